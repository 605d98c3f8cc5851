"""Iterative refinement: float64 certificates from float32 solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import ArgumentError, ConvergenceWarning, DtypeError
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.refinement import refine

Solver = Callable[..., Solution]
LEAST_SQUARES = [lsconv.lsmr, lsconv.lsqr, lsconv.cgls]
SQUARE = [lsconv.cg, lsconv.minres, lsconv.gmres]


def matrix(m: int, n: int, dtype: torch.dtype = torch.float64, condition: float = 30.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    rank = min(m, n)
    u = torch.linalg.qr(torch.randn(m, rank, generator=g, dtype=dtype))[0]
    v = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=dtype))[0]
    return (u * torch.linspace(1, condition, rank, dtype=torch.float64)) @ v.mH


def vectors(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize("solver", LEAST_SQUARES)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_least_squares_reach_float64(solver: Solver, shape: tuple[int, int], dtype: torch.dtype) -> None:
    A, b = matrix(*shape, dtype), vectors(3, shape[0], dtype=dtype)
    solution = refine(A, b, solver=solver)
    assert solution.converged.all()
    assert solution.x.dtype == dtype
    assert distance(solution.x, b @ torch.linalg.pinv(A).T) < 1e-9


@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_damped_least_squares_reach_float64(solver: Solver) -> None:
    A, b = matrix(20, 12), vectors(2, 20)
    solution = refine(A, b, solver=solver, damp=2.0, x0=torch.ones(12, dtype=torch.float64))
    expected = torch.linalg.solve(A.T @ A + 4 * torch.eye(12), A.T @ b.T).T
    assert solution.converged.all()
    assert distance(solution.x, expected) < 1e-9


@pytest.mark.parametrize("solver", SQUARE)
def test_square_systems_reach_float64(solver: Solver) -> None:
    A = matrix(14, 14)
    A = A @ A.T / 30
    b = vectors(2, 14)
    solution = refine(A, b, solver=solver)
    assert solution.converged.all()
    assert float((solution.residual_norm / b.norm(dim=-1)).max()) < 2e-11
    assert distance(solution.x, torch.linalg.solve(A, b.T).T) < 1e-7


def test_least_norm_by_craig_reaches_float64() -> None:
    A, b = matrix(12, 20), vectors(12)
    solution = refine(A, b, solver=lsconv.craig)
    assert solution.converged
    assert distance(solution.x, torch.linalg.pinv(A) @ b) < 1e-9


def test_least_norm_of_a_rank_deficient_tall_operator_reaches_float64_when_asked() -> None:
    A, b = matrix(20, 6) @ matrix(6, 12), vectors(20)
    exact = torch.linalg.pinv(A, rtol=1e-10) @ b
    solution = refine(A, b, least_norm=True)
    assert solution.converged
    assert distance(solution.x, exact) < 1e-8


def test_float32_alone_does_not_reach_it() -> None:
    A, b = matrix(20, 12), vectors(20)
    plain = lsconv.lsmr(A.float(), b.float()).x.double()
    exact = torch.linalg.pinv(A) @ b
    assert distance(plain, exact) > 1e4 * distance(refine(A, b).x, exact)


def test_an_inexact_inner_solve_costs_steps_not_the_answer() -> None:
    A, b = matrix(12, 12), vectors(2, 12)

    def sloppy(A: Any, b: torch.Tensor, **options: Any) -> Solution:
        return lsconv.lsmr(A, b, rtol=0.05, **options)

    solution = refine(A, b, solver=sloppy, max_refinements=200)
    assert solution.converged.all()
    assert distance(solution.x, torch.linalg.solve(A, b.T).T) < 1e-8


def test_a_useless_inner_solve_is_reported_and_does_no_harm() -> None:
    A, b = matrix(12, 12), vectors(2, 12)

    def wrong(A: Any, b: torch.Tensor, **options: Any) -> Solution:
        return lsconv.lsmr(-A if isinstance(A, torch.Tensor) else A, torch.flip(b, (-1,)), **options)

    with pytest.warns(ConvergenceWarning):
        solution = refine(A, b, solver=wrong)
    assert not solution.converged.any()
    assert (solution.residual_norm <= b.norm(dim=-1) * (1 + 1e-12)).all()


def test_items_are_independent() -> None:
    A, b = matrix(20, 12), vectors(4, 20)
    full = refine(A, b)
    b[1], b[2, 0] = 0, float("nan")
    with pytest.warns(ConvergenceWarning):
        solution = refine(A, b, check_finite=False)
    assert [solution.status[1], solution.status[2]] == [Status.ZERO, Status.NON_FINITE]
    assert torch.equal(solution.x[0], full.x[0])
    assert torch.equal(solution.x[3], full.x[3])


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_scaling_changes_only_the_scale_of_x(scale: float) -> None:
    A, b = matrix(20, 12), vectors(20)
    solution = refine(A * scale, b / scale)
    assert solution.converged
    assert distance(solution.x * scale**2, torch.linalg.pinv(A) @ b) < 1e-9


def test_a_convolution_reaches_float64() -> None:
    g = torch.Generator().manual_seed(0)
    A = lsconv.Conv2d(torch.randn(3, 2, 3, 3, generator=g, dtype=torch.float64), in_size=(9, 8), padding=1)
    b = torch.randn(2, *A.out_shape, generator=g, dtype=torch.float64)
    expected = (b.flatten(1) @ torch.linalg.pinv(A.to_dense()).T).reshape(2, *A.in_shape)
    solution = refine(A, b)
    assert solution.converged.all()
    assert distance(solution.x, expected) < 1e-8


def test_bad_arguments_are_refused() -> None:
    A, b = matrix(6, 6), vectors(6)
    with pytest.raises(DtypeError, match="float64"):
        refine(A.float(), b.float())
    with pytest.raises(ArgumentError, match="damp"):
        refine(A, b, solver=lsconv.gmres, damp=1.0)
