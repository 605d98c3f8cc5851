"""Point spread functions: their sum, their symmetry, their centre, and closed forms to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lsconv.app import psf

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


@pytest.mark.parametrize("radius", [1.0, 2.5, 4.3])
def test_a_disks_pixels_are_as_bright_as_the_part_inside_the_circle(radius: float) -> None:
    made = psf.disk(radius) * math.pi * radius**2
    reach = len(made) // 2
    fine = (torch.arange(len(made) * 100, dtype=torch.float64) + 0.5) / 100 - 0.5 - reach
    inside = (fine[:, None] ** 2 + fine**2 <= radius**2).double()
    counted = inside.reshape(len(made), 100, len(made), 100).mean((1, 3))
    assert (made - counted).abs().max() < 2e-3
    assert made[0].max() > 0


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
        lambda: psf.box(0),
        lambda: psf.box(2.5),  # type: ignore[arg-type]
    ],
)
def test_sizes_that_make_no_sense_are_refused(make: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()
