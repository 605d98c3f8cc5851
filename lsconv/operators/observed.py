"""Masks, crops and weights on the outputs of an operator: the data that they drop, and the operator behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.operators.algebra import BlockDiagonal, Complexified, Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Crop, Diagonal, Identity, Mask

__all__ = ["MeasuredRows", "observed"]


def observed(A: LinearOperator, y: Tensor) -> Tensor:
    """Return ``y`` with zeros where a mask, or a zero of a diagonal, makes the row of A zero.

    Args:
        A: the operator.
        y: ``(*batch, *A.out_shape)``.

    Example:
        >>> from lsconv.operators.observed import observed
        >>> A = 2 * lsconv.Mask(torch.tensor([True, False])) @ lsconv.Identity((2,))
        >>> observed(A, torch.tensor([1.0, float("nan")]))
        tensor([1., 0.])
    """
    if isinstance(A, Mask):
        return A.apply(y)
    if isinstance(A, Diagonal):
        return torch.where(A.diagonal.detach() != 0, y, 0)
    if isinstance(A, Product):
        return observed(A.operators[0], y)
    if isinstance(A, (Scaled, Complexified)):
        return observed(A.operator, y)
    if isinstance(A, (VStack, BlockDiagonal)):
        blocks = A.blocks if isinstance(A, VStack) else A.out_blocks
        return blocks.join([observed(B, part) for B, part in zip(A.operators, blocks.split(y), strict=True)])
    return y


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    r"""An operator ``R A`` with R selecting and scaling outputs of A.

    Least squares with it are weighted ones with A: :math:`\|RAx - y\|^2 = \sum_i w_i |(Ax)_i - z_i|^2` up to a
    constant, over the outputs i of A, with the weights ``w = |scale|^2`` and data z (:meth:`data`).

    Attributes:
        core: A.
        scale: the factors of A's outputs, ``(*batch, *core.out_shape)``, zero where an output is not in the data.
        rows: R.
    """

    core: LinearOperator
    scale: Tensor
    rows: LinearOperator

    @classmethod
    def of(cls, A: LinearOperator) -> MeasuredRows | None:
        """Split a product of masks, crops, diagonals and one more operator; None for any other operator."""
        factor, product = torch.ones(()), A
        while isinstance(product, Scaled) and product.alpha.ndim == 0:
            factor, product = factor * product.alpha.detach(), product.operator
        if not isinstance(product, Product):
            return None
        *rows, core = product.operators
        if not all(_selects_and_scales(row) for row in rows):
            return None
        R: LinearOperator = Product(rows) * factor if len(rows) > 1 else rows[0] * factor
        R = R.to(dtype=core.dtype)
        ones = torch.ones((*R.batch_shape, *R.out_shape), dtype=core.dtype, device=core.device)
        return cls(core, R.adjoint(ones).detach().conj().resolve_conj(), R)

    @property
    def weights(self) -> Tensor:
        """``|scale|^2``, one per output of A."""
        return self.scale.abs().square()

    def uniform_weight(self) -> Tensor | None:
        """The weight of all measured outputs, one number or one per batch item; None where an item has several."""
        weights = self.weights.flatten(self.scale.ndim - len(self.core.out_shape))
        largest = weights.amax(-1)
        smallest = torch.where(weights > 0, weights, torch.inf).amin(-1)
        if not (bool((smallest >= largest).all()) and bool((largest > 0).all())):
            return None
        return largest.flatten()[0] if largest.numel() and bool((largest == largest.flatten()[0]).all()) else largest

    def missing(self, groups: int = 1) -> Tensor | None:
        """Mark the outputs of A that were not measured, ``core.out_shape``; None where items or groups differ in them.

        Args:
            groups: the number of groups of channels, the first axis of ``core.out_shape``.
        """
        shape = self.core.out_shape
        unmeasured = (self.scale == 0).reshape(-1, *shape)
        parts = unmeasured.reshape(-1, groups, shape[0] // groups, *shape[1:])
        return unmeasured[0] if bool((parts == parts[:1, :1]).all()) else None

    def data(self, y: Tensor) -> Tensor:
        """Convert data y of ``R A`` to data z of A, zero where nothing was measured."""
        weights = self.weights
        weighted = self.rows.to(dtype=y.dtype).adjoint(y)
        return torch.where(weights > 0, weighted / torch.where(weights > 0, weights, 1).to(y.real.dtype), 0)


def _selects_and_scales(row: LinearOperator) -> bool:
    """Tell whether every output of an operator is one of its inputs times a number."""
    inner = row.operator if isinstance(row, Scaled) else row
    return isinstance(inner, (Mask, Diagonal, Crop, Identity))
