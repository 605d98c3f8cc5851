"""Batched cotangents give what a loop over them gives, by torch's older vmap and by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian, jvp

import lsconv

F64 = torch.float64
TIGHT = {"rtol": 1e-12}
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]  # of y, what A is made of, and damp


def wide(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randn(rows, columns, dtype=F64, generator=generator)


def positive(M: Tensor) -> Tensor:
    return M @ M.mT + 3 * torch.eye(len(M), dtype=F64)


def convolution(kernel: Tensor) -> lsconv.Conv2d:
    return lsconv.Conv2d(kernel, in_size=(4, 5), padding=1)


def rank_one(kernel: Tensor) -> Tensor:
    return kernel[:1, :, :, :1] * kernel[:1, :, :1, :] * torch.ones(2, 1, 1, 1, dtype=F64)


def _lstsq(A: lsconv.Convolution, y: Tensor, damp: Tensor, method: str) -> Tensor:
    return lsconv.lstsq(A, y, damp=damp, method=method, **TIGHT).x


def penalty(A: lsconv.LinearOperator) -> lsconv.LinearOperator:
    return lsconv.Gradient(A.in_shape, dtype=F64)


KERNEL = wide(2, 9).view(2, 1, 3, 3)
CONV, TALL, WIDE, SQUARE = (KERNEL, 40), (wide(5, 3), 5), (wide(3, 5), 3), (wide(4, 4), 4)

CASES: dict[str, tuple[tuple[Tensor, int], Solve]] = {
    "lstsq, tall": (TALL, lambda y, M, d: lsconv.lstsq(M, y, **TIGHT).x),
    "lstsq, wide": (WIDE, lambda y, M, d: lsconv.lstsq(M, y, **TIGHT).x),
    "lstsq, border": (CONV, lambda y, K, d: _lstsq(convolution(K), y.view(2, 4, 5), d, "border")),
    "lstsq, normal equations": (CONV, lambda y, K, d: _lstsq(convolution(K), y.view(2, 4, 5), d, "normal")),
    "lstsq, patches": (CONV, lambda y, K, d: _lstsq(lsconv.Conv2d(K, (12, 15), 3), y.view(2, 4, 5), d, "matrix")),
    "lstsq, axes": (CONV, lambda y, K, d: _lstsq(convolution(rank_one(K)), y.view(2, 4, 5), d, "separable")),
    "lstsq, rows": (CONV, lambda y, K, d: _lstsq(lsconv.Conv2d(K[..., :1], (6, 5)), y.view(2, 4, 5), d, "auto")),
    "pinv, border": (CONV, lambda y, K, d: lsconv.pinv(convolution(K), damp=d, method="border")(y.view(2, 4, 5))),
    "pinv.solve": (CONV, lambda y, K, d: lsconv.pinv(convolution(K), damp=d).solve(y.view(2, 4, 5), **TIGHT).x),
    "pinv.H": (CONV, lambda y, K, d: lsconv.pinv(convolution(K), damp=d).H(y[:20].view(1, 4, 5))),
    "tikhonov, L": (
        CONV,
        lambda y, K, d: lsconv.tikhonov(convolution(K), y.view(2, 4, 5), d, L=penalty(convolution(K)), **TIGHT).x,
    ),
    "tikhonov, lsmr": (
        CONV,
        lambda y, K, d: (
            lsconv.tikhonov(convolution(K), y.view(2, 4, 5), d, L=penalty(convolution(K)), method="lsmr", **TIGHT).x
        ),
    ),
    **{
        f"{name}, damp": (TALL, lambda y, M, d, name=name: getattr(lsconv, name)(M, y, damp=d, **TIGHT).x)
        for name in ("lsmr", "lsqr", "cgls", "craig")
    },
    **{
        name: (WIDE, lambda y, M, d, name=name: getattr(lsconv, name)(M, y, **TIGHT).x)
        for name in ("lsmr", "lsqr", "cgls", "craig")
    },
    **{
        name: (SQUARE, lambda y, M, d, name=name: getattr(lsconv, name)(positive(M), y, **TIGHT).x)
        for name in ("cg", "minres", "gmres")
    },
    "hybrid": (TALL, lambda y, M, d: lsconv.hybrid(M, y, rule="gcv").x),
}


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    matrix, size = CASES[name][0]
    y = torch.randn(size, dtype=F64, generator=torch.Generator().manual_seed(1))
    return y, matrix, torch.tensor(0.3, dtype=F64)


def agree(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 1e-8 * expected.abs().max())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n.startswith("tikhonov") else n for n in CASES]
)
def test_vectorised_jacobians_are_those_of_the_loop(name: str) -> None:
    y, M, damp = inputs(name)
    solve = CASES[name][1]
    for index, value in ((0, y), (1, M), (2, damp)):

        def of(v: Tensor, index: int = index) -> Tensor:
            given = [y, M, damp]
            given[index] = v
            return solve(*given).flatten()

        if index == 2 and not solve(y, M, damp.clone().requires_grad_()).requires_grad:
            continue  # it takes no damp
        expected = jacobian(of, value)
        assert agree(jacobian(of, value, vectorize=True), expected)
        assert agree(torch.func.jacrev(of, chunk_size=2)(value), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_cotangents_gives_a_batch_of_gradients(name: str) -> None:
    y, M, damp = (t.requires_grad_() for t in (t.clone() for t in inputs(name)))
    x = CASES[name][1](y, M, damp)
    g = torch.randn(3, *x.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    loop = [torch.autograd.grad(x, (y, M), one, retain_graph=True) for one in g]
    at_once = torch.autograd.grad(x, (y, M), g, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda one: torch.autograd.grad(x, (y, M), one, retain_graph=True))(g)
    through_vjp = torch.func.vmap(torch.func.vjp(lambda y, M: CASES[name][1](y, M, damp.detach()), y, M)[1])(g)
    for index in range(2):
        expected = torch.stack([bars[index] for bars in loop])
        assert agree(at_once[index], expected)
        assert agree(mapped[index], expected)
        assert agree(through_vjp[index], expected)


@pytest.mark.parametrize("name", ["lstsq, border", "lstsq, axes", "lstsq, patches", "tikhonov, L", "lsmr", "cg"])
def test_vectorised_second_derivatives_are_those_of_the_loop(name: str) -> None:
    y, M, damp = inputs(name)

    def loss(y: Tensor) -> Tensor:
        return (CASES[name][1](y, (1 + y[0]) * M, damp) ** 2).sum()

    assert agree(hessian(loss, y, vectorize=True), hessian(loss, y))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own forward mode
@pytest.mark.parametrize(
    "name",
    [
        "lstsq, border",
        "lstsq, normal equations",
        "lstsq, patches",
        "lstsq, axes",
        "lstsq, rows",
        "tikhonov, L",
        "lsqr",
        "gmres",
    ],
)
def test_a_batch_of_tangents_is_served_too(name: str) -> None:
    y, M, damp = inputs(name)

    def of(y: Tensor) -> Tensor:
        return CASES[name][1](y, (1 + y[0]) * M, damp).flatten()

    found = jacobian(of, y, vectorize=True, strategy="forward-mode")
    columns = [jvp(of, y, direction)[1] for direction in torch.eye(len(y), dtype=F64)]
    assert agree(found, torch.stack(columns, 1))
