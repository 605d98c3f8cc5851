r"""The decay of the inverse of a normal operator away from a cell, which says how far tiles have to overlap.

Away from edges the inverse is the convolution with the inverse transform of
:math:`(\hat A^H \hat A + \mathrm{damp}^2 |\hat L|^2)^{-1}`. A tile that is cut ``overlap`` cells outside its core is
wrong in the core by about the share of that kernel that lies beyond: the part by which one pass of all tiles, and then
every step of the iteration, falls short.
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
    """The tail of the inverse's kernel.

    Args:
        A: the convolution.
        terms: the penalty; empty: the identity.
        damp: the damping.
        longest: cells per axis of the grid that the kernel is looked at on.

    Attributes:
        kernel: cells of the longest axis of the kernel.
        tails: ``tails[o]``, the share of the kernel farther than o cells along some axis, which falls.
    """

    def __init__(self, A: Convolution, terms: Sequence[Filter], damp: float, longest: int) -> None:
        grid = [max(longest, 2 * k) for k in A.kernel_extent]
        S = _symbol(A, grid)
        normal = S.mH @ S
        mu = damp**2
        if terms:
            for term in terms:
                rows = _symbol(term.convolution, grid)
                normal = normal + mu * float(term.factor) ** 2 * (rows.mH @ rows)
            # a constant, which a difference does not see, is A's to determine
            shift = 1e-14 * normal.diagonal(dim1=-2, dim2=-1).real.amax()
        else:
            shift = torch.as_tensor(mu)
        normal = normal + shift * torch.eye(A.c_in, dtype=normal.dtype)
        axes = tuple(range(A.ndim))
        kernel = torch.fft.ifftn(torch.linalg.inv(normal), dim=axes).abs().square().sum((-2, -1))
        distance = torch.zeros(grid, dtype=torch.int64)
        for a, n in enumerate(grid):
            along = torch.arange(n).minimum(n - torch.arange(n)).reshape(-1, *(1,) * (A.ndim - a - 1))
            distance = torch.maximum(distance, along)
        shells = torch.zeros(max(grid) // 2 + 1, dtype=torch.float64)
        shells.index_add_(0, distance.flatten(), kernel.flatten().double())
        beyond = shells.flip(0).cumsum(0).flip(0)
        self.kernel = max(A.kernel_extent)
        self.tails = (beyond / beyond[0]).sqrt().tolist()

    def rate(self, overlap: int) -> float:
        """The part of an error that one pass leaves; rows of half a kernel are missing at the edges of tiles."""
        return min(2 * self._tail(max(overlap - (self.kernel - 1) // 2, 0)), 1.0)

    def contraction(self, overlap: int) -> float:
        """The part that every further step leaves, whose error is along the edges of cores and as wide as a kernel."""
        return self._tail(max(overlap - self.kernel + 1, 0))

    def _tail(self, overlap: int) -> float:
        if overlap < len(self.tails) - 1:
            return min(float(self.tails[overlap + 1]), 1.0)
        # beyond the grid the tail falls as over its last half, as far as the rounding of the transform lets it be seen
        half = len(self.tails) // 2
        fall = (self.tails[-2] / self.tails[half]) ** (1 / max(len(self.tails) - 2 - half, 1))
        return float(self.tails[-2] * fall ** (overlap + 2 - len(self.tails)))

    def steps(self, overlap: int, rtol: float) -> int:
        """The steps to expect after the first pass, roughly."""
        if self.rate(overlap) <= rtol:
            return 0
        fall = min(max(self.contraction(overlap), 1e-16), 0.99)
        # as measured for boxes and motions
        fall = fall if fall <= 0.01 else fall**0.3
        return max(math.ceil(math.log(rtol) / math.log(fall)) - 1, 1)

    def overlap(self, core: Sequence[int], largest: int, rtol: float) -> int:
        """The overlap for which the passes that lead to ``rtol`` cost least, among multiples of four."""

        def cost(overlap: int) -> float:
            # a step takes an application of A and of its adjoint besides
            return math.prod((c + 2 * overlap) / c for c in core) * (1 + 1.5 * self.steps(overlap, rtol))

        return min(range(min(8, largest), max(largest, 8) + 1, 4), key=cost)


def _symbol(A: Convolution, grid: Sequence[int]) -> Tensor:
    """The transfer functions, ``(*grid, c_out, c_in)``, the groups as blocks of the diagonal."""
    weight = A.weight.detach().to(double(A.dtype)).cpu()
    dense = weight.new_zeros(A.c_out, A.c_in, *A.kernel_extent)
    rows, columns = A.c_out // A.groups, A.c_in // A.groups
    taps = tuple(slice(None, None, d) for d in A.dilation)
    for g in range(A.groups):
        place: Any = (slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns), *taps)
        dense[place] = weight[g * rows : (g + 1) * rows]
    axes = tuple(range(2, 2 + A.ndim))
    return torch.fft.fftn(dense, s=list(grid), dim=axes).movedim((0, 1), (-2, -1))
