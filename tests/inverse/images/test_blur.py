"""The blur of an image by PSFs that vary, and its restoration, beside that by one PSF."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import lsconv

F64 = torch.float64
POSITIONS = torch.tensor(list(itertools.product((8.0, 32.0), (8.0, 26.0))), dtype=F64)


def psfs() -> torch.Tensor:
    """Gaussians of growing width, shifted, so that a flip would be seen."""
    places = torch.arange(7, dtype=F64) - 3
    found = []
    for k in range(4):
        rows, columns = (torch.exp(-0.5 * ((places - shift) / (0.6 + 0.4 * k)) ** 2) for shift in (0.3, -0.4))
        found.append(rows[:, None] * columns)
    stack = torch.stack(found)
    return stack / stack.sum((1, 2), keepdim=True)


@pytest.mark.parametrize("boundary", ["unknown", "zero", "periodic", "reflect"])
def test_at_each_position_it_is_the_blur_by_the_psf_there(boundary: str) -> None:
    A = lsconv.blur_operator(psfs(), (40, 34), boundary=boundary, channels=2, positions=POSITIONS)
    x = torch.randn(A.in_shape, dtype=F64)
    y = A(x)
    for psf, (row, column) in zip(psfs(), POSITIONS.int().tolist(), strict=True):
        alone = lsconv.blur_operator(psf, (40, 34), boundary=boundary, channels=2)(x)
        torch.testing.assert_close(y[:, row, column], alone[:, row, column])


def scene() -> torch.Tensor:
    coarse = torch.rand(1, 2, 9, 9, dtype=F64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(46, 40), mode="nearest")[0]


@pytest.mark.parametrize(
    "prior, options", [pytest.param("gradient", {}, marks=pytest.mark.slow), ("tikhonov", {"damp": 0.02})]
)
def test_a_varying_blur_is_restored_better_than_by_the_mean_psf(prior: str, options: dict[str, float]) -> None:
    x = scene()
    y = lsconv.blur_operator(psfs(), (40, 34), channels=2, positions=POSITIONS)(x)
    y = y + 1e-3 * torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    inside = (..., slice(6, -6), slice(6, -6))
    truth = x[:, 3:-3, 3:-3]
    errors = []
    for kernel, where in ((psfs(), POSITIONS), (psfs().mean(0), None)):
        solution = lsconv.deconvolve(y, kernel, psf_positions=where, prior=prior, channels="first", **options)
        assert bool(solution.converged.all())
        errors.append(float((solution.x - truth)[inside].norm()))
    assert errors[0] < 0.8 * errors[1]


def test_colours_last_in_arrays_and_missing_pixels() -> None:
    y = lsconv.blur_operator(psfs(), (40, 34), channels=2, positions=POSITIONS)(scene())
    y = torch.cat([y, y[:1]])
    seen = torch.rand(40, 34, generator=torch.Generator().manual_seed(2)) > 0.05
    options = {"damp": 0.05, "psf_positions": POSITIONS.numpy()}
    first = lsconv.deconvolve(y, psfs(), channels="first", observed=seen, **options)
    spoiled = np.where(seen.numpy()[..., None], y.movedim(0, -1).numpy(), 7.0)
    last = lsconv.deconvolve(spoiled, psfs().numpy(), observed=seen, **options)
    np.testing.assert_allclose(last.x, first.x.movedim(0, -1).numpy(), atol=1e-8)


def test_arguments_that_do_not_fit() -> None:
    image = torch.rand(40, 34, dtype=F64)
    with pytest.raises(lsconv.ShapeError, match="a PSF for each position"):
        lsconv.blur_operator(psfs()[None], (40, 34), ndim=2, positions=POSITIONS)
    with pytest.raises(lsconv.ShapeError, match="positions"):
        lsconv.deconvolve(image, psfs(), psf_positions=POSITIONS[:, :1])
    with pytest.raises(lsconv.MethodError, match="psf_positions"):
        lsconv.deconvolve(image, psfs(), psf_positions=POSITIONS, noise="poisson")
