"""deconvolve: where the PSF's centre is, what lies beyond the borders, and kinds, types and layouts that come back."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.normal_inverse import NormalInverse
from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, MethodError, NonFiniteError, ShapeError
from lsconv.psf import motion

BOUNDARIES = ("unknown", "zero", "periodic", "reflect")


def blurred_by_definition(field: np.ndarray, psf: np.ndarray, boundary: str) -> np.ndarray:
    """``y[i] = sum_j psf[j] x[i - j + c]``, c = size // 2, pixel by pixel; "unknown": x's inner pixels only."""
    centre = [size // 2 for size in psf.shape]
    first = [(size - 1) // 2 if boundary == "unknown" else 0 for size in psf.shape]
    sizes = [n - k + 1 if boundary == "unknown" else n for n, k in zip(field.shape, psf.shape, strict=True)]
    y = np.zeros(sizes)
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*psf.shape):
            read = [i + f - j + c for i, f, j, c in zip(place, first, tap, centre, strict=True)]
            if boundary == "periodic":
                read = [r % n for r, n in zip(read, field.shape, strict=True)]
            elif boundary == "reflect":
                read = [n - 1 - abs(n - 1 - abs(r)) for r, n in zip(read, field.shape, strict=True)]
            elif any(not 0 <= r < n for r, n in zip(read, field.shape, strict=True)):
                continue
            y[place] += psf[tap] * field[tuple(read)]
    return y


def asymmetric(*shape: int) -> np.ndarray:
    """A PSF with a strong centre at size // 2 (so that it can be inverted) and no symmetry, sum one."""
    rng = np.random.default_rng(4)
    psf = rng.random(shape)
    psf[tuple(size // 2 for size in shape)] += psf.size
    return psf / psf.sum()


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (1, 4), (5,), (2, 3, 2)])
def test_the_blur_is_the_true_convolution_about_pixel_size_over_two(boundary: str, shape: tuple[int, ...]) -> None:
    psf = asymmetric(*shape)
    field = np.random.default_rng(0).random((9, 10, 7)[: len(shape)])
    expected = blurred_by_definition(field, psf, boundary)
    A = lsconv.blur_operator(torch.from_numpy(psf), expected.shape, boundary=boundary)
    assert A.in_shape == (1, *field.shape)
    assert torch.allclose(A(torch.from_numpy(field)[None])[0], torch.from_numpy(expected), atol=1e-14)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (3, 4)])
