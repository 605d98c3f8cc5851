"""One solve with a plan, shared by all functions of this folder: the fallback for unconverged items, and the report."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, ConvergenceWarning, MethodError
from lsconv.inverse.plans.krylov_plan import KRYLOV_ONLY
from lsconv.inverse.route import fallback_plan
from lsconv.krylov.gradients.attach import LeastSquares
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items

__all__ = ["Fallback", "solve", "with_fallback", "with_start", "without_items"]

_COMMON = {"rtol", "atol", "max_iter"}


def solve(
    plan: Plan,
    y: Tensor,
    nonfinite: Tensor,
    *,
    fallback: Fallback | None = None,
    raise_on_failure: bool = False,
    **options: Any,
) -> Solution:
    """Solve with a plan, mark the items whose data are not finite, and report those that did not converge.

    Args:
        plan: the plan.
        y: right-hand sides, ``(*batch, *out_shape)``.
        nonfinite: True for the items of y that hold NaN or infinity, ``(*batch)``.
        fallback: solves for the items that the plan leaves unconverged; None: no other plan does.
        raise_on_failure: raise instead of warning.
        options: those of the plan's ``solve``.
    """
    max_iter = options.get("max_iter")
    if max_iter is not None and (isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 0):
        raise ArgumentError(f"max_iter: expected an integer >= 0 or None, got {max_iter!r}")
    unknown = sorted(set(options) - _COMMON - KRYLOV_ONLY)
    if unknown:
        raise ArgumentTypeError(
            f"{', '.join(unknown)}: no such option; known are {', '.join(sorted(_COMMON | KRYLOV_ONLY))}"
        )
    # the fallback solves alone where the plan's iterations have cost, or for this y would cost, the fallback's setup
    if fallback is not None and plan.innermost.gives_way(y):
        plan = fallback.plan() or plan
    extra = sorted(set(options) - _COMMON - plan.options)
    if extra:
        raise MethodError(
            f"{', '.join(extra)}: {plan!r} takes no such option; ask for method='lsmr' or another Krylov method"
        )
    if fallback is not None and max_iter is None:
        # a plan stops early where LSMR may take over its items, which LSMR does not for an rcond of the user's
        options["max_iter"] = fallback.first.innermost.fallback_after if fallback.rcond is None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = plan.solve(y, **options)
    if fallback is not None and not solution.all_converged:
        solution = with_fallback(solution, fallback, y, {**options, "max_iter": max_iter})
    if bool(nonfinite.any()):
        solution = without_items(solution, nonfinite)
    report(solution, plan, raise_on_failure=raise_on_failure)
    return solution


def with_start(options: dict[str, Any], problem: LeastSquares) -> dict[str, Any]:
    """The options, with the prior of the problem as the start x0: its part in the null space of A stays in x."""
    return options if problem.x_prior is None else {**options, "x0": problem.x_prior}


def with_fallback(solution: Solution, fallback: Fallback, y: Tensor, options: dict[str, Any]) -> Solution:
    """Replace the items that the plan left unconverged, or not certified to be of minimum norm, by the fallback's.

    LSMR converges for a rank-deficient A whose nonzero singular values are well separated from zero, and not where
    they decay to zero gradually. Where neither plan has converged, the x with the smaller objective is returned.
    """
    plan = fallback.plan()
    if plan is None:
        return solution
    common = {name: value for name, value in options.items() if name in _COMMON}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        other = plan.solve(y, **common)
    objectives = [
        torch.hypot(
            answer.residual_norm, answer.damp * ItemSpace(fallback.A.in_shape, y.dtype, y.device).norm(answer.x)
        )
        for answer in (solution, other)
    ]
    undecided = other.codes == Status.RANK_UNDECIDED.code
    better = ~solution.converged & (other.converged | undecided | (objectives[1] < objectives[0]))
    return solution.replaced(better, other)


class Fallback:
    """The plan of :func:`~lsconv.inverse.route.fallback_plan`, made when an item first needs it.

    Attributes:
        answering: the plan that gave the answer, which the backward pass uses: ``first`` or the fallback.

    Args:
        A: the operator.
        damp: the damping.
        first: the plan whose unconverged items the fallback solves for.
        rcond: the user's threshold of the rank.
    """

    def __init__(self, A: LinearOperator, damp: float | Tensor, first: Plan, rcond: float | None = None) -> None:
        self.A, self.damp, self.first, self.rcond = A, damp, first, rcond
        self._made: list[Plan | None] = []
        self.answering: Plan = first

    def plan(self) -> Plan | None:
        """Make the plan once, set :attr:`answering` to it, and return it; None where no other plan would do better."""
        if not self._made:
            self._made.append(fallback_plan(self.A, self.damp, self.first, self.rcond))
        self.answering = self._made[0] or self.first
        return self._made[0]

    def for_another_solve(self) -> Fallback:
        """A copy for another solve, which begins with the first plan; both copies share the plan of the fallback."""
        other = copy.copy(self)
        other.answering = self.first
        return other


def without_items(solution: Solution, nonfinite: Tensor) -> Solution:
    """The solution with NaN and :attr:`Status.NON_FINITE` for the items that ``nonfinite``, ``(*batch)``, marks."""
    x = solution.x
    return replace(
        solution,
        x=x.masked_fill(over_items(nonfinite, x.ndim - nonfinite.ndim), torch.nan),
        codes=torch.where(nonfinite, Status.NON_FINITE.code, solution.codes),
        converged=solution.converged & ~nonfinite,
        residual_norm=solution.residual_norm.masked_fill(nonfinite, torch.nan),
        gradient_norm=solution.gradient_norm.masked_fill(nonfinite, torch.nan),
    )
