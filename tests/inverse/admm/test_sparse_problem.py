"""A convex problem with sparsifying terms: the answer of soft thresholding, its bounds, and its level."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse.admm.fourier_step import ExtendedGrid
from lsconv.inverse.admm.operator_step import NormalStep
from lsconv.inverse.admm.proximal import Term, gaussian_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem

F64 = torch.float64
WEIGHT = 0.3


def denoising(y: Tensor, **options: Any) -> SparseProblem:
    """``min 1/2 ||x - y||^2 + WEIGHT ||x||_1`` of a convolution with one tap, whose answer is known."""
    A = lsconv.Conv2d(torch.ones(1, 1, 1, 1, dtype=F64), tuple(y.shape[-2:]))

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        identity = lsconv.Identity(A.in_shape, dtype=A.dtype)
        return [gaussian_term(A, y), sparsity_term(identity, torch.full((), WEIGHT, dtype=F64))]

    return SparseProblem(A, y, terms, **options)


@pytest.mark.parametrize("bounds", [None, (0.0, 0.9)])
@pytest.mark.parametrize("extended", [True, False])
def test_the_answer_is_that_of_soft_thresholding(bounds: tuple[float, float] | None, extended: bool) -> None:
    y = torch.randn(1, 5, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    problem = denoising(y, bounds=bounds, extended=extended)
    assert isinstance(problem.step, ExtendedGrid if extended else NormalStep)
    result = problem.run(1e-8, 1000, None)
    assert bool(result.met.all())
    exact = y.sign() * (y.abs() - WEIGHT).clamp_min(0)
    exact = exact if bounds is None else exact.clamp(*bounds)
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-5)
    certificate = problem.certificate(result.x, result.duals, problem.terms_double)
    objective = 0.5 * (exact - y).square().sum() + WEIGHT * exact.abs().sum()
    torch.testing.assert_close(certificate.objective, objective, rtol=1e-6, atol=0)


def test_the_level_left_out_is_the_constant_that_explains_most_of_the_data() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)), (8, 9))
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64)
    y = 5 + torch.randn(A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(2))

    def terms(A: lsconv.LinearOperator, y: Tensor) -> list[Term]:
        return [gaussian_term(A, y), sparsity_term(L, torch.tensor(WEIGHT, dtype=F64), (0, 1))]

    problem = SparseProblem(A, y, terms, centred=True)
    assert problem.level is not None
    level = torch.linalg.lstsq(A(torch.ones(A.in_shape, dtype=F64)).reshape(-1, 1), y.reshape(-1, 1)).solution
    torch.testing.assert_close(problem.level, level.reshape(1, 1, 1).expand(A.in_shape))
    plain = SparseProblem(A, y, terms)
    results = [p.run(1e-6, 2000, None) for p in (plain, problem)]
    assert all(bool(result.met.all()) for result in results)
    objectives = [plain.certificate(result.x, result.duals, plain.terms_double).objective for result in results]
    torch.testing.assert_close(objectives[0], objectives[1], rtol=1e-6, atol=0)