def test_a_centred_delta_is_the_identity_even_where_the_psf_is_even(boundary: str, shape: tuple[int, int]) -> None:
    psf = np.zeros(shape)
    psf[shape[0] // 2, shape[1] // 2] = 1.0
    image = np.random.default_rng(0).random((12, 11))
    x = lsconv.deconvolve(image, psf, boundary=boundary, damp=1e-7).x
    assert np.abs(x - image).max() < 1e-10


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (2, 2)])
@pytest.mark.parametrize(("prior", "damp"), [("gradient", 1e-4), ("tikhonov", 1e-7)])
def test_a_restored_picture_is_where_the_scene_was(
    boundary: str, shape: tuple[int, int], prior: str, damp: float
) -> None:
    psf = asymmetric(*shape)
    scene = np.random.default_rng(1).random((20, 21))
    image = blurred_by_definition(scene, psf, boundary)
    x = lsconv.deconvolve(image, psf, boundary=boundary, prior=prior, damp=damp).x
    assert x.shape == image.shape
    first = [(k - 1) // 2 if boundary == "unknown" else 0 for k in shape]
    expected = scene[first[0] : first[0] + x.shape[0], first[1] : first[1] + x.shape[1]]
    inner = (slice(4, -4),) * 2  # near an unknown border the data determine less
    assert np.abs(x - expected)[inner].max() < (1e-2 if boundary == "unknown" else 1e-5)
    shifts = {
        shift: np.abs(x - np.roll(expected, shift, (0, 1)))[inner].max()
        for shift in itertools.product((-1, 0, 1), repeat=2)
    }
    assert min(shifts, key=shifts.__getitem__) == (0, 0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("prior", ["tikhonov", "gradient"])
def test_the_answer_is_that_of_the_dense_normal_equations(boundary: str, prior: str) -> None:
    psf, damp = torch.from_numpy(asymmetric(3, 4)), 0.3
    image = torch.rand(8, 9, dtype=torch.float64)
    A = lsconv.blur_operator(psf, (8, 9), boundary=boundary)
    matrix = A.to_dense().reshape(72, -1)
    n = matrix.shape[1]
    height, width = A.spatial_in
    if prior == "tikhonov":
        L = torch.eye(n, dtype=torch.float64)
        start = torch.full((n,), float(image.mean()), dtype=torch.float64)  # psf sums to one
    else:
        cells = torch.eye(n, dtype=torch.float64).reshape(n, height, width)
        wrap = boundary == "periodic"
        down = torch.cat([cells[:, 1:], cells[:, :1] if wrap else cells[:, -1:]], 1) - cells
        right = torch.cat([cells[:, :, 1:], cells[:, :, :1] if wrap else cells[:, :, -1:]], 2) - cells
        L = torch.cat([down.reshape(n, -1), right.reshape(n, -1)], 1).T
        start = torch.zeros(n, dtype=torch.float64)
    rest = image.flatten() - matrix @ start
    expected = start + torch.linalg.solve(matrix.T @ matrix + damp**2 * L.T @ L, matrix.T @ rest)
    solution = lsconv.deconvolve(image, psf, boundary=boundary, damp=damp, prior=prior, crop=False, rtol=1e-12)
    assert torch.allclose(solution.x.flatten(), expected, atol=1e-8)


def test_crop_gives_the_pictures_part_of_the_field() -> None:
    image, psf = torch.rand(12, 13), torch.from_numpy(asymmetric(4, 5)).float()
    whole = lsconv.deconvolve(image, psf, damp=0.1, crop=False).x
    assert whole.shape == (15, 17)
    assert torch.equal(lsconv.deconvolve(image, psf, damp=0.1).x, whole[1:13, 2:15])


@pytest.mark.parametrize("damp", ["gcv", 0.1])
def test_numpy_is_answered_with_numpy_and_torch_with_torch(damp: Any) -> None:
    image, psf = np.random.default_rng(0).random((12, 12)), asymmetric(3, 3)
    in_numpy = lsconv.deconvolve(image, psf, damp=damp).x
    in_torch = lsconv.deconvolve(torch.from_numpy(image), torch.from_numpy(psf), damp=damp).x
    assert isinstance(in_numpy, np.ndarray)
    assert isinstance(in_torch, Tensor)
    assert in_numpy.dtype == np.float64
    assert np.array_equal(in_numpy, in_torch.numpy())


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "float16", "float32", "float64", ">u2"]
)
def test_numbers_keep_their_type_and_integers_are_rounded_and_cut_off(dtype: str) -> None:
    kind = np.dtype(dtype)
    image = np.random.default_rng(0).random((12, 12)) ** 0.1  # many pixels next to white: the answer overshoots
    stored = (image * np.iinfo(kind).max).astype(kind) if kind.kind in "iu" else image.astype(kind)
    x = lsconv.deconvolve(stored, asymmetric(3, 3), damp=1e-2).x
    assert x.dtype == kind.newbyteorder("=")
    scale = np.iinfo(kind).max if kind.kind in "iu" else 1
    exact = lsconv.deconvolve(stored.astype(np.float64) / scale, asymmetric(3, 3), damp=1e-2).x
    assert exact.max() > 1
    if kind.kind in "iu":
        expected = np.clip(np.rint(exact * scale), np.iinfo(kind).min, scale)
        assert np.abs(x.astype(np.float64) - expected).max() <= max(1, 1e-6 * scale)
        assert x.max() == scale
    else:
        assert np.abs(x - exact).max() < {2: 2e-3, 4: 1e-5, 8: 1e-12}[kind.itemsize]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.bfloat16])
def test_tensors_keep_their_type_too(dtype: torch.dtype) -> None:
    image = (torch.rand(12, 12) * 100).to(dtype)
    x = lsconv.deconvolve(image, torch.from_numpy(asymmetric(3, 3)), damp=1e-5, boundary="zero").x
    assert x.dtype == dtype
    back = lsconv.blur_operator(torch.from_numpy(asymmetric(3, 3)).float(), (12, 12), boundary="zero")(x.float()[None])
    assert (back[0] - image.float()).abs().max() < (8 if dtype is torch.bfloat16 else 50)


