"""The tiles of a field: disjoint cores, their overlap, and smooth windows whose squares sum to one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.operators.fft_convolution import short_fft_length

__all__ = ["TileLayout", "candidates"]


@dataclass(frozen=True)
class TileAxis:
    """The tiles along one axis.

    Attributes:
        cells: number of cells of the whole field.
        count: number of tiles.
        overlap: cells by which the window of a tile is wider than its core, on each side.
        guard: cells on each side outside the window, of a tile that is not solved as a periodic one.
        wraps: whether the field is periodic, so that the last tile is the neighbour of the first.
        first: the first cell of the first core.
        last: the end of the last core; None: the end of the field.
    """

    cells: int
    count: int
    overlap: int
    guard: int
    wraps: bool
    first: int = 0
    last: int | None = None

    @property
    def length(self) -> int:
        """Number of cells of all cores together."""
        return (self.cells if self.last is None else self.last) - self.first

    @property
    def edges(self) -> list[int]:
        """The first cell of every core, and the end of the last."""
        return [self.first + round(i * self.length / self.count) for i in range(self.count + 1)]

    @property
    def margin(self) -> int:
        """Cells by which a periodic field is continued at both ends, so that no tile has to wrap around."""
        return self.size(True) if self.wraps and self.count > 1 else 0

    def size(self, periodic: bool) -> int:
        """Number of cells of a tile, the same for all; ``periodic``: of one that is solved as a periodic field."""
        core = -(-self.length // self.count)
        return min(short_fft_length(core + 2 * (self.overlap + (0 if periodic else self.guard))), self.cells)

    def start(self, tile: int, periodic: bool) -> int:
        """The first cell of a tile, counted in the field with its margin."""
        size, edges = self.size(periodic), self.edges
        middle = (edges[tile] + edges[tile + 1] - size) // 2
        return self.margin + middle if self.margin else min(max(middle, 0), self.cells - size)

    def window(self, tile: int, periodic: bool) -> Tensor:
        """The window of a tile on its own cells: 1 inside, falling to 0 at ``overlap`` cells outside its core."""
        first, last = self.edges[tile : tile + 2]
        start = self.start(tile, periodic) - self.margin
        places = torch.arange(start, start + self.size(periodic), dtype=torch.float64) + 0.5
        ramps = [((places - edge + self.overlap) / (2 * self.overlap)).clamp(0, 1) for edge in (first, last)]
        # The root of a linear ramp is steep at its end and would amplify the error at the edge of a tile.
        ramps = [(math.pi / 2 * ramp).sin().square() for ramp in ramps]
        if not self.margin:
            ramps[0] = torch.ones_like(places) if tile == 0 else ramps[0]
            ramps[1] = torch.zeros_like(places) if tile == self.count - 1 else ramps[1]
        return (ramps[0] - ramps[1]).clamp_min(0).sqrt()


@dataclass(frozen=True)
class TileLayout:
    """The tiles of a field, by axis."""

    axes: tuple[TileAxis, ...]

    @classmethod
    def of(cls, field: Sequence[int], kernel_size: Sequence[int], core: Sequence[int], *, wraps: bool) -> TileLayout:
        """Lay out tiles whose cores have about ``core`` cells; a periodic axis gets one tile, or three or more."""
        axes = []
        for n, k, cells in zip(field, kernel_size, core, strict=True):
            count = max(round(n / cells), 1)
            count = 1 if wraps and count < 3 else count
            axes.append(TileAxis(n, count, max(min(k, n // count // 2), 1), k, wraps))
        return cls(tuple(axes))

    @property
    def tiles(self) -> list[tuple[int, ...]]:
        """The index of every tile, one number per axis."""
        return list(itertools.product(*(range(axis.count) for axis in self.axes)))

    def is_inside(self, tile: tuple[int, ...]) -> bool:
        """Tell whether a tile touches no edge of the field, or only periodic ones."""
        return all(axis.wraps or 0 < i < axis.count - 1 for i, axis in zip(tile, self.axes, strict=True))

    def size(self, periodic: bool) -> tuple[int, ...]:
        """Number of cells of a tile, per axis."""
        return tuple(axis.size(periodic) for axis in self.axes)

    def start(self, tile: tuple[int, ...], periodic: bool) -> tuple[int, ...]:
        """The first cell of a tile, per axis."""
        return tuple(axis.start(i, periodic) for i, axis in zip(tile, self.axes, strict=True))

    def window(self, tile: tuple[int, ...], periodic: bool) -> Tensor:
        """The window of a tile on its own cells, the product of those along the axes."""
        product = torch.ones((), dtype=torch.float64)
        for i, axis in zip(tile, self.axes, strict=True):
            product = product[..., None] * axis.window(i, periodic)
        return product

    @property
    def counts(self) -> tuple[int, int]:
        """The number of tiles that touch no edge of the field, and of those that do."""
        inside = math.prod(axis.count if axis.wraps else max(axis.count - 2, 0) for axis in self.axes)
        return inside, math.prod(axis.count for axis in self.axes) - inside


def candidates(field: Sequence[int], kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """List core sizes to choose from: 2, 4, 8 and so on times the kernel, up to the whole field."""
    found = []
    for factor in itertools.count(1):
        found.append(tuple(min(2**factor * max(k, 4), n) for n, k in zip(field, kernel_size, strict=True)))
        if found[-1] == tuple(field):
            return found
    raise AssertionError
