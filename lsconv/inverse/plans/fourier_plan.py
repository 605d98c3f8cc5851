"""The plan of a circular convolution that nothing crops: one small matrix per frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.fourier.circulant import CirculantPlan, block_circulant
from lsconv.krylov.gradients.backward_solves import normal_by_apply
from lsconv.krylov.loop.certificate import NormBounds, RankThreshold
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import double
from lsconv.operators.memory import allowed_bytes, check_fits

__all__ = ["FourierPlan"]


class FourierPlan(Plan):
    """The exact inverse of a block-circulant operator (:class:`CirculantPlan`), with certificates."""

    never_misses = True
    reason = "nothing is cropped from a circular convolution: one small matrix per frequency"

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float = 0.0,
        *,
        rcond: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        embedding = block_circulant(A, tuple(torch.as_tensor(damp).shape))
        entries = embedding.blocks * math.prod(embedding.grid) * embedding.in_channels * embedding.out_channels
        # the symbol, its inverse and as much work space, of complex numbers of 16 bytes
        check_fits(3 * 16 * entries, allowed_bytes(memory_limit, A.device), A, "fourier")
        self.plan = CirculantPlan(A, damp, rcond=rcond)  # type: ignore[arg-type]
        self.A = self.plan.A
        self.precise = self.A.to(dtype=double(self.A.dtype))

    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``; nothing iterates, so ``max_iter`` has no effect."""
        plan, A = self.plan, self.A
        x = plan.solve_unrounded(y.detach())
        judge = Judge(
            self.precise,
            self.tolerances(rtol, atol),
            plan.damp,
            A.dtype,
            rounding=torch.finfo(plan.dtype).eps,
            norm=NormBounds(plan.norm),
            rank=RankThreshold(plan.rcond, truncated=True),
        )
        solution = judge.solution(x.to(self.precise.dtype), y.to(self.precise.dtype))
        if plan.rank is None:
            return solution
        return solution.with_rank(plan.rank, plan.undecided)

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``."""
        return self.plan.solve(y)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.plan.solve_adjoint(v)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        return normal_by_apply(self.A, self.plan.damp, lambda y, _: self.plan.solve(y), g, rtol=rtol)

    def __repr__(self) -> str:
        return (
            f"FourierPlan(grid={self.plan.embedding.grid}, factors={self.plan.nbytes / 2**20:.1f} MiB, {self.A.device})"
        )
