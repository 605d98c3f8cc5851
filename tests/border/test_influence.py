"""Traces, determinants and norms through the border against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.border.influence import ExactInfluence, Influence
from lsconv.errors import ArgumentError, MethodError, PlanMemoryError
from lsconv.operators.convolution import Convolution

DOUBLE = torch.float64


def dense(A: Convolution, damp: Tensor, y: Tensor) -> Influence:
    """Every quantity by dense linear algebra, from the singular value decomposition of the matrix of A."""
    M = A.to_dense()
    U, s, _ = torch.linalg.svd(M, full_matrices=False)
    mu = damp.unsqueeze(-1) ** 2
    f = s**2 / (s**2 + mu)
    flat = y.reshape(*y.shape[: y.ndim - len(A.out_shape)], -1, 1)
    c = (U.mH @ flat)[..., 0].abs()
    outside = (flat[..., 0].abs() ** 2).sum(-1) - (c**2).sum(-1)
    return Influence(
        trace=f.sum(-1),
        logdet=torch.log1p(s**2 / mu).sum(-1),
        residual_norm_sq=(((1 - f) * c) ** 2).sum(-1) + outside,
        penalty_norm_sq=((s * c / (s**2 + mu)) ** 2).sum(-1),
        penalty_slope=-2 * ((s * c) ** 2 / (s**2 + mu) ** 3).sum(-1),
    )


def assert_same(got: Influence, want: Influence, rtol: float = 1e-8) -> None:
    for name in ("trace", "logdet", "residual_norm_sq", "penalty_norm_sq", "penalty_slope"):
        value, reference = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(
            value, reference.expand_as(value), rtol=rtol, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


def case(ndim: int, size: tuple[int, ...], c_out: int, c_in: int, kernel: int, dtype: Any = DOUBLE, batch: Any = (),
         groups: int = 1, **options: Any) -> Convolution:  # fmt: skip
    weight = torch.randn(*batch, c_out, c_in // groups, *(kernel,) * ndim, dtype=dtype)
    return Convolution(weight, size, groups=groups, **options)


CASES: dict[str, Any] = {
    "valid": lambda: case(2, (9, 8), 1, 1, 3),
    "valid, wide": lambda: case(2, (7, 8), 2, 3, 3),
    "valid, tall": lambda: case(2, (7, 8), 3, 2, 3),
    "same": lambda: case(2, (6, 7), 2, 2, 3, padding=1),
    "same, tall": lambda: case(2, (6, 7), 3, 1, 3, padding=1),
    "full": lambda: case(2, (6, 5), 2, 2, 3, padding=2),
    "full, wide": lambda: case(2, (6, 5), 1, 2, 3, padding=2),
    "stride": lambda: case(2, (9, 8), 2, 1, 3, stride=2, padding=1),
    "stride beyond the kernel": lambda: case(1, (17,), 1, 1, 2, stride=3),
    "groups": lambda: case(2, (6, 7), 4, 2, 3, groups=2, padding=1),
    "dilation": lambda: case(1, (20,), 1, 1, 3, dilation=3, padding=2),
    "one dimension": lambda: case(1, (30,), 1, 1, 5),
    "three dimensions": lambda: case(3, (5, 4, 5), 1, 1, 2),
    "complex": lambda: case(2, (6, 7), 2, 2, 3, dtype=torch.complex128, padding=1),
    "kernel per batch item": lambda: case(2, (6, 7), 1, 1, 3, batch=(2,)),
    "kernel per batch item, groups": lambda: case(1, (12,), 2, 2, 3, batch=(2,), groups=2, padding=1),
    "circular": lambda: case(2, (6, 8), 2, 1, 3, padding=1, padding_mode="circular"),
    "circular, cropped": lambda: case(2, (6, 8), 1, 1, 3, padding=0, padding_mode="circular"),
    "circular, stride": lambda: case(2, (6, 8), 1, 1, 3, padding=1, stride=2, padding_mode="circular"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("damp", [1e-2, 0.3, 30.0])
def test_everything_equals_dense_algebra(name: str, damp: float) -> None:
    A = CASES[name]()
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=A.dtype)
    value = torch.tensor(damp, dtype=DOUBLE)
    assert_same(ExactInfluence(A).at(value, y, slope=True), dense(A, value, y))


@settings(max_examples=25)
@given(data=st.data())
def test_drawn_convolutions_equal_dense_algebra(data: Any, zero_padded_convolutions: Any) -> None:
    A = data.draw(zero_padded_convolutions())
    # outputs that read padding alone make an operator that is zero, and a relative accuracy of zero means nothing
    assume(bool(A.to_dense().flatten(-2).abs().amax(-1).min() > 0))
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=A.dtype)
    damp = torch.tensor(0.1, dtype=DOUBLE)
    assert_same(ExactInfluence(A).at(damp, y, slope=True), dense(A, damp, y))


@pytest.mark.parametrize("name", ["same", "kernel per batch item"])
def test_each_item_of_a_batch_has_its_own_damp(name: str) -> None:
    A = CASES[name]()
    damp = torch.tensor([[0.1, 1.0], [0.5, 0.02], [3.0, 0.3]], dtype=DOUBLE)
    y = torch.randn(3, 2, *A.out_shape, dtype=A.dtype)
    assert_same(ExactInfluence(A).at(damp, y, slope=True), dense(A, damp, y))


def test_a_leading_dimension_of_damps_shares_the_data() -> None:
    A = CASES["valid"]()
    damp = torch.logspace(-3, 1, 5, dtype=DOUBLE).reshape(5, 1)
    y = torch.randn(4, *A.out_shape, dtype=A.dtype)
    got = ExactInfluence(A).at(damp, y, slope=True)
    assert got.trace.shape == (5, 4)
    assert_same(got, dense(A, damp, y))


def test_blocks_in_chunks_are_the_blocks_at_once() -> None:
    A = CASES["groups"]()
    damp = torch.logspace(-3, 1, 5, dtype=DOUBLE)
    y = torch.randn(*A.out_shape, dtype=A.dtype)
    assert_same(ExactInfluence(A, work_bytes=1).at(damp, y, slope=True), dense(A, damp, y))


def test_the_trace_is_minus_the_derivative_of_the_determinant() -> None:
    A, step = CASES["same"](), 1e-4
    exact, damp = ExactInfluence(A), torch.tensor(0.3, dtype=DOUBLE)
    up, down = (exact.at(damp * (1 + s) ** 0.5).logdet for s in (step, -step))
    torch.testing.assert_close(exact.at(damp).trace, -(up - down) / (2 * step), rtol=1e-6, atol=0)


def test_float32_operators_are_traced_in_double() -> None:
    A = lsconv.Conv2d(torch.randn(1, 1, 3, 3), in_size=(9, 9))
    damp = torch.tensor(1e-3)
    exact = ExactInfluence(A.to(dtype=DOUBLE)).at(damp).trace
    torch.testing.assert_close(ExactInfluence(A).at(damp).trace, exact, rtol=1e-10, atol=0)


def test_an_operator_without_an_exact_trace_is_refused_by_name() -> None:
    weight = torch.randn(1, 1, 3, 3)
    with pytest.raises(MethodError, match="A: exact traces need"):
        ExactInfluence(lsconv.Conv2d(weight, in_size=(8, 8), padding=1, padding_mode="reflect"))
    with pytest.raises(PlanMemoryError, match="unknowns per block"):
        ExactInfluence(lsconv.Conv2d(weight, in_size=(64, 64)), max_unknowns=10)
    with pytest.raises(ArgumentError, match="damp"):
        ExactInfluence(lsconv.Conv2d(weight, in_size=(8, 8))).at(torch.zeros(()))
