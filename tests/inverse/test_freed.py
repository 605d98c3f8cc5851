"""What a solve holds, its factors above all, goes with its last reference and not at some later garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

import lsconv
from lsconv.inverse.images.deconvolve import deconvolve

Action = Callable[[lsconv.Convolution], object]


def _backward(A: lsconv.Convolution, damp: float) -> None:
    weight = A.weight.detach().clone().requires_grad_()
    y = torch.randn(A.out_shape, requires_grad=True)
    lsconv.lstsq(A.with_parameters([weight]), y, damp=damp).x.sum().backward()


def _abandoned(A: lsconv.Convolution) -> None:
    """A graph that nobody goes back through."""
    lsconv.lstsq(A, torch.randn(A.out_shape, requires_grad=True), damp=0.1)


def _penalised(A: lsconv.Convolution) -> None:
    y = torch.randn(A.out_shape, requires_grad=True)
    lsconv.tikhonov(A, y, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)).x.sum().backward()


def _through_pinv(A: lsconv.Convolution) -> None:
    lsconv.pinv(A)(torch.randn(A.out_shape, requires_grad=True)).sum().backward()


ACTIONS: dict[str, Action] = {
    "lstsq": lambda A: lsconv.lstsq(A, torch.randn(A.out_shape)),
    "lstsq, damp": lambda A: lsconv.lstsq(A, torch.randn(A.out_shape), damp=0.1),
    "lsmr": lambda A: lsconv.lsmr(A, torch.randn(A.out_shape), damp=0.1),
    "backward": lambda A: _backward(A, 0.0),
    "backward, damp": lambda A: _backward(A, 0.1),
    "no backward": _abandoned,
    "tikhonov": _penalised,
    "pinv": _through_pinv,
}
PADDINGS = {"valid": (0, "zeros"), "same": (1, "zeros"), "circular": (1, "circular"), "reflect": (1, "reflect")}


def _tensors() -> int:
    # by their types: asked for its class, a deprecated object would warn
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _tensors_left_by(action: Callable[[], object]) -> int:
    """How many tensors there are more after it, before any garbage is collected."""
    action()  # what is kept for good is kept now
    gc.collect()
    gc.disable()
    gc.freeze()  # of what is there already, all that the tests have imported, nothing is listed and nothing can be left
    try:
        before = _tensors()
        action()
        return _tensors() - before
    finally:
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize(
    "padding", ["valid", *(pytest.param(p, marks=pytest.mark.slow) for p in ("same", "circular", "reflect"))]
)
@pytest.mark.parametrize("name", ACTIONS)
def test_nothing_is_left_to_the_garbage_collector(name: str, padding: str) -> None:
    width, mode = PADDINGS[padding]
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[:, :, 1, 1] += 5 * torch.eye(2)
    A = lsconv.Conv2d(weight, in_size=(10, 9), padding=width, padding_mode=mode)
    assert _tensors_left_by(lambda: ACTIONS[name](A)) == 0


def test_nothing_of_a_deconvolution_is_left() -> None:
    picture, psf = torch.rand(24, 20), torch.ones(3, 3) / 9
    assert _tensors_left_by(lambda: deconvolve(picture, psf)) == 0


def test_tensors_that_an_action_leaves_alive_are_counted() -> None:
    def action() -> None:
        cycle = [torch.zeros(1)]
        cycle.append(cycle)  # type: ignore[arg-type]

    assert _tensors_left_by(action) == 1
