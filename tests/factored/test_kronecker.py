"""The solve axis by axis against the dense matrix of the same convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.factored.kronecker import Factors, SeparablePlan
from lsconv.krylov.loop.solution import Status
from tests.factored.dense import RCOND, check_items, check_maps

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "valid": ((1, 1, 3, 4), (8, 9), {}),
    "same": ((1, 1, 3, 3), (8, 9), {"padding": 1}),
    "reflect, more outputs than inputs": ((1, 1, 3, 3), (7, 8), {"padding": 2, "padding_mode": "reflect"}),
    "replicate, stride": ((1, 1, 3, 2), (7, 8), {"padding": (2, 1), "padding_mode": "replicate", "stride": (2, 1)}),
    "circular, cropped": ((1, 1, 3, 3), (8, 8), {"padding": 1, "padding_mode": "circular", "stride": (3, 1)}),
    "one axis, dilated": ((1, 1, 5), (20,), {"dilation": 2, "padding": 3}),
    "depthwise": ((3, 1, 3, 3), (6, 6), {"groups": 3, "padding": 1}),
    "depthwise with multiplier": ((6, 1, 3, 3), (6, 6), {"groups": 3, "padding": 1}),
    "channels mixed by one matrix": ((2, 3, 3, 3), (6, 5), {"padding": 1}),
    "in space": ((1, 1, 2, 3, 3), (4, 5, 6), {"padding": 1}),
    "an axis left alone": ((1, 1, 3, 1), (4, 6), {}),
    "an axis with outputs that read nothing": ((1, 1, 3, 1), (4, 6), {"padding": 1, "stride": 2}),
}


def separable(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, own: tuple[int, ...] = ()) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ndim = len(shape) - 2
    kernel = torch.randn(*own, *shape[:2], *(1 for _ in range(ndim)), dtype=dtype, generator=generator)
    for a, taps in enumerate(shape[2:]):
        size = [taps if b == a else 1 for b in range(ndim)]
        kernel = kernel * torch.randn(*own, 1, 1, *size, dtype=dtype, generator=generator)
    return kernel


def gaussian(taps: int, width: float) -> torch.Tensor:
    g = torch.exp(-((torch.arange(taps, dtype=torch.float64) - taps // 2) ** 2) / (2 * width**2))
    return torch.outer(g, g)[None, None] / g.sum() ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_every_map_is_that_of_the_dense_matrix(name: str, damp: float, dtype: torch.dtype) -> None:
    shape, size, geometry = CASES[name]
    A = lsconv.Convolution(separable(shape, dtype), size, **geometry)
    check_maps(SeparablePlan(A, damp, rcond=RCOND, rtol=1e-6), damp)


@pytest.mark.parametrize("damp", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_rounded_to_float32_is_refined_to_its_own_answer(name: str, damp: float) -> None:
    shape, size, geometry = CASES[name]
    A = lsconv.Convolution(separable(shape).float(), size, **geometry)
    check_maps(SeparablePlan(A, damp, rcond=RCOND, rtol=1e-6), damp)


def test_equal_groups_share_their_factors() -> None:
    kernel = separable((1, 1, 3, 3)).expand(4, 1, 3, 3).contiguous()
    A = lsconv.Conv2d(kernel, (6, 7), groups=4)
    factors = Factors.of(A)
    assert factors is not None
    assert factors.channels.shape[1] == 1
    for damp in (0.0, 0.1):
        check_maps(SeparablePlan(A, damp, rcond=RCOND, rtol=1e-10), damp)


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_and_dampings_per_item_have_their_own_factors(groups: int) -> None:
    A = lsconv.Conv2d(separable((2, 2 // groups, 3, 3), own=(3, 1)), (5, 7), groups=groups, padding=1)
    damp = torch.tensor([0.0, 0.1], dtype=torch.float64).reshape(2, 1, 1)
    y = torch.randn(2, 3, 4, *A.out_shape, dtype=torch.float64)
    solution = SeparablePlan(A, damp, rcond=RCOND, rtol=1e-10).solve(y)
    assert solution.converged.all()
    check_items(A, damp, solution.x, y)


@pytest.mark.parametrize("rcond", [1e-12, 1e-4, 1e-1])
def test_the_rank_is_that_of_torch_for_the_whole_matrix(rcond: float) -> None:
    A = lsconv.Conv2d(gaussian(7, 1.5), (12, 10), padding=3, padding_mode="replicate")
    solution = SeparablePlan(A, rcond=rcond, rtol=1e-10).solve(A(torch.ones(A.in_shape, dtype=torch.float64)))
    M = A.to_dense()
    assert int(solution.rank) == int(torch.linalg.matrix_rank(M, rtol=rcond))
    expected = torch.linalg.pinv(M, rtol=rcond) @ M.sum(1)
    torch.testing.assert_close(solution.x.flatten(), expected, rtol=1e-6, atol=1e-6)


def test_a_singular_value_on_the_threshold_is_undecided() -> None:
    A = lsconv.Conv2d(torch.diag(torch.tensor([4.0, 1.0])).reshape(2, 2, 1, 1).repeat(1, 1, 1, 1), (3, 3))
    on, beside = (SeparablePlan(A, rcond=r, rtol=1e-6).solve(torch.ones(A.out_shape)) for r in (0.25, 0.26))
    assert on.status == Status.RANK_UNDECIDED
    assert beside.converged
    assert int(beside.rank) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_separability_is_decided_within_the_dtype(dtype: torch.dtype) -> None:
    kernel, eps = gaussian(9, 2.0), torch.finfo(dtype).eps
    near, far = kernel.clone(), kernel.clone()
    near[..., 0, 1] += eps * kernel.norm()
    far[..., 0, 1] += 100 * eps * kernel.norm()
    assert Factors.of(lsconv.Conv2d(near.to(dtype), (20, 20))) is not None
    assert Factors.of(lsconv.Conv2d(far.to(dtype), (20, 20))) is None


def test_a_rounded_kernel_is_refused_where_the_damp_is_no_larger_than_its_error() -> None:
    A = lsconv.Conv2d(gaussian(9, 2.0).float(), (20, 20))
    for damp in (0.0, 1e-7):
        with pytest.raises(MethodError, match=r"float64 kernel.*border"):
            SeparablePlan(A, damp, rcond=RCOND, rtol=1e-6)
    SeparablePlan(A, 1e-4, rcond=RCOND, rtol=1e-6)


def test_a_kernel_that_is_not_separable_is_refused() -> None:
    with pytest.raises(MethodError, match="separable kernel"):
        SeparablePlan(lsconv.Conv2d(torch.randn(1, 1, 3, 3), (8, 8)), 0.1, rcond=RCOND, rtol=1e-6)


def test_the_zero_kernel_has_rank_zero_and_the_answer_zero() -> None:
    A = lsconv.Conv2d(torch.zeros(1, 1, 3, 3), (6, 6))
    for damp in (0.0, 0.5):
        solution = SeparablePlan(A, damp, rcond=RCOND, rtol=1e-6).solve(torch.ones(A.out_shape))
        assert (solution.x == 0).all()


def test_a_plan_beyond_the_memory_allowed_is_refused() -> None:
    A = lsconv.Conv2d(gaussian(5, 1.0), (20, 20))
    needed = SeparablePlan.bytes_for(A)
    SeparablePlan(A, 0.1, rcond=RCOND, rtol=1e-6, allowed=needed)
    with pytest.raises(PlanMemoryError, match="memory_limit="):
        SeparablePlan(A, 0.1, rcond=RCOND, rtol=1e-6, allowed=needed - 1)
