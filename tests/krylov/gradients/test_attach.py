"""Implicit gradients of the Krylov methods: exactness, memory, failures heard of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError

D = torch.float64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cg", "minres", "gmres"])
def test_square_methods_have_first_and_second_derivatives(name: str) -> None:
    matrix, b = torch.randn(4, 4, dtype=D), torch.randn(2, 4, dtype=D)

    def answer(S: Tensor, b: Tensor) -> Tensor:
        return getattr(lsconv, name)(S @ S.T + 3 * torch.eye(4, dtype=D), b, rtol=1e-13).x

    assert torch.autograd.gradcheck(answer, (matrix.requires_grad_(), b.requires_grad_()), fast_mode=True)
    assert torch.autograd.gradgradcheck(answer, (matrix, b), fast_mode=True)


@pytest.mark.parametrize("name", ["cgls", "craig", "lsmr"])
def test_wide_operators_follow_golub_and_pereyra(name: str) -> None:
    matrix, b = torch.randn(3, 5, dtype=D, requires_grad=True), torch.randn(2, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, b: getattr(lsconv, name)(A, b, rtol=1e-12).x, (matrix, b), fast_mode=True)


def test_parameters_of_user_functions_receive_gradients() -> None:
    scale, b = torch.rand(4, dtype=D) + 1, torch.randn(4, dtype=D)

    def answer(scale: Tensor, b: Tensor) -> Tensor:
        A = lsconv.FromFunctions((4,), (4,), lambda x, s: s * x, lambda y, s: s * y, dtype=D, parameters=(scale,))
        return lsconv.lsqr(A, b, rtol=1e-13).x

    found = torch.autograd.functional.jacobian(answer, (scale, b))
    torch.testing.assert_close(found[0], torch.diag(-b / scale**2))
    torch.testing.assert_close(found[1], torch.diag(1 / scale))


@pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
def test_memory_does_not_depend_on_the_iterations() -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3).requires_grad_(), in_size=(16, 16), padding=1)
    y, saved = torch.randn(A.out_shape, requires_grad=True), []
    for limit in (10, 1000):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            lsconv.lsmr(A, y, rtol=0.0, max_iter=limit)
        saved.append(kept)
    assert saved[0] == saved[1]
    assert len(saved[0]) <= 5


def test_backward_solves_that_fail_are_heard_of() -> None:
    A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0, 1.0]]]).requires_grad_(), in_size=200, padding=1)
    y = A(torch.zeros(1, 200)).detach().requires_grad_()  # nothing to do forward, much to do backward
    heard: list[str] = []
    previous = lsconv.set_backward_failure_hook(heard.append)
    try:
        lsconv.lsmr(A, y, max_iter=3).x.backward(torch.randn(1, 200))
    finally:
        lsconv.set_backward_failure_hook(previous)
    assert heard
    assert "did not converge" in heard[0]


LEAST_SQUARES = ["lsqr", "lsmr", "cgls", "craig"]


def _start_and_pseudo_inverse(A: Tensor, y: Tensor, x0: Tensor) -> Tensor:
    pinv = torch.linalg.pinv(A)
    return x0 + (pinv @ (y - x0 @ A.mT)[..., None])[..., 0]


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_a_start_that_stays_in_the_answer_has_a_gradient(name: str) -> None:
    A, y = torch.randn(3, 5, dtype=D, requires_grad=True), torch.randn(2, 3, dtype=D, requires_grad=True)
    x0 = torch.randn(2, 5, dtype=D, requires_grad=True)
    g = torch.randn(2, 5, dtype=D)
    expected = torch.autograd.grad(_start_and_pseudo_inverse(A, y, x0), (A, y, x0), g)
    answers = [getattr(lsconv, name)(A, y, x0=x0, rtol=1e-13).x]
    answers.append(lsconv.lstsq(lsconv.Dense(A), y, method=name, x0=x0, rtol=1e-13).x)
    answers.append(lsconv.pinv(lsconv.Dense(A), method=name).solve(y, x0=x0, rtol=1e-13).x)
    for x in answers:
        for got, wanted in zip(torch.autograd.grad(x, (A, y, x0), g), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)


def test_a_start_matters_only_to_the_items_without_damping() -> None:
    A, y = torch.randn(3, 5, dtype=D, requires_grad=True), torch.randn(2, 3, dtype=D, requires_grad=True)
    x0, g = torch.randn(2, 5, dtype=D, requires_grad=True), torch.randn(2, 5, dtype=D)
    x = lsconv.lsmr(A, y, damp=torch.tensor([0.0, 0.5], dtype=D), x0=x0, rtol=1e-13).x
    gram = A @ A.mT + 0.25 * torch.eye(3, dtype=D)
    dense = torch.stack([_start_and_pseudo_inverse(A, y, x0)[0], A.mT @ torch.linalg.solve(gram, y[1])])
    pairs = zip(*(torch.autograd.grad(t, (A, y, x0), g) for t in (x, dense)), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    assert not lsconv.lsmr(A.detach(), y.detach(), damp=0.5, x0=x0).x.requires_grad


def test_damping_of_zero_has_the_gradient_zero() -> None:
    # x depends on damp^2
    A, y, damp = torch.randn(3, 5, dtype=D), torch.randn(2, 3, dtype=D), torch.zeros(2, dtype=D, requires_grad=True)
    for x in (lsconv.lsmr(A, y, damp=damp).x, lsconv.lstsq(A, y, damp=damp).x, lsconv.pinv(A, damp=damp)(y)):
        (found,) = torch.autograd.grad(x.sum(), damp)
        assert found.tolist() == [0.0, 0.0]


def _positive(size: int) -> lsconv.LinearOperator:
    root = torch.randn(size, size, dtype=D)
    return lsconv.Dense(root @ root.mT + torch.eye(size, dtype=D))


@pytest.mark.parametrize("name", ["lsqr", "lsmr", "cgls"])
def test_preconditioners_that_only_speed_up_leave_the_gradient_alone(name: str) -> None:
    for shape, options in (((3, 5), {"M": _positive(3)}), ((5, 3), {"N": _positive(3)})):
        A, y = torch.randn(shape, dtype=D, requires_grad=True), torch.randn(shape[0], dtype=D, requires_grad=True)
        x = getattr(lsconv, name)(A, y, rtol=1e-12, **options).x
        dense, g = torch.linalg.pinv(A) @ y, torch.randn_like(x)
        for got, wanted in zip(*(torch.autograd.grad(t, (A, y), g) for t in (x, dense)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["lsqr", "lsmr", "cgls"])
@pytest.mark.parametrize("side", ["M", "N"])
@pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")  # the audit knows the plain problem only
def test_preconditioners_that_choose_the_answer_have_a_gradient_by_the_data_only(name: str, side: str) -> None:
    rows, columns = (5, 3) if side == "M" else (3, 5)
    A, y, P = torch.randn(rows, columns, dtype=D), torch.randn(rows, dtype=D, requires_grad=True), _positive(5)
    weight, g = P.to_dense(), torch.randn(columns, dtype=D)
    if side == "M":
        inverse = torch.linalg.solve(A.mT @ weight @ A, A.mT @ weight)
    else:
        inverse = weight @ A.mT @ torch.linalg.inv(A @ weight @ A.mT)
    x = getattr(lsconv, name)(A, y, rtol=1e-12, **{side: P}).x
    torch.testing.assert_close(torch.autograd.grad(x, y, g)[0], inverse.mT @ g, rtol=1e-8, atol=1e-9)
    x = getattr(lsconv, name)(A.requires_grad_(), y, rtol=1e-12, **{side: P}).x
    with pytest.raises(MethodError, match=f"{side}: without damping .* damp > 0"):
        torch.autograd.grad(x, A, g)
    x = lsconv.lstsq(lsconv.Dense(A), y, method=name, preconditioner=P, rtol=1e-12).x
    with pytest.raises(MethodError, match=f"{side}: without damping .* damp > 0"):
        torch.autograd.grad(x, A, g)
