"""Gradients of lstsq, pinv and tikhonov against autograd through dense float64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from tests.oracles import dense_tikhonov

D = torch.float64
SETTINGS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "valid, tall": ((2, 1, 3, 3), {}),
    "valid, wide": ((1, 2, 3, 3), {}),
    "same": ((2, 2, 3, 3), {"padding": 1}),
    "full": ((1, 1, 3, 3), {"padding": 2}),
    "circular": ((2, 2, 3, 3), {"padding": 1, "padding_mode": "circular"}),
    "groups, dilation": ((4, 1, 3, 3), {"groups": 2, "dilation": 2}),
    "stride, 1-D": ((3, 1, 3), {"stride": 2}),
    "kernel per item": ((2, 2, 1, 3, 3), {}),
}


def _draw(name: str) -> tuple[lsconv.Convolution, Tensor]:
    shape, options = SETTINGS[name]
    weight = torch.randn(shape, dtype=D)
    size = (6, 6) if shape[-2:] == (3, 3) else (7,)
    weight[(..., *(1 for _ in size))] += 3  # away from a change of rank
    A = lsconv.Convolution(weight.requires_grad_(), size, **options)
    return A, torch.randn(2, *A.out_shape, dtype=D, requires_grad=True)


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_equal_those_of_the_dense_formula(name: str, damped: bool) -> None:
    A, y = _draw(name)
    damp = torch.tensor([0.5, 2.0], dtype=D, requires_grad=True) if damped else None
    given: dict[str, Any] = {"damp": damp} if damped else {}
    answers = {
        "lstsq": lsconv.lstsq(A, y, **given).x,
        "pinv": lsconv.pinv(A, **given)(y),
        "lsqr": lsconv.lsqr(A, y, rtol=1e-12, **given).x,
        "lsmr": lsconv.lsmr(A, y, rtol=1e-12, **given).x,
    }
    inputs = [y, A.weight, *given.values()]
    g = torch.randn(2, *A.in_shape, dtype=D)
    expected = torch.autograd.grad(dense_tikhonov(A, y, 0.0 if damp is None else damp), inputs, g)
    for x in answers.values():
        for found, wanted in zip(torch.autograd.grad(x, inputs, g), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7 * float(wanted.abs().max()))


@pytest.mark.slow
def test_first_and_second_derivatives_of_tikhonov_with_penalty_and_prior() -> None:
    def answer(w: Tensor, y: Tensor, damp: Tensor, kernel: Tensor, prior: Tensor) -> Tensor:
        L = lsconv.Conv1d(kernel, in_size=5, padding=1)
        return lsconv.tikhonov(lsconv.Conv1d(w, in_size=5), y, damp, L=L, x_prior=prior).x

    shapes = [(2, 1, 3), (2, 2, 3), (2,), (1, 1, 2), (2, 1, 5)]
    inputs = [torch.randn(shape, dtype=D) for shape in shapes]
    inputs[2] = inputs[2].abs() + 0.3
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(answer, inputs, fast_mode=True)


def test_adjoint_of_the_pseudo_inverse_is_differentiable() -> None:
    w = torch.randn(2, 1, 3, dtype=D, requires_grad=True)
    v = torch.randn(2, 1, 6, dtype=D, requires_grad=True)
    damp = torch.tensor(0.6, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, v, d: lsconv.pinv(lsconv.Conv1d(w, in_size=6), damp=d).H(v), (w, v, damp), fast_mode=True
    )


def test_zero_tiny_and_nan_cotangents() -> None:
    A = lsconv.Conv2d(torch.randn(2, 1, 3, 3).requires_grad_(), in_size=(6, 6))
    y = torch.randn(2, *A.out_shape, requires_grad=True)
    x = lsconv.lstsq(A, y, damp=0.5).x
    one = torch.randn_like(x)

    def grads(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(x, (y, A.weight), g, retain_graph=True)

    assert not any(t.any() for t in grads(torch.zeros_like(x)))
    for tiny, full in zip(grads(1e-30 * one), grads(one), strict=True):
        torch.testing.assert_close(tiny.double() * 1e30, full.double(), rtol=1e-4, atol=1e-5)
    spoiled = one.clone()
    spoiled[0, 0, 0, 0] = torch.nan
    assert grads(spoiled)[0][0].isnan().all()
    torch.testing.assert_close(grads(spoiled)[0][1], grads(one)[0][1])


def test_transforms_agree_with_autograd() -> None:
    w, y = torch.randn(2, 1, 3, 3, dtype=D), torch.randn(3, 2, 4, 4, dtype=D)
    A = lsconv.Conv2d(w, in_size=(6, 6))
    Ap = lsconv.pinv(A, damp=0.7)
    torch.testing.assert_close(torch.func.vmap(Ap)(y), Ap(y))
    found = torch.func.jacrev(Ap)(y[0])
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(Ap, y[0]))
    found = torch.func.vmap(torch.func.grad(lambda y: Ap(y).pow(2).sum()))(y)
    torch.testing.assert_close(found, 2 * Ap.H(Ap(y)))
