"""The plan of items that miss different outputs: one border for each mask, with the missing outputs in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.inverse.plans.missing import MissingBorderPlan, MissingPlan
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.elementary import Diagonal
from lsconv.operators.observed import MeasuredRows

__all__ = ["MasksPerItemPlan"]


class MasksPerItemPlan(MissingPlan):
    """A :class:`MissingBorderPlan` for each of the masks; items with equal masks share it.

    Args:
        A: the masked operator.
        rows: A as a convolution and the outputs that are measured, with one weight for all outputs of a batch item.
        damp: the damping, > 0, one number.
        L: the penalty; None: the identity.

    Raises:
        MethodError: items have a damp or a kernel of their own; or A, or L, has no border.
    """

    @torch.no_grad()
    def __init__(
        self, A: LinearOperator, rows: MeasuredRows, damp: Tensor | float, L: LinearOperator | None = None
    ) -> None:
        super().__init__(A, rows, None, damp, L)
        if self.damp.ndim > 0 or rows.core.batch_shape:
            raise MethodError("A: a border for each mask serves one damp and one kernel")
        mask_batch = rows.scale.shape[: rows.scale.ndim - len(rows.core.out_shape)]
        scales, groups = rows.weights.sqrt().reshape(math.prod(mask_batch), -1).unique(dim=0, return_inverse=True)
        self.groups, self.scales = groups.reshape(mask_batch), scales.reshape(-1, *rows.core.out_shape)
        self.plans = []
        for scale in self.scales.to(rows.core.dtype):
            R = Diagonal(scale)
            self.plans.append(MissingBorderPlan(R @ rows.core, MeasuredRows(rows.core, scale, R), self.damp, L))

    def _filled_in(self, y: Tensor, tolerances: Tolerances, max_iter: int | None) -> tuple[Tensor, Tensor, Tensor]:
        def answer(plan: MissingBorderPlan, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return plan._filled_in(plan.rows.scale.to(data.dtype) * data, tolerances, max_iter)

        x, iterations, may_leave_range = self._by_mask(answer, self.measured.data(y), self.core.out_shape)
        return x, iterations, may_leave_range

    def _normal(self, g: Tensor, rtol: float | None) -> Tensor:
        (v,) = self._by_mask(lambda plan, part: (plan._normal(part, rtol),), g, self.core.in_shape)
        return v

    def _by_mask(
        self, solve: Callable[[MissingBorderPlan, Tensor], Sequence[Tensor]], given: Tensor, item: tuple[int, ...]
    ) -> list[Tensor]:
        """The results of ``solve`` for the items of each mask, back in their places.

        Args:
            solve: takes the plan of a mask and the items that have it, and returns tensors with as many items.
            given: ``(*batch, *item)``.
            item: the shape of an item.
        """
        batch = broadcast_shapes(given.shape[: given.ndim - len(item)], self.groups.shape)
        first = len(batch) - self.groups.ndim
        groups = self.groups.expand(batch[first:]).flatten()
        given = given.expand(*batch, *item).reshape(*batch[:first], len(groups), *item)
        results: list[Tensor] = []
        for number, plan in enumerate(self.plans):
            places = (groups == number).nonzero()[:, 0]
            parts = solve(plan, given.index_select(first, places))
            if not results:
                results = [part.new_empty(*batch[:first], len(groups), *part.shape[first + 1 :]) for part in parts]
            for result, part in zip(results, parts, strict=True):
                result.index_copy_(first, places, part)
        return [result.reshape(*batch, *result.shape[first + 1 :]) for result in results]

    def __repr__(self) -> str:
        return f"MasksPerItemPlan({len(self.plans)} masks, the first by {self.plans[0]!r})"
