r"""The field in overlapping regions of one size, and the restriction of a convolution to each.

The restricted convolution reads the cells of its region alone. At a boundary of the region inside the field it has no
padding, so that outputs which would read other cells are left out; at the edge of the field it has the padding of A.
So all regions that touch no padded edge have the same convolution: they are of one kind. There are at most :math:`3^d`
kinds in d dimensions, and only one where A is "valid" or circular.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.operators.convolution import Convolution
from lsconv.tiled.layout import TileAxis

__all__ = ["Region", "Regions"]

# Per axis: whether the first and the last cell touch a padded edge of the field; None: the region is a periodic axis.
Kind = tuple["tuple[bool, bool] | None", ...]


@dataclass(frozen=True)
class Region:
    """One region.

    Attributes:
        tile: its index, one number per axis.
        core: the first cell of its core, per axis.
        core_size: cells of the core, per axis.
        start: the first cell of the region, per axis; outside the field where the region crosses a periodic edge.
        kind: the padded edges of the field that it touches.
    """

    tile: tuple[int, ...]
    core: tuple[int, ...]
    core_size: tuple[int, ...]
    start: tuple[int, ...]
    kind: Kind

    @property
    def inside(self) -> tuple[slice, ...]:
        """The cells of the core within the region, of all channels."""
        places = zip(self.core, self.start, self.core_size, strict=True)
        return (slice(None), *(slice(c - s, c - s + n) for c, s, n in places))


class Regions:
    """The regions whose cores are in the rows of this process.

    Args:
        A: the convolution of the whole field.
        axes: the cores along each axis.
        overlap: the least number of cells by which a region exceeds its core on each side, per axis.
        wraps: per axis, whether A is circular.
        others: further convolutions with the inputs of A, such as penalties, whose padded edges count too.

    Attributes:
        size: cells of a region, per axis.
        all: the regions.
    """

    def __init__(
        self,
        A: Convolution,
        axes: Sequence[TileAxis],
        overlap: Sequence[int],
        wraps: Sequence[bool],
        others: Sequence[Convolution] = (),
    ) -> None:
        self.A, self.wraps = A, tuple(wraps)
        self._padded = [tuple(any(C.padding[a][side] for C in (A, *others)) for side in (0, 1)) for a in range(A.ndim)]
        self.axes = tuple(
            TileAxis(axis.cells, axis.count, o, 0, w, axis.first, axis.last)
            for axis, o, w in zip(axes, overlap, wraps, strict=True)
        )
        self.size = tuple(axis.size(True) for axis in self.axes)
        self.all = [self._region(tile) for tile in itertools.product(*(range(axis.count) for axis in axes))]

    def _region(self, tile: tuple[int, ...]) -> Region:
        """The region of one tile."""
        core, core_size, start = [], [], []
        kind: list[tuple[bool, bool] | None] = []
        for i, axis, size, wrap, (left, right) in zip(
            tile, self.axes, self.size, self.wraps, self._padded, strict=True
        ):
            first, last = axis.edges[i : i + 2]
            middle = (first + last - size) // 2
            core.append(first)
            core_size.append(last - first)
            if wrap and size < axis.cells:
                start.append(middle)
                kind.append((False, False))
            else:
                start.append(min(max(middle, 0), axis.cells - size))
                kind.append(None if wrap else (left and start[-1] == 0, right and start[-1] + size == axis.cells))
        return Region(tile, tuple(core), tuple(core_size), tuple(start), tuple(kind))

    def rows(self) -> tuple[int, int]:
        """The interval of rows of inputs that the regions read, the first row and the end."""
        return min(r.start[0] for r in self.all), max(r.start[0] for r in self.all) + self.size[0]

    def window(self, region: Region) -> Tensor:
        """The window of a region on its own cells; the squares of all windows sum to one in every cell of the field."""
        product = torch.ones((), dtype=torch.float64)
        for axis, s, c, n, size in zip(self.axes, region.start, region.core, region.core_size, self.size, strict=True):
            places = torch.arange(s, s + size, dtype=torch.float64) + 0.5
            shifts = (-axis.cells, 0, axis.cells) if axis.wraps and n < axis.cells else (0,)
            share = torch.zeros_like(places)
            for shift in shifts:
                rise, fall = (((places + shift - e) / (2 * axis.overlap) + 0.5).clamp(0, 1) for e in (c, c + n))
                rise = torch.ones_like(places) if c == 0 and (not axis.wraps or len(shifts) == 1) else rise
                last = c + n == axis.cells and (not axis.wraps or len(shifts) == 1)
                share += rise - (torch.zeros_like(places) if last else fall)
            product = product[..., None] * share.sqrt()
        return product

    def output_rows(self) -> tuple[int, int]:
        """The interval of rows of outputs that the convolutions of the regions have, the first row and the end."""
        k, (left, right) = self.A.kernel_extent[0], self.A.padding[0]
        firsts, ends = [], []
        for region in self.all:
            edges = region.kind[0] or (True, True)
            firsts.append(self.outputs(region)[0])
            ends.append(firsts[-1] + self.size[0] - k + 1 + (left if edges[0] else 0) + (right if edges[1] else 0))
        return min(firsts), max(ends)

    def convolution(self, kind: Kind, of: Convolution | None = None) -> Convolution:
        """Restrict A, or another convolution with the inputs of A such as a penalty, to regions of this kind.

        It has its padding at the edges of the field that ``kind`` names.
        """
        A = self.A if of is None else of
        padding = [
            pair if edges is None else (pair[0] if edges[0] else 0, pair[1] if edges[1] else 0)
            for pair, edges in zip(A.padding, kind, strict=True)
        ]
        return Convolution(
            A.weight.detach(), self.size, padding=padding, dilation=A.dilation, groups=A.groups,
            padding_mode=A.padding_mode, check_finite=False,
        )  # fmt: skip

    def outputs(self, region: Region) -> tuple[int, ...]:
        """The position, in the output of A, of the first output of the region's convolution."""
        return tuple(
            s + (0 if edges is None or edges[0] else left)
            for s, edges, (left, _) in zip(region.start, region.kind, self.A.padding, strict=True)
        )

    def core_outputs(self, region: Region) -> tuple[slice, ...]:
        """The outputs, within those of the region, that belong to its core; every output of A belongs to one core."""
        slices = []
        for a, (c, n, o) in enumerate(zip(region.core, region.core_size, self.outputs(region), strict=True)):
            left, cells, m = self.A.padding[a][0], self.A.spatial_in[a], self.A.spatial_out[a]
            low, high = c, c + n
            if not self.wraps[a]:
                shift = left - (self.A.kernel_extent[a] - 1) // 2
                low, high = min(max(c + shift, 0), m) if c else 0, min(max(c + n + shift, 0), m)
                high = m if c + n == cells else high
            slices.append(slice(low - o, max(high, low) - o))
        return (slice(None), *slices)
