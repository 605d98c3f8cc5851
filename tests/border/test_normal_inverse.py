"""The inverse through a border, by every means, against dense algebra: shapes, scales, small corners, budgets."""

from __future__ import annotations

import itertools

import pytest
import torch

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.plan import BorderPlan
from tests.oracles import dense_tikhonov

SHAPES = {"valid": ((20, 19), 0), "full": ((11, 12), 2), "same": ((14, 13), 1)}


def _convolution(name: str, dtype: torch.dtype = torch.float64) -> lsconv.Convolution:
    size, padding = SHAPES[name]
    weight = 0.2 * torch.randn(2, 2, 3, 3, dtype=torch.float64)
    for channel in range(2):
        weight[channel, channel, 1, 1] += 2
    return lsconv.Conv2d(weight.to(dtype), size, padding=padding)


WAYS = {
    "dense border": Limits(factorise=Factorise.AFTER_ITERATIONS),
    "small corners": Limits(factorise=Factorise.NEVER, dense_unknowns=0, corner_unknowns=16),
    "factors after some iterations": Limits(factorise=Factorise.AFTER_ITERATIONS, dense_unknowns=0, corner_unknowns=16),
    "factors": Limits(factorise=Factorise.AT_ONCE),
}
every_way = pytest.mark.parametrize("limits", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("damp", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("name", SHAPES)
def test_answers_repeat_and_are_those_of_dense_algebra(name: str, damp: float, limits: Limits) -> None:
    A = _convolution(name)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    plan, exact = BorderPlan(A, damp, limits=limits), dense_tikhonov(A, y, damp)
    for _ in range(3):  # the first may end in factors
        solution = plan.solve(y)
        assert solution.converged.all()
        torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-8 * float(exact.abs().max()))


@every_way
@pytest.mark.parametrize("name", SHAPES)
def test_scales_do_not_matter(name: str, limits: Limits) -> None:
    A = _convolution(name)
    y = torch.randn(3, *A.out_shape, dtype=torch.float64)
    exact = BorderPlan(A, 0.1, limits=limits).solve(y).x
    for of_y, of_A in itertools.product((1e-30, 1e30), repeat=2):
        solution = BorderPlan(A.with_parameters([A.weight * of_A]), 0.1 * of_A, limits=limits).solve(y * of_y)
        assert solution.converged.all()
        torch.testing.assert_close(solution.x / (of_y / of_A), exact, rtol=0, atol=1e-8)
    scale = torch.tensor([1e-30, 1.0, 1e30], dtype=torch.float64)[:, None, None, None]  # side by side in a batch
    torch.testing.assert_close(BorderPlan(A, 0.1, limits=limits).solve(y * scale).x / scale, exact, rtol=0, atol=1e-8)


@every_way
@pytest.mark.parametrize("name", SHAPES)
def test_broken_and_zero_items_leave_their_neighbours_alone(name: str, limits: Limits) -> None:
    A = _convolution(name)
    y = torch.randn(3, *A.out_shape, dtype=torch.float64)
    y[0] = 0
    broken = y.clone()
    broken[1, 0, 2, 2] = torch.nan
    plan = BorderPlan(A, limits=limits)
    solution = plan.solve(y)
    assert solution.status[0] == lsconv.Status.ZERO
    assert not solution.x[0].any()
    other = plan.solve(broken)
    assert other.converged.tolist() == [True, False, True]
    torch.testing.assert_close(other.x[2], solution.x[2], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SHAPES)
def test_a_short_budget_is_never_called_converged_wrongly(name: str) -> None:
    A = _convolution(name)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    exact = dense_tikhonov(A, y, 0.0)
    for max_iter in (0, 1, 2, 5):
        solution = BorderPlan(A, limits=Limits(dense_unknowns=0)).solve(y, max_iter=max_iter)
        for item in solution.converged.nonzero().flatten():
            assert torch.dist(solution.x[item], exact[item]) <= 1e-7 * exact[item].norm()


@pytest.mark.parametrize("size", [33, 401])
def test_an_input_that_no_output_reads_is_zero_or_not_certified(size: int) -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        A = lsconv.Convolution(torch.randn(3, 1, 2), (size,), stride=2)
        solution = BorderPlan(A).solve(torch.randn(A.out_shape))
        assert not solution.converged or abs(float(solution.x[0, -1])) <= 1e-4 * float(solution.x.norm())


def test_more_columns_than_rows_but_more_outputs_than_inputs_is_solved() -> None:
    for seed in range(6):
        A = lsconv.Convolution(
            torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), (1,), padding=3
        )
        if torch.linalg.cond(A.to_dense()) < 100:
            assert BorderPlan(A, 1e-6).solve(torch.randn(A.out_shape, dtype=torch.float64)).converged


@pytest.mark.parametrize("penalty", [lsconv.Gradient, lsconv.Laplacian])
def test_penalty_on_an_axis_of_one_pixel(penalty: type) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 1, 5, dtype=torch.float64), (1, 20), padding=(0, 2))
    y = torch.randn(A.out_shape, dtype=torch.float64)
    assert lsconv.tikhonov(A, y, 0.1, L=penalty(A.in_shape, dtype=torch.float64)).converged


def test_complex_laplacian_serves_as_a_penalty() -> None:
    A = _convolution("valid", torch.complex128)
    y = torch.randn(A.out_shape, dtype=torch.complex128)
    assert lsconv.tikhonov(A, y, 0.1, L=lsconv.Laplacian(A.in_shape, dtype=torch.complex128)).converged
