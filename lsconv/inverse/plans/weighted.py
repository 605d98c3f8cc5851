r"""The plan of a convolution whose outputs count differently, through the border of the mean weight.

.. math:: \min_x \sum_i w_i |(Ax)_i - y_i|^2 + \mathrm{damp}^2 \|Lx\|^2

Flexible conjugate gradients solve its normal equations (:mod:`lsconv.inverse.plans.normal_iteration`). The
preconditioner is :math:`(\bar w A^HA + \mathrm{damp}^2 L^HL)^{-1}`, with the mean weight :math:`\bar w`, exact through
the border of A. The number of steps grows with the deviation of the weights, averaged by the blur, from their mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request, least_shift
from lsconv.border.penalty import common_grid_filters
from lsconv.errors import MethodError
from lsconv.inverse.plans.normal_iteration import NormalIteration
from lsconv.krylov.loop.batched_scalars import binary_unit
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.observed import MeasuredRows

__all__ = ["WeightedPlan"]


class WeightedPlan(NormalIteration):
    """Setup for a convolution with weights, or a mask, before it; :meth:`solve` answers right-hand sides.

    Args:
        A: the operator, weights included.
        rows: A as a convolution and the weights of its outputs.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.

    Raises:
        MethodError: the convolution, or L, is not served by the border.
    """

    reason = "weights, or masks of items, vary: an iteration, preconditioned by the border of their mean"
    inverse: NormalInverse

    @torch.no_grad()
    def __init__(
        self, A: LinearOperator, rows: MeasuredRows, damp: Tensor | float, L: LinearOperator | None = None
    ) -> None:
        super().__init__(A, damp, L)
        core = rows.core.to(dtype=double(A.dtype))
        if not isinstance(core, Convolution):
            raise MethodError(f"A: expected weights before a convolution, got {A!r}")
        core = core.with_parameters([core.weight.detach()])
        weights = rows.weights.double().flatten(rows.scale.ndim - len(core.out_shape))
        mean = weights.mean(-1)
        mean = torch.where(mean > 0, mean, 1)
        self.mean, self._positive = mean, bool((weights > 0).all())
        self.ratio = torch.where(weights > 0, weights, torch.inf).amin(-1).reciprocal() * weights.amax(-1)
        floor = least_shift(core.weight.real.dtype, damped=True)
        terms = common_grid_filters(core, L)
        self.inverse = normal_inverse(Request.of(core, self.damp / mean.sqrt(), terms, floor=floor, side="solution"))
        self.factor_batch = tuple(self.inverse.embedding.batch_shape)
        self.inverse.factorise_if_cheaper(self.factor_batch, 10)

    def precondition(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the inverse of the normal operator of the mean weight."""
        return self.inverse(g, tolerance)[0]

    def _null_suspects(self, x: Tensor, data: Tensor, null_share: float) -> Tensor:
        """Mark the items whose x may have a larger part in the null space of A than its share.

        With positive weights, the weighted A has the null space of A, on which the preconditioner M divides by its
        shift alone. The length of ``M^-1 g``, computed to a thousandth, bounds that of the part of x there, unless the
        shift of M is not that of the damping.
        """
        if not (self._positive and self.inverse.exact):
            return super()._null_suspects(x, data, null_share)
        space = self.space
        g = self.stack.adjoint(data - self.stack.apply(x)) - space.broadcast(self.mu) * x
        unit = binary_unit(space.safe_norm(g))
        part = space.norm(self.precondition(g * space.broadcast(1 / unit), 1e-3)) * unit / self.mean
        part = part + 1e-3 * space.safe_norm(g) / self.mu
        return ~(part <= null_share * space.norm(x))

    def __repr__(self) -> str:
        return (
            f"WeightedPlan(weights up to {float(self.ratio.max()):.3g} times the least, preconditioner of the mean: "
            f"{self.inverse.describe()})"
        )
