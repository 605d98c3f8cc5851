"""The system on the border of a volume with a penalty, by the factors of its capacitance, against the matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.factored_capacitance import FactoredCapacitance
from lsconv.border.normal_inverse import DefiniteInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.penalty import common_grid_filters
from lsconv.border.stacked_plan import StackedPlan

F64 = torch.float64
ITERATED = Limits(factorise=Factorise.NEVER, dense_unknowns=0)


def _penalty(name: str, A: lsconv.Convolution) -> lsconv.LinearOperator:
    options: dict[str, Any] = {"ndim": 3, "dtype": A.dtype}
    gradient = lsconv.Gradient(A.in_shape, boundary="neumann", spacing=(2.0, 1.0, 1.0), **options)
    if name == "gradient":
        return gradient
    if name == "gradient and identity":
        return lsconv.vstack([gradient, 0.3 * lsconv.Identity(A.in_shape, dtype=A.dtype)])
    groups = A.in_shape[0]
    size = (3, 5, 4) if name == "long" else (1, 3, 2)
    return lsconv.Convolution(torch.randn(groups, 1, *size, dtype=A.dtype), A.spatial_in, groups=groups)


def _inverse(name: str, dtype: torch.dtype = F64, groups: int = 1, **options: Any) -> DefiniteInverse:
    torch.manual_seed(0)
    A = lsconv.Convolution(torch.randn(groups, 1, 2, 3, 2, dtype=dtype), (5, 8, 7), groups=groups)
    damp = torch.tensor([0.5, 0.8], dtype=F64) if groups > 1 else 0.5
    terms = common_grid_filters(A, _penalty(name, A))
    inverse = normal_inverse(Request.of(A, damp, terms, floor=1e-13, limits=ITERATED, **options))
    assert isinstance(inverse, DefiniteInverse)
    assert inverse.stack is not None
    return inverse


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128])
@pytest.mark.parametrize("name", ["gradient", "gradient and identity", "short", "long"])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_product_by_factors_is_that_of_the_matrices(name: str, dtype: torch.dtype, groups: int) -> None:
    inverse = _inverse(name, dtype, groups)
    matrices = inverse.problem.circulant_parts.Q
    u = torch.randn(2, inverse.embedding.blocks, inverse.border.size, dtype=dtype)
    expected = inverse.border.gather(matrices.on_grid(inverse.border.scatter(u)))
    error = torch.linalg.vector_norm(inverse.begin_iteration()(u) - expected) / torch.linalg.vector_norm(expected)
    assert error < (2e-6 if dtype == torch.float32 else 1e-13)


def test_rows_of_few_taps_take_one_transform_together_and_long_ones_one_each() -> None:
    few, long = _inverse("gradient").stack, _inverse("long").stack
    assert few is not None
    assert long is not None
    assert few.transforms == 2
    assert long.transforms == 2
    assert _inverse("gradient and identity").stack.transforms == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("real", [True, False])
def test_the_entries_of_factors_are_those_of_the_matrices(real: bool) -> None:
    inverse = _inverse("gradient", F64 if real else torch.complex128)
    factored, matrices = inverse.Q, inverse.problem.circulant_parts.Q
    assert isinstance(factored, FactoredCapacitance)
    torch.testing.assert_close(factored.kernel(), matrices.kernel(), rtol=0, atol=1e-12)
    for axes in ((0,), (2,), (0, 1), (1, 2)):
        lags = [torch.tensor([0, 3, 1])] * len(axes)
        torch.testing.assert_close(factored.at_lags(axes, lags), matrices.at_lags(axes, lags), rtol=0, atol=1e-12)


def test_strips_and_corners_by_factors_are_those_of_the_matrices() -> None:
    inverse = _inverse("gradient")
    entries, expected = (inverse.border.entries(Q) for Q in (inverse.Q, inverse.problem.circulant_parts.Q))
    for axes in ((0,), (1,), (2,), (0, 2), (1, 2)):
        cells = inverse.border.cross_section(axes, 1)
        torch.testing.assert_close(entries.between(axes, cells), expected.between(axes, cells), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gradient", "gradient and identity"])
def test_the_answer_is_that_of_the_dense_problem(name: str) -> None:
    torch.manual_seed(0)
    A = lsconv.Convolution(torch.rand(1, 1, 2, 3, 2, dtype=F64), (5, 8, 7))
    L, damp = _penalty(name, A), torch.tensor([0.05, 0.5], dtype=F64)
    y = torch.randn(3, 2, *A.out_shape, dtype=F64)
    solution = StackedPlan(A, L, damp, limits=ITERATED).solve(y)
    assert bool(solution.converged.all())
    a, penalty = A.to_dense().reshape(A.out_numel, -1), L.to_dense().reshape(L.out_numel, -1)
    for item, strength in enumerate(damp):
        normal = a.T @ a + strength**2 * penalty.T @ penalty
        expected = torch.linalg.solve(normal, a.T @ y[:, item].flatten(1).T).T.reshape(3, *A.in_shape)
        torch.testing.assert_close(solution.x[:, item], expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
