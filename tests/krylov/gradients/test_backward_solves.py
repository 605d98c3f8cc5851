"""Backward solves by every path: cotangents at the edge of the range, the forward's tolerance, failures, warnings."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border import outer_iteration as module
from lsconv.errors import ConvergenceWarning
from lsconv.krylov.gradients import backward_solves
from lsconv.krylov.loop.options import Options

D = torch.float64


def _conv(w: Tensor, **options: Any) -> lsconv.Convolution:
    return lsconv.Conv2d(w, in_size=(6, 6), **options)


PATHS: dict[str, Callable[[Tensor], tuple[lsconv.LinearOperator, Callable[[Any, Tensor], Tensor]]]] = {
    "border, outputs": lambda w: (_conv(w[:1]), lambda A, y: lsconv.lstsq(A, y, damp=0.5, method="border").x),
    "border, inputs": lambda w: (_conv(w, padding=2), lambda A, y: lsconv.lstsq(A, y, damp=0.5, method="border").x),
    "normal": lambda w: (_conv(w), lambda A, y: lsconv.lstsq(A, y, damp=0.5, method="normal").x),
    "matrix": lambda w: (_conv(w, stride=3), lambda A, y: lsconv.lstsq(A, y, damp=0.5, method="matrix").x),
    "folded": lambda w: (_conv(w.reshape(6, 1, 3, 1)), lambda A, y: lsconv.lstsq(A, y, damp=0.5).x),
    "border, undamped": lambda w: (_conv(w, padding=2), lambda A, y: lsconv.lstsq(A, y, method="border").x),
    "fourier": lambda w: (
        _conv(w, padding=1, padding_mode="circular"),
        lambda A, y: lsconv.lstsq(A, y, damp=0.5).x,
    ),
    "stacked": lambda w: (
        _conv(w),
        lambda A, y: lsconv.tikhonov(A, y, 0.5, L=lsconv.Gradient((1, 6, 6), ndim=2, dtype=w.dtype)).x,
    ),
    "stacked, LSMR": lambda w: (
        _conv(w, padding=1, padding_mode="reflect"),
        lambda A, y: lsconv.tikhonov(A, y, 0.5, L=lsconv.Laplacian((1, 6, 6), ndim=2, dtype=w.dtype)).x,
    ),
    "lsqr": lambda w: (_conv(w), lambda A, y: lsconv.lsqr(A, y, damp=0.5).x),
    "lsmr": lambda w: (_conv(w), lambda A, y: lsconv.lsmr(A, y, damp=0.5).x),
    "lsmr, undamped": lambda w: (_conv(w, padding=2), lambda A, y: lsconv.lsmr(A, y).x),
    "lsmr, undamped, wide": lambda w: (_conv(w[:1]), lambda A, y: lsconv.lsmr(A, y).x),
    "cg": lambda w: (_conv(w, padding=1).H @ _conv(w, padding=1), lambda A, y: lsconv.cg(A, y).x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", PATHS)
def test_zero_tiny_and_nan_cotangents(path: str, dtype: torch.dtype) -> None:
    weight = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    weight[:, :, 1, 1] += 3
    A, solve = PATHS[path](weight.requires_grad_())
    y = torch.randn(2, *A.out_shape, dtype=dtype, requires_grad=True)
    x = solve(A, y)
    one = torch.randn_like(x)

    def gradients(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(x, (y, weight), g, retain_graph=True)

    full = gradients(one)
    assert not any(bool(t.any()) for t in gradients(torch.zeros_like(x)))
    for tiny, whole in zip(gradients(2.0**-100 * one), full, strict=True):  # 8e-31, and no rounding from the scaling
        torch.testing.assert_close(2.0**100 * tiny.double(), whole.double(), rtol=1e-6, atol=1e-6)
    spoiled = one.clone()
    spoiled[0].view(-1)[0] = torch.nan
    for_y, for_weight = gradients(spoiled)
    assert bool(for_y[0].isnan().all())
    torch.testing.assert_close(for_y[1], full[0][1])
    assert bool(for_weight[0].isnan().all())
    zero_and_one = one.clone()
    zero_and_one[0] = 0
    assert not gradients(zero_and_one)[0][0].any()


@pytest.mark.parametrize("method", ["lsqr", "lsmr", "cgls"])
def test_backward_takes_over_the_tolerance_of_a_krylov_method(method: str) -> None:
    class Counting(lsconv.FromFunctions):
        """A matrix whose applications are counted."""

    counts: list[int] = []
    matrix = torch.diag(torch.logspace(0, -2, 60, dtype=D))

    def apply(x: Tensor) -> Tensor:
        counts.append(1)
        return x @ matrix.mT

    A = Counting((60,), (60,), apply, lambda y: y @ matrix, dtype=D)
    spent = {}
    for rtol in (1e-3, 1e-12):
        y = torch.randn(60, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x = getattr(lsconv, method)(A, y, damp=1e-3, rtol=rtol).x
        counts.clear()
        (found,) = torch.autograd.grad(x, y, torch.ones(60, dtype=D))
        spent[rtol] = len(counts)
        expected = matrix @ torch.linalg.solve(matrix @ matrix + 1e-6 * torch.eye(60, dtype=D), torch.ones(60, dtype=D))
        assert (found - expected).norm() <= 1e4 * rtol * expected.norm()
    assert spent[1e-3] < 0.7 * spent[1e-12]


@pytest.mark.usefixtures("iterated")
@pytest.mark.parametrize("path", ["border, outputs", "border, inputs", "stacked"])
def test_backward_takes_over_the_tolerance_of_a_direct_method(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    run = module.outer_iteration
    monkeypatch.setattr(module, "outer_iteration", lambda e: (asked.append(e.tolerances.rtol), run(e))[1])
    A, _ = PATHS[path](torch.randn(2, 1, 3, 3, dtype=D))
    y = torch.randn(A.out_shape, dtype=D, requires_grad=True)
    L = lsconv.Gradient((1, 6, 6), ndim=2, dtype=D) if path == "stacked" else None
    lsconv.tikhonov(A, y, 0.5, L=L, rtol=1e-3, method="border").x.sum().backward()
    forward, *rest = asked
    assert forward == 1e-3
    assert rest
    assert all(1e-5 < rtol <= 1e-3 for rtol in rest)  # border on outputs: times damp / norm


@pytest.mark.usefixtures("iterated")
def test_failures_of_every_kind_of_backward_solve_reach_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    previous = lsconv.set_backward_failure_hook(heard.append)
    try:
        for path in ("border, outputs", "border, inputs", "border, undamped", "stacked", "stacked, LSMR", "lsmr"):
            A, solve = PATHS[path](torch.randn(2, 1, 3, 3, dtype=D))
            y = torch.randn(A.out_shape, dtype=D, requires_grad=True)
            x = solve(A, y)
            with monkeypatch.context() as patch:
                patch.setattr("lsconv.border.outer_iteration._PATIENCE", 0)
                patch.setattr(backward_solves, "_SLACK", 0)
                options = Options.of
                patch.setattr(Options, "of", lambda *a, of=options, **o: of(*a, **{**o, "max_iter": 1}))
                heard.clear()
                x.backward(torch.randn_like(x))
            # a small stack is decomposed where the iteration fails
            assert bool(heard) == (path != "stacked, LSMR"), path
            assert all(text.startswith("backward solve: ") and "did not converge" in text for text in heard)
    finally:
        lsconv.set_backward_failure_hook(previous)


@pytest.mark.parametrize("through", ["lsmr", "lstsq", "tikhonov", "pinv", "backward"])
def test_warnings_point_at_the_line_that_called(through: str) -> None:
    kernel = torch.tensor([[[1.0, 2.0, 1.0]]])
    A = lsconv.Conv1d(kernel.clone().requires_grad_(), in_size=200, padding=1)
    y = torch.randn(1, 200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if through == "lsmr":
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            lsconv.lsmr(A, y, max_iter=3)
        elif through == "lstsq":
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            lsconv.lstsq(A, y, method="lsmr", max_iter=3)
        elif through == "tikhonov":
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            lsconv.tikhonov(A, y, 1e-6, method="lsmr", max_iter=3)
        elif through == "pinv":
            Ap = lsconv.pinv(A, method="lsmr")
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            Ap.solve(y, max_iter=3)
        else:
            x = lsconv.lsmr(A, torch.zeros(1, 200).requires_grad_(), max_iter=3).x
            line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
            x.backward(torch.randn(1, 200))
    told = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    assert told
    assert all((w.filename, w.lineno) == (__file__, line) for w in told)


def test_hybrid_has_the_gradient_at_its_damping_held_fixed() -> None:
    w = torch.randn(2, 1, 3, dtype=D, requires_grad=True)
    y = torch.randn(2, 2, 6, dtype=D, requires_grad=True)
    A, g = lsconv.Conv1d(w, in_size=8), torch.randn(2, 1, 8, dtype=D)
    chosen = lsconv.lstsq(A, y, method="hybrid")
    fixed = lsconv.lsmr(A, y, damp=chosen.damp, rtol=1e-13)
    for found, expected in zip(*(torch.autograd.grad(s.x, (w, y), g) for s in (chosen, fixed)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_inputs_that_no_output_reads_receive_their_prior_back() -> None:
    # stride 3, two taps: every third input is beyond the data, and what the prior says there is what x is
    def answer(w: Tensor, y: Tensor, damp: Tensor, prior: Tensor) -> Tensor:
        return lsconv.tikhonov(lsconv.Conv1d(w, in_size=9, stride=3), y, damp, x_prior=prior, rtol=1e-12).x

    inputs = [torch.randn(3, 1, 2, dtype=D), torch.randn(3, 3, dtype=D), torch.tensor(0.6, dtype=D)]
    inputs.append(torch.randn(1, 9, dtype=D))
    assert torch.autograd.gradcheck(answer, [t.requires_grad_() for t in inputs], fast_mode=True)
    assert torch.autograd.gradgradcheck(answer, inputs, fast_mode=True)


@pytest.mark.parametrize(
    ("padding_mode", "damp"),
    [
        ("zeros", 0.0),
        ("zeros", torch.tensor([0.0, 0.7], dtype=D)),
        ("circular", 0.7),
        ("reflect", 0.0),
        ("reflect", torch.tensor([0.0, 0.7], dtype=D)),
    ],
)
def test_gradient_by_the_data_alone_is_the_adjoint_of_the_solve(padding_mode: str, damp: Any) -> None:
    weight = torch.randn(1, 2, 3, 3, dtype=D)
    A = lsconv.Conv2d(weight, in_size=(5, 4), padding=1, padding_mode=padding_mode)
    y = torch.randn(2, *A.out_shape, dtype=D, requires_grad=True)
    answers = {
        "lstsq": lambda y: lsconv.lstsq(A, y, damp=damp, rtol=1e-12).x,
        "tikhonov": lambda y: lsconv.tikhonov(A, y, damp, rtol=1e-12).x,
        "lsqr": lambda y: lsconv.lsqr(A, y, damp=damp, rtol=1e-12).x,
        "craig": lambda y: lsconv.craig(A, y, damp=damp, rtol=1e-12).x,
        "pinv": lsconv.pinv(A, damp=damp),
    }
    matrix = A.to_dense()
    mu = torch.as_tensor(damp, dtype=D).square().expand(2)[:, None, None]
    inverse = matrix.mT @ torch.linalg.inv(matrix @ matrix.mT + mu * torch.eye(A.out_numel, dtype=D))
    g = torch.randn(2, *A.in_shape, dtype=D)
    expected = (inverse.mT @ g.reshape(2, -1, 1)).reshape(y.shape)
    for name, answer in answers.items():
        (found,) = torch.autograd.grad(answer(y), y, g)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8, msg=name)
        loss = answer(y).pow(3).sum()  # and it has a derivative of its own
        (first,) = torch.autograd.grad(loss, y, create_graph=True)
        v = torch.randn_like(y)
        (second,) = torch.autograd.grad(first, y, v)
        x = (inverse @ y.detach().reshape(2, -1, 1)).reshape(g.shape)
        along = (inverse @ v.reshape(2, -1, 1)).reshape(g.shape)
        product = (inverse.mT @ (6 * x * along).reshape(2, -1, 1)).reshape(y.shape)
        torch.testing.assert_close(second, product, rtol=1e-6, atol=1e-7, msg=name)


def test_gradient_by_the_data_alone_costs_one_solve_and_no_convolution() -> None:
    from lsconv.fourier.circulant import FourierPlan

    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=D), in_size=(8, 8), padding=1, padding_mode="circular")
    y = torch.randn(A.out_shape, dtype=D, requires_grad=True)
    x = lsconv.pinv(A, damp=0.1)(y)
    methods = ((FourierPlan, "apply"), (FourierPlan, "adjoint"), (lsconv.Convolution, "apply"))
    with contextlib.ExitStack() as stack:
        calls = [
            stack.enter_context(mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)))
            for owner, name in methods
        ]
        x.sum().backward()
    assert [call.call_count for call in calls] == [0, 1, 0]
