"""Samples and standard deviations of the posterior: moments against dense covariances, coverage of truths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv import Conv2d, Gradient, LinearOperator

DOUBLE = torch.float64
SIGMA, DAMP = 0.3, 0.4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blur(padding: int = 0) -> lsconv.Convolution:
    return Conv2d(torch.rand(1, 1, 3, 3, dtype=DOUBLE, generator=generator()), (7, 6), padding=padding)


def problems() -> dict[str, tuple[LinearOperator, LinearOperator | None]]:
    A = blur()
    mask = torch.rand(A.out_shape, generator=generator(1)) < 0.7
    weights = torch.rand(A.out_shape, dtype=DOUBLE, generator=generator(2)) + 0.5
    L = Gradient(A.in_shape, dtype=DOUBLE)
    return {
        "identity": (A, None),
        "same": (blur(1), None),
        "gradient": (A, L),
        "same, gradient": (blur(1), Gradient(A.in_shape, dtype=DOUBLE, boundary="dirichlet")),
        "mask": (lsconv.Mask(mask) @ A, L),
        "weights": (lsconv.Diagonal(weights) @ A, L),
        "matrix": (lsconv.Dense(A.to_dense()), None),
    }


def covariance(A: LinearOperator, L: LinearOperator | None, damp: float = DAMP) -> Tensor:
    M = A.to_dense()
    P = torch.eye(A.in_numel, dtype=DOUBLE) if L is None else L.to_dense()
    return SIGMA**2 * torch.linalg.inv(M.T @ M + damp**2 * P.T @ P)


@pytest.mark.parametrize("name", problems())
def test_moments_of_samples_are_those_of_the_posterior(name: str) -> None:
    A, L = problems()[name]
    y = A(torch.randn(A.in_shape, dtype=DOUBLE, generator=generator(3)))
    x_prior = torch.linspace(0, 1, A.in_numel, dtype=DOUBLE).reshape(A.in_shape)
    count = 4000
    samples = lsconv.posterior_samples(
        A, y, DAMP, noise_std=SIGMA, L=L, x_prior=x_prior, count=count, generator=generator(4)
    ).flatten(1)
    mean = lsconv.tikhonov(A, y, DAMP, L=L, x_prior=x_prior).x.flatten()
    C = covariance(A, L)
    std = C.diagonal().sqrt()
    # the largest of hundreds of errors: four standard errors and the tail of their number
    assert float(((samples.mean(0) - mean).abs() / (std / count**0.5)).max()) < 4.5
    found = (samples - mean).T @ (samples - mean) / count
    errors = ((C.square() + std[:, None].square() * std.square()) / count).sqrt()
    z = (found - C) / errors
    assert float(z.abs().max()) < 5
    assert 0.8 < float(z.square().mean()) < 1.2


@pytest.mark.parametrize("name", problems())
def test_exact_and_sampled_standard_deviations_are_right(name: str) -> None:
    A, L = problems()[name]
    expected = covariance(A, L).diagonal().sqrt().reshape(A.in_shape)
    std, error = lsconv.posterior_std(A, DAMP, noise_std=SIGMA, L=L, exact=True, return_error=True)
    assert error == 0
    torch.testing.assert_close(std, expected, rtol=1e-10, atol=0)
    std, error = lsconv.posterior_std(
        A, DAMP, noise_std=SIGMA, L=L, exact=False, count=2000, generator=generator(), return_error=True
    )
    assert error == pytest.approx(4000**-0.5)
    assert float((std / expected - 1).abs().max()) < 4.5 * error


def test_a_batch_of_damps_and_noises_has_a_map_each() -> None:
    A, damp = blur(), torch.tensor([0.3, 0.9], dtype=DOUBLE)
    std = lsconv.posterior_std(A, damp, noise_std=torch.tensor([1.0, 2.0]))
    for item, factor in enumerate((1.0, 2.0)):
        alone = lsconv.posterior_std(A, float(damp[item]), noise_std=factor)
        torch.testing.assert_close(std[item], alone, rtol=1e-12, atol=0)
    y = torch.zeros(2, *A.out_shape, dtype=DOUBLE)
    samples = lsconv.posterior_samples(A, y, damp, noise_std=1.0, count=3000, generator=generator())
    assert samples.shape == (3000, 2, *A.in_shape)
    expected = lsconv.posterior_std(A, damp, noise_std=1.0)
    assert float((samples.std(0) / expected - 1).abs().max()) < 4.5 * 6000**-0.5


@pytest.mark.parametrize("masked", [False, True])
def test_the_interval_of_ninety_percent_holds_ninety_percent_of_pixels(masked: bool) -> None:
    """200 truths drawn from the prior; border, masked and other pixels each for themselves."""
    A0 = Conv2d(torch.rand(1, 1, 5, 5, dtype=DOUBLE, generator=generator()), (20, 20))
    mask = torch.rand(A0.out_shape, generator=generator(1)) < 0.8
    A = lsconv.Mask(mask) @ A0 if masked else A0
    L = Gradient(A.in_shape, boundary="dirichlet", dtype=DOUBLE)
    P = L.to_dense()
    R = torch.linalg.cholesky(P.T @ P)
    normal = torch.randn(A.in_numel, 200, dtype=DOUBLE, generator=generator(2)) * SIGMA / DAMP
    truth = torch.linalg.solve_triangular(R.T, normal, upper=True).T.reshape(200, *A.in_shape)
    y = A(truth) + SIGMA * torch.randn(200, *A.out_shape, dtype=DOUBLE, generator=generator(3))
    x = lsconv.tikhonov(A, y, DAMP, L=L).x
    std = lsconv.posterior_std(A, DAMP, noise_std=SIGMA, L=L)
    inside = ((x - truth).abs() <= 1.6448536 * std).double()
    border = torch.ones(20, 20, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    regions = {"border": border[None], "inside": ~border[None]}
    if masked:
        regions["masked"] = torch.nn.functional.pad(~mask, (2, 2, 2, 2))
    for name, region in regions.items():
        assert 0.88 < float(inside[:, region].mean()) < 0.92, name


@pytest.mark.slow
def test_the_noise_is_found_in_the_residual() -> None:
    A = Conv2d(torch.rand(1, 1, 5, 5, dtype=DOUBLE, generator=generator()) / 12, (64, 64))
    rows, columns = torch.linspace(0, 3, 64, dtype=DOUBLE)[:, None], torch.linspace(0, 2, 64, dtype=DOUBLE)
    x = (torch.sin(rows) * torch.cos(columns))[None]
    noise = torch.tensor([0.02, 0.2], dtype=DOUBLE)
    y = A(x) + noise[:, None, None, None] * torch.randn(2, *A.out_shape, dtype=DOUBLE, generator=generator(1))
    L = Gradient(A.in_shape, dtype=DOUBLE)
    damp = lsconv.choose_damp(A, y, "gcv", L=L).damp
    for window in (A, lsconv.Mask(torch.rand(A.out_shape, generator=generator(2)) < 0.9) @ A):
        found = lsconv.noise_level(window, y, damp, L=L)
        assert float((found / noise - 1).abs().max()) < 0.05
    samples = lsconv.posterior_samples(A, y, damp, noise_std=None, L=L, count=400, generator=generator(3))
    std = lsconv.posterior_std(A, damp, noise_std=None, y=y, L=L, exact=False, generator=generator(4))
    ratio = samples.std(0).square().mean((-3, -2, -1)).sqrt() / std.square().mean((-3, -2, -1)).sqrt()
    assert float((ratio - 1).abs().max()) < 0.02


def test_arguments_that_the_posterior_does_not_serve_are_refused() -> None:
    A = Conv2d(torch.rand(1, 1, 3, 3), (80, 80))
    with pytest.raises(lsconv.errors.MethodError, match="4096"):
        lsconv.posterior_std(A, 1.0, noise_std=1.0, exact=True)
    with pytest.raises(lsconv.errors.ArgumentError, match="noise_std"):
        lsconv.posterior_std(A, 1.0, noise_std=None)
    with pytest.raises(lsconv.errors.ArgumentError, match="noise_std"):
        lsconv.posterior_samples(A, torch.zeros(A.out_shape), 1.0, noise_std=-1.0)
    with pytest.raises(lsconv.errors.ArgumentError, match="damp"):
        lsconv.posterior_std(A, 0.0, noise_std=1.0)
    with pytest.raises(lsconv.errors.ArgumentError, match="count"):
        lsconv.posterior_samples(A, torch.zeros(A.out_shape), 1.0, noise_std=1.0, count=0)
