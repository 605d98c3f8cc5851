"""Error bars of deconvolve against dense covariances, by layout, and what they are refused for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv

DOUBLE = torch.float64
PSF = torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.4, 0.1], [0.0, 0.2, 0.0]], dtype=DOUBLE)


def dense(image: Tensor, damp: float, prior: str, noise_std: float) -> Tensor:
    A = lsconv.blur_operator(PSF, tuple(image.shape))
    M = A.to_dense()
    L = (
        lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
        if prior == "gradient"
        else torch.eye(A.in_numel, dtype=DOUBLE)
    )
    N = M.T @ M + damp**2 * L.T @ L
    std = noise_std * torch.linalg.inv(N).diagonal().sqrt().reshape(A.in_shape)[0]
    return std[1:-1, 1:-1]


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_error_bars_are_the_roots_of_the_diagonal_of_the_dense_covariance(prior: str) -> None:
    image = torch.rand(11, 12, dtype=DOUBLE)
    solution = lsconv.deconvolve(image, PSF, damp=0.3, prior=prior, noise_std=None, error_bars=True)
    A = lsconv.blur_operator(PSF, (11, 12))
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE) if prior == "gradient" else None
    level = torch.full(A.in_shape, float(image.mean()), dtype=DOUBLE)
    sigma = float(lsconv.noise_level(A, image[None], 0.3, L=L, x_prior=level))
    torch.testing.assert_close(solution.std, dense(image, 0.3, prior, sigma), rtol=1e-6, atol=0)
    assert lsconv.deconvolve(image, PSF, damp=0.3).std is None


def test_given_noise_is_taken() -> None:
    image = torch.rand(11, 12, dtype=DOUBLE)
    solution = lsconv.deconvolve(image, PSF, noise_std=0.05, error_bars=True)
    torch.testing.assert_close(solution.std, dense(image, float(solution.damp), "gradient", 0.05), rtol=1e-6, atol=0)


def test_channels_have_the_layout_of_the_image_and_their_own_noise() -> None:
    image = torch.rand(2, 11, 12, 3, dtype=DOUBLE)
    image[..., 1] *= 2
    options: dict[str, Any] = {"channels": "last", "damp": 0.3, "error_bars": True}
    together = lsconv.deconvolve(image, PSF, **options)
    assert together.std.shape == image.shape
    one = lsconv.deconvolve(image[1, ..., 1], PSF, damp=0.3, error_bars=True)
    torch.testing.assert_close(together.std[1, ..., 1], one.std, rtol=1e-6, atol=0)


def test_integers_have_error_bars_in_grey_levels_of_floating_point() -> None:
    image = (200 * np.random.default_rng(0).random((11, 12))).astype("uint8")
    solution = lsconv.deconvolve(image, PSF.numpy(), damp=0.3, error_bars=True)
    assert (solution.x.dtype, solution.std.dtype.kind) == (np.uint8, "f")
    exact = lsconv.deconvolve(torch.from_numpy(image.astype("float64")), PSF, damp=0.3, error_bars=True)
    np.testing.assert_allclose(solution.std, exact.std.numpy(), rtol=1e-4)


@pytest.mark.slow
def test_large_images_are_sampled_the_same_way_every_time() -> None:
    image = torch.rand(70, 72)
    first, again = (lsconv.deconvolve(image, PSF, damp=0.3, noise_std=None, error_bars=8).std for _ in range(2))
    assert torch.equal(first, again)
    many = lsconv.deconvolve(image, PSF, damp=0.3, error_bars=400).std
    exact = lsconv.deconvolve(image[:50, :50], PSF, damp=0.3, error_bars=True).std
    ratio = many[20:30, 20:30].square().mean().sqrt() / exact[20:30, 20:30].square().mean().sqrt()
    assert abs(float(ratio) - 1) < 0.05


def test_missing_pixels_are_less_sure() -> None:
    image = torch.rand(20, 20, dtype=DOUBLE)
    image[8:12, 8:12] = torch.nan
    with pytest.warns(lsconv.InputWarning):
        std = lsconv.deconvolve(image, PSF, damp=0.3, error_bars=True).std
    assert std[9:11, 9:11].min() > 1.5 * std[3:6, 3:6].max()


@pytest.mark.parametrize(
    "options", [{"prior": "tv"}, {"bounds": (0.0, None)}, {"noise": "poisson"}, {"prior": lambda x: x, "damp": 0.1}]
)
def test_error_bars_are_refused_where_the_posterior_is_not_gaussian(options: dict[str, Any]) -> None:
    with pytest.raises(lsconv.MethodError, match="error_bars"):
        lsconv.deconvolve(torch.rand(12, 12), PSF.float(), error_bars=True, **options)
