"""The normal equations against the dense matrix of the same operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.factored.normal_equations import NormalEquationsPlan, _displaced_gram
from lsconv.inverse.route import route
from lsconv.operators.convolution import Convolution
from tests.factored.dense import RCOND, check_items, check_maps

LONG: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "full": ((1, 1, 40), (9,), {"padding": 39}),
    "beyond full, unequal": ((3, 2, 14), (6,), {"padding": ((13, 15),)}),
    "in the plane": ((2, 1, 9, 8), (5, 4), {"padding": (8, 7)}),
    "dilated, in groups": ((4, 1, 5, 6), (3, 4), {"padding": (8, 10), "dilation": 2, "groups": 2}),
    "in space": ((1, 1, 4, 5, 3), (2, 3, 3), {"padding": (3, 4, 2)}),
    "not Toeplitz: cut off": ((3, 1, 12), (9,), {"padding": 8}),
    "not Toeplitz: cut off in the plane": ((2, 1, 9, 8), (5, 4), {"padding": (6, 7)}),
    "not Toeplitz: strided": ((4, 1, 12), (9,), {"padding": 11, "stride": 2}),
    "not Toeplitz: reflecting": ((3, 1, 4), (9,), {"padding": 3, "padding_mode": "reflect"}),
}


def conv(name: str, dtype: torch.dtype = torch.float64, own: tuple[int, ...] = ()) -> lsconv.Convolution:
    shape, size, geometry = LONG[name]
    generator = torch.Generator().manual_seed(0)
    return lsconv.Convolution(torch.randn(*own, *shape, dtype=dtype, generator=generator), size, **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("name", LONG)
def test_every_map_is_that_of_the_dense_matrix(name: str, damp: float, dtype: torch.dtype) -> None:
    check_maps(NormalEquationsPlan(conv(name, dtype), damp, rcond=RCOND, rtol=1e-10), damp)


def test_a_wide_operator_with_damp_is_served() -> None:
    A = lsconv.Conv2d(torch.randn(1, 2, 3, 3, dtype=torch.float64), (6, 7))
    check_maps(NormalEquationsPlan(A, 0.3, rcond=RCOND, rtol=1e-10), 0.3)


@pytest.mark.parametrize("name", ["full", "not Toeplitz: cut off"])
def test_kernels_and_dampings_per_item_have_their_own_matrices(name: str) -> None:
    A = conv(name, own=(3, 1))
    damp = torch.tensor([0.0, 0.1], dtype=torch.float64).reshape(2, 1, 1)
    y = torch.randn(2, 3, 4, *A.out_shape, dtype=torch.float64)
    solution = NormalEquationsPlan(A, damp, rcond=RCOND, rtol=1e-10).solve(y)
    assert solution.converged.all()
    check_items(A, damp, solution.x, y)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_the_scale_of_the_kernel_does_not_matter(scale: float) -> None:
    A = conv("full")
    scaled = A.with_parameters([A.weight * scale])
    y = torch.randn(A.out_shape, dtype=torch.float64)
    x = NormalEquationsPlan(A, rcond=RCOND, rtol=1e-10).solve(y).x
    found = NormalEquationsPlan(scaled, rcond=RCOND, rtol=1e-10).apply(y)
    torch.testing.assert_close(found * scale, x)


def test_an_ill_conditioned_operator_is_refused_and_served_with_damp() -> None:
    smooth = torch.exp(-((torch.arange(200, dtype=torch.float64) - 100) ** 2) / 450)[None, None]
    A = lsconv.Conv1d(smooth, 30, padding=199)
    with pytest.raises(MethodError, match=r"condition number|singular"):
        NormalEquationsPlan(A, rcond=RCOND, rtol=1e-10)
    check_maps(NormalEquationsPlan(A, 0.1, rcond=RCOND, rtol=1e-10), 0.1)


def test_a_smallest_singular_value_near_the_threshold_is_not_decided_here() -> None:
    A = lsconv.Dense(torch.diag(torch.tensor([1.0, 0.1], dtype=torch.float64)))
    NormalEquationsPlan(A, rcond=1e-3, rtol=1e-10)
    with pytest.raises(MethodError, match="condition number"):
        NormalEquationsPlan(A, rcond=0.05, rtol=1e-10)


def test_a_plan_beyond_the_memory_allowed_is_refused() -> None:
    A = conv("not Toeplitz: cut off")
    needed = NormalEquationsPlan.bytes_for(A)
    NormalEquationsPlan(A, 0.1, rcond=RCOND, rtol=1e-6, allowed=needed)
    with pytest.raises(PlanMemoryError, match="memory_limit="):
        NormalEquationsPlan(A, 0.1, rcond=RCOND, rtol=1e-6, allowed=needed - 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        ((2, 3, 3, 4), (9, 7), {"padding": 1}),
        ((1, 2, 3, 2), (8, 9), {"dilation": 2, "padding": (1, 3)}),
        ((1, 1, 20, 22), (5, 6), {"padding": (17, 19)}),
        ((2, 1, 2, 3, 3), (4, 5, 6), {"padding": (0, 1, 1)}),
        ((4, 2, 3, 3, 3), (6, 7), {"padding": 1}),
    ],
)
def test_the_matrix_formed_by_displacement_is_the_dense_one(
    kernel: tuple[int, ...], size: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    A = Convolution(torch.randn(*kernel, dtype=dtype), size, **options)
    M = A.to_dense()
    assert NormalEquationsPlan.flops(A) < A.in_numel**3 / 3 + 2 * A.in_numel**2 * A.out_numel
    torch.testing.assert_close(_displaced_gram(A), M.mH @ M, rtol=1e-12, atol=1e-12)


def test_a_response_from_a_picture_takes_a_tenth_of_the_dense_products() -> None:
    picture = torch.rand(1, 1, 60, 60, dtype=torch.float64)
    A = Convolution(picture - picture.mean(), (9, 9), padding=51)  # outputs that the picture knows all of
    y = torch.randn(1, *A.out_shape, dtype=torch.float64)
    assert NormalEquationsPlan.flops(A) < 0.1 * 2 * A.in_numel**2 * A.out_numel
    plan = route(A, 0.5)
    assert isinstance(plan, NormalEquationsPlan)
    M, solution = A.to_dense(), plan.solve(y)
    normal = M.mT @ M + 0.25 * torch.eye(81, dtype=torch.float64)
    exact = torch.linalg.solve(normal, M.mT @ y.flatten())
    assert solution.converged.all()
    assert (solution.x.flatten() - exact).norm() < 1e-10 * exact.norm()
