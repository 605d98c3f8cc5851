"""Solves inside functions that torch.compile compiles: the same numbers, and no iteration is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv

ANSWERS: dict[str, Callable[[lsconv.LinearOperator, Tensor, Tensor], Tensor]] = {
    "lsmr": lambda A, y, damp: lsconv.lsmr(A, y, damp=damp).x,
    "lstsq": lambda A, y, damp: lsconv.lstsq(A, y, damp=damp).x,
    "pinv": lambda A, y, damp: lsconv.pinv(A, damp=damp)(y),
    "pinv.H": lambda A, y, damp: lsconv.pinv(A, damp=damp).H(y.mean() + torch.ones(A.in_shape)),
    "pinv.solve": lambda A, y, damp: lsconv.pinv(A, damp=damp).solve(y).x,
    "tikhonov": lambda A, y, damp: lsconv.tikhonov(A, y, damp, L=lsconv.Gradient(A.in_shape, ndim=2)).x,
}


@pytest.mark.parametrize(
    "name", [n if n in ("lsmr", "pinv") else pytest.param(n, marks=pytest.mark.slow) for n in ANSWERS]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # by torch
def test_compiled_around_a_solve_nothing_changes(name: str) -> None:
    from torch._dynamo import utils

    def loss(weight: Tensor, y: Tensor, damp: Tensor) -> Tensor:
        A = lsconv.Conv2d(2 * weight, in_size=(6, 6))
        return ANSWERS[name](A, y.sin(), damp.abs()).square().sum()

    inputs = [t.requires_grad_() for t in (torch.randn(2, 1, 3, 3), torch.randn(3, 2, 4, 4), torch.tensor(0.5))]
    torch._dynamo.reset()
    utils.counters.clear()
    compiled: Any = torch.compile(loss, backend="aot_eager")(*inputs)
    expected = loss(*inputs)
    assert torch.equal(compiled, expected)
    found = torch.autograd.grad(compiled, inputs)
    for got, wanted in zip(found, torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert 0 < utils.counters["frames"]["total"] < 50  # a traced iteration alone has as many
