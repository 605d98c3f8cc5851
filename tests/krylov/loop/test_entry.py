"""An empty batch gives an empty answer, in every function, as in torch; and gradients of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv

F64 = torch.float64


def convolution(kernel: Tensor | None = None, **options: Any) -> lsconv.Conv2d:
    kernel = torch.randn(2, 2, 3, 3, dtype=F64) if kernel is None else kernel
    return lsconv.Conv2d(kernel, in_size=(8, 8), padding=1, **options)


def penalty(A: lsconv.LinearOperator) -> lsconv.LinearOperator:
    return lsconv.Gradient(A.in_shape)


def halved(v: Tensor) -> Tensor:
    return v / 2


SOLVES: dict[str, Callable[..., lsconv.Solution]] = {
    "lstsq": lsconv.lstsq,
    "lstsq, damp": lambda A, y: lsconv.lstsq(A, y, damp=0.1),
    "lstsq, lsmr": lambda A, y: lsconv.lstsq(A, y, method="lsmr", damp=0.1, max_iter=3),
    "lstsq, x0": lambda A, y: lsconv.lstsq(A, y, method="lsqr", x0=A.H(y)),
    "pinv.solve": lambda A, y: lsconv.pinv(A, damp=0.1).solve(y),
    "tikhonov": lambda A, y: lsconv.tikhonov(A, y, 0.1),
    "tikhonov, L": lambda A, y: lsconv.tikhonov(A, y, 0.1, L=penalty(A), x_prior=A.H(y)),
    "tikhonov, lsmr": lambda A, y: lsconv.tikhonov(A, y, 0.1, L=penalty(A), method="lsmr"),
    "tikhonov, gcv": lambda A, y: lsconv.tikhonov(A, y, "gcv", L=penalty(A)),
    "total_variation": lambda A, y: lsconv.total_variation(A, y, 0.01),
    "plug_and_play": lambda A, y: lsconv.plug_and_play(A, y, halved, 0.1),
    "refine": lambda A, y: lsconv.refine(A, y, damp=0.1),
    **{name: getattr(lsconv, name) for name in ("lsmr", "lsqr", "cgls", "craig", "hybrid")},
    "lsmr, damp": lambda A, y: lsconv.lsmr(A, y, damp=torch.ones(y.shape[0])[:, None] if y.ndim > 4 else 0.1),
    **{
        name: lambda A, y, name=name: getattr(lsconv, name)(A.H @ A + lsconv.Identity(A.in_shape), y)
        for name in ("cg", "minres", "gmres")
    },
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("batch", [(0,), (3, 0), (0, 2)])
def test_every_field_of_a_solution_is_empty(name: str, batch: tuple[int, ...]) -> None:
    A = convolution()
    solution = SOLVES[name](A, torch.zeros(*batch, *A.out_shape, dtype=F64))
    assert solution.x.shape == (*batch, *A.in_shape)
    assert solution.x.dtype == F64
    for field in ("codes", "converged", "iterations", "residual_norm", "gradient_norm", "damp"):
        assert getattr(solution, field).shape == batch
    assert solution.raise_for_status() is solution
    assert solution.status == torch.zeros(batch).tolist()
    assert "Solution" in str(solution)
    if isinstance(solution.history, lsconv.History):
        assert solution.history.residual_norm.shape[1:] == batch


@pytest.mark.parametrize("rule", ["gcv", "lcurve", "evidence", "discrepancy"])
def test_no_damp_is_chosen_for_no_data(rule: str) -> None:
    A = convolution()
    noise = {"noise_std": 0.1} if rule == "discrepancy" else {}
    selection = lsconv.choose_damp(A, torch.zeros(0, *A.out_shape, dtype=F64), rule, **noise)
    assert selection.damp.shape == (0,)
    assert selection.values.shape[1:] == (0,)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_pseudo_inverses_and_their_adjoints(damp: float) -> None:
    A = convolution()
    Ap = lsconv.pinv(A, damp=damp)
    y = torch.zeros(2, 0, *A.out_shape, dtype=F64)
    assert Ap(y).shape == Ap.H(y).shape == (2, 0, *A.in_shape)
    per_item = lsconv.pinv(A, damp=torch.full((2, 1), 0.1))
    assert per_item(y).shape == per_item.H(y).shape == (2, 0, *A.in_shape)


@pytest.mark.parametrize("backend", ["direct", "fft"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("dtype", [F64, torch.complex64])
def test_operators_map_nothing_to_nothing(backend: str, mode: str, dtype: torch.dtype) -> None:
    x = torch.zeros(0, 2, 8, 8, dtype=dtype, requires_grad=True)
    for kernel in (torch.randn(3, 2, 3, 3, dtype=dtype), torch.randn(4, 1, 3, 2, 3, 3, dtype=dtype)):
        kernel.requires_grad_()
        A = convolution(kernel, padding_mode=mode, backend=backend)
        y = A(x)
        assert y.shape == (*A.batch_shape[:1], 0, 3, 8, 8)
        back = A.H(y)
        assert back.shape == (*A.batch_shape[:1], 0, 2, 8, 8)
        grads = torch.autograd.grad(back.abs().sum(), (x, kernel))
        assert grads[0].shape == x.shape
        assert torch.equal(grads[1], torch.zeros_like(kernel))


def other_operators() -> list[lsconv.LinearOperator]:
    return [
        lsconv.Identity((4,)),
        lsconv.Crop((4,), 1, 2),
        lsconv.Pad((4,), 1, "reflect"),
        lsconv.Mask(torch.ones(4) > 0),
        lsconv.Gradient((4,), ndim=1),
        lsconv.Laplacian((4,), ndim=1),
        lsconv.Dense(torch.ones(3, 4)),
        lsconv.Dense(torch.ones(3, 4).to_sparse()),
        lsconv.vstack([lsconv.Identity((4,)), lsconv.Crop((4,), 1, 2)]),
        lsconv.block_diag([lsconv.Gradient((4,), ndim=1), lsconv.Identity((4,))]),
        lsconv.CirculantPreconditioner(lsconv.Conv1d(torch.ones(1, 1, 3), in_size=6, padding=1), 0.1),
        lsconv.from_scipy(np.ones((3, 4), dtype=np.float32)),
    ]


def test_other_operators_too() -> None:
    for A in other_operators():
        for batch in ((0,), (2, 0)):
            assert A(torch.zeros(*batch, *A.in_shape)).shape == (*batch, *A.out_shape)
            assert A.H(torch.zeros(*batch, *A.out_shape)).shape == (*batch, *A.in_shape)


@pytest.mark.parametrize("name", ["lstsq", "lstsq, damp", "pinv.solve", "tikhonov, L", "lsqr", "cg", "pinv", "pinv.H"])
def test_gradients_of_nothing_are_zero(name: str) -> None:
    kernel = torch.randn(2, 2, 3, 3, dtype=F64, requires_grad=True)
    A = convolution(kernel)
    y = torch.zeros(0, *A.out_shape, dtype=F64, requires_grad=True)
    solves = {"pinv": lambda A, y: lsconv.pinv(A)(y), "pinv.H": lambda A, y: lsconv.pinv(A).H(y)}
    answer = (solves[name] if name in solves else lambda A, y: SOLVES[name](A, y).x)(A, y)
    for_y, for_kernel = torch.autograd.grad(answer.sum(), (y, kernel))
    assert for_y.shape == y.shape
    assert torch.equal(for_kernel, torch.zeros_like(kernel))


def test_one_damp_per_item_of_none() -> None:
    A = convolution()
    damp = torch.ones(0, dtype=F64, requires_grad=True)
    x = lsconv.lstsq(A, torch.zeros(0, *A.out_shape, dtype=F64), damp=damp).x
    assert torch.autograd.grad(x.sum(), damp)[0].shape == (0,)
    assert lsconv.lsqr(torch.ones(0, 3, 2), torch.ones(0, 3)).x.shape == (0, 2)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward mode
def test_transforms_of_nothing() -> None:
    A = convolution()
    y = torch.zeros(0, *A.out_shape, dtype=F64)

    def solve(y: Tensor) -> Tensor:
        return lsconv.lstsq(A, y, damp=0.1).x

    assert torch.func.vmap(solve)(y).shape == (0, *A.in_shape)
    assert torch.func.jacrev(solve)(y).shape == (0, *A.in_shape, 0, *A.out_shape)
    assert torch.func.jvp(solve, (y,), (y,))[1].shape == (0, *A.in_shape)
    y.requires_grad_()
    g = torch.zeros(3, 0, *A.in_shape, dtype=F64)
    assert torch.autograd.grad(solve(y), y, g, is_grads_batched=True)[0].shape == (3, 0, *A.out_shape)


def test_modules_pass_nothing_on_and_learn_nothing_from_it() -> None:
    conv = torch.nn.Conv2d(2, 2, 3, padding=1)
    y = torch.zeros(0, 2, 8, 8)
    for layer, more in (
        (lsconv.nn.PseudoInverse(conv), ()),
        (lsconv.nn.RangeNull(conv), (y,)),
        (lsconv.nn.Tikhonov(conv), (y,)),
        (lsconv.nn.Tikhonov(conv, L=torch.nn.Conv2d(2, 1, 2, bias=False)), ()),
    ):
        conv.zero_grad()
        x = layer(y, *more)
        assert x.shape == (0, 2, 8, 8)
        x.sum().backward()
        assert conv.weight.grad is not None
        assert not bool(conv.weight.grad.any())


@pytest.mark.parametrize("channels", [None, "first", "last"])
@pytest.mark.parametrize("prior", ["gradient", "tv", halved])
def test_no_images_are_deconvolved_to_none(channels: str | None, prior: Any) -> None:
    shape = {None: (0, 9, 10), "first": (2, 0, 3, 9, 10), "last": (0, 9, 10, 3)}[channels]
    psf = torch.full((3, 3), 1 / 9)
    for image in (torch.zeros(shape), np.zeros(shape, np.uint8)):
        solution = lsconv.deconvolve(image, psf, prior=prior, channels=channels)
        assert tuple(solution.x.shape) == shape
        assert solution.x.dtype == image.dtype
        assert 0 in solution.converged.shape
    image = torch.zeros(shape, requires_grad=True)
    if prior == "gradient":
        lsconv.deconvolve(image, psf, channels=channels).x.sum().backward()
        assert image.grad is not None
    with pytest.raises(lsconv.LsconvError, match="image: is empty"):
        lsconv.deconvolve(torch.zeros(2, 0, 10), psf)


def test_what_does_not_fit_is_refused_all_the_same() -> None:
    A = convolution()
    y = torch.zeros(0, *A.out_shape, dtype=F64)
    for call, text in (
        (lambda: lsconv.lstsq(A, y[..., :-1]), "y: shape"),
        (lambda: lsconv.lstsq(A, y[..., :0]), "y: shape"),
        (lambda: lsconv.lstsq(A, y.float()), "y: dtype"),
        (lambda: lsconv.lstsq(A, y, damp=-1), "damp"),
        (lambda: lsconv.lstsq(A, y, damp=torch.ones(3)), "broadcast"),
        (lambda: lsconv.lstsq(A, y, method="best"), "method"),
        (lambda: lsconv.lsqr(A, y, x0=y[..., 1:]), "x0"),
    ):
        with pytest.raises(lsconv.LsconvError, match=text):
            call()
