"""Separable kernels solved axis by axis, until the factors of the border would have paid for themselves."""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import Tensor

from lsconv.border.cost_model import direct_plan_cost
from lsconv.factored.kronecker import SeparablePlan
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.lsmr_cost import iteration_work
from lsconv.operators.convolution import Convolution
from lsconv.operators.memory import allowed_bytes

__all__ = ["SeparableThenBorderPlan"]


class SeparableThenBorderPlan(SeparablePlan):
    """A :class:`SeparablePlan` that hands over to the border after :attr:`_most` right-hand sides.

    A solve axis by axis multiplies by dense matrices; a solve with the factors of the border takes Fourier transforms.
    Where the latter is cheaper, the plan hands over once the work saved so far would have paid for the factors.

    Attributes:
        solved: the number of right-hand sides solved so far.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.solved = 0
        super().__init__(*args, **options)

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether solves with the border's factors would by now have saved the cost of making these factors."""
        return self.solved > 0 and self.solved >= self._most

    @functools.cached_property
    def _most(self) -> float:
        """The number of right-hand sides after which the factors pay; infinite where they never do, or do not fit."""
        A, precise = self.A, self.precise
        assert isinstance(precise, Convolution)
        if A.ndim > 2 or not Embedding.serves(A) or not bool((self.damp > 0).all()):
            return math.inf
        border = direct_plan_cost(A, tuple(self.damp.shape))
        each = (1 + self._steps) * self.flops(A, self._product)[1] + self._steps * iteration_work(precise)
        if border.solve_work >= each or border.peak_bytes > allowed_bytes(None, A.device):
            return math.inf
        return border.setup_work / (each - border.solve_work)

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
        return super().__repr__().replace("ThenBorder", "", 1)  # the name under which the documentation has it
