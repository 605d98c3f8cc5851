"""Noise as deconvolve is told it: missing pixels, maps, and the choice of the weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from lsconv.psf import motion
from tests.inverse.images.pictures import asymmetric, edges_and_slopes, gaussian_psf


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
