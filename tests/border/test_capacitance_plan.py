"""The direct border solve of square convolutions, against dense singular value decompositions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv import psf
from lsconv.border.capacitance import FEW_VECTORS
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.errors import MethodError, PlanMemoryError

F64 = torch.float64


def same(
    channels: int,
    size: tuple[int, ...],
    kernel: int = 3,
    *,
    seed: int = 0,
    dtype: torch.dtype = F64,
    batch: tuple[int, ...] = (),
    **options: Any,
) -> lsconv.Convolution:
    generator = torch.Generator().manual_seed(seed)
    groups = options.get("groups", 1)
    weight = torch.randn(*batch, channels, channels // groups, *(kernel,) * len(size), generator=generator, dtype=dtype)
    make = {1: lsconv.Conv1d, 2: lsconv.Conv2d, 3: lsconv.Conv3d}[len(size)]
    options.setdefault("padding", options.get("dilation", 1) * (kernel // 2))
    return make(weight, size, **options)


def matrix(A: lsconv.LinearOperator) -> Tensor:
    return A.to_dense().reshape(*A.batch_shape, math.prod(A.out_shape), math.prod(A.in_shape))


@st.composite
def squares(draw: Any) -> lsconv.Convolution:
    ndim = draw(st.sampled_from([1, 2, 2, 3]))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([3, 3, 5] if ndim < 3 else [3]))
    dilation = draw(st.integers(1, 2))
    low = 2 * dilation * (kernel // 2)
    size = tuple(draw(st.integers(low, low + {1: 12, 2: 5, 3: 1}[ndim])) for _ in range(ndim))
    dtype = draw(st.sampled_from([torch.float64, torch.complex128]))
    batch = draw(st.sampled_from([(), (), (2,)]))
    return same(
        channels, size, kernel, seed=draw(st.integers(0, 10**6)), dtype=dtype, batch=batch, groups=groups,
        dilation=dilation,
    )  # fmt: skip


@given(A=squares(), seed=st.integers(0, 10**6))
def test_equals_the_truncated_pseudo_inverse_and_so_does_its_adjoint(A: lsconv.Convolution, seed: int) -> None:
    dense = matrix(A)
    values = torch.linalg.svdvals(dense)
    relative = values / values[..., :1]
    assume(not bool(((relative > 1e-14) & (relative < 1e-8)).any()))  # no doubt about the rank
    inverse = torch.linalg.pinv(dense, rtol=1e-12)
    assume(min(A.spatial_in) > 1)
    plan = CapacitancePlan(A)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(3, *A.batch_shape, *A.out_shape, generator=generator, dtype=A.dtype)
    condition = (values[..., 0] / torch.where(relative > 1e-12, values, torch.inf).amin(-1)).max().item()
    for answer, M in ((plan.apply(y), inverse), (plan.adjoint(y), inverse.mH)):
        expected = (M @ y.flatten(-A.ndim - 1).unsqueeze(-1)).squeeze(-1)
        error = torch.linalg.vector_norm(answer.flatten(-A.ndim - 1) - expected, dim=-1)
        assert bool((error <= 1e-13 * condition * torch.linalg.vector_norm(expected, dim=-1)).all())


def with_null_space(size: int = 12) -> lsconv.Convolution:
    """``0.05 x_i + x_{i+1}``, whose symbol winds once around zero: its smallest singular value is ``0.05^size``."""
    weight = torch.zeros(1, 1, 3, dtype=F64)
    weight[0, 0] = torch.tensor([0.0, 0.05, 1.0])
    return lsconv.Conv1d(weight, size, padding=1)


def test_winding_is_found_and_the_answer_has_minimum_norm_and_least_squares() -> None:
    A = with_null_space()
    U, s, Vh = torch.linalg.svd(matrix(A))
    assert s[-1] < 1e-14 * s[0] < 1e-2 * s[-2]
    plan = CapacitancePlan(A)
    assert plan.nullity.tolist() == [1]
    y = torch.randn(4, 1, 12, dtype=F64)  # with a part that A cannot reach
    solution = plan.solve(y)
    assert solution.nullity is not None
    assert solution.nullity.tolist() == [1] * 4
    assert "a null space of 1 dimension(s)" in str(solution)
    x, r = solution.x.flatten(1), (y - A(solution.x)).flatten(1)
    assert bool(((x @ Vh[-1]).abs() < 1e-12 * x.norm(dim=1)).all())
    assert bool(((U.mT @ r.mT)[:-1].norm(dim=0) < 1e-12 * y.flatten(1).norm(dim=1)).all())
    assert bool(solution.converged.all())


def test_penrose_conditions() -> None:
    for A in (same(2, (7, 9), seed=3), with_null_space()):
        X = lsconv.pinv(A, method="border")
        assert isinstance(X.plan, CapacitancePlan)
        M, P = matrix(A), matrix(X)
        H = matrix(X.H)
        for got, expected in ((M @ P @ M, M), (P @ M @ P, P), ((M @ P).mH, M @ P), ((P @ M).mH, P @ M), (H, P.mH)):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * float(expected.norm()))


def test_the_question_with_padding_one_at_a_quarter_of_its_size_to_rounding() -> None:
    # LSQR is at a residual of 1e-5 after 3000 iterations here, the iteration on the border at 2e-6 after 4500
    A = same(8, (64, 64))
    x = torch.randn(8, 64, 64, dtype=F64)
    y = A(x)
    solution = lsconv.lstsq(A, y)
    assert bool(solution.converged)
    assert torch.dist(A(solution.x), y) < 1e-13 * y.norm()
    assert torch.dist(solution.x, x) < 1e-7 * x.norm()


def test_float32_data_are_answered_from_factors_in_float64() -> None:
    A = same(4, (24, 24), dtype=torch.float32)
    x = torch.randn(2, 4, 24, 24)
    solution = lsconv.lstsq(A, A(x))
    assert solution.x.dtype == torch.float32
    assert bool(solution.converged.all())
    expected = lsconv.lstsq(A.to(dtype=F64), A(x).double()).x
    assert torch.dist(solution.x.double(), expected) < 1e-4 * expected.norm()


def test_strides_are_polyphase_channels() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 2, 3, 3, generator=generator, dtype=F64)  # 2x2 phases of two channels to eight
    A = lsconv.Conv2d(weight, (12, 12), stride=2, padding=1)
    dense = matrix(A)
    x = torch.randn(2, 12, 12, dtype=F64)
    got = CapacitancePlan(A).solve(A(x)).x
    condition = float(torch.linalg.cond(dense))
    assert torch.dist(got, x) < 1e-14 * condition * x.norm()


def test_a_null_space_of_many_dimensions() -> None:
    # one channel: a third of the border; the answer still fits, and has no part in what A does not see
    A = same(1, (96, 96), seed=1)
    plan = CapacitancePlan(A)
    assert 20 < int(plan.nullity) < 97
    y = A(torch.randn(1, 96, 96, dtype=F64))
    solution = plan.solve(y)
    assert bool(solution.converged)
    assert torch.dist(A(solution.x), y) < 1e-11 * y.norm()
    forward, _ = plan.capacitance.directions
    extensions = forward.extend(forward.null.movedim(-1, 0))[:, 0, :, :96, :96].flatten(1)
    assert torch.dist(extensions @ extensions.mT, torch.eye(len(extensions), dtype=F64)) < 1e-6
    assert float((extensions @ solution.x.flatten()).norm()) < 1e-6 * float(solution.x.norm())
    images = torch.stack([A(part).flatten() for part in extensions.reshape(-1, 1, 96, 96)])
    assert float(torch.linalg.matrix_norm(images, 2)) < 1e-11 * float(A.weight.abs().sum())


def test_the_few_null_vectors_kept_project_as_those_that_transforms_make_anew() -> None:
    plan = CapacitancePlan(same(1, (48, 44), seed=1))
    assert 1 < int(plan.nullity) <= FEW_VECTORS
    x = torch.randn(3, 1, *plan.capacitance.directions[0].zero.shape, dtype=F64)
    for direction, back in (plan.capacitance.directions, plan.capacitance.directions[::-1]):
        x = x.masked_fill(direction.zero, 0)
        made_anew = replace(direction, extensions=None)
        projected = direction.null_part(x, back)
        torch.testing.assert_close(projected, made_anew.null_part(x, back), rtol=0, atol=1e-9)
        torch.testing.assert_close(direction.null_part(projected, back), projected, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_gradients_are_those_of_the_dense_inverse() -> None:
    A = same(2, (6, 5), seed=4)
    weight = A.weight.detach().clone().requires_grad_()
    y = torch.randn(2, 6, 5, dtype=F64, requires_grad=True)

    def solve(weight: Tensor, y: Tensor) -> Tensor:
        return lsconv.lstsq(lsconv.Conv2d(weight, (6, 5), padding=1), y).x

    assert torch.autograd.gradcheck(solve, (weight, y), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("seed", range(3))
def test_more_null_vectors_than_are_looked_for_at_first(seed: int) -> None:
    """Eight and as many of its adjoint: next to those of S^-1 the other singular values are rounding."""
    weight = torch.randn(2, 1, 2, 3, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    A = lsconv.Convolution(weight, (3, 2, 4), stride=(1, 2, 1), padding=(1, 1, 0), dilation=(2, 1, 1))
    y = torch.randn(A.out_shape, dtype=F64)
    matrix = A.to_dense()
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-10)) == 16
    solution = CapacitancePlan(A).solve(y)
    assert bool(solution.converged)
    assert int(solution.nullity) == 8
    expected = torch.linalg.pinv(matrix, rtol=1e-10) @ y.flatten()
    torch.testing.assert_close(solution.x.flatten(), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_an_operator_of_zeros_and_its_batch() -> None:
    weight = torch.stack([torch.ones(1, 1, 2, dtype=F64), torch.zeros(1, 1, 2, dtype=F64)])
    A = lsconv.Conv1d(weight[0], in_size=1, padding=1, dilation=2)  # every tap reads padding
    # as zero as the rounding of C^-1, whose norm is one here
    assert float(CapacitancePlan(A).apply(torch.ones(1, 1, dtype=F64)).abs()) < 10 * torch.finfo(F64).eps
    with pytest.raises(MethodError, match="symbol is singular"):
        CapacitancePlan(lsconv.Conv1d(weight, in_size=4, padding="same"))


def test_operators_that_the_capacitance_plan_does_not_serve_are_refused() -> None:
    with pytest.raises(MethodError, match="3 rows and 2 columns"):
        CapacitancePlan(lsconv.Conv2d(torch.randn(3, 2, 3, 3), (8, 8), padding=1))
    with pytest.raises(MethodError, match="unknowns and 0 equations"):
        CapacitancePlan(lsconv.Conv2d(torch.randn(2, 2, 3, 3), (8, 8)))
    with pytest.raises(MethodError, match="symbol is singular"):
        CapacitancePlan(lsconv.Conv2d(torch.ones(1, 1, 3, 3), (8, 8), padding=1))
    with pytest.raises(PlanMemoryError, match=r"needs about \S+ bytes, and 1e\+03 are allowed"):
        CapacitancePlan(same(2, (8, 8)), memory_limit=1000)
    with pytest.raises(MethodError, match="reflect"):
        CapacitancePlan(lsconv.Conv2d(torch.randn(1, 1, 3, 3), (8, 8), padding=1, padding_mode="reflect"))


def test_extreme_units() -> None:
    for unit in (1e-150, 1e150):
        A = same(2, (8, 8), seed=2)
        scaled = lsconv.Conv2d(A.weight * unit, (8, 8), padding=1)
        y = torch.randn(2, 8, 8, dtype=F64)
        torch.testing.assert_close(
            CapacitancePlan(scaled).apply(y) * unit, CapacitancePlan(A).apply(y), rtol=1e-9, atol=0
        )


@pytest.mark.slow
def test_an_undamped_blur_of_a_large_disk_is_factorised() -> None:
    """Its singular values fall exponentially, and no iteration of the border would converge."""
    A = lsconv.Conv2d(psf.disk(10.0)[None, None], (192, 192), padding=10)
    solution = lsconv.lstsq(A, A(torch.rand(A.in_shape, dtype=torch.float64)))
    assert solution.converged.all()
