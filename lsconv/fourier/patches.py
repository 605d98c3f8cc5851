r"""The border of a periodic grid, and an additive Schwarz preconditioner for operators restricted to it.

The border is the set of grid cells (channel, position) that a truncation removes. Near the faces of the image it looks
the same from cell to cell, so a block-circulant operator Q restricted to

* the cells within the border's width along one axis (a *slab*: in 2-D, the border rows over the whole width) or
* the border cells near the crossing of several slabs (an *edge*, a *corner*)

is block-circulant along the remaining axes: an FFT along these leaves one dense matrix per frequency, inverted once.
The preconditioner adds the inverses of all of them,

.. math:: M^{-1} = \sum_T R_T^T\, Q_{TT}^{-1} R_T, \quad T \text{ over the non-empty subsets of axes.}

Slabs alone leave the coupling around the crossings, which is what the iteration then spends its time on: with the
corners, half of the iterations remain.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from lsconv.fourier.symbol import FrequencyMatrices, Grid, hermitian_inverse

__all__ = ["Border", "Schwarz", "dense_entries"]

# A crossing is widened, up to the reach below, while its dense matrices stay under this many unknowns.
_CROSSING_UNKNOWNS = 1024
_CROSSING_REACH = 16
# A border this small is one dense patch, whose inverse is exact; the second limit is on the entries of all blocks.
_DENSE_UNKNOWNS = 1024
_DENSE_ENTRIES = 2**22
# Up to this many lags, all axes together, are summed over the frequencies; more are read off the transformed kernel.
_FEW_LAGS = 48


def dense_entries(ndim: int) -> int:
    """An upper bound of the entries of the dense patches of one block on a grid of ``ndim`` dimensions."""
    return max(_DENSE_UNKNOWNS, _CROSSING_UNKNOWNS * ndim) ** 2


class Border:
    """The border cells of a periodic grid, numbered one after the other.

    Args:
        grid: sizes of the periodic grid.
        positions: border positions per channel and axis; a cell is on the border when it is so along any axis.
        device: where the index tensors live.
    """

    def __init__(self, grid: tuple[int, ...], positions: list[list[list[int]]], device: torch.device) -> None:
        self.grid = grid
        self.positions = positions
        self.channels = len(positions)
        mask = torch.zeros(self.channels, *grid, dtype=torch.bool)
        for channel, axes in enumerate(positions):
            for a, places in enumerate(axes):
                mask[channel].movedim(a, 0)[places] = True
        index = mask.flatten().nonzero().flatten()
        self.mask = mask
        self.size = index.numel()
        self.index = index.to(device)

    def scatter(self, b: Tensor) -> Tensor:
        """``(rest, blocks, size)`` to ``(rest, blocks, channels, *grid)``, zero off the border."""
        z = b.new_zeros(*b.shape[:2], self.channels * math.prod(self.grid))
        return z.index_copy_(-1, self.index, b).reshape(*b.shape[:2], self.channels, *self.grid)

    def gather(self, z: Tensor) -> Tensor:
        """``(rest, blocks, channels, *grid)`` to ``(rest, blocks, size)``."""
        return z.flatten(2).index_select(-1, self.index)

    def numbering(self) -> Tensor:
        """The number of every border cell, -1 elsewhere: ``(channels, *grid)`` on the CPU."""
        numbers = torch.full((self.mask.numel(),), -1)
        numbers[self.mask.flatten()] = torch.arange(self.size)
        return numbers.reshape(self.mask.shape)

    def crossing(self, axes: tuple[int, ...], reach: int) -> list[tuple[int, ...]]:
        """The border cells (channel, *positions along axes) within ``reach`` of a crossing of the slabs of ``axes``."""
        cells: list[tuple[int, ...]] = []
        windows = [self._window(a, reach if len(axes) > 1 else 0) for a in axes]
        sizes = [len(w) for w in windows]
        for channel, places in enumerate(self.positions):
            flags = torch.zeros(sizes, dtype=torch.bool)
            for d, (a, window) in enumerate(zip(axes, windows, strict=True)):
                inside = torch.isin(torch.tensor(window), torch.tensor(places[a], dtype=torch.long))
                flags |= inside.reshape([-1 if e == d else 1 for e in range(len(axes))])
            cells += [
                (channel, *(window[i] for window, i in zip(windows, cell, strict=True)))
                for cell in flags.nonzero().tolist()
            ]
        return cells

    def _window(self, a: int, reach: int) -> list[int]:
        """The positions along axis ``a`` within ``reach`` of the border's, on the circle."""
        places = sorted({p for axes in self.positions for p in axes[a]})
        if not places:
            return []
        n = self.grid[a]
        return sorted({(p + d) % n for p in places for d in range(-reach, reach + 1)})


