"""The fallback: the plan that solves for the items that another plan leaves unconverged."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lsconv.border.plan import BorderPlan
from lsconv.errors import MethodError, PlanMemoryError, unreported
from lsconv.factored.dense_svd import SingularValuePlan
from lsconv.inverse.plans.adjoint_plan import AdjointPlan
from lsconv.inverse.plans.certified_lsmr import CertifiedLsmrPlan
from lsconv.inverse.plans.dense_stack import DenseStack
from lsconv.inverse.plans.krylov_choice import krylov_plan
from lsconv.inverse.plans.krylov_plan import KrylovPlan, KrylovStack
from lsconv.inverse.plans.route_costs import Planes
from lsconv.inverse.route import border_plan, singular_value_plan
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.plan import FALLBACK_AFTER, PenalisedPlan, Plan
from lsconv.operators.algebra import Adjoint
from lsconv.operators.base import LinearOperator

__all__ = ["Fallback", "fallback_plan", "penalised_fallback_plan"]


class Fallback:
    """The fallback of one plan; its own plan is made when an item first needs it.

    Args:
        A: the operator.
        damp: the damping.
        first: the plan whose unconverged items the fallback solves for.
        rcond: the user's threshold of the rank.
    """

    def __init__(self, A: LinearOperator, damp: float | Tensor, first: Plan, rcond: float | None = None) -> None:
        self.A, self.damp, self.first, self.rcond = A, damp, first, rcond

    @functools.cached_property
    def plan(self) -> Plan | None:
        """The plan of :func:`fallback_plan`; None where no other plan would do better."""
        return fallback_plan(self.A, self.damp, self.first, self.rcond)

    def replace_unconverged(
        self,
        solution: Solution,
        y: Tensor,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
    ) -> tuple[Solution, Plan]:
        """Replace the items that the first plan left unconverged, or not certified to be of minimum norm.

        LSMR converges for a rank-deficient A whose nonzero singular values are well separated from zero, and not where
        they decay to zero gradually. Where neither plan has converged, the x with the smaller objective is returned.

        Args:
            solution: the solution of the first plan.
            y: its right-hand sides, ``(*batch, *out_shape)``.
            rtol, atol, max_iter: those of the solve with the fallback's plan.

        Returns:
            The solution, and the plan of the backward pass: the fallback's, or the first where there is no other.
        """
        plan = self.plan
        if plan is None:
            return solution, self.first
        with unreported():
            other = plan.solve(y, rtol=rtol, atol=atol, max_iter=max_iter)
        space = ItemSpace(self.A.in_shape, y.dtype, y.device)
        before, after = (
            torch.hypot(answer.residual_norm, answer.damp * space.norm(answer.x)) for answer in (solution, other)
        )
        undecided = other.codes == Status.RANK_UNDECIDED.code
        better = ~solution.converged & (other.converged | undecided | (after < before))
        return solution.replaced(better, other), plan


def fallback_plan(A: LinearOperator, damp: Tensor | float, plan: Plan, rcond: float | None) -> Plan | None:
    """The plan that solves for the items that "auto" leaves unconverged; None where no other would do better.

    For a small A it is the dense decomposition, which decides every rank and costs no more than a failed iteration.

    Args:
        A: the operator.
        damp: the damping, a number or one per batch item.
        plan: the plan of "auto".
        rcond: the user's threshold of the rank, or None.
    """
    first = plan.innermost
    if first.never_misses and not first.exhausted:
        return None
    if SingularValuePlan.is_quick(A) and not first.never_misses:
        return singular_value_plan(A, damp, None, rcond)
    if first.gives_way_to_border:
        return _border_after(A, damp, first)
    if rcond is not None or not first.falls_back_on_lsmr:
        return None
    if isinstance(first, BorderPlan) and first.inverse.form == "valid" and bool((first.damp > 0).all()):
        return CertifiedLsmrPlan(A, damp, preconditioned=True)
    # LSMR after an iteration, which has failed, gets its default limit
    return KrylovPlan(A, damp, "lsmr", max_iter=None if first.iterates else FALLBACK_AFTER)


def _border_after(A: LinearOperator, damp: Tensor | float, first: Plan) -> Plan | None:
    """The plan of the border for what ``first`` leaves, or LSMR where there is no such plan.

    None where ``first`` misses no item and solves with the factors of the border would not have paid for them.
    """
    try:
        border = border_plan(A, damp, None, Planes.of(A.operator if isinstance(A, Adjoint) else A, damp))
    except (MethodError, PlanMemoryError):
        return None if first.never_misses else krylov_plan(A, damp, "lsmr")
    last = (border.plan if isinstance(border, AdjointPlan) else border).innermost
    factors = None
    if first.exhausted and isinstance(last, BorderPlan):
        # assume that as many right-hand sides will follow as have been solved so far
        factors = last.inverse.factorise_if_cheaper(tuple(last.inverse.embedding.batch_shape), first.solved)
    return None if first.never_misses and factors is None else border


def penalised_fallback_plan(
    A: LinearOperator, L: LinearOperator, damp: Tensor | float, plan: Plan
) -> PenalisedPlan | None:
    """The plan that solves for the items, with a penalty, that "auto" leaves unconverged; None where there is none."""
    if DenseStack.is_quick(A, L, damp):
        return DenseStack(A, L, damp)
    return KrylovStack(A, L, damp) if plan.innermost.falls_back_on_lsmr else None
