"""Tikhonov regularisation with a penalty by a plan that is kept: what ``pinv`` is where the penalty is the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.stacked_plan import StackedPlan
from lsconv.inverse.plans import KrylovStack, PenalisedBackward
from lsconv.inverse.route import penalty_plan
from lsconv.krylov.gradients.attach import LeastSquares, attach
from lsconv.krylov.gradients.backward_solves import Inverse
from lsconv.krylov.gradients.parameters import made_of, parameters_of
from lsconv.krylov.loop.empty_batch import serves_empty_batches
from lsconv.krylov.loop.solution import report
from lsconv.operators.base import LinearOperator

__all__ = ["penalised_inverse"]

Apply = Callable[[LinearOperator, Tensor, LinearOperator, Tensor, "Tensor | None"], Tensor]


@dataclass(frozen=True)
class _Kept:
    """A plan that is kept, for the values of A, L and damp that it was made for."""

    A: LinearOperator
    plan: StackedPlan | KrylovStack

    def answer(self, problem: LeastSquares) -> tuple[Tensor, Inverse]:
        """The x for the data and the prior of the problem."""
        solution = self.plan.solve(problem.y, x_prior=problem.x_prior)
        report(solution, self.plan)
        return solution.x, PenalisedBackward(self.A, self.plan)


def penalised_inverse(A: LinearOperator, L: LinearOperator, damp: Tensor, *, method: str = "auto") -> Apply:
    """The answers of ``tikhonov(A, y, damp, L=L, x_prior=x_prior)``, the setup done once.

    Args:
        A: the operator.
        L: the penalty.
        damp: the damping, > 0.
        method: as in :func:`lsconv.tikhonov`.

    Returns:
        A function of A, y, L, damp and x_prior, differentiable in all of them. A, L and damp have to have the values
        that the setup was made for; what autograd follows may have changed.
    """
    fixed_A, fixed_L = (made_of(operator, [p.detach() for p in parameters_of(operator)]) for operator in (A, L))
    with torch.no_grad():
        plan = penalty_plan(fixed_A, fixed_L, damp.detach(), method=method)

    solver = _Kept(fixed_A, plan)

    @serves_empty_batches()
    def apply(A: LinearOperator, y: Tensor, L: LinearOperator, damp: Tensor, x_prior: Tensor | None = None) -> Tensor:
        x: Tensor = attach(solver, LeastSquares(A, y, damp, L, x_prior))
        return x

    return apply
