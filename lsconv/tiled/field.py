"""A field of which this process has some rows, in an array of any kind: read and written by boxes of cells."""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayLike", "Field", "pieces"]


class ArrayLike(Protocol):
    """An array that is read and written by slices: a tensor, a numpy array or memory map, a Zarr array."""

    @property
    def shape(self) -> Any:
        """The sizes of the axes."""

    @property
    def dtype(self) -> Any:
        """The number type."""

    def __getitem__(self, cells: Any) -> Any: ...

    def __setitem__(self, cells: Any, values: Any) -> None: ...


class Field:
    """The rows ``first`` to ``first + rows`` of a field ``(*channels, *size)``.

    Args:
        array: the rows here, along the first spatial axis, after batch dimensions if any.
        size: spatial size of the whole field.
        channels: the axis of channels is there; without it, boxes have one.
        wraps: per axis, whether the first cell is the neighbour of the last.
        first: the first row here.
        item: which of the batch items is meant.
        dtype: of what is read; None: that of the array.
        device: of what is read.

    Attributes:
        rows: how many are here.
        halos: rows of other processes, each with the number of the first.
        spills: what is added to rows of other processes, likewise.

    Example:
        >>> from lsconv.tiled.field import Field
        >>> field = Field(torch.arange(4.0), (4,), channels=False, wraps=(True,))
        >>> field.read((-1,), (4,))
        tensor([[3., 0., 1., 2.]])
    """

    def __init__(
        self,
        array: ArrayLike,
        size: Sequence[int],
        *,
        channels: bool,
        wraps: Sequence[bool],
        first: int = 0,
        item: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.array, self.size, self.channels, self.wraps, self.first = array, tuple(size), channels, tuple(wraps), first
        self.item, self.dtype = item, dtype
        self.device = torch.device("cpu") if device is None else device
        self._mapped = 0
        self.rows = int(array.shape[len(array.shape) - len(self.size)])
        self.halos: list[tuple[int, Tensor]] = []
        self.spills: list[tuple[int, Tensor]] = []

    def read(self, start: Sequence[int], size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """A box, ``(channels, *size)``; cells beyond the field are zero, or those of the other side."""
        per_axis = [
            pieces(s, n, length, wrap) for s, n, length, wrap in zip(start, size, self.size, self.wraps, strict=True)
        ]
        found: Tensor | None = None
        for places in itertools.product(*per_axis):
            for offset, rows, array in self._rows(*places[0][1:], self.halos):
                cells = (slice(rows, rows + offset[1]), *(slice(at, at + n) for _, at, n in places[1:]))
                part = self._part(array, cells, dtype)
                if found is None:
                    found = torch.zeros(part.shape[0], *size, dtype=part.dtype, device=part.device)
                target = [slice(None), slice(places[0][0] + offset[0], places[0][0] + offset[0] + offset[1])]
                target += [slice(to, to + n) for to, _, n in places[1:]]
                found[tuple(target)] = part
        assert found is not None, (start, size, self.first, self.rows)
        return found

    def _rows(
        self, at: int, count: int, others: list[tuple[int, Tensor]]
    ) -> list[tuple[tuple[int, int], int, ArrayLike]]:
        """The arrays that hold rows ``at`` to ``at + count``: (offset, number) of the rows, and their place there."""
        found = []
        for first, array, rows in (
            (self.first, self.array, self.rows),
            *((first, halo, halo.shape[-len(self.size)]) for first, halo in others),
        ):
            low, high = max(at, first), min(at + count, first + rows)
            if low < high:
                found.append(((low - at, high - low), low - first, array))
        return found

    def _part(self, array: ArrayLike, cells: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        part = self._tensor(array[self._index(array, cells)], dtype)
        self._release(part.nbytes)
        return part if self.channels else part.unsqueeze(0)

    def _index(self, array: ArrayLike, cells: Sequence[slice]) -> tuple[Any, ...]:
        item = self.item if array is self.array else ()
        return (*item, *([slice(None)] if self.channels else []), *cells)

    def _tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        if not isinstance(values, Tensor):
            values = np.asarray(values)
            values = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
        return values.detach().to(device=self.device, dtype=dtype or self.dtype or values.dtype)

    def write(self, start: Sequence[int], values: Tensor) -> None:
        """Write a box ``(channels, *size)`` of rows that are here."""
        cells = [slice(s, s + n) for s, n in zip(start, values.shape[1:], strict=True)]
        cells[0] = slice(cells[0].start - self.first, cells[0].stop - self.first)
        index = self._index(self.array, cells)
        values = values if self.channels else values.squeeze(0)
        if isinstance(self.array, Tensor):
            self.array[index] = values.to(self.array.device, self.array.dtype)
        else:
            self.array[index] = values.cpu().numpy().astype(self.array.dtype, copy=False)
        self._release(values.nbytes)

    def add(self, start: Sequence[int], values: Tensor) -> None:
        """Add a box ``(channels, *size)`` to the cells, to those of other processes by way of :attr:`spills`."""
        per_axis = [
            pieces(s, n, length, wrap)
            for s, n, length, wrap in zip(start, values.shape[1:], self.size, self.wraps, strict=True)
        ]
        for places in itertools.product(*per_axis):
            for offset, rows, array in self._rows(*places[0][1:], self.spills):
                cells = (slice(rows, rows + offset[1]), *(slice(at, at + n) for _, at, n in places[1:]))
                index = self._index(array, cells)
                source = [slice(None), slice(places[0][0] + offset[0], places[0][0] + offset[0] + offset[1])]
                source += [slice(to, to + n) for to, _, n in places[1:]]
                part = values[tuple(source)]
                part = part if self.channels else part.squeeze(0)
                if isinstance(array, Tensor):
                    array[index] += part.to(array.device, array.dtype)
                else:
                    array[index] = array[index] + part.cpu().numpy().astype(array.dtype, copy=False)
                    self._release(part.nbytes)

    def _release(self, nbytes: int) -> None:
        """Release the mapped pages of a file; its contents stay."""
        self._mapped += nbytes
        if self._mapped < 2**26 or not isinstance(self.array, np.memmap) or self.array.mode == "c":
            return
        self._mapped = 0
        base: Any = self.array.base
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)

    def part(self, first: int, count: int) -> Tensor:
        """Rows that are here, as one tensor on the device: ``(*channels, count, ...)``."""
        cells = [slice(first - self.first, first - self.first + count), *(slice(0, n) for n in self.size[1:])]
        return self._tensor(self.array[self._index(self.array, cells)]).contiguous()


def pieces(start: int, count: int, size: int, wraps: bool) -> list[tuple[int, int, int]]:
    """The runs of cells within 0 to ``size`` that an interval has: (place in the interval, first cell, number).

    Example:
        >>> from lsconv.tiled.field import pieces
        >>> pieces(-2, 5, 8, True), pieces(-2, 5, 8, False)
        ([(0, 6, 2), (2, 0, 3)], [(2, 0, 3)])
    """
    if not wraps:
        low, high = max(start, 0), min(start + count, size)
        return [(low - start, low, high - low)] if low < high else []
    found, place = [], 0
    while place < count:
        at = (start + place) % size
        number = min(size - at, count - place)
        found.append((place, at, number))
        place += number
    return found
