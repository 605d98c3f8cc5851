"""PlanRequest: the damping, penalty and options for which a plan is chosen, as the rules of the choice read them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator

__all__ = ["PlanRequest", "Rule"]


@dataclass(frozen=True)
class PlanRequest:
    r"""A damping, a penalty, and the options of the caller, for which a plan is chosen.

    Attributes:
        choose: the function that chooses a plan, for rules that need the plan of another operator.
        damp: the damping, a number or one per batch item.
        method: the method asked for, or "auto".
        L: the penalty; None: the identity.
        preconditioner: that of a Krylov method: an operator, "auto", "circulant" or None.
        memory_limit: bytes that the plan may use; None: what the device has.
        rcond: the user's threshold for the rank; None: that of the dtype.
        needs_krylov: the caller has options that only a Krylov method takes.
    """

    choose: Callable[[LinearOperator, PlanRequest], Any]
    damp: Tensor | float
    method: str
    L: LinearOperator | None = None
    preconditioner: LinearOperator | str | None = "auto"
    memory_limit: int | None = None
    rcond: float | None = None
    needs_krylov: bool = False

    @property
    def any_method(self) -> bool:
        """True with ``method="auto"`` and no option that only Krylov methods take."""
        return self.method == "auto" and not self.needs_krylov

    @functools.cached_property
    def damped(self) -> bool:
        """True where ``damp > 0`` in every item."""
        return bool((torch.as_tensor(self.damp) > 0).all())

    @property
    def decides_rank(self) -> bool:
        """True where some item has ``damp = 0`` and the user has given a threshold for the rank."""
        return self.rcond is not None and bool((torch.as_tensor(self.damp) == 0).any())

    def plan(self, A: LinearOperator, **changes: Any) -> Any:
        """The plan for another operator and the same request, but for ``changes``."""
        return self.choose(A, replace(self, **changes))


Rule: TypeAlias = Callable[[LinearOperator, PlanRequest], Plan | None]
