"""The damp path of a convolution with a separable kernel, from the singular values of its axes.

The singular value decomposition of A is the Kronecker product of those of its axes, for any padding mode, stride and
dilation, so that a scan of damps costs sums over singular values but no solves. A kernel that is separable up to
rounding is replaced by the nearest separable one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.factored.kronecker import Factors, along_axes, separable_svd
from lsconv.inverse.damping.decomposed_path import DecomposedPath
from lsconv.inverse.plans.small_matrices import separable_factors
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double

__all__ = ["SeparablePath"]


class SeparablePath(DecomposedPath):
    """The damp path of a separable convolution with one kernel for all batch items, L the identity.

    Args:
        A: the convolution.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp; zero where A has a zero
            row.
        count: number of measured data.
        factors: the factors of the kernel along the axes.
    """

    @torch.no_grad()
    def __init__(self, A: Convolution, y: Tensor, count: Tensor, factors: Factors | None = None) -> None:
        parts = separable_svd(A, factors)
        assert parts is not None
        left_vectors, values, _ = parts
        self.rhs, self.data_count = y.shape[0], count
        self.batch = tuple(y.shape[1 : y.ndim - len(A.out_shape)])
        y = y.to(double(A.dtype))
        beta = along_axes([U.mH for U in left_vectors], y)
        first = len(self.batch) + 1
        square = all(U.shape[-1] == U.shape[-2] for U in left_vectors)
        outside = 0 * y[..., :1] if square else y - along_axes(left_vectors, beta)
        self.outside = outside.abs().square().flatten(first).sum(-1).sum(0)
        self.energies = beta.abs().square().flatten(first).sum(0)
        self.w = values.square().flatten()
        self.p = torch.ones_like(self.w)
        largest = values.max()
        self.scale = torch.where(largest > 0, largest, 1).expand(self.batch)
        self.nullity = torch.zeros(self.batch, dtype=torch.int64, device=A.device)

    @classmethod
    def where_cheap(cls, A: LinearOperator, y: Tensor, L: LinearOperator | None, count: Tensor) -> SeparablePath | None:
        """Make the path; None where A is no such convolution, or decomposing its axes costs more than another path."""
        if not isinstance(A, Convolution) or A.batch_shape or L is not None:
            return None
        factors = separable_factors(A, damped=True)
        return None if factors is None else cls(A, y, count, factors)
