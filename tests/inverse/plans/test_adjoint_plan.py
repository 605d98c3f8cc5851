"""The adjoint of a convolution is solved with by the convolution's own plan: the dense answers, certified."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.inverse.plans.adjoint_plan import AdjointPlan
from lsconv.inverse.plans.lsmr_then_border import LsmrThenBorderPlan
from lsconv.inverse.route import route
from lsconv.operators.dtypes import direct_rtol

F64 = torch.float64
SHAPES: list[dict[str, Any]] = [
    {"weight": (1, 1, 3, 3), "in_size": (9, 8)},
    {"weight": (1, 1, 4, 3), "in_size": (9, 8), "padding": 1},
    {"weight": (2, 3, 3, 3), "in_size": (7, 6)},
    {"weight": (3, 1, 3, 3), "in_size": (7, 6), "groups": 1, "padding": 1},
    {"weight": (4, 2, 3, 3), "in_size": (8, 6), "groups": 2, "stride": 2, "padding": 1},
    {"weight": (3, 2, 1, 1), "in_size": (6, 5)},
    {"weight": (2, 2, 3, 3), "in_size": (6, 6), "padding": 1, "padding_mode": "circular"},
]


def _operator(spec: dict[str, Any], dtype: torch.dtype) -> lsconv.Convolution:
    spec = dict(spec)
    return lsconv.Conv2d(torch.randn(spec.pop("weight"), dtype=F64).to(dtype), spec.pop("in_size"), **spec)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 1e-2, 0.5])
@pytest.mark.parametrize("spec", SHAPES)
def test_answers_are_those_of_the_dense_matrix(spec: dict[str, Any], damp: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    B = _operator(spec, dtype).H
    y = torch.randn(3, *B.out_shape, dtype=dtype)
    solution = lsconv.lstsq(B, y, damp=damp)
    D = B.to_dense().reshape(B.out_numel, B.in_numel).to(torch.promote_types(dtype, F64))
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    s = torch.where(s > 1e-6 * s[0], s / (s * s + damp * damp), 0)
    expected = (y.flatten(1).to(D.dtype) @ U.conj() * s) @ Vh.conj()
    assert bool(solution.converged.all())
    tolerance = 100 * direct_rtol(dtype) * float(s.max() * 1 / s[s > 0].min())
    torch.testing.assert_close(solution.x.flatten(1).to(D.dtype), expected, rtol=0,
                               atol=tolerance * float(expected.abs().max()))  # fmt: skip


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_the_plan_of_the_convolution_serves_its_adjoint(damp: float) -> None:
    A = lsconv.Conv2d(torch.randn(1, 1, 5, 5, dtype=F64), (40, 40))
    plan = route(A.H, damp)
    assert isinstance(plan, AdjointPlan)
    assert repr(plan).startswith("AdjointPlan(")
    y = torch.randn(A.in_shape, dtype=F64)
    v = torch.randn(A.out_shape, dtype=F64)
    torch.testing.assert_close((plan.apply(y) * v).sum(), (y * plan.adjoint(v)).sum(), rtol=1e-8, atol=1e-10)
    if damp:
        g = torch.randn(A.out_shape, dtype=F64)
        torch.testing.assert_close(
            A(A.H(plan.normal_solve(g))) + damp**2 * plan.normal_solve(g), g, rtol=1e-7, atol=1e-8
        )


def test_gradients_by_data_kernel_and_damp() -> None:
    weight = torch.randn(1, 1, 3, 3, dtype=F64, requires_grad=True)
    y = torch.randn(1, 6, 5, dtype=F64, requires_grad=True)
    damp = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def answer(weight: torch.Tensor, y: torch.Tensor, damp: torch.Tensor) -> torch.Tensor:
        return lsconv.lstsq(lsconv.Conv2d(weight, (6, 5)).H, y, damp=damp).x

    assert torch.autograd.gradcheck(answer, (weight, y, damp), atol=1e-6, fast_mode=True)


def test_the_adjoint_of_a_layer_is_tried_by_lsmr_and_handed_to_the_factors_of_the_layer() -> None:
    torch.manual_seed(0)
    A = lsconv.Conv2d(torch.randn(16, 16, 3, 3, dtype=F64), (12, 12), padding=1)
    damp = 0.01 * float(lsconv.norm(A))
    inverse = lsconv.pinv(A.H, damp=damp)
    assert isinstance(inverse.plan, LsmrThenBorderPlan)
    D = A.H.to_dense().reshape(A.in_numel, A.out_numel)
    normal = D.T @ D + damp**2 * torch.eye(A.out_numel, dtype=F64)
    for _ in range(4):
        y = torch.randn(A.in_shape, dtype=F64)
        solution = inverse.solve(y)
        assert bool(solution.converged)
        expected = torch.linalg.solve(normal, D.T @ y.flatten())
        torch.testing.assert_close(solution.x.flatten(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert inverse.plan.exhausted
    assert inverse.fallback is not None
    assert isinstance(inverse.fallback.plan, AdjointPlan)
    assert int(solution.iterations) == 0


def test_an_answer_within_the_tolerance_of_x_is_refined_where_its_gradient_is_not() -> None:
    torch.manual_seed(0)
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=F64), (16, 16), padding=1)
    damp = 1e-3 * float(lsconv.norm(A))
    plan = AdjointPlan(A.H, route(A, damp, method="border"), damp)
    exact = plan.plan.adjoint

    def inexact(v: torch.Tensor, *, rtol: float | None = None) -> torch.Tensor:
        x = exact(v, rtol=rtol)
        return x + 1e-9 * float(x.norm()) * torch.ones_like(x) / x.numel() ** 0.5

    plan.plan.adjoint = inexact  # type: ignore[method-assign]
    y = torch.randn(A.in_shape, dtype=F64)
    assert bool(plan.solve(y).converged)
