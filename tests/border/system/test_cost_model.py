"""When a plan goes over from iterating to the factors of its border."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.app import psf
from lsconv.border import normal_inverse
from lsconv.border.direct.cost import Cost, dense_cost
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.normal_inverse import NormalInverse
from lsconv.border.plan import BorderPlan
from lsconv.border.system.cost_model import Effort

F64 = torch.float64


def slow() -> tuple[lsconv.Convolution, float]:
    """A square, random and hardly damped one: the border iteration takes thousands of steps, or does not arrive."""
    weight = torch.randn(8, 8, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return lsconv.Conv2d(weight, (40, 40), padding=1), 18e-4


@pytest.mark.usefixtures("iterated")
def test_a_slow_plan_goes_over_to_the_factors_for_good() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp)
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


@pytest.mark.usefixtures("iterated")
def test_factors_that_memory_is_short_for_are_not_made() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp)
    limited = BorderPlan(A, damp, memory_limit=plan._needed(F64) + 2**20)
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
def test_a_plan_that_is_used_again_and_again_goes_over_to_factors_before_a_solve(
    monkeypatch: pytest.MonkeyPatch, spare: int | None
) -> None:
    monkeypatch.setattr(normal_inverse, "AT_ONCE", 0)
    monkeypatch.setattr(Effort, "ends", lambda *_: False)  # no solve is a reason by itself
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(96, 96))
    inverse = NormalInverse(A, 1e-3 * float(lsconv.norm(A)), floor=1e-13, spare_bytes=spare)
    f = torch.randn(A.out_shape, dtype=F64)
    counts = [int(inverse(f, 1e-8)[1]) for _ in range(40)]
    assert counts[0] > 12
    assert counts[-1] == counts[0] if spare == 0 else counts[-1] == 0


def test_solves_end_in_factors_that_would_have_spared_what_they_cost() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    cost, each = dense_cost(6000, definite=False), effort.iteration(1)
    by_iterations = 40 * each
    by_factors = 12 * cost.entries + 5 * each
    solves = 0
    while not effort.overdue(cost):
        effort.remember(30, 1, cost)
        solves += 1
    spared = max(0.0, by_iterations - by_factors)
    assert (solves - 1) * spared < effort.factors(cost) <= solves * spared


def test_factors_that_cost_no_less_to_use_are_never_earned() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    cost = Cost(1.0, 3 * effort.iteration(1), 0.0)
    for _ in range(100):
        effort.remember(30, 1, cost)
    assert effort.missed == 0


def test_factors_end_a_solve_that_would_cost_as_much() -> None:
    effort = Effort(1, 10_000, 4, definite=False)
    each = effort.iteration(1)
    cost = Cost(19 * each, 0.0, 0.0)  # and the setup of their grid: 24 iterations
    assert effort.ends(cost, 1, 12, 12)  # of two steps
    assert not effort.ends(cost, 1, 12, 11)
    assert not effort.ends(cost, 1, 11, 1000)  # more than twice of what has been spent
    assert effort.ends(cost, 1, 24, 1)


def test_definite_systems_cost_less() -> None:
    definite, mixed = (Effort(2, 100, 3, definite=flag) for flag in (True, False))
    first, fourth = definite.iteration(2) - definite.iteration(1), definite.iteration(5) - definite.iteration(4)
    assert first == pytest.approx(fourth)
    assert 0 < first < definite.iteration(1) < mixed.iteration(1)
