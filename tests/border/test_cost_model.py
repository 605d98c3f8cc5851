"""When a plan goes over from iterating to the factors of its border."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv import psf
from lsconv.border.cost_model import (
    CostModel,
    FactorCost,
    Limits,
    direct_plan_cost,
    expected_iterations,
    free_bytes,
    items_at_once,
)
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.plan import BorderPlan
from lsconv.border.system.border_system import BorderSystem

F64 = torch.float64


def slow() -> tuple[lsconv.Convolution, float]:
    """A square, random and hardly damped one: the border iteration takes thousands of steps, or does not arrive."""
    weight = torch.randn(8, 8, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return lsconv.Conv2d(weight, (40, 40), padding=1), 18e-4


def test_a_slow_plan_goes_over_to_the_factors_for_good() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp, limits=Limits(at_once=0))
    assert "direct" not in repr(plan)
    y = torch.randn(2, *A.out_shape, dtype=F64)
    first = plan.solve(y)
    assert bool(first.converged.all())
    assert "direct" in repr(plan)
    again = plan.solve(y)
    assert int(again.iterations.max()) == 0 < int(first.iterations.max())
    gradient = A.adjoint(y - A(again.x)) - damp**2 * again.x
    assert bool((gradient.flatten(1).norm(dim=1) < 1e-9 * A.adjoint(y).flatten(1).norm(dim=1)).all())
    adjoint = plan.adjoint(y)
    assert abs(torch.vdot(adjoint.flatten(), y.flatten()) - torch.vdot(y.flatten(), again.x.flatten())) < 1e-9 * (
        adjoint.norm() * y.norm()
    )


@pytest.mark.slow
def test_factors_that_memory_is_short_for_are_not_made() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp, limits=Limits(at_once=0))
    limited = BorderPlan(A, damp, memory_limit=plan._needed(F64) + 2**20, limits=Limits(at_once=0))
    limited.solve(torch.randn(A.out_shape, dtype=F64), max_iter=150)
    assert "direct" not in repr(limited)


def test_a_quick_plan_of_a_large_border_iterates_once() -> None:
    A = lsconv.Conv2d(torch.randn(8, 8, 3, 3, dtype=F64), (64, 64), padding=1)
    plan = BorderPlan(A, 20.0)
    plan.solve(torch.randn(A.out_shape, dtype=F64))
    assert plan.inverse.direct is None


def test_a_small_border_is_factorised_before_any_iteration() -> None:
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(48, 48))
    solution = (plan := BorderPlan(A, 1e-2)).solve(torch.randn(A.out_shape, dtype=F64))
    assert isinstance(plan.inverse.direct, DirectInverse)
    assert int(solution.iterations) == 0
    assert solution.converged


@pytest.mark.parametrize("spare", [None, 0])
def test_a_plan_that_is_used_again_and_again_goes_over_to_factors_before_a_solve(spare: int | None) -> None:
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(96, 96))
    limits = Limits(at_once=0, spare_bytes=spare)
    inverse = normal_inverse(Request.of(A, 1e-1 * float(lsconv.norm(A)), floor=1e-13, limits=limits))
    f = torch.randn(A.out_shape, dtype=F64)
    counts = [int(inverse(f, 1e-3)[1]) for _ in range(40)]
    assert counts[0] > 0
    assert counts[-1] == counts[0] if spare == 0 else counts[-1] == 0


@pytest.mark.parametrize("padding", [0, 3])
def test_iterations_end_when_they_have_cost_what_the_factors_do(padding: int) -> None:
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(96, 96), padding=padding)
    inverse = normal_inverse(Request.of(A, 1e-4, floor=1e-13, limits=Limits(at_once=0, dense_unknowns=0)))
    assert isinstance(inverse, BorderInverse)
    affordable = inverse.model.factor_work(inverse._cost) / inverse.model.iteration_work(1)
    shape = A.out_shape if inverse.side == "residual" else A.in_shape
    count = int(inverse(torch.randn(shape, dtype=F64), 1e-12)[1])
    assert affordable <= count < affordable + 1
    assert inverse.direct is not None


def test_factors_that_cost_no_less_to_use_are_never_earned() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5, dtype=F64), in_size=(40, 40))
    inverse = normal_inverse(Request.of(A, 1.0, floor=1e-13, limits=Limits(at_once=0, dense_unknowns=0)))
    assert isinstance(inverse, BorderInverse)
    cost = FactorCost(1.0, 100 * inverse.model.iteration_work(1), 0.0)
    system = BorderSystem(inverse.begin_iteration().problem, cost)
    b = torch.randn(1, 1, inverse.border.size, dtype=F64)
    for _ in range(3):
        system.solve(b, 1e-6, 1000, None)
    assert not system.budget_used_up


def test_a_worse_condition_lets_expect_more_iterations() -> None:
    assert expected_iterations(1.0) == 0
    assert expected_iterations(1e4) == pytest.approx(2 * expected_iterations(1e2))


@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        (psf.disk(3.0, size=(9, 9))[None, None], (64, 64), {"padding": 4}),
        (torch.randn(1, 1, 9, 9), (64, 64), {"padding": 4}),
        (torch.randn(6, 6, 3, 3), (24, 30), {}),
        (torch.randn(4, 2, 3, 3), (24, 24), {"padding": 1, "stride": 2}),
        (torch.randn(1, 1, 3, 5, 5), (10, 12, 12), {"padding": (1, 2, 2)}),
        (torch.randn(4, 4, 3, 3, 3), (6, 8, 8), {"padding": 1}),
    ],
)
def test_the_price_from_the_shapes_is_that_of_the_plan(
    kernel: torch.Tensor, size: tuple[int, ...], options: Any
) -> None:
    A = lsconv.Convolution(kernel.double(), size, **options)
    inverse = BorderPlan(A, 0.1 * float(kernel.norm())).inverse
    assert isinstance(inverse, BorderInverse)
    own = inverse.model.factor_work(inverse._cost)
    price = direct_plan_cost(A)
    # the plan may take a grid that transforms well and has a larger border
    assert 0.4 * own < price.setup_work < 2.5 * own
    own_bytes = inverse.model.peak_bytes(inverse._cost)
    assert 0.4 * own_bytes < price.peak_bytes < 2.5 * own_bytes


def test_a_tall_image_costs_as_much_to_factorise_as_a_wide_one() -> None:
    weight = psf.disk(3)[None, None]
    tall, wide = (
        BorderPlan(lsconv.Conv2d(weight, in_size), 1e-2, limits=Limits(at_once=0)).inverse
        for in_size in ((400, 40), (40, 400))
    )
    assert isinstance(tall, BorderInverse)
    assert isinstance(wide, BorderInverse)
    assert tall._cost.setup == pytest.approx(wide._cost.setup, rel=0.05)
    assert tall._cost.entries == pytest.approx(wide._cost.entries, rel=0.05)


def test_definite_systems_cost_less() -> None:
    definite, mixed = (CostModel(2, 100, 3, definite=flag) for flag in (True, False))
    one, two, four, five = (definite.iteration_work(rhs) for rhs in (1, 2, 4, 5))
    assert two - one == pytest.approx(five - four)
    assert 0 < two - one < one < mixed.iteration_work(1)


def test_as_many_right_hand_sides_go_at_once_as_an_allocator_reuses() -> None:
    cpu = torch.device("cpu")
    assert items_at_once(2**20, 2**30, cpu) == 2**5
    assert items_at_once(2**30, 0, cpu) == 1


def test_elsewhere_as_many_go_as_half_of_the_free_memory_holds() -> None:
    device = torch.device("meta")
    free = free_bytes(device)
    least, most = (items_at_once(2**20, 2**20, device) * 7 * 2**20 / (part * free) for part in (0.5, 0.5))
    assert 0.9 < least == most < 1.1
    assert items_at_once(2 * free, 2 * free, device) == 1
