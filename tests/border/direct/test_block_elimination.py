"""The elimination of one strip of the border against the dense matrix, with and without reflections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.border.border_set import Border, between_borders
from lsconv.border.direct.block_elimination import Elimination
from lsconv.border.direct.border_inverse import WholeBorder, whole_cost
from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.border.direct.reflection_symmetry import exchange, reflection_sums
from lsconv.border.normal_inverse import NormalInverse
from lsconv.border.plan import BorderPlan
from lsconv.fourier.symbol import FrequencyMatrices

F64 = torch.float64


def of(A: lsconv.Convolution, damp: float) -> tuple[NormalInverse, Tensor]:
    """The inverse of A with its border, and the dense matrix of the operator on that."""
    inverse = NormalInverse(A, damp, floor=1e-13)
    border = inverse.border
    return inverse, between_borders(border.kernel(inverse.on_border.matrices).whole(), border, border)


def exchange_of(inverse: NormalInverse, border: Border | None = None) -> list[int] | None:
    """The reflection between the components of a saddle operator of one real channel."""
    matrices = inverse.on_border.matrices
    single = inverse.form == "mixed" and matrices.rows == 2 and matrices.grid.real
    return exchange((border or inverse.border).members) if single else None


def error(A: lsconv.Convolution, damp: float = 0.1, blocks: int | None = None) -> float:
    """Of the eliminated inverse, relative to the condition of the dense matrix."""
    inverse, dense = of(A, damp)
    border, matrices = inverse.border, inverse.on_border.matrices
    kernel = border.kernel(matrices).whole()
    eliminated = Elimination(matrices, border, kernel, definite=inverse.form != "mixed", exchange=exchange_of(inverse))
    r = torch.randn(3, blocks or len(kernel), border.size, dtype=kernel.dtype)
    want = torch.linalg.solve(dense.unsqueeze(0), r.unsqueeze(-1)).squeeze(-1)
    off = torch.linalg.vector_norm(eliminated(r) - want) / torch.linalg.vector_norm(want)
    return float(off / torch.linalg.cond(dense).max())


def symmetric(*axes: int) -> Tensor:
    weight = torch.randn(1, 1, 5, 5, dtype=F64)
    for a in axes:
        weight = weight + weight.flip(a)
    return weight


@pytest.mark.parametrize("padding", [0, 2, 4, (1, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("size", [(14, 14), (13, 17), (20, 12)])
@pytest.mark.parametrize("axes", [(), (2,), (3,), (2, 3)])
def test_the_border_of_one_channel_is_inverted(
    axes: tuple[int, ...], size: tuple[int, int], padding: int | tuple[int, int]
) -> None:
    assert error(lsconv.Conv2d(symmetric(*axes), in_size=size, padding=padding)) < 1e-13


@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.sampled_from([1, 2, (2, 1)]),
    dilation=st.sampled_from([1, 2]),
    dtype=st.sampled_from([F64, torch.complex128]),
)
@settings(max_examples=40, deadline=None)
def test_the_border_of_any_channels_is_inverted(
    channels: tuple[int, int],
    padding: tuple[int, int],
    stride: int | tuple[int, int],
    dilation: int,
    dtype: torch.dtype,
) -> None:
    weight = torch.randn(*channels, 3, 3, dtype=dtype)
    A = lsconv.Conv2d(weight, in_size=(14, 15), padding=padding, stride=stride, dilation=dilation)
    inverse = NormalInverse(A, 0.1, floor=1e-13)
    if inverse.form != "circulant" and all(bool(members.any()) for members in inverse.border.members):
        assert error(A) < 1e-12


@pytest.mark.parametrize("padding", [0, 2, (1, 2)])
def test_it_does_not_matter_where_on_the_circle_the_border_of_a_channel_lies(padding: int | tuple[int, int]) -> None:
    inverse = NormalInverse(lsconv.Conv2d(symmetric(2, 3), in_size=(12, 13), padding=padding), 0.1, floor=1e-13)
    grid, channels, definite = inverse.on_border.matrices.grid, inverse.border.channels, inverse.form != "mixed"
    kernel = inverse.border.kernel(inverse.on_border.matrices).whole()
    for shift in range(max(grid.sizes)):
        along = [shift * (1 + c) for c in range(channels)]
        positions = [
            [members[c].roll(along[c]).nonzero().flatten().tolist() for members in inverse.border.members]
            for c in range(channels)
        ]
        border = Border(grid.sizes, positions, torch.device("cpu"))
        rolled = torch.stack(
            [
                torch.stack([kernel[:, c, d].roll([along[c] - along[d]] * 2, (-2, -1)) for d in range(channels)], dim=1)
                for c in range(channels)
            ],
            dim=1,
        )
        matrices = FrequencyMatrices(grid, grid.transform(rolled).movedim((1, 2), (-2, -1)))
        assert all(s is not None for s in reflection_sums(matrices, border)) or padding == (1, 2)
        r = torch.randn(1, 1, border.size, dtype=F64)
        want = torch.linalg.solve(between_borders(rolled, border, border), r.mT).mT
        eliminated = Elimination(matrices, border, rolled, definite=definite, exchange=exchange_of(inverse, border))
        torch.testing.assert_close(eliminated(r), want, rtol=1e-7, atol=1e-9)


def test_groups_are_blocks_and_one_block_serves_many() -> None:
    assert error(lsconv.Conv2d(torch.randn(4, 1, 3, 3, dtype=F64), in_size=(12, 13), padding=1, groups=4)) < 1e-13
    assert error(lsconv.Conv2d(symmetric(2), in_size=(12, 13)), blocks=3) < 1e-13


def test_single_precision_is_kept_in_the_factors_alone() -> None:
    inverse, dense = of(lsconv.Conv2d(symmetric(2, 3), in_size=(20, 20), padding=2), 0.5)
    border, matrices = inverse.border, inverse.on_border.matrices
    kernel, halved = border.kernel(matrices).whole(), exchange_of(inverse)
    single, double = (
        Elimination(matrices, border, kernel, definite=False, single=flag, exchange=halved) for flag in (True, False)
    )
    assert single.nbytes < double.nbytes
    r = torch.randn(1, 1, border.size, dtype=F64)
    want = torch.linalg.solve(dense, r.mT).mT
    assert single(r).dtype == F64
    assert 1e-9 < float((single(r) - want).norm() / want.norm()) < 1e-4


def cost_of(A: lsconv.Convolution, damp: float) -> tuple[float, int]:
    inverse = NormalInverse(A, damp, floor=1e-13)
    matrices, border = inverse.on_border.matrices, inverse.border
    halved = exchange_of(inverse) is not None
    cost = whole_cost(matrices, border, border, definite=inverse.form != "mixed", exchanged=halved)
    return cost.factors, border.size


def test_the_cost_is_that_of_the_factors_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    make = DenseInverse.__init__

    def noted(self: DenseInverse, matrices: Tensor, *, definite: bool, single: bool = False) -> None:
        blocks, size, _ = matrices.shape
        made.append((4 if matrices.is_complex() else 1) * blocks * size**3 * (1 if definite else 2) / 3)
        make(self, matrices, definite=definite, single=single)

    monkeypatch.setattr(DenseInverse, "__init__", noted)
    for axes, padding in (((), 2), ((2,), 2), ((2, 3), 2), ((3,), 1), ((2, 3), 0), ((), 4)):
        A = lsconv.Conv2d(symmetric(*axes), in_size=(40, 30), padding=padding)
        inverse = NormalInverse(A, 0.1, floor=1e-13)
        definite = inverse.form != "mixed"
        made.clear()
        WholeBorder(
            inverse.on_border.matrices, inverse.border, definite=definite, single=False, exchange=exchange_of(inverse)
        )
        flops = sum(made)
        assert cost_of(A, 0.1)[0] == pytest.approx(flops)


def test_reflections_spare_most_of_the_work() -> None:
    (none, size), (one, _), (both, _) = (
        cost_of(lsconv.Conv2d(symmetric(*axes), in_size=(64, 64), padding=2), 0.1) for axes in ((), (2,), (2, 3))
    )
    assert none < size**3 * 2 / 3 / 14
    assert one < none / 3.5
    assert both < one / 2.5  # one of two columns is its own image, where it counts as a pair


def test_borders_on_one_axis_and_volumes_are_factorised_as_they_are() -> None:
    for A in (
        lsconv.Conv2d(torch.randn(1, 1, 5, 1, dtype=F64), in_size=(14, 14), padding=(2, 0)),
        lsconv.Conv1d(torch.randn(1, 1, 5, dtype=F64), in_size=(30,), padding=1),
        lsconv.Conv3d(torch.randn(1, 1, 3, 3, 3, dtype=F64), in_size=(5, 6, 5), padding=1),
    ):
        inverse, dense = of(A, 0.2)
        whole = WholeBorder(inverse.on_border.matrices, inverse.border, definite=inverse.form != "mixed", single=False)
        r = torch.randn(2, 1, inverse.border.size, dtype=F64)
        torch.testing.assert_close(whole(r), torch.linalg.solve(dense, r.mT).mT, rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ reflections


def reflected(A: lsconv.Convolution) -> list[bool]:
    inverse = NormalInverse(A, 0.1, floor=1e-13)
    return [s is not None for s in reflection_sums(inverse.on_border.matrices, inverse.border)]


def test_reflections_are_seen_where_they_are() -> None:
    for axes in ((), (2,), (3,), (2, 3)):
        A = lsconv.Conv2d(symmetric(*axes), in_size=(20, 21), padding=2)
        assert reflected(A) == [2 in axes, 3 in axes]
    assert reflected(lsconv.Conv2d(symmetric(2, 3), in_size=(20, 21), padding=(2, 1))) == [True, True]
    off = symmetric(2, 3)
    off[0, 0, 0, 1] += 1e-3
    assert reflected(lsconv.Conv2d(off, in_size=(20, 21), padding=2)) == [False, False]
    assert reflected(lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=F64), in_size=(20, 21), padding=1)) == [False, False]


def test_a_complex_kernel_has_none() -> None:
    A = lsconv.Conv2d(symmetric(2, 3).to(torch.complex128), in_size=(20, 21), padding=2)
    assert reflected(A) == [False, False]


def test_a_border_that_is_not_one_run_has_none() -> None:
    inverse, _ = of(lsconv.Conv2d(symmetric(2, 3), in_size=(20, 21)), 0.1)
    matrices = inverse.on_border.matrices
    border = Border(inverse.border.grid, [[[3, 4, 9], [5, 6]]], torch.device("cpu"))
    assert [s is None for s in reflection_sums(matrices, border)] == [True, False]


# ------------------------------------------------------------------ in a plan


def disk(radius: float) -> Tensor:
    r = int(radius)
    p = torch.arange(-r, r + 1, dtype=F64)
    weight = (p[:, None] ** 2 + p**2 <= radius**2).double()
    return (weight / weight.sum())[None, None]


@pytest.mark.parametrize("padding", [0, 3])
def test_a_symmetric_blur_that_iterates_slowly_is_eliminated_early(padding: int) -> None:
    A = lsconv.Conv2d(disk(3), in_size=(96, 96), padding=padding)
    damp = 1e-4 * float(lsconv.norm(A))
    plan = BorderPlan(A, damp)
    y = torch.randn(2, *A.out_shape, dtype=F64)
    first = plan.solve(y)
    assert bool(first.converged.all())
    assert isinstance(plan.inverse._direct.schwarz.factors._inverse, Elimination)
    again = plan.solve(y)
    assert int(again.iterations.max()) <= 8 < int(first.iterations.max()) < 120
    gradient = A.adjoint(y - A(again.x)) - damp**2 * again.x
    assert bool((gradient.flatten(1).norm(dim=1) < 1e-9 * A.adjoint(y).flatten(1).norm(dim=1)).all())