def test_layouts_are_the_same_problem() -> None:
    image, psf = torch.rand(2, 3, 12, 13, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    first = lsconv.deconvolve(image, psf, channels="first", damp=0.1)
    last = lsconv.deconvolve(image.movedim(1, -1), psf, channels="last", damp=0.1)
    alone = lsconv.deconvolve(image[1, 2], psf, damp=0.1)
    plain = lsconv.deconvolve(image, psf, damp=0.1)
    assert first.damp.shape == (2,)
    assert last.x.shape == (2, 12, 13, 3)
    assert torch.allclose(last.x.movedim(-1, 1), first.x, atol=1e-12)
    assert torch.allclose(first.x[1, 2], alone.x, atol=1e-9)
    assert torch.allclose(plain.x, first.x, atol=1e-9)
    assert plain.damp.shape == (2, 3)


def test_a_psf_per_channel_and_per_picture_are_so_many_problems() -> None:
    image = torch.rand(2, 3, 12, 13, dtype=torch.float64)
    psf = (
        torch.rand(2, 3, 3, 3, dtype=torch.float64)
        + 9 * torch.eye(3, dtype=torch.float64)[1, :, None] * torch.eye(3)[1]
    )
    psf = psf / psf.sum((-2, -1), keepdim=True)
    together = lsconv.deconvolve(image, psf, channels="first", ndim=2, damp=0.1).x
    by_picture = lsconv.deconvolve(image[:, 0], psf[:, 0], ndim=2, damp=0.1).x
    shared = lsconv.deconvolve(image, psf[:, :1], channels="first", ndim=2, damp=0.1).x
    for item, channel in itertools.product(range(2), range(3)):
        alone = lsconv.deconvolve(image[item, channel], psf[item, channel], damp=0.1).x
        assert torch.allclose(together[item, channel], alone, atol=1e-9)
    assert torch.allclose(by_picture, together[:, 0], atol=1e-9)
    assert torch.allclose(shared[:, 0], together[:, 0], atol=1e-9)


def test_stacks_and_lines_follow_the_psfs_axes() -> None:
    stack = torch.rand(7, 8, 9)
    psf = torch.from_numpy(asymmetric(2, 3, 3)).float()
    plane, line = psf[0] / psf[0].sum(), psf[0, 0] / psf[0, 0].sum()
    assert lsconv.deconvolve(stack, psf, damp=0.1).damp.shape == ()
    assert lsconv.deconvolve(stack, psf, damp=0.1, crop=False).x.shape == (8, 10, 11)
    assert lsconv.deconvolve(stack, plane, damp=0.1).damp.shape == (7,)
    assert lsconv.deconvolve(stack[0, 0], line, damp=0.1, crop=False).x.shape == (11,)


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_a_flat_picture_stays_flat_at_any_damp(prior: str) -> None:
    """The prior pulls to the mean, not to black, so damping alone darkens nothing, at unknown borders either."""
    image = torch.full((16, 16), 0.7, dtype=torch.float64)
    x = lsconv.deconvolve(image, torch.ones(5, 5, dtype=torch.float64) / 25, prior=prior, damp=10.0).x
    assert (x - 0.7).abs().max() < 1e-12


def test_damp_is_in_the_units_of_the_psf() -> None:
    image, psf = torch.rand(12, 12, dtype=torch.float64), torch.from_numpy(asymmetric(3, 3))
    x = lsconv.deconvolve(image, psf, damp=0.1).x
    assert torch.allclose(lsconv.deconvolve(image, 5 * psf, damp=0.5, normalize_psf=False).x * 5, x, atol=1e-10)


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_a_psf_of_sum_zero_is_served_with_the_mean_that_nothing_says_at_zero(prior: str) -> None:
    psf = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    solution = lsconv.deconvolve(
        torch.rand(8, 8, dtype=torch.float64), psf, prior=prior, damp=0.1, crop=False, normalize_psf=False
    )
    assert bool(solution.converged)
    assert abs(solution.x.mean()) < 1e-3 if prior == "gradient" else True


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_channels_under_one_psf_share_a_damp_and_the_certificates(prior: str) -> None:
    """Three colours are solved as data of one operator: the answer is that of three operators side by side."""
    scene, psf = torch.rand(2, 3, 14, 15, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    apart = torch.stack([psf, psf, psf * (1 + 1e-12)])  # equal to rounding, not to the last bit
    chosen = lsconv.deconvolve(scene, psf, channels="first", prior=prior)
    chosen_beside = lsconv.deconvolve(scene, apart, channels="first", ndim=2, prior=prior)
    assert chosen.damp.shape == chosen.converged.shape == chosen.selection.damp.shape == (2,)
    # the gradient's trace is stochastic, by other probes
    torch.testing.assert_close(chosen.damp, chosen_beside.damp, rtol=1e-6 if prior == "tikhonov" else 0.05, atol=0)
    together = lsconv.deconvolve(scene, psf, channels="first", prior=prior, damp=chosen.damp)
    beside = lsconv.deconvolve(scene, apart, channels="first", ndim=2, prior=prior, damp=chosen.damp)
    assert bool(together.converged.all())
    torch.testing.assert_close(together.x, beside.x, rtol=0, atol=1e-7)
    torch.testing.assert_close(together.residual_norm, beside.residual_norm, rtol=1e-6, atol=0)


def test_colour_costs_one_setup() -> None:
    """Every factor made for a colour picture is that of one channel, for the choice of damp and for the answer."""
    made: list[int] = []
    original = NormalInverse.__init__

    def counting(self: NormalInverse, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        made.append(self.embedding.blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NormalInverse, "__init__", counting)
        lsconv.deconvolve(torch.rand(3, 60, 61), torch.ones(3, 3) / 9, channels="first")
    assert made
    assert set(made) == {1}


def test_a_quadratic_denoiser_reaches_the_quadratic_answer() -> None:
    """The proximal operator of |z - m|^2 as the denoiser: ADMM must end at the dense solution for that penalty."""
    psf, image, damp = torch.from_numpy(asymmetric(3, 3)), torch.rand(8, 8, dtype=torch.float64), 0.5
    strength = 0.2

    def proximal(v: Tensor) -> Tensor:  # of strength |z|^2 at penalty damp^2 |z - v|^2
        return v * damp**2 / (strength + damp**2)

    matrix = lsconv.blur_operator(psf, (8, 8)).to_dense().reshape(64, 100)
    expected = torch.linalg.solve(
        matrix.T @ matrix + strength * torch.eye(100, dtype=torch.float64), matrix.T @ image.flatten()
    )
    solution = lsconv.deconvolve(image, psf, prior=proximal, damp=damp, crop=False, max_iter=200, rtol=1e-8)
    assert torch.allclose(solution.x.flatten(), expected, atol=1e-8)


def test_bounds_hold_with_a_denoiser() -> None:
    image = torch.rand(12, 12).round()
    x = lsconv.deconvolve(image, torch.ones(3, 3) / 9, prior=lambda v: 0.5 * v, damp=0.5, bounds=(0.0, 0.4)).x
    assert x.min() >= 0
    assert x.max() == pytest.approx(0.4)


def edges_and_slopes(size: int) -> Tensor:
    """A square, a disk and a slope: what total variation is for."""
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    disk = (row - 0.7 * size) ** 2 + (column - 0.6 * size) ** 2 < (0.2 * size) ** 2
    square = (row > 0.15 * size) & (row < 0.45 * size) & (column > 0.2 * size) & (column < 0.6 * size)
    return 0.2 + 0.3 * disk + 0.5 * square + 0.1 * row / size


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "known"), [(0.01, True), (0.01, False), (0.03, False)])
def test_the_automatic_weight_is_nearly_as_good_as_the_best(noise: float, known: bool) -> None:
    scene = edges_and_slopes(48).float()
    psf = torch.ones(5, 5) / 25
    image = lsconv.blur_operator(psf, (44, 44))(scene[None])[0]
    image = image + noise * torch.randn(image.shape)
    truth = scene[2:-2, 2:-2]

    def decibels(**options: Any) -> float:
        x = lsconv.deconvolve(image, psf, prior="tv", rtol=1e-3, **options).x
        return float(-10 * torch.log10(torch.mean((x - truth) ** 2)))

    automatic = decibels(noise_std=noise if known else None)
    best = max(decibels(weight=float(weight)) for weight in np.geomspace(0.1, 10, 9) * noise**1.5)
    assert automatic > best - 1.0


def test_total_variation_is_that_of_the_blur_operator_and_keeps_bounds() -> None:
    image, psf = torch.rand(14, 14, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    A = lsconv.blur_operator(psf, (14, 14), boundary="zero")
    expected = lsconv.total_variation(A, image[None], 0.02, bounds=(0.3, 0.6), rtol=1e-6).x[0]
    x = lsconv.deconvolve(image, psf, boundary="zero", prior="tv", weight=0.02, bounds=(0.3, 0.6), rtol=1e-6).x
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)  # the PSF is divided by its sum again
    assert x.min() >= 0.3
    assert x.max() <= 0.6


GOOD: dict[str, Any] = {"image": torch.rand(8, 8), "psf": torch.ones(3, 3) / 9, "damp": 0.1}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"psf": torch.ones(9, 3) / 27}, ShapeError, "psf: its size .9, 3. exceeds that of the image, .8, 8."),
        ({"psf": torch.ones(3, 3, 3)}, ShapeError, "image: expected 3 spatial axes"),
        ({"psf": torch.ones(1, 1, 3, 3)}, ShapeError, "psf: expected 1, 2 or 3 spatial axes"),
        ({"psf": torch.tensor(1.0)}, ShapeError, "psf: expected"),
        ({"psf": torch.ones(3, 3), "ndim": 3}, ShapeError, "ndim=3"),
        (
            {"psf": torch.ones(2, 3, 3), "ndim": 2, "channels": "first"},
            ShapeError,
            "image: expected 2 spatial axes and",
        ),
        ({"psf": torch.zeros(3, 3)}, ArgumentError, "psf: is zero"),
        ({"psf": torch.full((3, 3), torch.nan)}, NonFiniteError, "psf: contains NaN"),
        ({"psf": [[1.0]]}, ArgumentTypeError, "psf: expected a torch.Tensor or a NumPy array, got list"),
        ({"psf": torch.ones(3, 3, dtype=torch.complex64)}, DtypeError, "psf: expected real"),
        ({"image": torch.full((8, 8), torch.inf)}, NonFiniteError, "image: contains infinity; missing pixels are NaN"),
        ({"image": torch.full((8, 8), torch.nan)}, NonFiniteError, "image: has no measured pixel"),
        ({"psf": -torch.ones(3, 3) / 9}, ArgumentError, "psf: its values sum to -1"),
        ({"origin": "middle"}, ArgumentError, "origin: expected"),
        ({"origin": (1, 3)}, ArgumentError, "origin: .1, 3. is no pixel"),
        ({"origin": (1,)}, ShapeError, "origin: expected 2 integers"),
        ({"noise": "shot"}, ArgumentError, "noise: expected"),
        ({"noise": "poisson", "noise_std": 1.0}, ArgumentError, "read_noise"),
        ({"noise": "poisson", "gain": 0.0}, ArgumentError, "gain: expected numbers > 0"),
        ({"noise": "poisson", "background": -1.0}, ArgumentError, "background: expected numbers >= 0"),
        ({"noise": "poisson", "image": -torch.ones(8, 8)}, ArgumentError, "image: counts must be >= 0"),
        ({"noise": "poisson", "prior": lambda v: v}, MethodError, "prior: a denoiser"),
        ({"noise": "poisson", "huber": 1.0}, TypeError, "huber: Poisson noise takes no such option"),
        ({"gain": 2.0}, ArgumentError, "gain"),
        ({"background": torch.ones(3, 5)}, ShapeError, "background: expected a number, or a map"),
        ({"background": "dark"}, ArgumentTypeError, "background"),
        ({"noise_std": 5.0, "damp": "upre"}, ArgumentError, "noise_std: 5 is no less than the range of the image"),
        ({"bounds": (2, 3)}, ArgumentError, "bounds: .2, 3. hold 0 % of the image"),
        ({"bounds": (3, 2)}, ArgumentError, "bounds: the lowest"),
        ({"image": torch.ones(0, 8)}, ShapeError, "image: is empty"),
        ({"image": "a.png"}, ArgumentTypeError, "image: expected"),
        ({"damp": -1.0}, ArgumentError, "damp"),
        ({"damp": "guess"}, ArgumentError, "damp"),
        ({"boundary": "mirror"}, ArgumentError, "boundary: expected one of 'unknown', 'zero'"),
        ({"prior": "ridge"}, ArgumentError, "prior: expected"),
        ({"channels": "middle"}, ArgumentError, "channels: expected"),
        ({"prior": lambda v: v[..., 1:]}, ShapeError, "denoiser"),
        ({"nonsense": 1}, ArgumentTypeError, "nonsense: .*boundary, damp, prior.*memory_limit"),
        ({"L": None}, ArgumentTypeError, "L: a quadratic prior takes no such option"),
        ({"prior": lambda v: v, "x0": 1}, ArgumentTypeError, "x0: a denoiser takes no such option"),
        ({"prior": "tv"}, ArgumentError, 'damp: .*prior="tv" has weight='),
        ({"prior": "tv", "damp": -1}, ArgumentError, 'damp: .*prior="tv" has weight='),
        ({"prior": "tv", "damp": "gcv"}, ArgumentError, 'damp: .*prior="tv" has weight='),
        ({"prior": "tv", "noise": "poisson"}, ArgumentError, 'damp: .*prior="tv" has weight='),
        ({"weight": 0.5}, ArgumentError, 'weight: is of prior="tv"; the other priors have damp='),
        ({"weight": 0.5, "prior": lambda v: v}, ArgumentError, 'weight: is of prior="tv"'),
        ({"noise_std": 0.0, "prior": "tv", "damp": "auto"}, ArgumentError, "noise_std: expected positive .*weight="),
        ({"noise_std": 0.0, "damp": "auto"}, ArgumentError, "noise_std: expected positive numbers, got 0.0"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {**GOOD, **change}
    with pytest.raises(error, match=says):
        lsconv.deconvolve(given.pop("image"), given.pop("psf"), **given)


def test_damp_is_chosen_by_upre_where_the_noise_is_a_number_and_by_gcv_elsewhere() -> None:
    image, psf = torch.rand(16, 16, dtype=torch.float64), torch.from_numpy(asymmetric(3, 3))
    a_map = torch.linspace(0.05, 0.1, 16, dtype=torch.float64).expand(16, 16)
    for rule, given in [("gcv", {}), ("upre", {"noise_std": 0.1}), ("gcv", {"noise_std": a_map})]:
        chosen = lsconv.deconvolve(image, psf, **given)
        assert chosen.selection is not None
        assert chosen.selection.rule == rule
        assert torch.equal(chosen.x, lsconv.deconvolve(image, psf, damp=rule, **given).x)
        denoised = lsconv.deconvolve(image, psf, prior=lambda v: 0.9 * v, max_iter=500, **given)
        assert bool(denoised.converged)


@pytest.mark.parametrize("options", [{"damp": 0.1}, {"damp": 0.1, "noise": "poisson"}, {"prior": "tv"}])
def test_options_of_the_solver_that_are_none_are_its_defaults(options: dict[str, Any]) -> None:
    image, psf = torch.rand(10, 10), torch.ones(3, 3) / 9
    x = lsconv.deconvolve(image, psf, max_iter=None, rtol=None, x0=None, **options).x
    assert torch.equal(x, lsconv.deconvolve(image, psf, **options).x)


@pytest.mark.slow
@pytest.mark.parametrize("noise_std", [0.0, 1e-4])
def test_a_damp_chosen_under_motion_is_one_that_the_solve_converges_at(noise_std: float) -> None:
    """Without noise the choice is next to nothing, and the border system at its hardest."""
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (114, 124))
    scene = 0.5 + 0.3 * torch.sin(6 * rows[:, None] * columns + columns) + 0.1 * rows[:, None]
    psf = torch.as_tensor(motion(15, 45), dtype=torch.float64)
    image = lsconv.blur_operator(psf, (102, 112))(scene[None])[0]
    image = image + noise_std * torch.randn(
        image.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    solution = lsconv.deconvolve(image.float(), psf.float())
    assert bool(solution.converged)
    assert float(solution.damp) < (1e-5 if noise_std == 0 else 0.2)


@pytest.mark.parametrize("margins", [((4, 4), (3, 3)), ((5, 3), (0, 6))])
@pytest.mark.parametrize("boundary", ["unknown", "zero", "reflect", "periodic"])
@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_zeros_around_the_psf_change_nothing_but_its_centre(
    margins: tuple[tuple[int, int], ...], boundary: str, prior: str
) -> None:
    if (boundary, prior) == ("reflect", "gradient"):
        pytest.skip("LSMR stagnates there above its tolerance, with margins and without")
    generator = torch.Generator().manual_seed(0)
    psf = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    psf = psf / psf.sum()
    image = torch.rand(20, 21, generator=generator, dtype=torch.float64)
    wide = torch.nn.functional.pad(psf, [*margins[1], *margins[0]])
    options: dict[str, Any] = {"boundary": boundary, "prior": prior, "rtol": 1e-8}
    found = lsconv.deconvolve(image, wide, damp=0.1, **options)
    shifts = [(k - 1) // 2 - ((w - 1) // 2 - m[0]) for k, w, m in zip(psf.shape, wide.shape, margins, strict=True)]
    if shifts == [0, 0]:
        torch.testing.assert_close(found.x, lsconv.deconvolve(image, psf, damp=0.1, **options).x)
    with_weight = lsconv.deconvolve(image, wide.requires_grad_(), damp=0.1, **options)  # it is not trimmed
    assert with_weight.x.shape == found.x.shape
    if boundary != "unknown" or prior == "tikhonov":
        torch.testing.assert_close(found.x, with_weight.x.detach(), rtol=1e-5, atol=1e-5)
    # the sum alone is that of the image, whatever the PSF
    (with_weight.x * torch.rand(with_weight.x.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert wide.grad is not None
    assert wide.grad.shape == wide.shape
    assert float(wide.grad[0, 0].abs()) > 0


def test_without_crop_the_field_is_that_of_the_psf_as_given() -> None:
    psf = torch.zeros(9, 11)
    psf[4, 4:7] = 1 / 3
    assert lsconv.deconvolve(torch.rand(20, 21), psf, damp=0.1, crop=False).x.shape == (28, 31)


# ------------------------------------------------------------------ units, missing pixels, origins


def gaussian_psf(size: int = 7, sigma: float = 1.2) -> np.ndarray:
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    psf = np.outer(line, line)
    return psf / psf.sum()


def camera_scene() -> np.ndarray:
    """Blocks between 0 and 100 grey levels, and their blur."""
    return np.kron(np.random.default_rng(0).uniform(0, 100, (6, 6)), np.ones((6, 6)))


def blurred_camera() -> np.ndarray:
    field = torch.from_numpy(np.pad(camera_scene(), 3, mode="edge"))
    return lsconv.blur_operator(torch.from_numpy(gaussian_psf()), (36, 36))(field[None])[0].numpy()


IN_GREY_LEVELS: list[dict[str, Any]] = [
    {"prior": "tv", "weight": 1.0, "bounds": (0, 60)},
    {"damp": "upre", "noise_std": 2.0},
    {"damp": 0.1, "background": 20.0},
    {"noise": "poisson", "damp": 0.05, "gain": 2.0, "offset": 5.0, "read_noise": 1.0},
]


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *itertools.product(IN_GREY_LEVELS, ["uint8", "int16", ">u2", "uint32", "int64", "uint64"]),
        pytest.param({"prior": "tv", "noise": "poisson", "background": 20.0}, "uint8", marks=pytest.mark.slow),
    ],
)
def test_an_integer_image_means_what_the_same_numbers_as_floats_mean(options: dict[str, Any], dtype: str) -> None:
    image = (20 + blurred_camera() + 2 * np.random.default_rng(1).standard_normal((36, 36))).round()
    found = lsconv.deconvolve(image.astype(dtype), gaussian_psf(), **options).x
    same = image.astype("float64" if np.dtype(dtype).itemsize > 2 else "float32")
    expected = lsconv.deconvolve(same, gaussian_psf(), **options).x
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    # the certificates of float32 allow two thousandths
    assert np.abs(found.astype(float) - expected.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)).max() < 1.5


def test_bool_and_float16_images_are_numbers() -> None:
    square = np.zeros((20, 20), bool)
    square[5:15, 6:12] = True
    x = lsconv.deconvolve(square, gaussian_psf(3), damp=0.1).x
    assert x.dtype == np.float32
    assert np.array_equal(x, lsconv.deconvolve(square.astype(np.float32), gaussian_psf(3), damp=0.1).x)
    assert len(np.unique(x)) > 2
    assert lsconv.deconvolve(torch.from_numpy(square), gaussian_psf(3), damp=0.1).x.dtype == torch.float32
    half = np.random.default_rng(0).random((12, 12)).astype(np.float16)
    x = lsconv.deconvolve(half, gaussian_psf(3), damp=0.1).x
    assert x.dtype == np.float16
    assert np.abs(x - lsconv.deconvolve(half.astype(np.float32), gaussian_psf(3), damp=0.1).x).max() < 2e-3


def test_a_psf_off_sum_one_is_divided_by_its_sum_with_a_word() -> None:
    image, psf = np.random.default_rng(0).random((16, 16)), gaussian_psf(5)
    with pytest.warns(lsconv.InputWarning, match="sum to 250"):
        x = lsconv.deconvolve(image, 250 * psf, damp=0.1).x
    assert np.allclose(x, lsconv.deconvolve(image, psf, damp=0.1).x, atol=1e-10)
    assert np.allclose(lsconv.deconvolve(image, 1.009 * psf, damp=0.1).x, x, atol=1e-10)  # within 1 %: no word


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("origin", [(0, 0), (2, 4), "peak", "centroid"])
def test_the_origin_moves_the_answer_and_nothing_else(boundary: str, origin: Any) -> None:
    """A delta at the origin is the identity; so the answer under a PSF stays where its origin is."""
    psf = np.zeros((3, 5))
    place = origin if isinstance(origin, tuple) else (1, 3)
    psf[place] = 1
    image = torch.rand(9, 10, dtype=torch.float64)
    A = lsconv.blur_operator(torch.from_numpy(psf), (9, 10), boundary=boundary, origin=origin)
    assert torch.allclose(lsconv.deconvolve(image, torch.from_numpy(psf), boundary=boundary, origin=origin,
                                            damp=1e-6, prior="tikhonov").x, image, atol=1e-8)  # fmt: skip
    assert A.out_shape == (1, 9, 10)


def test_a_causal_response_as_long_as_the_record_is_inverted() -> None:
    s = np.arange(60.0)
    response = s**3 * np.exp(-s / 1.5)
    response /= response.sum()
    truth = np.exp(-s / 6)
    record = np.convolve(response, truth)[:60]
    x = lsconv.deconvolve(record, response, boundary="zero", origin=(0,), damp=1e-4).x
    assert np.linalg.norm(x - truth)[()] < 0.2 * np.linalg.norm(truth)
    centred = np.concatenate([np.zeros(59), response])
    assert np.allclose(x, lsconv.deconvolve(record, centred, boundary="zero", damp=1e-4).x, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 40, 3), (2, 48, 40, 3)])
