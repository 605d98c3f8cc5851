"""One border solve of the whole image, for problems whose inverse reaches too far for tiles."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import plan_bytes
from lsconv.border.penalty import Filter, Penalty
from lsconv.border.plan import BorderPlan
from lsconv.border.stacked_plan import StackedPlan
from lsconv.fourier.circulant import CirculantPlan
from lsconv.fourier.embedding import Embedding
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.tiled.field import Field
from lsconv.tiled.ranks import Ranks

__all__ = ["UntiledPlan", "untiled_bytes"]


class UntiledPlan:
    """The plan of the whole image, made by the first rank when it is first asked.

    Args:
        A: the convolution.
        terms: the penalty as convolutions; empty: the identity.
        L: the penalty.
        damp: the damping.
        max_memory: bytes that it may take.
    """

    def __init__(
        self, A: Convolution, terms: Sequence[Filter], L: LinearOperator | None, damp: float, max_memory: int
    ) -> None:
        self.A, self.terms, self.L, self.damp, self.max_memory = A, terms, L, damp, max_memory
        self._plan: Any = None

    def write(self, ranks: Ranks, y: Field, x: Field, rtol: float) -> None:
        """Solve for all rows of y, and write the rows of x that are here."""
        A, first, y = self.A, ranks.rank == 0, copy.copy(y)
        m, n = A.spatial_out, A.spatial_in
        ranks.exchange(y, (0, m[0]) if first else (0, 0))
        found = torch.zeros(A.c_in, n[0] if first else 0, *n[1:], dtype=double(A.dtype), device=A.device)
        with ranks.together():
            if first:
                found = self.solve(y.read((0,) * A.ndim, m, double(A.dtype)), rtol)
        answer = Field(found, n, channels=True, wraps=(False,) * A.ndim, first=0, device=A.device)
        ranks.exchange(answer, (x.first, x.first + x.rows))
        with ranks.together():
            start = (x.first, *(0,) * (A.ndim - 1))
            x.write(start, answer.read(start, (x.rows, *n[1:])))

    def solve(self, y: Tensor, rtol: float) -> Tensor:
        """The answer for all rows."""
        if self._plan is None:
            A = self.A.to(dtype=double(self.A.dtype))
            if self.terms:
                L = None if self.L is None else self.L.to(dtype=A.dtype)
                self._plan = StackedPlan(A, L, self.damp, memory_limit=self.max_memory)  # type: ignore[arg-type]
            elif Embedding.exists(A) and Embedding(A).is_circulant:
                self._plan = CirculantPlan(A, self.damp)
            else:
                self._plan = BorderPlan(A, self.damp, memory_limit=self.max_memory)
        if isinstance(self._plan, CirculantPlan):
            return self._plan.solve_unrounded(y)
        return self._plan.solve(y, rtol=0.01 * rtol).x


def untiled_bytes(A: Convolution, terms: Sequence[Filter], damp: float) -> int:
    """The bytes of such a plan, with the vectors of a solve."""
    wide = A.to(dtype=double(A.dtype))
    penalty = None
    if terms:
        penalty = Penalty(wide, [Filter(t.convolution.to(dtype=wide.dtype), t.factor) for t in terms],
                          torch.tensor(damp, dtype=torch.float64, device=A.device))  # fmt: skip
    return plan_bytes(wide, penalty=penalty) + 10 * wide.dtype.itemsize * max(wide.in_numel, wide.out_numel)
