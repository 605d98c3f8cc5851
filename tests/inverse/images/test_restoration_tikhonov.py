"""Quadratic priors of images against dense normal equations, and their bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lsconv
from tests.inverse.images.pictures import BOUNDARIES, asymmetric, gaussian_psf


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
