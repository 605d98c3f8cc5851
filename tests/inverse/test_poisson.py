"""Counts: the likelihood's minimiser against SciPy, its strength by the discrepancy rule, cameras, and rows apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import lsconv
from lsconv.inverse.poisson import expected_divergence

DOUBLE = torch.float64


def psf() -> np.ndarray:
    line = np.exp(-0.5 * (np.arange(5) - 2) ** 2)
    return np.outer(line, line) / line.sum() ** 2


def counts(peak: float, background: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scene = np.kron(rng.uniform(0, peak, (5, 5)), np.ones((6, 6)))
    field = torch.from_numpy(np.pad(scene, 2, mode="edge"))
    mean = lsconv.blur_operator(torch.from_numpy(psf()), (30, 30))(field[None])[0].numpy()
    return scene, rng.poisson(mean + background).astype(float)


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_the_penalised_likelihood_is_at_its_minimum(prior: str) -> None:
    """L-BFGS-B on the dense objective, with nothing of lsconv's solvers in it."""
    y, damp, background = np.random.default_rng(0).poisson(4.0, (7, 8)).astype(float), 0.4, 1.5
    solution = lsconv.deconvolve(y, psf()[1:4, 1:4] / psf()[1:4, 1:4].sum(), prior=prior, noise="poisson",
                                 background=background, damp=damp, crop=False, rtol=1e-6, max_iter=5000)  # fmt: skip
    A = lsconv.blur_operator(torch.from_numpy(psf()[1:4, 1:4] / psf()[1:4, 1:4].sum()), (7, 8))
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE) if prior == "gradient" else lsconv.Identity(A.in_shape, dtype=DOUBLE)
    D, G, data = A.to_dense().numpy(), L.to_dense().numpy(), y.flatten()
    level = y.mean() - background

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        t, d = D @ x + background, G @ (x - level)
        value = np.sum(t - data * np.log(t)) + 0.5 * damp**2 * d @ d
        return value, D.T @ (1 - data / t) + damp**2 * G.T @ d

    start, options = np.full(D.shape[1], level), {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start), options=options)
    assert bool(solution.converged)
    assert objective(solution.x.flatten())[0] <= found.fun + 1e-6 * abs(found.fun)
    assert np.abs(solution.x.flatten() - found.x).max() < 2e-3


@pytest.mark.parametrize("options", [{"prior": "tv"}, {"prior": "gradient"}])
@pytest.mark.parametrize("peak", [10, 80])
def test_nothing_but_the_psf_restores(options: dict[str, Any], peak: float) -> None:
    scene, y = counts(peak, 2.0)
    solution = lsconv.deconvolve(y.astype(np.float32), psf(), noise="poisson", background=2.0, **options)
    assert bool(solution.converged)
    assert solution.x.min() >= 0
    assert np.std(solution.x - scene) < 0.9 * np.std(y - 2.0 - scene)


@pytest.mark.parametrize("prior", ["tv", "gradient"])
def test_the_discrepancy_rule_leaves_the_expected_divergence(prior: str) -> None:
    _, y = counts(40, 3.0)
    solution = lsconv.deconvolve(y.astype(np.float32), psf(), prior=prior, noise="poisson", background=3.0,
                                 damp="auto" if prior == "tv" else "discrepancy", crop=False)  # fmt: skip
    A = lsconv.blur_operator(torch.from_numpy(psf()), (30, 30))
    t = A(torch.from_numpy(solution.x).double()[None])[0].numpy() + 3.0
    divergence = np.sum(np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / t), 0) - y + t)
    assert divergence == pytest.approx(float(expected_divergence(torch.from_numpy(t)).sum()), rel=0.03)


@pytest.mark.parametrize("mean", [0.01, 0.3, 2.0, 30.0, 500.0])
def test_the_expected_divergence_is_that_of_drawn_variables(mean: float) -> None:
    y = np.random.default_rng(0).poisson(mean, 400_000)
    drawn = np.where(y > 0, y * np.log(np.where(y > 0, y, 1) / mean), 0) - y + mean
    error = 4 * drawn.std() / np.sqrt(len(y))
    assert float(expected_divergence(torch.tensor(mean))) == pytest.approx(drawn.mean(), abs=error + 1e-4)


def test_a_camera_of_any_gain_and_offset_gives_the_scene_of_its_photons() -> None:
    """Grey levels are photons times gain plus offset: the answer is the photons' times gain."""
    _, y = counts(30, 2.0)
    options: dict[str, Any] = {"noise": "poisson", "rtol": 1e-6, "max_iter": 4000}
    photons = lsconv.deconvolve(y, psf(), background=2.0, damp=0.2, **options).x
    grey = lsconv.deconvolve(3 * y + 100, psf(), background=6.0, damp=0.2 / 3, gain=3.0, offset=100.0, **options).x
    gains = np.full((30, 30), 3.0)
    mapped = lsconv.deconvolve(3 * y + 100, psf(), background=6.0, damp=0.2 / 3, gain=gains, offset=100.0, **options).x
    assert np.abs(grey - 3 * photons).max() < 0.02
    assert np.abs(mapped - grey).max() < 0.02


def test_read_noise_may_bring_photons_below_zero() -> None:
    scene, y = counts(10, 0.0)
    noisy = y + 2 * np.random.default_rng(1).standard_normal(y.shape)
    assert noisy.min() < -1
    solution = lsconv.deconvolve(noisy.astype(np.float32), psf(), noise="poisson", read_noise=2.0)
    assert bool(solution.converged)
    assert np.std(solution.x - scene) < 0.9 * np.std(noisy - scene)


@pytest.mark.parametrize("noise", ["gaussian", pytest.param("poisson", marks=pytest.mark.slow)])
def test_rows_with_weights_are_the_problem_of_the_operator_that_has_them(noise: str) -> None:
    """A diagonal or a mask before a convolution goes into the data term; hidden in a function it cannot."""
    torch.manual_seed(0)
    A = lsconv.blur_operator(torch.full((3, 3), 1 / 9, dtype=DOUBLE), (10, 11))
    weights = (0.5 + torch.rand(A.out_shape, dtype=DOUBLE)) * (torch.rand(A.out_shape) > 0.1)
    scene = torch.zeros(A.in_shape, dtype=DOUBLE)
    scene[:, 4:9, 3:9] = 20
    y = torch.poisson(weights * A(scene) + 1.0) * (weights > 0)
    hidden = lsconv.FromFunctions(A.in_shape, A.out_shape, lambda v: weights * A.apply(v),
                                  lambda v: A.adjoint(weights * v), dtype=DOUBLE)  # fmt: skip
    options: dict[str, Any] = {"noise": noise, "background": 1.0, "rtol": 1e-5, "max_iter": 4000}
    options |= {"bounds": (0, None)} if noise == "poisson" else {}
    shown = lsconv.total_variation(lsconv.Diagonal(weights) @ A, y, 0.1, **options)
    other = lsconv.total_variation(hidden, torch.where(weights > 0, y, 0.0), 0.1, **options)
    assert bool(shown.converged)
    assert bool(other.converged)
    torch.testing.assert_close(shown.x, other.x, rtol=0, atol=0.02)
    torch.testing.assert_close(shown.residual_norm, other.residual_norm, rtol=1e-3, atol=0)
