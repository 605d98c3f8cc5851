r"""The decay of the inverse of a normal operator away from a cell, which says how far tiles have to overlap.

Away from the edges of the image :math:`(A^H A + \mathrm{damp}^2 L^H L)^{-1}` is the convolution with a kernel G, the
inverse Fourier transform of :math:`(\hat A^H \hat A + \mathrm{damp}^2 |\hat L|^2)^{-1}`. A tile that ends ``overlap``
cells outside its core lacks the part of G beyond that distance. The norm of that part, relative to the norm of G,
estimates the relative error in the core after one pass over all tiles, and the factor by which each later step reduces
it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.border.penalty import Filter
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double

__all__ = ["Decay"]


class Decay:
    """The norm of the kernel G of the inverse outside boxes of growing size.

    Args:
        A: the convolution.
        terms: the penalty L as convolutions; empty: the identity.
        damp: the damping.
        grid_size: cells per axis of the periodic grid on which G is computed.

    Attributes:
        kernel_extent: cells of A's kernel along its longest axis.
        tails: ``tails[o]`` is the norm of G at a distance of o cells or more along some axis, over that of G.
    """

    def __init__(self, A: Convolution, terms: Sequence[Filter], damp: float, grid_size: int) -> None:
        grid = [max(grid_size, 2 * k) for k in A.kernel_extent]
        S = _symbol(A, grid)
        normal = S.mH @ S
        mu = damp**2
        if terms:
            for term in terms:
                rows = _symbol(term.convolution, grid)
                normal = normal + mu * float(term.factor) ** 2 * (rows.mH @ rows)
            # L may vanish at frequency zero, and A too: a shift at the level of rounding keeps the matrices invertible.
            shift = 1e-14 * normal.diagonal(dim1=-2, dim2=-1).real.amax()
        else:
            shift = torch.as_tensor(mu)
        normal = normal + shift * torch.eye(A.c_in, dtype=normal.dtype)
        axes = tuple(range(A.ndim))
        kernel = torch.fft.ifftn(torch.linalg.inv(normal), dim=axes).abs().square().sum((-2, -1))
        distance = torch.zeros(grid, dtype=torch.int64)
        for a, n in enumerate(grid):
            per_axis = torch.arange(n).minimum(n - torch.arange(n)).reshape(-1, *(1,) * (A.ndim - a - 1))
            distance = torch.maximum(distance, per_axis)
        shells = torch.zeros(max(grid) // 2 + 1, dtype=torch.float64)
        shells.index_add_(0, distance.flatten(), kernel.flatten().double())
        beyond = shells.flip(0).cumsum(0).flip(0)
        self.kernel_extent = max(A.kernel_extent)
        self.tails = (beyond / beyond[0]).sqrt().tolist()

    def first_pass_error(self, overlap: int) -> float:
        """Estimate the relative error after one pass; a tile lacks the outputs within half a kernel of its edges."""
        return min(2 * self._tail(max(overlap - (self.kernel_extent - 1) // 2, 0)), 1.0)

    def contraction(self, overlap: int) -> float:
        """Estimate the factor by which each later step reduces the error, which lies within a kernel of core edges."""
        return self._tail(max(overlap - self.kernel_extent + 1, 0))

    def _tail(self, overlap: int) -> float:
        """The relative norm of G farther than ``overlap`` cells, extrapolated where the grid is not that long."""
        if overlap < len(self.tails) - 1:
            return min(float(self.tails[overlap + 1]), 1.0)
        # G decays exponentially, so the mean decay over the outer half of the grid is continued.
        half = len(self.tails) // 2
        factor = (self.tails[-2] / self.tails[half]) ** (1 / max(len(self.tails) - 2 - half, 1))
        return float(self.tails[-2] * factor ** (overlap + 2 - len(self.tails)))

    def steps(self, overlap: int, rtol: float) -> int:
        """Estimate the number of steps to ``rtol`` after the first pass."""
        if self.first_pass_error(overlap) <= rtol:
            return 0
        factor = min(max(self.contraction(overlap), 1e-16), 0.99)
        # Slow contractions are slower than the tail says: the exponent is fitted to box and motion blurs.
        factor = factor if factor <= 0.01 else factor**0.3
        return max(math.ceil(math.log(rtol) / math.log(factor)) - 1, 1)

    def overlap(self, core: Sequence[int], largest: int, rtol: float) -> int:
        """Choose the overlap, of 8, 12, 16, ... ``largest`` cells, for which reaching ``rtol`` takes least work."""

        def cost(overlap: int) -> float:
            # A later step applies A and its adjoint once more than the first pass does.
            return math.prod((c + 2 * overlap) / c for c in core) * (1 + 1.5 * self.steps(overlap, rtol))

        return min(range(min(8, largest), max(largest, 8) + 1, 4), key=cost)


def _symbol(A: Convolution, grid: Sequence[int]) -> Tensor:
    """The transfer functions of A, ``(*grid, c_out, c_in)``; groups are diagonal blocks of these matrices."""
    weight = A.weight.detach().to(double(A.dtype)).cpu()
    dense = weight.new_zeros(A.c_out, A.c_in, *A.kernel_extent)
    rows, columns = A.c_out // A.groups, A.c_in // A.groups
    taps = tuple(slice(None, None, d) for d in A.dilation)
    for g in range(A.groups):
        block: Any = (slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns), *taps)
        dense[block] = weight[g * rows : (g + 1) * rows]
    axes = tuple(range(2, 2 + A.ndim))
    return torch.fft.fftn(dense, s=list(grid), dim=axes).movedim((0, 1), (-2, -1))
