"""Point spread functions: sum, symmetry, centre, derivatives, and closed forms and fine quadratures to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scipy.special
import torch
from torch import Tensor

import lsconv
from lsconv import psf

MAKERS: dict[str, Callable[[], Tensor]] = {
    "gaussian 0.3": lambda: psf.gaussian(0.3),
    "gaussian 2.5": lambda: psf.gaussian(2.5),
    "disk 0.2": lambda: psf.disk(0.2),
    "disk 1": lambda: psf.disk(1.0),
    "disk 4.3": lambda: psf.disk(4.3),
    "motion 0": lambda: psf.motion(0, 12),
    "motion 7": lambda: psf.motion(7, 0),
    "motion 10.5 at 30": lambda: psf.motion(10.5, 30),
    "motion 9 at 90": lambda: psf.motion(9, 90),
    "motion 9 at -135": lambda: psf.motion(9, -135),
    "gaussian 3 by 1 at 20": lambda: psf.gaussian([3.0, 1.0], 20),
    "moffat": lambda: psf.moffat(3.0, 2.5),
    "airy": lambda: psf.airy(0.5, 0.9, 0.1),
    "disk in micrometres": lambda: psf.disk(0.9, spacing=[0.2, 0.3]),
    "motion in micrometres": lambda: psf.motion(2.0, 70, spacing=[0.2, 0.3]),
    "box 1": lambda: psf.box(1),
    "box 5": lambda: psf.box(5),
    "box 4": lambda: psf.box(4),
}


@pytest.mark.parametrize("name", MAKERS)
def test_light_is_kept_and_nothing_is_negative(name: str) -> None:
    made = MAKERS[name]()
    assert made.dtype == torch.float64
    assert abs(float(made.sum()) - 1) < 1e-12
    assert made.min() >= 0


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "box 4"])
def test_a_psf_is_its_own_mirror_image_about_pixel_size_over_two(name: str) -> None:
    made = MAKERS[name]()
    assert all(size % 2 == 1 for size in made.shape)
    assert torch.allclose(made, made.flip(0, 1), atol=1e-12)
    places = [torch.arange(size, dtype=torch.float64) - size // 2 for size in made.shape]
    assert abs(float((made.sum(1) * places[0]).sum())) < 1e-12
    assert abs(float((made.sum(0) * places[1]).sum())) < 1e-12


@pytest.mark.parametrize("name", ["gaussian 2.5", "disk 4.3", "disk 1", "box 5"])
def test_round_and_square_ones_look_the_same_along_rows_and_columns(name: str) -> None:
    made = MAKERS[name]()
    assert torch.allclose(made, made.T, atol=1e-14)


@pytest.mark.parametrize("sigma", [1.0, 2.5])
def test_a_gaussians_variance_is_sigma_squared(sigma: float) -> None:
    made = psf.gaussian(sigma)
    place = torch.arange(len(made), dtype=torch.float64) - len(made) // 2
    assert abs(float((made.sum(0) * place**2).sum()) / sigma**2 - 1) < 2e-3  # cut off at four sigma


@pytest.mark.parametrize(
    "radius, spacing", [(1.0, (1.0, 1.0)), (2.5, (1.0, 1.0)), (4.3, (1.0, 1.0)), (2.0, (0.5, 0.8))]
)
def test_a_disks_pixels_have_the_area_inside_the_circle(radius: float, spacing: tuple[float, float]) -> None:
    """Against the chords of the circle in 4000 columns of every pixel, cut at the pixel's ends."""
    made = psf.disk(radius, spacing=spacing) * math.pi * radius**2
    rows, columns = (step * (torch.arange(n, dtype=torch.float64) - n // 2)
                     for n, step in zip(made.shape, spacing, strict=True))  # fmt: skip
    across = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 - 0.5
    chord = (radius**2 - (columns[:, None] + spacing[1] * across) ** 2).clamp_min(0).sqrt()
    low, high = rows[:, None, None] - spacing[0] / 2, rows[:, None, None] + spacing[0] / 2
    counted = (torch.minimum(chord, high) - torch.maximum(-chord, low)).clamp_min(0).mean(-1) * spacing[1]
    assert (made - counted).abs().max() < 1e-5
    assert made[0].max() > 0


@pytest.mark.parametrize("length, angle", [(9.0, 30.0), (4.0, 90.0), (6.3, -70.0), (0.7, 45.0)])
def test_a_motion_is_the_line_shared_among_pixels(length: float, angle: float) -> None:
    made = psf.motion(length, angle)
    moment = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 - 0.5
    ways = (-length * math.sin(math.radians(angle)), length * math.cos(math.radians(angle)))
    hats = [(1 - (way * moment - (torch.arange(n) - n // 2)[:, None]).abs()).clamp_min(0)
            for way, n in zip(ways, made.shape, strict=True)]  # fmt: skip
    assert (made - hats[0] @ hats[1].T / len(moment)).abs().max() < 1e-8


def test_a_turned_gaussian_has_the_covariance_of_its_axes() -> None:
    made = psf.gaussian([3.0, 1.5], 20, size=61)
    place = torch.arange(61, dtype=torch.float64) - 30
    # up and right are positive; the long axis was vertical and is turned to the left
    cosine, sine = math.cos(math.radians(20)), math.sin(math.radians(20))
    assert abs(float((made.sum(1) * place**2).sum()) - (9 * cosine**2 + 2.25 * sine**2)) < 1e-9
    assert abs(float((made * place[:, None] * place).sum()) - (9 - 2.25) * cosine * sine) < 1e-9


def test_a_stacks_gaussian_is_the_product_of_its_axes() -> None:
    made = psf.gaussian([2.0, 1.0, 0.5], spacing=[1.0, 0.5, 0.5])
    lines = [psf.gaussian([sigma]) for sigma in (2.0, 2.0, 1.0)]
    assert torch.allclose(made, torch.einsum("i,j,k->ijk", *lines), rtol=1e-12)


def test_a_moffats_width_at_half_maximum_is_its_fwhm() -> None:
    made = psf.moffat(5.0, 2.5, spacing=0.5)
    centre = len(made) // 2
    assert abs(float(made[centre, centre + 5] / made[centre, centre]) - 0.5) < 1e-12
    assert abs(float(made[centre, centre + 10] / made[centre, centre]) - (1 + 4 * (2**0.4 - 1)) ** -2.5) < 1e-12


@pytest.mark.parametrize("na", [0.3, 1.2])
def test_an_airy_disk_is_that_of_the_bessel_function(na: float) -> None:
    made = psf.airy(0.5, na, 0.02, size=151)
    place = 0.02 * (torch.arange(151, dtype=torch.float64) - 75)
    v = 2 * math.pi * na / 0.5 * (place[:, None] ** 2 + place**2).sqrt()
    exact = torch.where(v > 0, (2 * torch.from_numpy(scipy.special.j1(v.numpy())) / v) ** 2, 1)
    exact[75, 75] = 1
    assert (made / made[75, 75] - exact).abs().max() < 1e-13


SMOOTH: dict[str, tuple[Callable[..., Tensor], list[Any]]] = {
    "gaussian": (lambda sigma: psf.gaussian(sigma, size=9), [1.3]),
    "gaussian turned": (lambda sigma, angle: psf.gaussian(sigma, angle, size=9), [[1.3, 0.8], 25.0]),
    "gaussian of a stack": (lambda sigma: psf.gaussian(sigma, size=5), [[0.9, 1.3, 0.8]]),
    "disk": (lambda radius: psf.disk(radius, size=9), [2.3]),
    "motion": (lambda length, angle: psf.motion(length, angle, size=9), [6.3, 27.0]),
    "moffat": (lambda fwhm, beta: psf.moffat(fwhm, beta, size=9), [2.5, 3.0]),
    "airy": (lambda wavelength, na: psf.airy(wavelength, na, 0.1, size=9), [0.5, 1.1]),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_by_the_parameters_are_right_once_and_again(name: str) -> None:
    function, values = SMOOTH[name]
    parameters = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    assert torch.autograd.gradcheck(function, parameters, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, parameters, fast_mode=True)


def test_a_psf_has_the_type_of_its_parameter_and_the_size_that_is_asked_for() -> None:
    made = psf.motion(torch.tensor(3.0), 10, size=(5, 8))
    assert (made.dtype, made.shape) == (torch.float32, (5, 8))
    whole = psf.disk(2.5)
    assert torch.allclose(psf.disk(2.5, size=9)[2:-2, 2:-2][:5, :5], whole)  # a larger array adds zeros only
    assert psf.disk(2.5, size=6)[3, 3] == whole[2, 2]


def test_a_motions_ends_get_half_the_light_and_angles_turn_it_counter_clockwise() -> None:
    along = torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125], dtype=torch.float64)
    assert torch.allclose(psf.motion(4, 0), along[None], atol=1e-12)
    assert torch.allclose(psf.motion(4, 90), along[:, None], atol=1e-12)
    rising = psf.motion(8, 45)  # towards the upper right: row 0 is the top
    assert rising[0, -1] > 0
    assert rising[0, 0] == 0
    assert torch.allclose(psf.motion(8, -45), rising.flip(0), atol=1e-12)


def test_a_motions_second_moment_is_that_of_the_line() -> None:
    length, angle = 21.0, 25.0
    made = psf.motion(length, angle)
    across = torch.arange(made.shape[1], dtype=torch.float64) - made.shape[1] // 2
    line = (length * math.cos(math.radians(angle))) ** 2 / 12
    spread = float((made.sum(0) * across**2).sum()) - line  # sharing among pixels adds at most 1/4
    assert 0 <= spread <= 0.25


@pytest.mark.parametrize(
    "make",
    [
        lambda: psf.gaussian(0.0),
        lambda: psf.gaussian(math.nan),
        lambda: psf.disk(-1.0),
        lambda: psf.motion(-1, 0),
        lambda: psf.motion(3, math.inf),
        lambda: psf.gaussian([1.0, 2.0, 3.0, 4.0]),
        lambda: psf.gaussian([1.0, 2.0, 3.0], 10),
        lambda: psf.disk(2.0, spacing=0.0),
        lambda: psf.disk(2.0, size=(3, 0)),
        lambda: psf.moffat(2.0, 1.0),
        lambda: psf.airy(0.5, 0.0, 0.1),
        lambda: psf.box(0),
        lambda: psf.box(2.5),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_make_no_sense_are_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(lsconv.ArgumentError, match=r"expected|turns"):
        make()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("radius", lambda: psf.disk("wide")),  # type: ignore[arg-type]
        ("length", lambda: psf.motion(torch.ones(2))),
        ("beta", lambda: psf.moffat(3.0, [4.0])),  # type: ignore[arg-type]
        ("na", lambda: psf.airy(0.5, torch.tensor(1), 0.1)),
    ],
)
def test_an_error_names_the_argument(name: str, make: Callable[[], Tensor]) -> None:
    with pytest.raises((lsconv.ArgumentError, lsconv.ArgumentTypeError), match=f"^{name}: expected a number or a"):
        make()
