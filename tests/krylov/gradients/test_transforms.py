"""Forward mode and torch.func: tangents against differences, vmap against a loop, and errors that name the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError

D = torch.float64
# torch itself announces the end of torch.jit.script when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]


def _convolution(w: Tensor) -> lsconv.Convolution:
    return lsconv.Conv1d(w, in_size=7)


def _tikhonov(w: Tensor, y: Tensor, damp: Tensor) -> Tensor:
    L = lsconv.Conv1d(w[..., :1, :, :2], in_size=7, padding=1)
    prior = torch.linspace(0, 1, 7, dtype=D).expand(1, 7) * damp.sum()
    return lsconv.tikhonov(_convolution(w), y, damp, L=L, x_prior=prior).x


ANSWERS: dict[str, Answer] = {
    "lstsq": lambda w, y, damp: lsconv.lstsq(_convolution(w), y, damp=damp).x,
    "lsqr": lambda w, y, damp: lsconv.lsqr(_convolution(w), y, damp=damp, rtol=1e-13).x,
    "lsmr": lambda w, y, damp: lsconv.lsmr(_convolution(w), y, damp=damp, rtol=1e-13).x,
    "undamped, tall": lambda w, y, damp: lsconv.lsmr(_convolution(w), y, rtol=1e-13).x,
    "undamped, wide": lambda w, y, damp: lsconv.lsmr(_convolution(w[:1]), y[..., :1, :], rtol=1e-13).x,
    "tikhonov": _tikhonov,
}
every_answer = pytest.mark.parametrize("name", ANSWERS)


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 1, 3, dtype=D), torch.randn(2, 2, 5, dtype=D), torch.tensor([0.4, 1.3], dtype=D)


@every_answer
def test_forward_mode_agrees_with_differences_and_with_reverse_mode(name: str) -> None:
    answer, inputs = ANSWERS[name], _inputs()
    followed = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(answer, followed, check_forward_ad=True, fast_mode=True)
    forward = torch.func.jacfwd(answer, argnums=(0, 1, 2))(*inputs)
    reverse = torch.func.jacrev(answer, argnums=(0, 1, 2))(*inputs)
    for one, other in zip(forward, reverse, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_forward_mode_of_a_pseudo_inverse_and_of_a_square_method() -> None:
    w, y, _ = _inputs()
    Ap = lsconv.pinv(_convolution(w), damp=0.5)
    tangent = torch.randn_like(y)
    torch.testing.assert_close(torch.func.jvp(Ap, (y,), (tangent,)), (Ap(y), Ap(tangent)))
    matrix, b = torch.randn(4, 4, dtype=D, requires_grad=True), torch.randn(4, dtype=D, requires_grad=True)

    def square(S: Tensor, b: Tensor) -> Tensor:
        return lsconv.cg(S @ S.mT + torch.eye(4, dtype=D), b, rtol=1e-14).x

    assert torch.autograd.gradcheck(square, (matrix, b), check_forward_ad=True, fast_mode=True)


def test_hessian_forward_over_reverse() -> None:
    w, y, damp = _inputs()

    def loss(damp: Tensor) -> Tensor:
        return ANSWERS["lstsq"](w, y, damp).pow(2).sum()

    expected = torch.autograd.functional.hessian(loss, damp)
    torch.testing.assert_close(torch.func.hessian(loss)(damp), expected)


@every_answer
def test_vmap_over_everything_equals_a_loop(name: str) -> None:
    answer, (w, y, damp) = ANSWERS[name], _inputs()
    stacked = [torch.stack([t + 0.1 * k * (k + t.sign()) for k in range(3)]) for t in (w, y, damp)]

    def loss(w: Tensor, y: Tensor, damp: Tensor) -> Tensor:
        return answer(w, y, damp).pow(3).sum()

    for mapped in [(None, 0, None), (None, None, 0), (0, None, None), (0, 0, 0)]:
        choose = [whole if dim == 0 else one for whole, one, dim in zip(stacked, (w, y, damp), mapped, strict=True)]
        if mapped == (None, None, 0) and name.startswith("undamped"):
            continue
        items = [[t[k] if dim == 0 else t for t, dim in zip(choose, mapped, strict=True)] for k in range(3)]
        found = torch.func.vmap(answer, in_dims=mapped)(*choose)
        torch.testing.assert_close(found, torch.stack([answer(*item) for item in items]), rtol=1e-8, atol=1e-9)
        gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=mapped)(*choose)
        expected = [torch.func.grad(loss, argnums=(0, 1, 2))(*item) for item in items]
        for found, wanted in zip(gradients, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-7, atol=1e-8)


def test_gradient_through_vmap_and_two_levels_of_vmap() -> None:
    w, y, _ = _inputs()
    weights, damps = torch.stack([w, 2 * w, w + 1]), torch.tensor([0.3, 0.7], dtype=D)

    def answers(weights: Tensor) -> Tensor:
        inner = torch.func.vmap(lambda w, d: ANSWERS["lstsq"](w, y, d), in_dims=(None, 0))
        found: Tensor = torch.func.vmap(inner, in_dims=(0, None))(weights, damps)
        return found

    def loop(weights: Tensor) -> Tensor:
        return torch.stack([torch.stack([ANSWERS["lstsq"](w, y, d) for d in damps]) for w in weights])

    torch.testing.assert_close(answers(weights), loop(weights))
    g = torch.randn(3, 2, 2, 1, 7, dtype=D)
    found, expected = (torch.func.grad(lambda ws, f=f: (f(ws) * g).sum())(weights) for f in (answers, loop))
    torch.testing.assert_close(found, expected)


def test_what_vmap_cannot_map_says_what_to_do_instead() -> None:
    w, y, damp = _inputs()
    with pytest.raises(MethodError, match=r"pinv: vmap hides .* use lstsq inside vmap"):
        torch.func.vmap(lambda d: lsconv.pinv(_convolution(w), damp=d)(y))(damp)

    def scaled(scale: Tensor) -> Tensor:
        A = lsconv.FromFunctions((4,), (4,), lambda x, s: s * x, lambda x, s: s * x, dtype=D, parameters=(scale,))
        return lsconv.lsqr(A, torch.ones(4, dtype=D)).x

    with pytest.raises(MethodError, match="only y, damp and x_prior can be mapped over"):
        torch.func.vmap(scaled)(torch.rand(3, 4, dtype=D) + 1)
    with pytest.raises(MethodError, match="positive in every item or zero in every item"):
        torch.func.vmap(lambda d: lsconv.lstsq(_convolution(w), y, damp=d).x)(torch.tensor([0.0, 0.5], dtype=D))
