"""The border of a periodic grid: its cells, vectors on them, and the entries of an operator between them.

A cell is a (channel, position) that a truncation removes. Vectors are read by ``gather`` with a broadcast index and
written by an addition to zeros, because ``index_select`` and ``index_copy_`` are slow on a CPU with leading axes.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor

from lsconv.border.factored_capacitance import FactoredCapacitance
from lsconv.fourier.embedding import BorderPositions
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid

__all__ = [
    "Border",
    "BorderEntries",
    "between_borders",
    "circulant_entries",
    "gathered",
    "largest_block",
    "scattered",
    "split_at_gaps",
]


class Border:
    """The border cells of a periodic grid, numbered in the order of channel and position.

    Args:
        grid: sizes of the periodic grid.
        positions: border positions per channel and axis; a cell is on the border if any of its coordinates is one.
        device: the device of the index tensors.

    Attributes:
        mask: True on the border, ``(channels, *grid)`` on the CPU.
        index: the numbers of the border cells in the flattened grid, ``(size,)``.
        on_axis: for every axis the border positions of each channel, bool ``(channels, positions)``.
        diagonal: a diagonal that is added to an operator restricted to the border, ``(blocks, size)``; None: zero.
        clusters: further cells, of :meth:`with_cells`, in clusters of near ones: rows of channel, *positions*.
    """

    diagonal: Tensor | None = None
    clusters: tuple[Tensor, ...] = ()

    def __init__(self, grid: tuple[int, ...], positions: BorderPositions, device: torch.device) -> None:
        self.grid = grid
        self.channels = len(positions)
        self.on_axis = [torch.zeros(self.channels, n, dtype=torch.bool) for n in grid]
        for channel, axes in enumerate(positions):
            for a, places in enumerate(axes):
                self.on_axis[a][channel, places] = True
        mask = torch.zeros(self.channels, *grid, dtype=torch.bool)
        for a, places in enumerate(self.on_axis):
            mask |= places.reshape(self.channels, *(n if e == a else 1 for e, n in enumerate(grid)))
        index = mask.flatten().nonzero().flatten()
        self.mask = mask
        self.size = index.numel()
        self.index = index.to(device)

    def with_cells(self, cells: Tensor) -> Border:
        """Add cells, a bool mask ``(channels, *grid)`` of the first channels, and return the larger border."""
        union = copy.copy(self)
        union.mask = self.mask.clone()
        union.mask[: len(cells)] |= cells.cpu()
        union.index = union.mask.flatten().nonzero().flatten().to(self.index.device)
        union.size = union.index.numel()
        places = (union.mask & ~self.mask).nonzero()
        largest = largest_block(len(places), cells.numel())
        union.clusters = tuple(places[rows] for rows in split_at_gaps(places, largest))
        return union

    def scatter(self, b: Tensor) -> Tensor:
        """Write unknowns ``(rhs, blocks, size)`` into zeros on the grid, ``(rhs, blocks, channels, *grid)``."""
        z = scattered(b, self.index, self.channels * math.prod(self.grid))
        return z.reshape(*b.shape[:2], self.channels, *self.grid)

    def gather(self, z: Tensor) -> Tensor:
        """Read the unknowns ``(rhs, blocks, size)`` from a tensor on the grid, ``(rhs, blocks, channels, *grid)``."""
        return gathered(z.flatten(2), self.index)

    def entries(self, Q: FrequencyMatrices | FactoredCapacitance) -> BorderEntries:
        """The entries of a block-circulant operator between the unknowns."""
        return BorderEntries(Q, self)

    def numbering(self) -> Tensor:
        """The number of every border cell, -1 elsewhere: ``(channels, *grid)`` on the CPU."""
        numbers = torch.full((self.mask.numel(),), -1)
        numbers[self.mask.flatten()] = torch.arange(self.size)
        return numbers.reshape(self.mask.shape)

    def cross_section(self, axes: tuple[int, ...], overlap: int) -> Tensor:
        """The border cells across ``axes``: rows of channel, *positions*.

        Of one axis they are those of its strip, of several the cells within ``overlap`` of where their strips cross.
        """
        windows = [self._window(a, overlap if len(axes) > 1 else 0) for a in axes]
        flags = torch.zeros(self.channels, *(len(w) for w in windows), dtype=torch.bool)
        for d, (a, window) in enumerate(zip(axes, windows, strict=True)):
            flags |= self.on_axis[a][:, window].reshape(self.channels, *(-1 if e == d else 1 for e in range(len(axes))))
        cells = flags.nonzero()
        return torch.stack([cells[:, 0], *(w[cells[:, 1 + d]] for d, w in enumerate(windows))], dim=1)

    def cross_section_size(self, axes: tuple[int, ...], overlap: int) -> int:
        """The number of cells that :meth:`cross_section` has."""
        overlap = overlap if len(axes) > 1 else 0
        windows = [sum(1 + min(gap, 2 * overlap) for gap in self._gaps[a]) for a in axes]
        inside = zip(*([w - m for m in self._counts[a]] for w, a in zip(windows, axes, strict=True)), strict=True)
        return self.channels * math.prod(windows) - sum(math.prod(lengths) for lengths in inside)

    @functools.cached_property
    def _gaps(self) -> list[list[int]]:
        """The distances from each border position, of any channel, to the next one, for every axis."""
        places = [positions.any(0).nonzero().flatten() for positions in self.on_axis]
        return [(torch.diff(p, append=p[:1] + n) - 1).tolist() for p, n in zip(places, self.grid, strict=True)]

    @functools.cached_property
    def _counts(self) -> list[list[int]]:
        """The number of border positions of every channel, for every axis."""
        return [positions.sum(1).tolist() for positions in self.on_axis]

    def _window(self, a: int, overlap: int) -> Tensor:
        """The positions along axis ``a`` within ``overlap`` of a border position, on the circle."""
        places = self.on_axis[a].any(0).nonzero().flatten()
        return ((places[:, None] + torch.arange(-overlap, overlap + 1)) % self.grid[a]).unique()


class BorderEntries:
    """The entries of a block-circulant Q between cells.

    Args:
        Q: the operator.
        border: the border.
    """

    def __init__(self, Q: FrequencyMatrices | FactoredCapacitance, border: Border) -> None:
        self.Q, self.border, self.grid = Q, border, border.grid
        self._kernel: Tensor | None = None

    def full_kernel(self) -> Tensor:
        """The first block column, ``(blocks, channels, channels, *grid)``."""
        if self._kernel is None:
            self._kernel = self.Q.kernel()
        return self._kernel

    def between(self, axes: tuple[int, ...], cells: Tensor) -> Tensor:
        """The entries between cells that extend over the whole of the other axes, along which Q is circulant.

        Args:
            axes: the axes across which the cells are given.
            cells: rows of channel, *positions along the axes*.

        Returns:
            One matrix per frequency of the other axes, ``(blocks, *other frequencies, cells, cells)``.
        """
        Q = self.Q
        channel, *places = cells.unbind(1)
        # there are few positions along an axis, but many cells
        distinct = [p.unique() for p in places]
        which = [torch.searchsorted(d, p.contiguous()) for d, p in zip(distinct, places, strict=True)]
        tables = [(p[:, None] - p[None, :]) % self.grid[a] for p, a in zip(distinct, axes, strict=True)]
        present = [torch.bincount(table.flatten()).nonzero().flatten() for table in tables]
        if Q.prefers_lags(axes, sum(len(p) for p in present)):
            numbers = [torch.searchsorted(p, table) for p, table in zip(present, tables, strict=True)]
            lags = [number[w[:, None], w[None, :]] for number, w in zip(numbers, which, strict=True)]
            lead = (slice(None),) * (1 + len(self.grid) - len(axes))
            pairs: Any = (*lead, *lags, channel[:, None], channel[None, :])
            return Q.at_lags(axes, present)[pairs]
        if len(axes) == len(self.grid):
            return circulant_entries(self.full_kernel(), cells)
        kernel = self.full_kernel().movedim([3 + a for a in axes], list(range(3, 3 + len(axes))))
        lags = [table[w[:, None], w[None, :]] for table, w in zip(tables, which, strict=True)]
        pairs = (slice(None), channel[:, None], channel[None, :], *lags)
        block = kernel[pairs]  # blocks, cells, cells, *others
        others = Grid(tuple(n for a, n in enumerate(self.grid) if a not in axes), real=Q.grid.real)
        return others.transform(block).movedim((1, 2), (-2, -1))

    def dense(self) -> Tensor:
        """All entries between the cells of the border: ``(blocks, size, size)``."""
        return between_borders(self.full_kernel(), self.border, self.border)


def circulant_entries(kernel: Tensor, cells: Tensor) -> Tensor:
    """The entries of a block-circulant operator between cells, ``(blocks, cells, cells)``.

    The index of an entry in the kernel around lag zero is the difference of one number per cell.

    Args:
        kernel: the first block column, ``(blocks, channels, channels, *grid)``.
        cells: rows of channel, *positions*, on the CPU or the device of the kernel.
    """
    channel, *places = cells.unbind(1)
    row, column = channel * kernel.shape[2], channel.clone()
    for a, (p, n) in enumerate(zip(places, kernel.shape[3:], strict=True)):
        p = _unrolled(p, n)
        extent = int(p.amax())
        kernel = kernel.index_select(3 + a, (torch.arange(-extent, extent + 1) % n).to(kernel.device))
        row, column = row * (2 * extent + 1) + extent + p, column * (2 * extent + 1) - p
    lags = (row[:, None] + column[None, :]).flatten().to(kernel.device)
    return kernel.flatten(1).index_select(1, lags).unflatten(1, (len(row), len(row)))


def between_borders(kernel: Tensor, row_border: Border, column_border: Border) -> Tensor:
    """The matrix of a block-circulant operator between two borders, ``(blocks, row_border.size, column_border.size)``.

    Channels with the same border positions (all, unless a stride splits them) read the kernel at the same lags.

    Args:
        kernel: its first block column, ``(blocks, rows, columns, *grid)``.
        row_border: the border of the rows, in the range.
        column_border: the border of the columns, in the domain.
    """
    transposed = kernel.new_empty(len(kernel), column_border.size, row_border.size)
    for columns, q, to in _channels_by_border(column_border):
        for rows, p, starts_of in _channels_by_border(row_border):
            lags = torch.zeros((), dtype=torch.int64)
            for a, n in enumerate(row_border.grid):
                lags = lags * n + (p[:, a] - q[:, a, None]) % n
            lags = lags.flatten().to(kernel.device)
            for column, start in zip(columns.tolist(), to.tolist(), strict=True):
                part = kernel[:, rows.to(kernel.device), column].flatten(2)[..., lags]
                part = part.unflatten(-1, (len(q), len(p))).transpose(1, 2)  # blocks, q, rows, p
                target = transposed[:, start : start + len(q)]
                if len(rows) == row_border.channels:
                    target.unflatten(-1, (len(rows), len(p))).copy_(part)
                else:
                    where = (starts_of[:, None] + torch.arange(len(p))).flatten().to(kernel.device)
                    target.index_copy_(-1, where, part.flatten(2))
    return transposed.mT


def _channels_by_border(border: Border) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Group the channels whose border cells have the same positions.

    Returns:
        For every group its channels ``(count,)``, the positions ``(cells, axes)`` that they share, and for each channel
        the number that its first cell has on the border, ``(count,)``.
    """
    flat = border.mask.flatten(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), flat.sum(1).cumsum(0)[:-1]])
    masks, mask_of = torch.unique(flat, dim=0, return_inverse=True)
    groups = []
    for number, mask in enumerate(masks):
        channels = (mask_of == number).nonzero().flatten()
        groups.append((channels, mask.reshape(border.grid).nonzero(), starts[channels]))
    return groups


