"""Implicit gradients of the Krylov methods: exactness, memory, failures heard of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv

D = torch.float64


@pytest.mark.parametrize("name", ["cg", "minres", "gmres"])
def test_square_methods_have_first_and_second_derivatives(name: str) -> None:
    matrix, b = torch.randn(4, 4, dtype=D), torch.randn(2, 4, dtype=D)

    def answer(S: Tensor, b: Tensor) -> Tensor:
        return getattr(lsconv, name)(S @ S.T + 3 * torch.eye(4, dtype=D), b, rtol=1e-13).x

    assert torch.autograd.gradcheck(answer, (matrix.requires_grad_(), b.requires_grad_()))
    assert torch.autograd.gradgradcheck(answer, (matrix, b))


@pytest.mark.parametrize("name", ["cgls", "craig", "lsmr"])
def test_wide_operators_follow_golub_and_pereyra(name: str) -> None:
    matrix, b = torch.randn(3, 5, dtype=D, requires_grad=True), torch.randn(2, 3, dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda A, b: getattr(lsconv, name)(A, b, rtol=1e-12).x, (matrix, b))


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
