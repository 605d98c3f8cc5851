"""A block-circulant operator on a border, applied along its strips, against transforms of the whole grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.cost_model import Limits
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.penalty import as_convolutions
from lsconv.border.plan import BorderPlan

ITERATED = Limits(at_once=0, later=False)


def border_inverse(A: lsconv.Convolution, damp: Any, **options: Any) -> BorderInverse:
    inverse = normal_inverse(Request.of(A, damp, limits=ITERATED, **options))
    assert isinstance(inverse, BorderInverse)
    return inverse


def inverse_of(case: str, dtype: torch.dtype, n: tuple[int, int] = (230, 190), damp: float = 4.0) -> BorderInverse:
    torch.manual_seed(0)
    real = dtype.to_real() if dtype.is_complex else dtype
    if case == "gradient":
        A = lsconv.Conv2d(torch.rand(1, 1, 3, 4, dtype=dtype), in_size=n)
        terms = as_convolutions(lsconv.Gradient(A.in_shape, dtype=dtype), 2)
        assert terms is not None
        return border_inverse(A, damp, terms=terms, floor=0.0)
    shape, padding = {
        "valid": ((1, 1, 5, 3), 0),
        "valid, two channels": ((2, 2, 3, 3), 0),
        "full": ((1, 1, 3, 4), 3),
        "same": ((1, 1, 3, 5), (1, 2)),
        "groups": ((3, 1, 3, 3), 0),
        "one axis": ((1, 1, 1, 5), 0),
    }[case]
    A = lsconv.Conv2d(torch.randn(shape, dtype=dtype), in_size=n, padding=padding, groups=3 if case == "groups" else 1)
    damps = torch.tensor([3 * damp, 5 * damp], dtype=real) if case == "groups" else 3 * damp
    return border_inverse(A, damps, floor=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("case", ["valid", "valid, two channels", "full", "same", "groups", "gradient", "one axis"])
def test_product_along_the_strips_is_that_of_the_whole_grid(case: str, dtype: torch.dtype) -> None:
    inverse = inverse_of(case, dtype)
    strips = inverse.begin_iteration().schwarz.strips
    assert strips is not None
    u = torch.randn(2, inverse.embedding.blocks, inverse.border.size, dtype=dtype)
    expected = inverse.border.gather(inverse.system.on_grid(inverse.border.scatter(u)))
    error = torch.linalg.vector_norm(strips(u) - expected) / torch.linalg.vector_norm(expected)
    assert error < (2e-6 if dtype == torch.float32 else 1e-11)


def test_a_kernel_that_reaches_across_the_grid_has_no_strips() -> None:
    torch.manual_seed(0)
    A = lsconv.Conv2d(torch.ones(1, 1, 9, 9) / 81, in_size=(150, 150))
    assert border_inverse(A, 1e-5, floor=0.0).begin_iteration().schwarz.strips is None


def test_a_border_next_to_a_wide_kernel_leaves_nothing_to_save() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 40, 40), in_size=(90, 90))
    assert border_inverse(A, 50.0, floor=0.0).begin_iteration().schwarz.strips is None


@pytest.mark.parametrize("rtol", [1e-6, 1e-9])
def test_a_plan_with_strips_solves_the_normal_equations(rtol: float) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5, dtype=torch.float64), in_size=(220, 190))
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    plan = BorderPlan(A, 20.0, limits=ITERATED)
    assert isinstance(plan.inverse, BorderInverse)
    assert plan.inverse.begin_iteration().schwarz.strips is not None
    solution = plan.solve(y, rtol=rtol)
    assert bool(solution.converged.all())
    gradient = A.adjoint(y - A(solution.x)) - 400 * solution.x  # of curvature 400 and more
    assert torch.linalg.vector_norm(gradient / 400) < 10 * rtol * torch.linalg.vector_norm(solution.x)


@pytest.mark.parametrize("case", ["valid", "gradient", "same"])
def test_a_batch_has_the_answers_of_its_items_alone(case: str) -> None:
    inverse = inverse_of(case, torch.float64)
    A = inverse.convolution
    f = torch.randn(3, *(A.in_shape if inverse.side == "solution" else A.out_shape), dtype=torch.float64)
    together, _, u = inverse.continued(f, 1e-12)
    alone = torch.stack([inverse.continued(item, 1e-12)[0] for item in f])
    assert u is not None
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-10 * float(together.abs().max()))
    again, iterations, _ = inverse.continued(f, 1e-9, start=u)
    assert int(iterations.max()) == 0
    torch.testing.assert_close(again, together, rtol=0, atol=1e-10 * float(together.abs().max()))
