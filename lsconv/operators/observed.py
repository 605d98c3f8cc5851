"""Data that an operator cannot reach: rows that are zero by what they are made of, so that no x explains them."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.algebra import BlockDiagonal, Complexified, Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Diagonal, Mask

__all__ = ["observed"]


def observed(A: LinearOperator, y: Tensor) -> Tensor:
    """``y`` with zeros where a mask (or a zero of a diagonal) in front of A drops the row, whatever stood there.

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
