"""The exact solve axis by axis, by a plan that gives way to the border's factors once these are the cheaper ones."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from lsconv.border.cost_model import direct_work
from lsconv.factored.kronecker import SeparablePlan
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.lsmr_cost import iteration_work
from lsconv.krylov.plan import FallbackKind
from lsconv.operators.convolution import Convolution
from lsconv.operators.memory import allowed_bytes

__all__ = ["KeptSeparablePlan"]


class KeptSeparablePlan(SeparablePlan):
    """:class:`SeparablePlan` until its answers have cost more than the border's, by as much as the border's factors do.

    An answer axis by axis is a product of dense matrices, and one of the border a transform: which of them costs less
    depends on the size, and on the refinement that a kernel in single precision takes.

    Attributes:
        solved: the right-hand sides so far.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.solved = 0
        super().__init__(*args, **options)

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether the border's factors would have been made by now for what their answers would have saved."""
        return self.solved > 0 and self.solved >= self._most

    @property
    def fallback_kind(self) -> FallbackKind:  # type: ignore[override]
        """The border where the plan gives way to it."""
        return FallbackKind.BORDER if self.exhausted else FallbackKind.NOTHING

    @functools.cached_property
    def _most(self) -> float:
        """The right-hand sides after which the plan is exhausted; infinite where an answer of the border costs more."""
        A, precise = self.A, self.precise
        assert isinstance(precise, Convolution)
        if A.ndim > 2 or not Embedding.exists(A) or not bool((self.damp > 0).all()):
            return math.inf
        border = direct_work(A, tuple(self.damp.shape))
        each = (1 + self._steps) * self.flops(A, self._product)[1] + self._steps * iteration_work(precise)
        if border.solve >= each or border.bytes > allowed_bytes(None, A.device):
            return math.inf
        return border.setup / (each - border.solve)

    def _adapt(self) -> None:
        super()._adapt()
        self.solved = 0
        self.__dict__.pop("_most", None)

    def _inverse(self, y: Tensor) -> Tensor:
        self.solved += y.numel() // self.A.out_numel
        return super()._inverse(y)

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        self.solved += v.numel() // self.A.in_numel
        return super()._inverse_adjoint(v)

    def __repr__(self) -> str:
        return super().__repr__().removeprefix("Kept")  # the plan that a user knows
