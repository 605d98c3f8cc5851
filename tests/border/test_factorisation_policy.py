"""When a plan goes over from iterating to the factors of its border."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv import psf
from lsconv.border.cost_model import CostModel, FactorCost, Factorise, Limits
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.factorisation_policy import FactorisationPolicy, expected_iterations
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.plan import BorderPlan

F64 = torch.float64
AFTER_ITERATIONS = Limits(factorise=Factorise.AFTER_ITERATIONS)


def slow() -> tuple[lsconv.Convolution, float]:
    """A square, random and hardly damped one: the border iteration takes thousands of steps, or does not arrive."""
    weight = torch.randn(8, 8, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return lsconv.Conv2d(weight, (40, 40), padding=1), 18e-4


def test_a_slow_plan_goes_over_to_the_factors_for_good() -> None:
    A, damp = slow()
    plan = BorderPlan(A, damp, limits=AFTER_ITERATIONS)
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
    plan = BorderPlan(A, damp, limits=AFTER_ITERATIONS)
    limited = BorderPlan(A, damp, memory_limit=plan._needed(F64) + 2**20, limits=AFTER_ITERATIONS)
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
    limits = Limits(factorise=Factorise.AFTER_ITERATIONS, spare_bytes=spare)
    inverse = normal_inverse(Request.of(A, 1e-1 * float(lsconv.norm(A)), floor=1e-13, limits=limits))
    f = torch.randn(A.out_shape, dtype=F64)
    counts = [int(inverse(f, 1e-3)[1]) for _ in range(40)]
    assert counts[0] > 0
    assert counts[-1] == counts[0] if spare == 0 else counts[-1] == 0


@pytest.mark.parametrize("padding", [0, 3])
def test_iterations_end_when_they_have_cost_what_the_factors_do(padding: int) -> None:
    A = lsconv.Conv2d(psf.disk(3)[None, None], in_size=(96, 96), padding=padding)
    inverse = normal_inverse(
        Request.of(A, 1e-4, floor=1e-13, limits=Limits(factorise=Factorise.AFTER_ITERATIONS, dense_unknowns=0))
    )
    assert isinstance(inverse, BorderInverse)
    affordable = inverse.model.factor_work(inverse._cost) / inverse.model.iteration_work(1)
    shape = A.out_shape if inverse.side == "residual" else A.in_shape
    count = int(inverse(torch.randn(shape, dtype=F64), 1e-12)[1])
    assert affordable <= count < affordable + 1
    assert inverse.direct is not None


MODEL = CostModel(1, 40 * 40, 1, definite=True)


def policy(
    factorise: Factorise, cost_in_iterations: float, entries: float = 0.0, condition: float = 4.0
) -> FactorisationPolicy:
    """The policy of a border whose factors cost so many iterations; three are expected where the condition is four."""
    cost = FactorCost(cost_in_iterations * MODEL.iteration_work(1), entries, 0.0)
    return FactorisationPolicy(MODEL, cost, Limits(factorise=factorise), condition, torch.device("cpu"))


@pytest.mark.parametrize(
    ("factorise", "cheap", "dear"),
    [
        (Factorise.AUTO, True, False),
        (Factorise.AT_ONCE, True, True),
        (Factorise.AFTER_ITERATIONS, False, False),
        (Factorise.NEVER, False, False),
    ],
)
def test_factors_are_made_before_any_iteration_where_they_are_cheap(
    factorise: Factorise, cheap: bool, dear: bool
) -> None:
    assert policy(factorise, 2.0).should_factorise(1, 1) == cheap
    assert policy(factorise, 5.0).should_factorise(1, 1) == dear
    assert policy(factorise, 5.0).should_factorise(1, 2) == cheap  # for two solves they are


@pytest.mark.parametrize("factorise", [Factorise.AUTO, Factorise.AFTER_ITERATIONS, Factorise.NEVER])
def test_factors_are_due_when_the_iterations_of_all_solves_have_cost_as_much(factorise: Factorise) -> None:
    choice = policy(factorise, 20.5)
    for left in (21, 15, 9, 3):
        assert not choice.is_due()
        allowance = choice.allowance(1)
        assert (None if allowance is None else allowance.iterations) == (None if factorise is Factorise.NEVER else left)
        choice.record(6, 1, exceeded=False)
    assert choice.is_due() == (factorise is not Factorise.NEVER)


def test_an_exceeded_allowance_makes_the_factors_due_unless_they_are_given_up() -> None:
    choice = policy(Factorise.AUTO, 20.0)
    choice.record(1, 1, exceeded=True)
    assert choice.is_due()
    choice.give_up()
    assert not choice.is_due()
    assert choice.allowance(1) is None


def test_factors_that_do_not_fit_are_given_up() -> None:
    choice = FactorisationPolicy(MODEL, FactorCost(1.0, 1.0, 10.0), Limits(spare_bytes=8), 1e9, torch.device("cpu"))
    assert not choice.should_factorise(1, 1)
    choice.record(1000, 1, exceeded=True)
    assert not choice.is_due()
    assert choice.allowance(1) is None


def test_factors_that_are_slower_to_read_than_to_iterate_are_not_made() -> None:
    choice = policy(Factorise.AFTER_ITERATIONS, 1.0, entries=100 * MODEL.iteration_work(1))
    for _ in range(3):
        choice.record(20, 1, exceeded=False)
    assert not choice.is_due()
    assert choice.allowance(1) is not None


def test_a_worse_condition_means_more_expected_iterations() -> None:
    assert expected_iterations(1.0) == 0
    assert expected_iterations(1e4) == pytest.approx(2 * expected_iterations(1e2))
