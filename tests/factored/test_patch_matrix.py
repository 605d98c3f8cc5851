"""The solve patch by patch against the dense matrix of the same convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import PlanMemoryError
from lsconv.factored.patch_matrix import PatchPlan
from tests.factored.dense import RCOND, check_items, check_maps

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1x1, wide": ((4, 6, 1, 1), (5, 7), {}),
    "1x1, tall, outputs that read nothing": ((6, 4, 1, 1), (5, 7), {"padding": (1, 2)}),
    "1x1, inputs that nothing reads": ((4, 6, 1, 1), (5, 7), {"stride": 2}),
    "2x2 stride 2 in groups, odd size": ((8, 2, 2, 2), (8, 9), {"stride": 2, "groups": 2}),
    "patches cut off at both borders": ((5, 3, 3, 3), (10, 11), {"stride": 3, "padding": 1}),
    "gaps between patches": ((5, 3, 4), (17,), {"stride": 5}),
    "interleaved by dilation": ((4, 2, 2, 2), (9, 9), {"dilation": 3, "stride": 2}),
    "one output": ((4, 2, 5, 5), (5, 5), {}),
    "in space": ((2, 3, 1, 1, 2), (3, 4, 6), {"stride": (1, 2, 2)}),
    "unequal padding": ((6, 3, 2), (11,), {"stride": 2, "padding": ((1, 3),)}),
    "a padding mode without padding": ((3, 4, 1, 1), (4, 4), {"padding_mode": "reflect"}),
    "padding wider than a patch": ((4, 2, 3, 1), (9, 9), {"stride": (3, 2), "padding": (2, 2)}),
}
OVERLAPPING: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((1, 1, 3, 3), (8, 8), {"stride": 2}),
    ((1, 1, 2, 2), (8, 8), {"stride": (2, 1)}),
    ((1, 1, 2, 2), (9, 9), {"stride": 2, "dilation": 2}),
    ((1, 1, 1, 1), (4, 4), {"padding": 1, "padding_mode": "reflect"}),
)


def conv(name: str, dtype: torch.dtype = torch.float64) -> lsconv.Convolution:
    shape, size, geometry = CASES[name]
    generator = torch.Generator().manual_seed(0)
    return lsconv.Convolution(torch.randn(*shape, dtype=dtype, generator=generator), size, **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_every_map_is_that_of_the_dense_matrix(name: str, damp: float, dtype: torch.dtype) -> None:
    A = conv(name, dtype)
    assert PatchPlan.serves(A)
    check_maps(PatchPlan(A, damp, rcond=RCOND, rtol=1e-6), damp)


@pytest.mark.parametrize(("shape", "size", "geometry"), OVERLAPPING)
def test_overlapping_patches_are_not_served(
    shape: tuple[int, ...], size: tuple[int, ...], geometry: dict[str, Any]
) -> None:
    assert not PatchPlan.serves(lsconv.Convolution(torch.ones(shape), size, **geometry))


def test_kernels_and_dampings_per_item_have_their_own_blocks() -> None:
    A = lsconv.Conv2d(torch.randn(3, 1, 4, 3, 2, 2, dtype=torch.float64), (5, 6), stride=2, groups=2)
    damp = torch.tensor([0.0, 0.1], dtype=torch.float64).reshape(2, 1, 1)
    y = torch.randn(2, 3, 4, *A.out_shape, dtype=torch.float64)
    solution = PatchPlan(A, damp, rcond=RCOND, rtol=1e-10).solve(y)
    assert solution.converged.all()
    check_items(A, damp, solution.x, y)


@pytest.mark.parametrize("rcond", [0.0, 1e-3, 0.3])
def test_the_rank_is_that_of_torch_for_the_whole_matrix(rcond: float) -> None:
    generator = torch.Generator().manual_seed(2)
    U, _, V = torch.linalg.svd(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64))
    # the second group is smaller than the threshold of the first
    values = torch.tensor([[1.0, 0.5, 0.1, 1e-2], [5e-2, 2e-3, 5e-4, 1e-12]], dtype=torch.float64)
    weight = (U @ torch.diag_embed(values) @ V).reshape(8, 4, 1, 1)
    A = lsconv.Conv2d(weight, (2, 3), groups=2, padding=1)
    plan = PatchPlan(A, rcond=rcond, rtol=1e-10)
    M = A.to_dense()
    y = torch.randn(A.out_shape, generator=generator, dtype=torch.float64)
    assert int(plan.rank) == int(torch.linalg.matrix_rank(M, rtol=max(rcond, 1e-15)))
    expected = torch.linalg.pinv(M, rtol=max(rcond, 1e-15)) @ y.flatten()
    torch.testing.assert_close(plan.solve(y).x.flatten(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_singular_value_on_the_threshold_is_undecided() -> None:
    weight = torch.diag(torch.tensor([4.0, 2.0, 1.0]))[:, :, None, None]
    A = lsconv.Conv2d(weight, (3, 3))
    on, beside = (PatchPlan(A, rcond=r, rtol=1e-6) for r in (0.25, 0.26))
    y = torch.ones(A.out_shape)
    assert not bool(on.solve(y).converged)
    assert bool(beside.solve(y).converged)
    assert int(beside.rank) == 2 * 9


def test_a_plan_beyond_the_memory_allowed_is_refused() -> None:
    A = conv("2x2 stride 2 in groups, odd size")
    needed = PatchPlan.bytes_for(A)
    PatchPlan(A, rcond=RCOND, rtol=1e-6, allowed=needed)
    with pytest.raises(PlanMemoryError, match="memory_limit="):
        PatchPlan(A, rcond=RCOND, rtol=1e-6, allowed=needed - 1)


def test_a_damp_far_below_the_norm_is_refined_to_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    column = 0.1 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
    matrix = column * torch.ones(1, 3) + 1e-8 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    A = lsconv.Conv2d(matrix[:, :, None, None], (2, 2))
    y = torch.randn(40, *A.out_shape, generator=generator, dtype=torch.float64)
    plan = PatchPlan(A, 1e-7, rcond=1e-12, rtol=1e-10)
    assert plan.solve(y).converged.all()
    monkeypatch.setattr(plan, "_normal", torch.zeros_like)
    assert not plan.solve(y).converged.any()  # without the step
