"""Groups with equal kernels, such as the colours of an image under one blur, as one group with a batch of data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian

__all__ = ["EqualGroups"]


@dataclass(frozen=True)
class EqualGroups:
    """One group of a convolution whose groups have equal kernels, so that the setup is done once for all of them.

    Attributes:
        A: the convolution of one group.
        L: the penalty on its inputs, or None.
        groups: the number of groups.
    """

    A: Convolution
    L: LinearOperator | None
    groups: int

    @classmethod
    def of(cls, A: LinearOperator, L: LinearOperator | None = None) -> EqualGroups | None:
        """Make it; None where A has one group, kernels differ, or L is no Gradient or Laplacian of each channel."""
        if not isinstance(A, Convolution) or A.groups == 1:
            return None
        channels = A.c_in // A.groups
        if isinstance(L, (Gradient, Laplacian)) and L.ndim == A.ndim and len(L.in_shape) == A.ndim + 1:
            L = type(L)((channels, *A.spatial_in), L.ndim, L.boundary, L.spacing, dtype=L.dtype, device=L.device)
        elif L is not None:
            return None
        weight = A.weight.detach().unflatten(-A.ndim - 2, (A.groups, -1))
        first = weight.narrow(-A.ndim - 3, 0, 1)
        if not bool((weight == first).all()):
            return None
        one = Convolution(
            first.squeeze(-A.ndim - 3), A.spatial_in, A.stride, A.padding, A.dilation, padding_mode=A.padding_mode,
            check_finite=False,
        )  # fmt: skip
        return cls(one, L, A.groups)

    def split(self, z: Tensor) -> Tensor:
        """Reshape ``(*batch, channels, *size)`` to ``(groups, *batch, channels of a group, *size)``."""
        return z.unflatten(-self.A.ndim - 1, (self.groups, -1)).movedim(-self.A.ndim - 2, 0)

    def join(self, z: Tensor) -> Tensor:
        """Undo :meth:`split`."""
        return z.movedim(0, -self.A.ndim - 2).flatten(-self.A.ndim - 2, -self.A.ndim - 1)
