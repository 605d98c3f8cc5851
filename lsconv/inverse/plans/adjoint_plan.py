"""The plan of the adjoint of a convolution, a transposed convolution: the adjoint of the plan of the convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.errors import unreported
from lsconv.factored.direct_plan import in_double
from lsconv.krylov.gradients.backward_solves import normal_by_apply
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.krylov.loop.certificate import RankThreshold
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.dtypes import default_rcond

__all__ = ["AdjointPlan"]


class AdjointPlan(Plan):
    r"""Solves with ``A.H`` by the plan of A.

    .. math:: (AA^H + \mathrm{damp}^2)^{-1} A = \left((A^HA + \mathrm{damp}^2)^{-1} A^H\right)^H, \qquad
              (A^H)^+ = (A^+)^H

    Args:
        A: the adjoint of a convolution.
        plan: the plan of the convolution, ``A.H``.
        damp: the damping, a number or one per batch item.
    """

    reason = "the adjoint of a convolution is solved with by the plan of the convolution"
    falls_back_on_lsmr = True

    def __init__(self, A: LinearOperator, plan: Plan, damp: Tensor | float) -> None:
        self.A, self.plan = A, plan
        self.damp = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device)

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``; ``max_iter`` has no effect."""
        precise = in_double(self.A)
        judge = Judge(
            precise,
            self.tolerances(rtol, atol),
            self.damp,
            self.A.dtype,
            rank=RankThreshold(default_rcond(self.A.dtype)),
        )
        with unreported():  # the certificate says which items have converged
            x, b = self.plan.adjoint(y, rtol=rtol).to(precise.dtype), y.to(precise.dtype)
            solution = judge.solution(x, b)
            if solution.all_converged or not bool((self.damp > 0).all()):
                return solution
            # the plan's tolerance is that of x, whose errors show in the gradient up to ||A|| / damp times as much
            damp_squared = over_items(self.damp.square(), len(self.A.in_shape))
            gradient = precise.adjoint(b - precise.apply(x)) - damp_squared * x
            return judge.solution(x + self.normal_solve(gradient.to(y.dtype), rtol=rtol), b)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, without a certificate."""
        return self.plan.adjoint(y, rtol=rtol)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.plan.apply(v, rtol=rtol)

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        return normal_by_apply(self.A, self.damp, lambda y, tolerance: self.apply(y, rtol=tolerance), g, rtol=rtol)

    def reasons(self) -> list[str]:
        """The reasons of this plan, and of the one inside it."""
        return [self.reason, *self.plan.reasons()]

    def __repr__(self) -> str:
        return f"AdjointPlan({self.plan!r})"