def largest_block(count: int, cells: int) -> int:
    """Choose the size of dense blocks for ``count`` cells whose factors cost as much as a few transforms of the grid.

    There are ``count / size`` blocks of ``size^3 / 3`` operations each; a transform takes about a hundred per cell.

    Args:
        count: the number of cells in all blocks.
        cells: the number of cells of the grid.
    """
    operations = 2000 * cells
    return math.isqrt(3 * operations // max(count, 1))


def split_at_gaps(places: Tensor, most: int, rows: Tensor | None = None) -> list[Tensor]:
    """Bisect a set of cells recursively until no part has more than ``most``.

    Each cut is at the widest gap between neighbouring cells, along any axis, in the middle half of the cells.

    Args:
        places: the cells, rows of channel, *positions*.
        most: the cells of a part; less than two: no parts are made of more cells than that.
        rows: the numbers of the rows to split; None: all.

    Returns:
        The numbers of the rows of every part.
    """
    rows = torch.arange(len(places)) if rows is None else rows
    if len(rows) <= most or most < 2:
        return [rows] if 0 < len(rows) <= most else []
    quarter, cuts = len(rows) // 4, []
    for a in range(1, places.shape[1]):
        ordered, order = places[rows, a].sort()
        gaps = ordered.diff()[quarter : len(rows) - quarter]
        cut = int(gaps.argmax())
        cuts.append((int(gaps[cut]), int(ordered[-1] - ordered[0]), quarter + cut + 1, order))
    *_, cut, order = max(cuts, key=lambda each: each[:2])
    return [part for half in (order[:cut], order[cut:]) for part in split_at_gaps(places, most, rows[half])]


def gathered(v: Tensor, index: Tensor) -> Tensor:
    """``v[..., index]``."""
    return v.gather(-1, index.expand(*v.shape[:-1], -1))


def scattered(v: Tensor, index: Tensor, size: int) -> Tensor:
    """Zeros of ``(..., size)`` with the entries of ``v`` at ``index``, which are distinct."""
    zeros = v.new_zeros(*v.shape[:-1], size)
    if v.device.type == "cpu":
        return zeros.index_add_(-1, index, v)
    return zeros.index_copy_(-1, index, v)


def _unrolled(places: Tensor, n: int) -> Tensor:
    """Renumber positions on a circle of n from the end of their widest gap."""
    distinct = places.unique()
    gaps = torch.diff(distinct, prepend=distinct[-1:] - n)
    return (places - distinct[gaps.argmax()]) % n