def test_three_values_a_pixel_are_colours(shape: tuple[int, ...]) -> None:
    image, psf = np.random.default_rng(0).random(shape), gaussian_psf(3)
    x = lsconv.deconvolve(image, psf, damp=0.1).x
    assert np.array_equal(x, lsconv.deconvolve(image, psf, damp=0.1, channels="last").x)


@pytest.mark.parametrize(("image", "psf"), [((40, 40, 4), (5, 5)), ((6, 40, 40), (6, 5, 5)), ((40, 40, 3), (3, 5, 5))])
def test_shapes_that_can_be_read_in_two_ways_are_refused(image: tuple[int, ...], psf: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"channels=.*ndim|ndim.*channels="):
        lsconv.deconvolve(np.ones(image), np.ones(psf) / np.prod(psf))


@pytest.mark.parametrize(
    "options",
    [
        {"damp": 0.1},
        {"damp": 0.1, "bounds": (0.2, 0.8)},
        {"prior": "tv", "weight": 0.01, "rtol": 1e-5},
        {"noise": "poisson", "damp": 0.3, "rtol": 1e-5},
    ],
)
def test_missing_pixels_have_no_say_whatever_stands_there(options: dict[str, Any]) -> None:
    """Their values change nothing, and outside their reach the answer is that of the whole image."""
    image, psf = np.random.default_rng(0).random((20, 20)), gaussian_psf(3)
    mask = np.zeros((20, 20), bool)
    mask[3:5, 3:6] = True
    with pytest.warns(lsconv.InputWarning, match="6 of 400 pixels are NaN or masked"):
        missing = lsconv.deconvolve(np.where(mask, np.nan, image), psf, **options)
    with pytest.warns(lsconv.InputWarning):
        masked = lsconv.deconvolve(np.ma.masked_array(image, mask), psf, **options)
    assert bool(missing.converged)
    assert np.isfinite(missing.x).all()
    assert np.array_equal(missing.x, masked.x)
    whole = lsconv.deconvolve(image, psf, **options).x
    assert np.abs(missing.x - whole)[14:, 14:].max() < 0.02
    assert np.abs(missing.x - whole)[3:5, 3:6].max() > 0.02


