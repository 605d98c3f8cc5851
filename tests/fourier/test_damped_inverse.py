"""Damped inverses by factors of Gram matrices against dense least squares with the rows of the damping appended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.fourier.circulant import FourierPlan
from lsconv.operators.convolution import Conv1d, Conv2d, Convolution
from lsconv.operators.dtypes import double

CIRCULAR: dict[str, Any] = {"padding_mode": "circular"}
F64 = torch.float64


def _operator(kind: str, dtype: torch.dtype = F64) -> Convolution:
    """Square, tall and wide matrices per frequency, summed from taps (1-D) and multiplied from symbols (2-D)."""
    torch.manual_seed(0)
    if kind == "grouped":
        return Conv1d(torch.randn(12, 6, 3, dtype=dtype), 16, padding=1, groups=2, **CIRCULAR)
    if kind == "strided":
        return Conv2d(torch.randn(6, 3, 3, 3, dtype=dtype), (8, 6), stride=2, padding=1, **CIRCULAR)
    if kind == "kernel per item":
        return Conv1d(torch.randn(3, 6, 5, 3, dtype=dtype), 16, padding=1, **CIRCULAR)
    if kind == "dilated":
        return Conv1d(torch.randn(6, 6, 3, dtype=dtype), 21, padding=2, dilation=2, **CIRCULAR)
    rows, columns = {"square": (6, 6), "tall": (7, 5), "wide": (5, 7)}[kind.split()[0]]
    if kind.endswith("2-D"):
        return Conv2d(torch.randn(rows, columns, 3, 2, dtype=dtype), (6, 5), padding="same", **CIRCULAR)
    return Conv1d(torch.randn(rows, columns, 3, dtype=dtype), 16, padding=1, **CIRCULAR)


def _expected(A: Convolution, damp: float, y: Tensor) -> Tensor:
    D = A.to(dtype=double(A.dtype)).to_dense()
    below = damp * torch.eye(A.in_numel, dtype=D.dtype).expand(*A.batch_shape, -1, -1)
    data = y.to(D.dtype).flatten(-len(A.out_shape))
    data = torch.cat([data, data.new_zeros(*data.shape[:-1], A.in_numel)], -1)
    x = torch.linalg.pinv(torch.cat([D, below], -2)) @ data.unsqueeze(-1)
    return x.reshape(*data.shape[:-1], *A.in_shape)


KINDS = ("square", "tall", "wide", "square 2-D", "tall 2-D", "wide 2-D", "grouped", "strided", "kernel per item",
         "dilated")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damp", [1e-4, 0.3])
def test_factors_and_the_inverses_that_replace_them_solve_damped_least_squares(kind: str, damp: float) -> None:
    A = _operator(kind)
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=F64)
    expected, plan = _expected(A, damp, y), FourierPlan(A, damp)
    held = []
    for _ in range(3):
        held.append(plan.damped is not None)
        torch.testing.assert_close(plan.apply(y), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    held.append(plan.damped is not None)
    assert held == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_adjoints_of_factors_and_of_inverses_are_the_conjugate_transposes(kind: str) -> None:
    A = _operator(kind)
    y, x = (torch.randn(*A.batch_shape, *shape, dtype=F64) for shape in (A.out_shape, A.in_shape))
    plan = FourierPlan(A, 1e-3)
    product = float((plan.apply(y) * x).sum())
    for _ in range(3):  # the second of them makes the inverses
        back = plan.adjoint(x)
        assert float((y * back).sum()) == pytest.approx(product, rel=1e-9)
    assert plan.damped is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", ["square", "wide 2-D"])
def test_answers_in_other_dtypes_are_rounded_once(dtype: torch.dtype, kind: str) -> None:
    A = _operator(kind, dtype)
    y = torch.randn(4, *A.out_shape, dtype=dtype)
    expected = _expected(A, 1e-3, y)
    eps = torch.finfo(dtype).eps
    error = (FourierPlan(A, 1e-3).apply(y) - expected).abs().max() / expected.abs().max()
    assert float(error) < (eps if dtype.itemsize < 16 else 1e-10)


@pytest.mark.parametrize("kind", ["square", "tall", "wide"])
def test_refinement_recovers_what_the_factors_of_an_ill_conditioned_operator_lose(kind: str) -> None:
    """The condition of the normal equations is 1e10; the answer has the accuracy of that of A, 1e5."""
    A = _operator(kind)
    scales = torch.logspace(0, -7, max(A.c_in, A.c_out), dtype=F64)  # of those channels that the products sum over
    A = A.with_parameters([A.weight * (scales[:, None] if kind == "wide" else scales[:, None, None])])
    y = A(torch.randn(A.in_shape, dtype=F64))
    damp = 1e-5 * float(torch.linalg.matrix_norm(A.to_dense(), 2))
    expected, plan = _expected(A, damp, y), FourierPlan(A, damp)
    assert plan.damped is not None
    assert plan.damped.steps is not None
    assert plan.damped.steps >= 2

    def error() -> float:
        return float((plan.apply(y) - expected).norm() / expected.norm())

    refined = error()
    plan.damped.steps = 0
    assert refined < 1e-10 < error()


def test_one_damping_per_item_is_one_factorisation_per_item() -> None:
    A = _operator("wide")
    damps = torch.tensor([[1e-3], [0.1], [2.0]], dtype=F64)
    y = torch.randn(3, 2, *A.out_shape, dtype=F64)
    x = FourierPlan(A, damps).apply(y)
    for item, damp in enumerate(damps.flatten().tolist()):
        torch.testing.assert_close(x[item], _expected(A, damp, y[item]), rtol=0, atol=1e-10)


def test_damping_too_small_for_the_factors_is_left_to_singular_values() -> None:
    A = _operator("square")
    y = torch.randn(A.out_shape, dtype=F64)
    plan = FourierPlan(A, 1e-7)
    assert plan.damped is None
    torch.testing.assert_close(plan.apply(y), _expected(A, 1e-7, y), rtol=0, atol=1e-8)


def test_as_many_answers_as_rows_make_the_inverses_at_once() -> None:
    A = _operator("square")
    plan = FourierPlan(A, 0.1)
    factors = plan.nbytes
    assert factors == (16 * 6 + 4) * 6 * 9  # rfft keeps 9 of 16 matrices, with their pivots
    plan.apply(torch.randn(6, *A.out_shape, dtype=F64))
    assert plan.damped is None
    assert plan.nbytes == 16 * 6 * 6 * 9


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("damp", [1e-5, 1e-2, 1.0])
def test_lstsq_certifies_answers_for_a_layer_of_nearly_dependent_channels(dtype: torch.dtype, damp: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 8, 3, 3, dtype=F64)
    weight[1] = weight[0] + 1e-6 * weight[1]
    A = Conv2d(weight.to(dtype), (6, 5), padding=1, **CIRCULAR)
    y = torch.randn(A.out_shape, dtype=dtype)
    solution = lsconv.lstsq(A, y, damp=damp)
    assert bool(solution.converged)
    expected = _expected(A, damp, y)
    # an inconsistent part of y is amplified by the square of the condition, in the dense answer too
    assert float((solution.x - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1e-8)


def test_gradients_of_a_damped_answer_are_those_of_the_dense_one() -> None:
    A = _operator("wide")
    weight = A.weight.clone().requires_grad_()
    y = torch.randn(A.out_shape, dtype=F64, requires_grad=True)

    def answer(weight: Tensor, y: Tensor) -> Tensor:
        return lsconv.lstsq(A.with_parameters([weight]), y, damp=0.1).x

    # the third answer of a plan differs from the second by rounding
    assert torch.autograd.gradcheck(answer, (weight, y), atol=1e-6, nondet_tol=1e-9, fast_mode=True)
