"""A padding mode is one row of the table: two modes that torch has not, put into it, against dense algebra."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError
from lsconv.operators.convolution import norm_bound
from lsconv.operators.padding_modes import MODES, PaddingMode


def numpy_pad(name: str, **options: str) -> Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]:
    """The padding as NumPy defines it: what it makes of the identity is its matrix."""

    @functools.cache
    def matrix(n: int, pair: tuple[int, int]) -> Tensor:
        return torch.as_tensor(np.pad(np.eye(n), (pair, (0, 0)), name, **options))  # type: ignore[call-overload]

    def pad(x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        for axis, pair in enumerate(pairs, start=-len(pairs)):
            x = (x.movedim(axis, -1) @ matrix(x.shape[axis], tuple(pair)).to(x).mT).movedim(-1, axis)
        return x

    return pad


def fold_symmetric(inside: Tensor, before: Tensor, after: Tensor, axis: int) -> None:
    inside.narrow(axis, 0, before.shape[axis]).add_(before.flip(axis))
    inside.narrow(axis, inside.shape[axis] - after.shape[axis], after.shape[axis]).add_(after.flip(axis))


def fold_odd(inside: Tensor, before: Tensor, after: Tensor, axis: int) -> None:
    """The adjoint of ``2 x_0 - x_k`` before the border."""
    n, left, right = inside.shape[axis], before.shape[axis], after.shape[axis]
    inside.narrow(axis, min(1, left), left).sub_(before.flip(axis))
    inside.narrow(axis, n - 1 - right if right else 0, right).sub_(after.flip(axis))
    inside.narrow(axis, 0, 1).add_(2 * before.sum(axis, keepdim=True))
    inside.narrow(axis, n - 1, 1).add_(2 * after.sum(axis, keepdim=True))


NEW = {
    "symmetric": PaddingMode(
        pad=numpy_pad("symmetric"), fold=fold_symmetric, widest=lambda n: n,
        column_sum=lambda n, pair, stride, outputs: 1 + (pair[0] > 0) + (pair[1] > 0), copies=True,
    ),
    "odd": PaddingMode(
        pad=numpy_pad("reflect", reflect_type="odd"), fold=fold_odd, widest=lambda n: n - 1,
        column_sum=lambda n, pair, stride, outputs: 2 + 2 * max(pair), row_sum=3.0,
    ),
}  # fmt: skip


@pytest.fixture(params=list(NEW))
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODES, request.param, NEW[request.param])
    return str(request.param)


def blur(mode: str, size: tuple[int, ...] = (14, 12)) -> lsconv.Conv2d:
    weight = torch.rand(1, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[..., 2, 1] += 5  # well conditioned, so that iterations are few
    return lsconv.Conv2d(weight / weight.sum(), size, padding=(2, 1), padding_mode=mode)


def dense_tikhonov(A: lsconv.LinearOperator, L: lsconv.LinearOperator, y: Tensor, damp: float) -> Tensor:
    rows = torch.cat([A.to_dense(), damp * L.to_dense()])
    right = torch.cat([y.flatten(), y.new_zeros(rows.shape[0] - y.numel())])
    return (torch.linalg.pinv(rows) @ right).reshape(A.in_shape)


def test_operators_have_it_with_its_adjoint_in_both_backends(mode: str) -> None:
    A = blur(mode)
    dense = A.to_dense()
    for backend in ("direct", "fft"):
        B = lsconv.Conv2d(A.weight, A.spatial_in, padding=A.padding, padding_mode=mode, backend=backend)
        torch.testing.assert_close(B.to_dense(), dense, rtol=1e-12, atol=1e-12)
        assert B.dot_test() < 1e-12
    assert torch.linalg.matrix_norm(dense, 2) <= norm_bound(A)
    P = lsconv.Pad((5,), ((4, 3),), mode, dtype=torch.float64)
    padded = P.to_dense().abs()
    assert padded.sum(1).amax() <= MODES[mode].row_sum
    assert padded.sum(0).amax() <= MODES[mode].column_sum(5, (4, 3), 1, 12)


def test_answers_are_exact_whatever_route_serves_it(mode: str) -> None:
    A = blur(mode)
    y = torch.randn(A.out_shape, dtype=torch.float64)
    identity = lsconv.Identity(A.in_shape, dtype=A.dtype)
    for damp in (0.0, 1e-2):
        solution = lsconv.lstsq(A, y, damp=damp)
        assert solution.converged
        torch.testing.assert_close(solution.x, dense_tikhonov(A, identity, y, damp), rtol=1e-6, atol=1e-6)
    gradient = lsconv.Gradient(A.in_shape, ndim=2, dtype=A.dtype)
    penalised = lsconv.tikhonov(A, y, L=gradient, damp=1e-2)
    assert penalised.converged
    torch.testing.assert_close(penalised.x, dense_tikhonov(A, gradient, y, 1e-2), rtol=1e-6, atol=1e-6)
    varying = lsconv.VaryingConvolution(
        torch.stack([A.weight[0, 0], A.weight[0, 0].flip(0)]),
        torch.stack([w := torch.linspace(0, 1, 14, dtype=A.dtype)[:, None].expand(14, 12), 1 - w]),
        A.spatial_in, padding=A.padding, padding_mode=mode,
    )  # fmt: skip
    solution = lsconv.lstsq(varying, y, damp=1e-2)
    assert solution.converged
    torch.testing.assert_close(solution.x, dense_tikhonov(varying, identity, y, 1e-2), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_convex_term_is_served(mode: str) -> None:
    A = blur(mode, (12, 10))
    x = torch.zeros(A.in_shape, dtype=A.dtype)
    x[:, 3:8, 2:6] = 1.0
    solution = lsconv.total_variation(A, A(x), 1e-3)
    assert solution.converged


def test_the_border_and_tiles_serve_copies_and_refuse_what_combines_cells(mode: str) -> None:
    A = blur(mode)
    y = torch.randn(A.out_shape, dtype=torch.float64)
    if MODES[mode].copies:
        exact = lsconv.lstsq(A, y, damp=1e-2, method="border")
        assert exact.converged
        assert lsconv.explain(blur(mode, (200, 200)), damp=1e-2).plan.startswith("BorderPlan")
        tiled = lsconv.tiled.Plan(A, damp=1e-2, tile=7).solve(y)
        assert tiled.converged
        torch.testing.assert_close(torch.as_tensor(tiled.x), exact.x, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(MethodError):
            lsconv.lstsq(A, y, damp=1e-2, method="border")
        with pytest.raises(MethodError, match="'odd' has no border plan"):
            lsconv.tiled.Plan(A, damp=1e-2, tile=7)