def test_a_map_of_noise_weighs_every_pixel_and_one_of_background_is_subtracted() -> None:
    rng = np.random.default_rng(0)
    image, psf = rng.random((12, 12)), torch.from_numpy(gaussian_psf(3))
    sigma, background = 0.1 + rng.random((12, 12)), rng.random((12, 12))
    A = lsconv.blur_operator(psf, (12, 12))
    weights = float(torch.from_numpy(sigma).median()) / sigma
    D, G = A.to_dense(), lsconv.Gradient(A.in_shape, dtype=torch.float64).to_dense()
    W = torch.from_numpy(weights).flatten()[:, None]
    rows = torch.cat([W * D, 0.3 * G])
    data = torch.cat([W[:, 0] * torch.from_numpy(image - background).flatten(), torch.zeros(len(G))])
    expected = torch.linalg.lstsq(rows, data[:, None], driver="gelsd").solution.reshape(14, 14)[1:-1, 1:-1]
    x = lsconv.deconvolve(image, psf.numpy(), damp=0.3, noise_std=sigma, background=background, rtol=1e-9).x
    assert np.abs(x - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_bounds_of_a_quadratic_prior_hold_and_are_optimal(prior: str) -> None:
    from scipy.optimize import lsq_linear

    image, psf = np.random.default_rng(0).random((8, 8)), torch.from_numpy(gaussian_psf(3))
    A = lsconv.blur_operator(psf, (8, 8))
    L = lsconv.Gradient(A.in_shape, dtype=torch.float64) if prior == "gradient" else lsconv.Identity(A.in_shape)
    G = L.to_dense().double()
    level = torch.full((A.in_numel,), image.mean(), dtype=torch.float64)
    rows, data = torch.cat([A.to_dense(), 0.2 * G]), torch.cat([torch.from_numpy(image).flatten(), 0.2 * G @ level])
    expected = lsq_linear(rows.numpy(), data.numpy(), (0.3, 0.7), tol=1e-14, max_iter=500).x
    solution = lsconv.deconvolve(image, psf.numpy(), prior=prior, damp=0.2, bounds=(0.3, 0.7), crop=False)
    assert bool(solution.converged)
    assert np.abs(solution.x.flatten() - expected).max() < 1e-6
