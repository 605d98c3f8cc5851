"""The exact solve of a small problem with a penalty, through the singular values of ``[A; damp L]``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.factored.dense_svd import SingularValuePlan
from lsconv.krylov.loop.certificate import NormBounds
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import PenalisedPlan
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import default_rcond, direct_rtol, double

__all__ = ["DenseStack"]


class DenseStack(PenalisedPlan):
    """Setup of the dense solve of ``min ||A x - y||^2 + damp^2 ||L (x - x_prior)||^2``; :meth:`solve` answers.

    Args:
        A: the operator.
        L: the penalty.
        damp: the damping, a number or one per batch item.
    """

    def __init__(self, A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> None:
        self.A, self.penalty = A, L
        self.problem = _in_double(A, L, damp)
        self.plan = SingularValuePlan(self.problem.stack, rcond=default_rcond(A.dtype), rtol=direct_rtol(A.dtype))

    @staticmethod
    def is_quick(A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> bool:
        """Tell whether the setup takes about a second or less."""
        return SingularValuePlan.is_quick(_in_double(A, L, damp).stack)

    @torch.no_grad()
    def solve(
        self,
        y: Tensor,
        *,
        x_prior: Tensor | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
    ) -> Solution:
        """The certified solution for ``y``; see :func:`tikhonov`."""
        problem = self.problem
        found = self.plan.solve(problem.data(y, x_prior), rtol=rtol)
        judge = problem.judge(self.tolerances(rtol, atol), self.A.dtype, norm=NormBounds(upper=self.plan.norm))
        return problem.solution(judge, found.x, y, x_prior=x_prior, iterations=found.iterations, otherwise=found.codes)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``."""
        return self.plan.normal_solve(g).to(self.A.dtype)

    def __repr__(self) -> str:
        return f"DenseStack(L={type(self.penalty).__name__}, {self.plan!r})"


def _in_double(A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> Penalised:
    """The problem in double precision, or in that of A where A or L does not convert."""
    damping = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
    try:
        return Penalised(A.to(dtype=double(A.dtype)), damping, L.to(dtype=double(A.dtype)))
    except NotImplementedError:
        return Penalised(A, damping, L)
