"""deconvolve: where a restored picture is, its priors and bounds, and arguments that do not fit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, MethodError, NonFiniteError, ShapeError
from tests.inverse.images.pictures import BOUNDARIES, asymmetric, blurred_by_definition

GOOD: dict[str, Any] = {"image": torch.rand(8, 8), "psf": torch.ones(3, 3) / 9, "damp": 0.1}


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


def test_crop_gives_the_pictures_part_of_the_field() -> None:
    image, psf = torch.rand(12, 13), torch.from_numpy(asymmetric(4, 5)).float()
    whole = lsconv.deconvolve(image, psf, damp=0.1, crop=False).x
    assert whole.shape == (15, 17)
    assert torch.equal(lsconv.deconvolve(image, psf, damp=0.1).x, whole[1:13, 2:15])


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


def test_total_variation_is_that_of_the_blur_operator_and_keeps_bounds() -> None:
    image, psf = torch.rand(14, 14, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    A = lsconv.blur_operator(psf, (14, 14), boundary="zero")
    expected = lsconv.total_variation(A, image[None], 0.02, bounds=(0.3, 0.6), rtol=1e-6).x[0]
    x = lsconv.deconvolve(image, psf, boundary="zero", prior="tv", weight=0.02, bounds=(0.3, 0.6), rtol=1e-6).x
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-9)  # the PSF is divided by its sum again
    assert x.min() >= 0.3
    assert x.max() <= 0.6


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
def test_an_argument_that_does_not_fit_is_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    given = {**GOOD, **change}
    with pytest.raises(error, match=says):
        lsconv.deconvolve(given.pop("image"), given.pop("psf"), **given)


@pytest.mark.parametrize("options", [{"damp": 0.1}, {"damp": 0.1, "noise": "poisson"}, {"prior": "tv"}])
def test_options_of_the_solver_that_are_none_are_its_defaults(options: dict[str, Any]) -> None:
    image, psf = torch.rand(10, 10), torch.ones(3, 3) / 9
    x = lsconv.deconvolve(image, psf, max_iter=None, rtol=None, x0=None, **options).x
    assert torch.equal(x, lsconv.deconvolve(image, psf, **options).x)
