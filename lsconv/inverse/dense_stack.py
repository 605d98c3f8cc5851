"""The exact solve of a small problem with a penalty, through the singular values of ``[A; damp L]``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.stacked_plan import stacked_data, stacked_solution
from lsconv.factored.singular_values import SingularValuePlan
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.operators.algebra import VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import default_rcond, direct_rtol

__all__ = ["DenseStack", "stacked"]


class DenseStack:
    """Setup of the dense solve of ``min ||A x - y||^2 + damp^2 ||L (x - x_prior)||^2``; :meth:`solve` answers.

    Args:
        A: the operator.
        L: the penalty.
        damp: the damping, a number or one per batch item.
    """

    def __init__(self, A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> None:
        self.A, self.L, self.damp = A, L, torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        self.stack = stacked(A, L, damp)
        self.plan = SingularValuePlan(self.stack, rcond=default_rcond(A.dtype), rtol=direct_rtol(A.dtype))

    @staticmethod
    def is_quick(A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> bool:
        """Tell whether the setup takes about a second or less."""
        return SingularValuePlan.is_quick(stacked(A, L, damp))

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, x_prior: Tensor | None = None, rtol: float | None = None, atol: float = 0.0
    ) -> Solution:
        """The certified solution for ``y``; see :func:`tikhonov`."""
        stack = self.plan.precise
        assert isinstance(stack, VStack)
        found = self.plan.solve(stacked_data(self.stack, y, x_prior), rtol=rtol)
        return stacked_solution(
            stack,
            found.x.to(stack.dtype),
            y,
            self.damp.expand(found.converged.shape),
            x_prior=x_prior,
            dtype=self.A.dtype,
            tolerances=Tolerances.of(self.A.dtype, self.plan.rtol if rtol is None else rtol, atol),
            iterations=found.iterations,
            norm_bound=self.plan.norm,
            otherwise=found.codes,
        )

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``."""
        return self.plan.normal_solve(g)

    def __repr__(self) -> str:
        return f"DenseStack(L={type(self.L).__name__}, {self.plan!r})"


def stacked(A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> VStack:
    """``[A; damp L]``."""
    return VStack([A, L * torch.as_tensor(damp, dtype=A.dtype, device=A.device)])
