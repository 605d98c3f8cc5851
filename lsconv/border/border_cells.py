"""The border of a periodic grid: the cells (channel, position) that a truncation removes."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lsconv.border.border_kernel import Kernel
from lsconv.border.indexing import gathered, scattered
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["Border"]


class Border:
    """The border cells of a periodic grid, numbered one after the other.

    Args:
        grid: sizes of the periodic grid.
        positions: border positions per channel and axis; a cell is on the border when it is so along any axis.
        device: where the index tensors live.

    Attributes:
        cellwise: whether every unknown is the value of one cell.
        diagonal: what an operator restricted to the border has on its diagonal besides; None for nothing.
    """

    cellwise = True
    diagonal: Tensor | None = None

    def __init__(self, grid: tuple[int, ...], positions: list[list[list[int]]], device: torch.device) -> None:
        self.grid = grid
        self.channels = len(positions)
        # whether a position along an axis makes a cell a border cell, per channel
        self.members = [torch.zeros(self.channels, n, dtype=torch.bool) for n in grid]
        for channel, axes in enumerate(positions):
            for a, places in enumerate(axes):
                self.members[a][channel, places] = True
        mask = torch.zeros(self.channels, *grid, dtype=torch.bool)
        for a, members in enumerate(self.members):
            mask |= members.reshape(self.channels, *(n if e == a else 1 for e, n in enumerate(grid)))
        index = mask.flatten().nonzero().flatten()
        self.mask = mask
        self.size = index.numel()
        self.index = index.to(device)

    def scatter(self, b: Tensor) -> Tensor:
        """``(rest, blocks, size)`` to ``(rest, blocks, channels, *grid)``, zero off the border."""
        z = scattered(b, self.index, self.channels * math.prod(self.grid))
        return z.reshape(*b.shape[:2], self.channels, *self.grid)

    def gather(self, z: Tensor) -> Tensor:
        """``(rest, blocks, channels, *grid)`` to ``(rest, blocks, size)``."""
        return gathered(z.flatten(2), self.index)

    def kernel(self, Q: FrequencyMatrices) -> Kernel:
        """The entries of a block-circulant operator between the unknowns."""
        return Kernel(Q, self)

    def numbering(self) -> Tensor:
        """The number of every border cell, -1 elsewhere: ``(channels, *grid)`` on the CPU."""
        numbers = torch.full((self.mask.numel(),), -1)
        numbers[self.mask.flatten()] = torch.arange(self.size)
        return numbers.reshape(self.mask.shape)

    def crossing(self, axes: tuple[int, ...], reach: int) -> Tensor:
        """The border cells within ``reach`` of a crossing of the slabs of ``axes``: rows of channel, *positions*."""
        windows = [self._window(a, reach if len(axes) > 1 else 0) for a in axes]
        flags = torch.zeros(self.channels, *(len(w) for w in windows), dtype=torch.bool)
        for d, (a, window) in enumerate(zip(axes, windows, strict=True)):
            flags |= self.members[a][:, window].reshape(self.channels, *(-1 if e == d else 1 for e in range(len(axes))))
        cells = flags.nonzero()
        return torch.stack([cells[:, 0], *(w[cells[:, 1 + d]] for d, w in enumerate(windows))], dim=1)

    def crossing_size(self, axes: tuple[int, ...], reach: int) -> int:
        """How many cells :meth:`crossing` has."""
        reach = reach if len(axes) > 1 else 0
        windows = [sum(1 + min(gap, 2 * reach) for gap in self._gaps[a]) for a in axes]
        inside = zip(*([w - m for m in self._counts[a]] for w, a in zip(windows, axes, strict=True)), strict=True)
        return self.channels * math.prod(windows) - sum(math.prod(lengths) for lengths in inside)

    @functools.cached_property
    def _gaps(self) -> list[list[int]]:
        """How many cells follow on each border position, of any channel, before the next one; for every axis."""
        places = [members.any(0).nonzero().flatten() for members in self.members]
        return [(torch.diff(p, append=p[:1] + n) - 1).tolist() for p, n in zip(places, self.grid, strict=True)]

    @functools.cached_property
    def _counts(self) -> list[list[int]]:
        """The border positions of every channel, for every axis."""
        return [members.sum(1).tolist() for members in self.members]

    def _window(self, a: int, reach: int) -> Tensor:
        """The positions along axis ``a`` within ``reach`` of the border's, on the circle."""
        places = self.members[a].any(0).nonzero().flatten()
        return ((places[:, None] + torch.arange(-reach, reach + 1)) % self.grid[a]).unique()