class _Patch:
    """One term of the Schwarz sum: a set of border cells on which Q is block-circulant, and the inverse there."""

    def __init__(
        self,
        Q: FrequencyMatrices,
        border: Border,
        numbering: Tensor,
        axes: tuple[int, ...],
        cells: list[tuple[int, ...]],
        *,
        definite: bool,
    ) -> None:
        table = torch.tensor(cells)
        channel, places = table[:, 0], table[:, 1:]
        where = (channel, *places.T)
        index = numbering.movedim([1 + a for a in axes], list(range(1, 1 + len(axes))))[where]
        self.shape = tuple(index.shape)  # cells, *other axes
        self.index = index.flatten().to(Q.matrices.device)
        lags = [(p[:, None] - p[None, :]) % border.grid[a] for p, a in zip(places.T, axes, strict=True)]
        others = Grid(tuple(n for a, n in enumerate(border.grid) if a not in axes), real=Q.grid.real)
        present, which = zip(*(lag.unique(return_inverse=True) for lag in lags), strict=True)
        if not Q.elementwise and sum(len(p) for p in present) <= _FEW_LAGS:
            lead = (slice(None),) * (1 + len(others.sizes))
            pairs = (*lead, *which, channel[:, None], channel[None, :])
            matrices = Q.at_lags(axes, list(present))[pairs]
        else:
            kernel = Q.kernel().movedim([3 + a for a in axes], list(range(3, 3 + len(axes))))
            pairs = (slice(None), channel[:, None], channel[None, :], *lags)
            block = kernel[pairs]  # blocks, cells, cells, *others
            matrices = others.transform(block).movedim((1, 2), (-2, -1))
        matrices = matrices.contiguous()
        inverses = hermitian_inverse(matrices) if definite else torch.linalg.inv(matrices)
        self.inverse = FrequencyMatrices(others, inverses)

    def __call__(self, r: Tensor) -> Tensor:
        cells = r.index_select(-1, self.index).reshape(*r.shape[:2], *self.shape)
        return self.inverse.on_grid(cells).flatten(2)


class Schwarz:
    """The additive Schwarz preconditioner of ``Q`` restricted to a border.

    Args:
        matrices: the block-circulant operator Q, Hermitian.
        border: the cells it is restricted to.
        definite: True when Q is positive definite on the border; the preconditioner then is too.
        crossings: include the crossings of the slabs.
    """

    def __init__(self, matrices: FrequencyMatrices, border: Border, *, definite: bool, crossings: bool = True) -> None:
        numbering = border.numbering()
        self.patches: list[_Patch] = []
        if border.size <= _DENSE_UNKNOWNS and border.size**2 * matrices.matrices.shape[0] <= _DENSE_ENTRIES:
            axes, cells = tuple(range(len(border.grid))), [tuple(cell) for cell in border.mask.nonzero().tolist()]
            self.patches.append(_Patch(matrices, border, numbering, axes, cells, definite=definite))
            return
        used = [a for a in range(len(border.grid)) if any(axes[a] for axes in border.positions)]
        for count in range(1, len(used) + 1 if crossings else 2):
            for axes in combinations(used, count):
                cells = self._cells(border, axes)
                if cells:
                    patch = _Patch(matrices, border, numbering, axes, cells, definite=definite)
                    self.patches.append(patch)

    @staticmethod
    def _cells(border: Border, axes: tuple[int, ...]) -> list[tuple[int, ...]]:
        if len(axes) == 1:
            return border.crossing(axes, 0)
        reach = min(_CROSSING_REACH, min(border.grid[a] for a in axes) // 4)
        while reach > 0:
            cells = border.crossing(axes, reach)
            if len(cells) <= _CROSSING_UNKNOWNS:
                return cells
            reach //= 2
        return []

    @property
    def nbytes(self) -> int:
        """Bytes of the inverses."""
        return sum(patch.inverse.nbytes for patch in self.patches)

    def __call__(self, r: Tensor) -> Tensor:
        """``M^{-1} r`` for border vectors ``(rest, blocks, size)``."""
        if len(self.patches) == 1 and self.patches[0].index.numel() == r.shape[-1]:
            return torch.empty_like(r).index_copy_(-1, self.patches[0].index, self.patches[0](r))
        z = torch.zeros_like(r)
        for patch in self.patches:
            z.index_add_(-1, patch.index, patch(r))
        return z
