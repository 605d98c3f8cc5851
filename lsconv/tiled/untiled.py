"""One border solve of the whole image, for problems whose inverse decays too slowly for tiles."""

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
from lsconv.fourier.circulant import FourierPlan
from lsconv.fourier.embedding import Embedding
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.tiled.field import Field
from lsconv.tiled.ranks import Ranks

__all__ = ["UntiledPlan", "untiled_bytes"]


class UntiledPlan:
    """The plan for the whole image, made on the first rank when the first data come.

    Args:
        A: the convolution.
        terms: L as convolutions; empty: the identity.
        L: the penalty.
        damp: the damping.
        max_memory: bytes that the plan may take.
    """

    def __init__(
        self, A: Convolution, terms: Sequence[Filter], L: LinearOperator | None, damp: float, max_memory: int
    ) -> None:
        self.A, self.terms, self.L, self.damp, self.max_memory = A, terms, L, damp, max_memory
        self._plan: Any = None

    def write(self, ranks: Ranks, y: Field, x: Field, rtol: float) -> None:
        """Solve on the first rank for all rows of y, and write the rows of x on each rank."""
        A, first, y = self.A, ranks.rank == 0, copy.copy(y)
        m, n = A.spatial_out, A.spatial_in
        ranks.exchange(y, (0, m[0]) if first else (0, 0))
        found = torch.zeros(A.c_in, n[0] if first else 0, *n[1:], dtype=double(A.dtype), device=A.device)
        with ranks.raise_on_all():
            if first:
                found = self.solve(y.read((0,) * A.ndim, m, double(A.dtype)), rtol)
        answer = Field(found, n, channels=True, wraps=(False,) * A.ndim, first=0, device=A.device)
        ranks.exchange(answer, (x.first, x.first + x.rows))
        with ranks.raise_on_all():
            start = (x.first, *(0,) * (A.ndim - 1))
            x.write(start, answer.read(start, (x.rows, *n[1:])))

    def solve(self, y: Tensor, rtol: float) -> Tensor:
        """Solve for all rows of y, ``(c_out, *size)``."""
        if self._plan is None:
            A = self.A.to(dtype=double(self.A.dtype))
            if self.terms:
                L = None if self.L is None else self.L.to(dtype=A.dtype)
                self._plan = StackedPlan(A, L, self.damp, memory_limit=self.max_memory)  # type: ignore[arg-type]
            elif Embedding.serves(A) and Embedding(A).is_circulant:
                self._plan = FourierPlan(A, self.damp, memory_limit=self.max_memory)
            else:
                self._plan = BorderPlan(A, self.damp, memory_limit=self.max_memory)
        if isinstance(self._plan, FourierPlan):
            return self._plan.apply(y)
        return self._plan.solve(y, rtol=0.01 * rtol).x


def untiled_bytes(A: Convolution, terms: Sequence[Filter], damp: float) -> int:
    """Estimate the bytes of an :class:`UntiledPlan`, with the vectors of a solve."""
    A_double = A.to(dtype=double(A.dtype))
    vectors = 10 * A_double.dtype.itemsize * max(A_double.in_numel, A_double.out_numel)
    return plan_bytes(A_double, penalty=Penalty.of_terms(A_double, terms, damp)) + vectors
