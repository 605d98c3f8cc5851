"""The product of a block-circulant operator, restricted to a border, over the whole grid."""

from __future__ import annotations

from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["GridProduct"]


class GridProduct:
    """``u -> (Q u)`` on the border for border vectors ``(rhs, blocks, size)``.

    Args:
        matrices: the block-circulant operator Q.
        border: the cells.
    """

    def __init__(self, matrices: FrequencyMatrices, border: Border) -> None:
        self.matrices, self.border = matrices, border

    def __call__(self, u: Tensor) -> Tensor:
        """The product."""
        product = self.border.gather(self.matrices.on_grid(self.border.scatter(u)))
        return product if self.border.diagonal is None else product.addcmul_(self.border.diagonal, u)
