"""The dense oracle of the factored plans: the matrix of A in double precision, its regularised inverse and the like."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import lsconv

RCOND = 1e-9


def double(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def matrix(A: lsconv.LinearOperator) -> torch.Tensor:
    return A.to(dtype=torch.complex128 if A.is_complex else torch.float64).to_dense()


def filtered(M: torch.Tensor, damp: float, power: int) -> torch.Tensor:
    """``V sigma^power / (sigma^2 + damp^2) V^H`` (power 0) or ``U^H`` (power 1), on the whole space where damped."""
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=True)
    sigma = torch.nn.functional.pad(sigma, (0, Vh.shape[-1] - len(sigma)))
    keep = (sigma > RCOND * sigma[0]) | (damp > 0)
    weight = torch.where(keep, sigma**power / torch.where(keep, sigma**2 + damp**2, 1.0), 0.0)
    return (Vh.mH * weight) @ (Vh if power == 0 else torch.eye(len(sigma), M.shape[0], dtype=M.dtype) @ U.mH)


def inverse(M: torch.Tensor, damp: float) -> torch.Tensor:
    """``(M^H M + damp^2)^+ M^H``."""
    return filtered(M, damp, 1)


def normal(M: torch.Tensor, damp: float) -> torch.Tensor:
    """``(M^H M + damp^2)^+``."""
    return filtered(M, damp, 0)


def error(found: torch.Tensor, given: torch.Tensor, P: torch.Tensor, item_ndim: int) -> float:
    """The largest error of ``found = P given``, relative to what rounding of the data makes of it."""
    wide = double(given).flatten(-item_ndim)
    expected = (P @ wide.unsqueeze(-1)).squeeze(-1)
    return float((double(found).flatten(-item_ndim) - expected).abs().max() / (P.norm() * wide.abs().max()))


def check_maps(plan: Any, damp: float, *, rank: bool = True) -> None:
    """Every map of a plan for one operator, on a batch, against the matrix."""
    A = plan.A
    M, generator = matrix(A), torch.Generator().manual_seed(1)
    y = torch.randn(2, 3, *A.out_shape, dtype=A.dtype, generator=generator)
    v = torch.randn(2, *A.in_shape, dtype=A.dtype, generator=generator)
    P = inverse(M, damp)
    condition = float(torch.linalg.matrix_norm(M, 2) * torch.linalg.matrix_norm(P, 2))
    eps = 30 * torch.finfo(A.dtype).eps + 10 * torch.finfo(M.dtype).eps * condition
    ndim = len(A.in_shape)
    solution = plan.solve(y)
    assert solution.converged.all(), str(solution)
    attempted = plan.attempt_apply(y)  # nothing iterates: an answer needs no certificate, and has no fallback
    assert attempted is not None
    assert not attempted[1].any()
    assert torch.equal(attempted[0], plan.apply(y))
    assert plan.never_misses
    assert solution.x.dtype == A.dtype
    assert solution.x.is_contiguous()
    assert error(solution.x, y, P, ndim) < eps
    assert error(plan.apply(y), y, P, ndim) < eps
    assert error(plan.adjoint(v), v, P.mH, ndim) < eps
    assert error(plan.normal_solve(v), v, normal(M, damp), ndim) < eps
    residual = (double(y).flatten(-ndim) - double(solution.x).flatten(-ndim) @ M.mT).norm(dim=-1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-5, atol=1e-5 * float(y.norm()))
    if damp == 0 and rank:
        assert (solution.rank == torch.linalg.matrix_rank(M, rtol=RCOND)).all()


def check_items(A: lsconv.LinearOperator, damp: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Answers of kernels and dampings per item, whose batch dimensions ``(dampings, kernels, 1)`` broadcast."""
    M = matrix(A)
    for i, j in itertools.product(range(damp.shape[0]), range(A.batch_shape[0])):
        P = inverse(M[j, 0], float(damp[i]))
        assert error(x[i, j], y[i, j], P, len(A.in_shape)) < 1e-12
