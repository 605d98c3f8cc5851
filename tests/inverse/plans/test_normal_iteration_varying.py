"""Answers for a varying convolution against dense matrices, through tiles and through LSMR, with gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import lsconv
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.plans.normal_iteration import VaryingPlan
from lsconv.inverse.route import penalty_plan, route

F64 = torch.float64


def example(
    size: tuple[int, ...], form: str = "after", padding: Any = 0, mode: str = "zeros", *, channels: str = "one",
    dtype: torch.dtype = F64,
) -> lsconv.VaryingConvolution:  # fmt: skip
    """Blurs of growing width, at the corners of the field; the first weight of all is zero over a part of it."""
    ndim = len(size)
    positions = list(itertools.product(*((n / 4, 3 * n / 4) for n in size)))
    kernels = []
    for k in range(len(positions)):
        profile = torch.exp(-0.5 * ((torch.arange(5) - 2.0) / (0.6 + 0.5 * k / len(positions))) ** 2).to(dtype)
        kernel = profile / profile.sum()
        for _ in range(ndim - 1):
            kernel = kernel[..., None] * profile / profile.sum()
        kernels.append(kernel)
    stack = torch.stack(kernels)
    if channels == "own":
        mix = torch.tensor([[1.0, 0.3], [-0.2, 0.8], [0.1, 0.4]], dtype=dtype).reshape(1, 3, 2, *(1,) * ndim)
        stack = stack[:, None, None] * mix
    return lsconv.VaryingConvolution.from_grid(
        stack, positions, size, form, padding, mode, channels=3 if channels == "shared" else 1
    )


def exact(A: Any, y: torch.Tensor, damp: float, L: Any = None) -> torch.Tensor:
    """The damped solution by dense matrices in float64."""
    D = A.to(dtype=F64).to_dense()
    B = torch.eye(D.shape[1], dtype=F64) if L is None else L.to(dtype=F64).to_dense()
    x = torch.linalg.solve(D.mT @ D + damp**2 * B.mT @ B, D.mT @ y.double().reshape(-1, D.shape[0], 1))
    return x.reshape(*y.shape[: y.ndim - len(A.out_shape)], *A.in_shape)


CASES = [
    ((61,), "after", 0, "zeros", "one"),
    ((61,), "before", "same", "zeros", "own"),
    ((33, 29), "after", 0, "zeros", "one"),
    ((20, 23), "before", 0, "zeros", "shared"),
    ((29, 30), "after", "same", "zeros", "own"),
    ((33, 30), "before", "same", "circular", "one"),
    ((29, 29), "after", "same", "reflect", "one"),
    ((11, 9, 10), "after", 0, "zeros", "one"),
]


@pytest.mark.parametrize("size, form, padding, mode, channels", CASES)
@pytest.mark.parametrize("dtype", [F64, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_tiles_give_the_damped_solution(
    size: tuple[int, ...], form: str, padding: Any, mode: str, channels: str, dtype: torch.dtype
) -> None:
    A = example(size, form, padding, mode, channels=channels, dtype=dtype)
    y = torch.randn(2, *A.out_shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    solution = lsconv.lstsq(A, y, damp=0.1, method="border")
    assert isinstance(route(A, 0.1, method="border"), VaryingPlan)
    assert bool(solution.converged.all())
    reference = exact(A, y, 0.1)
    tolerance = 1e-8 if dtype == F64 else 2e-5
    assert float(torch.dist(solution.x.double(), reference) / reference.norm()) < tolerance


@pytest.mark.parametrize(
    "size, padding, channels", [((33, 29), 0, "one"), ((19, 20), "same", "shared"), ((61,), 0, "own")]
)
def test_tiles_give_the_solution_with_a_penalty(size: tuple[int, ...], padding: Any, channels: str) -> None:
    A = example(size, padding=padding, channels=channels)
    L = lsconv.Gradient(A.in_shape, ndim=A.ndim).to(dtype=F64)
    y, prior = torch.randn(2, *A.out_shape, dtype=F64), torch.randn(A.in_shape, dtype=F64)
    assert isinstance(penalty_plan(A, L, 0.1), VaryingPlan)
    solution = lsconv.tikhonov(A, y, 0.1, L=L, x_prior=prior)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, exact(A, y - A(prior), 0.1, L) + prior, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("with_weights", [False, True])
def test_missing_data_and_weights(with_weights: bool) -> None:
    A = example((33, 29))
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(2, *A.out_shape, dtype=F64, generator=generator)
    seen = torch.rand(A.out_shape, generator=generator) > 0.1
    weights = 0.2 + torch.rand(A.out_shape, dtype=F64, generator=generator) if with_weights else None
    y = torch.where(seen, y, torch.nan)
    root = seen.double() * (1 if weights is None else weights.sqrt())
    solution = lsconv.lstsq(A, y, damp=0.1, observed=seen, weights=weights, method="border")
    assert bool(solution.converged.all())
    B = lsconv.Diagonal(root) @ A
    torch.testing.assert_close(solution.x, exact(B, root * y.nan_to_num(), 0.1), rtol=1e-7, atol=1e-8)


def test_a_damp_per_batch_item_and_an_empty_batch() -> None:
    A = example((23, 19), channels="shared")
    y, damp = torch.randn(2, *A.out_shape, dtype=F64), torch.tensor([0.05, 0.3], dtype=F64)
    x = lsconv.lstsq(A, y, damp=damp, method="border").x
    for item in range(2):
        torch.testing.assert_close(x[item], exact(A, y[item], float(damp[item])), rtol=1e-7, atol=1e-8)
    assert lsconv.lstsq(A, y[:0], damp=0.1).x.shape == (0, *A.in_shape)


@pytest.mark.slow
def test_gradients_by_data_kernels_weights_and_damp() -> None:
    A = example((12,))
    y = torch.randn(2, *A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    damp = torch.tensor(0.3, dtype=F64, requires_grad=True)
    parameters = [p.clone().requires_grad_() for p in A.parameters()]

    def answer(y: torch.Tensor, damp: torch.Tensor, *p: torch.Tensor) -> torch.Tensor:
        return lsconv.lstsq(A.with_parameters(p), y, damp=damp, method="border", rtol=1e-12).x

    assert torch.autograd.gradcheck(answer, (y, damp, *parameters), rtol=1e-4, atol=1e-6, fast_mode=True)


def test_without_damping_it_is_the_pseudo_inverse_by_lsmr() -> None:
    A = example((21,), padding="same")
    y = A(torch.randn(A.in_shape, dtype=F64))
    assert isinstance(route(A, 0.0), KrylovPlan)
    x = lsconv.lstsq(A, y, rtol=1e-13).x
    torch.testing.assert_close(x.flatten(), torch.linalg.pinv(A.to_dense()) @ y.flatten(), rtol=1e-5, atol=1e-6)


def test_the_route_takes_tiles_where_they_pay_and_says_so() -> None:
    A = example((200, 200), dtype=torch.float32)
    assert isinstance(route(A, 10.0), KrylovPlan)
    assert isinstance(route(A, 1e-3), VaryingPlan)
    explained = lsconv.explain(A, 1e-3)
    assert "tiles with the kernel of their place" in explained.reasons[0]
    assert "tiles overlapping" in explained.plan
    assert "iterations expected" in explained.plan


def test_tiles_take_far_fewer_iterations_than_lsmr() -> None:
    A = example((96, 96))
    y = A(torch.rand(1, 96, 96, dtype=F64, generator=torch.Generator().manual_seed(3)))
    tiles = lsconv.lstsq(A, y, damp=1e-2, method="border", rtol=1e-6)
    alone = lsconv.lstsq(A, y, damp=1e-2, method="lsmr", rtol=1e-6)
    assert bool(tiles.converged)
    assert bool(alone.converged)
    assert int(tiles.iterations) * 5 < int(alone.iterations)


@pytest.mark.slow
def test_total_variation_reaches_the_same_objective_as_without_tiles() -> None:
    A = example((24, 24))
    y = A(torch.rand(1, 24, 24, dtype=F64, generator=torch.Generator().manual_seed(4)))
    solution = lsconv.total_variation(A, y, 1e-3, rtol=1e-5)
    assert bool(solution.converged.all())
    hidden = lsconv.FromFunctions(A.in_shape, A.out_shape, A.apply, A.adjoint, dtype=F64)
    other = lsconv.total_variation(hidden, y, 1e-3, rtol=1e-5)
    torch.testing.assert_close(solution.x, other.x, rtol=1e-2, atol=1e-3)


def test_smooth_windows_take_few_iterations() -> None:
    """Windows with steep ends would take 20."""
    places = torch.arange(15, dtype=F64) - 7
    profiles = [torch.exp(-0.5 * (places / sigma) ** 2) for sigma in (1.5, 1.8, 1.8, 2.1)]
    kernels = torch.stack([p[:, None] * p / p.sum() ** 2 for p in profiles])
    A = lsconv.VaryingConvolution.from_grid(kernels, list(itertools.product((40.0, 120.0), (40.0, 120.0))), (174, 174))
    generator = torch.Generator().manual_seed(0)
    y = A(torch.rand(A.in_shape, dtype=F64, generator=generator))
    y = y + 0.01 * torch.randn(y.shape, dtype=F64, generator=generator)
    solution = VaryingPlan(A, 1e-2).solve(y, rtol=1e-3)
    assert bool(solution.converged)
    assert int(solution.iterations) <= 10
