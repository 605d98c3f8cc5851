"""The plan of a convolution whose kernel varies: conjugate gradients, preconditioned by tiles with local kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.inverse.plans.normal_iteration import NormalIteration
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import double
from lsconv.operators.observed import MeasuredRows
from lsconv.operators.varying_convolution import VaryingConvolution
from lsconv.tiled.schwarz import SchwarzInverse

__all__ = ["VaryingPlan"]


class VaryingPlan(NormalIteration):
    """Setup for a convolution whose kernel varies; :meth:`solve` answers right-hand sides.

    Args:
        A: the operator, with a mask or weights before it where there are some.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.
        refuse_if_slower: refuse where LSMR should take less time.

    Raises:
        MethodError: the tiles do not serve A or L, or would not pay.
    """

    reason = "the kernel varies: an iteration, preconditioned by tiles with the kernel of their place"
    inverse: SchwarzInverse

    @torch.no_grad()
    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        L: LinearOperator | None = None,
        *,
        refuse_if_slower: bool = False,
    ) -> None:
        rows, core = _rows_and_core(A)
        if not isinstance(core, VaryingConvolution):
            raise MethodError(f"A: expected a VaryingConvolution, with weights before it or not, got {A!r}")
        super().__init__(A, damp, L)
        core = core.with_parameters([tensor.detach() for tensor in core.parameters()]).to(dtype=double(A.dtype))
        weights = None if rows is None else rows.weights
        penalty = None if L is None else L.to(dtype=core.dtype)
        self.inverse = SchwarzInverse(core, self.damp, penalty, weights, refuse_if_slower=refuse_if_slower)
        self.factor_batch = tuple(self.damp.shape)
        self.has_null_space = rows is not None or A.out_numel < A.in_numel

    def precondition(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the Schwarz preconditioner."""
        return self.inverse(g, tolerance)

    @staticmethod
    def serves(A: LinearOperator) -> bool:
        """Tell whether A is a convolution whose kernel varies, with a mask or weights before it or not."""
        return isinstance(_rows_and_core(A)[1], VaryingConvolution)

    def __repr__(self) -> str:
        return f"VaryingPlan({self.A.in_shape} -> {self.A.out_shape}, {self.inverse.describe()})"


def _rows_and_core(A: LinearOperator) -> tuple[MeasuredRows | None, LinearOperator]:
    """Split A into a mask or weights on its outputs, None where there are none, and the operator that they act on."""
    rows = None if isinstance(A, VaryingConvolution) else MeasuredRows.of(A)
    return rows, A if rows is None else rows.core
