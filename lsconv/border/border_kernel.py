"""The entries of a block-circulant operator between border cells, for the matrices that a preconditioner inverts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsconv.border.direct.dense_inverse import between_borders
from lsconv.fourier.symbol import FrequencyMatrices, Grid

if TYPE_CHECKING:  # the border asks for its kernel, which asks about the border
    from lsconv.border.border_cells import Border

__all__ = ["Kernel"]

# Up to this many lags, all axes together, are summed over the frequencies; more are read off the transformed kernel.
_FEW_LAGS = 48


class Kernel:
    """The entries of a block-circulant Q between cells.

    Args:
        Q: the operator.
        border: the border whose cells are asked about.
    """

    def __init__(self, Q: FrequencyMatrices, border: Border) -> None:
        self.Q, self.grid = Q, border.grid
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """The first block column, ``(blocks, channels, channels, *grid)``."""
        if self._whole is None:
            self._whole = self.Q.kernel()
        return self._whole

    def between(self, axes: tuple[int, ...], cells: Tensor) -> Tensor:
        """One matrix per frequency of the other axes: ``(blocks, *other frequencies, cells, cells)``."""
        Q = self.Q
        channel, *places = cells.unbind(1)
        # few positions lie along an axis, however many cells
        distinct, which = zip(*(p.unique(return_inverse=True) for p in places), strict=True)
        tables = [(p[:, None] - p[None, :]) % self.grid[a] for p, a in zip(distinct, axes, strict=True)]
        present, numbers = zip(*(table.unique(return_inverse=True) for table in tables), strict=True)
        if not Q.elementwise and sum(len(p) for p in present) <= _FEW_LAGS:
            lags = [table[w[:, None], w[None, :]] for table, w in zip(numbers, which, strict=True)]
            lead = (slice(None),) * (1 + len(self.grid) - len(axes))
            pairs = (*lead, *lags, channel[:, None], channel[None, :])
            return Q.at_lags(axes, list(present))[pairs]
        if len(axes) == len(self.grid):
            return self.within(cells)
        kernel = self.whole().movedim([3 + a for a in axes], list(range(3, 3 + len(axes))))
        lags = [table[w[:, None], w[None, :]] for table, w in zip(tables, which, strict=True)]
        pairs = (slice(None), channel[:, None], channel[None, :], *lags)
        block = kernel[pairs]  # blocks, cells, cells, *others
        others = Grid(tuple(n for a, n in enumerate(self.grid) if a not in axes), real=Q.grid.real)
        return others.transform(block).movedim((1, 2), (-2, -1))

    def dense(self, border: Border) -> Tensor:
        """All entries between the cells of a border: ``(blocks, size, size)``."""
        return between_borders(self.whole(), border, border)

    def within(self, cells: Tensor, outer: Tensor | None = None) -> Tensor:
        """The entries between cells, or only the rows of these numbers of them: ``(blocks, outer, cells)``.

        An entry's place in the part of the kernel around lag zero is a difference of one number per cell.
        """
        kernel, device = self.whole(), self.whole().device
        channel, *places = cells.unbind(1)
        row, column = channel * kernel.shape[2], channel.clone()
        for a, (p, n) in enumerate(zip(places, self.grid, strict=True)):
            p = _unrolled(p, n)
            reach = int(p.amax())
            kernel = kernel.index_select(3 + a, (torch.arange(-reach, reach + 1) % n).to(device))
            row, column = row * (2 * reach + 1) + reach + p, column * (2 * reach + 1) - p
        row = row if outer is None else row[outer]
        lags = (row[:, None] + column[None, :]).flatten().to(device)
        return kernel.flatten(1).index_select(1, lags).unflatten(1, (len(row), len(cells)))


def _unrolled(places: Tensor, n: int) -> Tensor:
    """Positions on a circle of n, counted from the end of their widest gap."""
    distinct = places.unique()
    gaps = torch.diff(distinct, prepend=distinct[-1:] - n)
    return (places - distinct[gaps.argmax()]) % n
