"""Data that an operator cannot reach, and the outputs that it takes: masks, crops and weights before an operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.operators.algebra import BlockDiagonal, Complexified, Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Crop, Diagonal, Identity, Mask

__all__ = ["MeasuredRows", "observed"]


def observed(A: LinearOperator, y: Tensor) -> Tensor:
    """Return ``y`` with zeros where a mask (or a zero of a diagonal) in front of A drops the row.

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
    r"""An operator ``R A`` that only selects and scales the outputs of A: :math:`\|RAx - y\|^2` is
    :math:`\sum_i w_i |(Ax)_i - z_i|^2` over the outputs i of A, with ``w = |scale|^2``.

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
        """The rows of a product of masks, crops, diagonals and one more operator; None of any other operator."""
        factor, product = torch.ones(()), A
        while isinstance(product, Scaled) and product.alpha.ndim == 0:
            factor, product = factor * product.alpha.detach(), product.operator
        if not isinstance(product, Product):
            return None
        *rows, core = product.operators
        if not all(_takes_outputs(row) for row in rows):
            return None
        R: LinearOperator = Product(rows) * factor if len(rows) > 1 else rows[0] * factor
        R = R.to(dtype=core.dtype)
        ones = torch.ones((*R.batch_shape, *R.out_shape), dtype=core.dtype, device=core.device)
        return cls(core, R.adjoint(ones).detach().conj().resolve_conj(), R)

    @property
    def weights(self) -> Tensor:
        """``|scale|^2``, one per output of A."""
        return self.scale.abs().square()

    def uniform(self) -> Tensor | None:
        """The one weight that all outputs in the data have; by batch item of ``scale`` where items have different ones.

        None where an item has several.
        """
        weights = self.weights.flatten(self.scale.ndim - len(self.core.out_shape))
        most = weights.amax(-1)
        smallest = torch.where(weights > 0, weights, torch.inf).amin(-1)
        if not (bool((smallest >= most).all()) and bool((most > 0).all())):
            return None
        return most.flatten()[0] if most.numel() and bool((most == most.flatten()[0]).all()) else most

    def missing(self, groups: int = 1) -> Tensor | None:
        """The outputs of A that no data are of, ``core.out_shape``; None where items or groups miss different ones.

        Args:
            groups: of the first axis of ``core.out_shape``.
        """
        shape = self.core.out_shape
        lost = (self.scale == 0).reshape(-1, *shape)
        parts = lost.reshape(-1, groups, shape[0] // groups, *shape[1:])
        return lost[0] if bool((parts == parts[:1, :1]).all()) else None

    def data(self, y: Tensor) -> Tensor:
        """The data z of A for data of ``R A``, zero where there are none."""
        weights = self.weights
        lifted = self.rows.to(dtype=y.dtype).adjoint(y)
        return torch.where(weights > 0, lifted / torch.where(weights > 0, weights, 1).to(y.real.dtype), 0)


def _takes_outputs(row: LinearOperator) -> bool:
    """Tell whether every output of an operator is one of its inputs times a number."""
    inner = row.operator if isinstance(row, Scaled) else row
    return isinstance(inner, (Mask, Diagonal, Crop, Identity))
