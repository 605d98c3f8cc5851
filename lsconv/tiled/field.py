"""A field of which this process stores some rows, in an array of any kind: read and written by boxes of cells."""

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
    """The rows ``first`` to ``first + rows`` of a field ``(*channels, *size)``, and the access to boxes of cells of it.

    Args:
        array: the rows that this process stores, ``(*batch, *channels, rows, *size[1:])``.
        size: spatial size of the whole field.
        channels: the array has an axis of channels; without it, boxes are read with one channel.
        wraps: per axis, whether the field is periodic: its last cell is followed by its first.
        first: the number, in the whole field, of the first row that is stored here.
        item: the index of the batch item that the field is.
        dtype: the type of the tensors that are read; None: that of the array.
        device: the device of the tensors that are read.

    Attributes:
        rows: the number of rows that are stored here.
        halos: copies of rows of other processes: (number of the first row, values).
        remote_sums: sums to be added to rows of other processes: (number of the first row, values).

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
        self.remote_sums: list[tuple[int, Tensor]] = []

    def read(self, start: Sequence[int], size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Read a box ``(channels, *size)``; cells outside the field are zero, or wrap around to the other side."""
        per_axis = [
            pieces(s, n, length, wrap) for s, n, length, wrap in zip(start, size, self.size, self.wraps, strict=True)
        ]
        found: Tensor | None = None
        for places in itertools.product(*per_axis):
            for offset, rows, array in self._array_rows(*places[0][1:], self.halos):
                cells = (slice(rows, rows + offset[1]), *(slice(at, at + n) for _, at, n in places[1:]))
                part = self._read_cells(array, cells, dtype)
                if found is None:
                    found = torch.zeros(part.shape[0], *size, dtype=part.dtype, device=part.device)
                target = [slice(None), slice(places[0][0] + offset[0], places[0][0] + offset[0] + offset[1])]
                target += [slice(to, to + n) for to, _, n in places[1:]]
                found[tuple(target)] = part
        assert found is not None, (start, size, self.first, self.rows)
        return found

    def _array_rows(
        self, at: int, count: int, others: list[tuple[int, Tensor]]
    ) -> list[tuple[tuple[int, int], int, ArrayLike]]:
        """Find the arrays that hold rows ``at`` to ``at + count``: the stored one, and those of other processes' rows.

        Returns:
            For each array ((offset of its rows in the interval, number of rows), first row within the array, array).
        """
        found = []
        for first, array, rows in (
            (self.first, self.array, self.rows),
            *((first, halo, halo.shape[-len(self.size)]) for first, halo in others),
        ):
            low, high = max(at, first), min(at + count, first + rows)
            if low < high:
                found.append(((low - at, high - low), low - first, array))
        return found

    def _read_cells(self, array: ArrayLike, cells: tuple[slice, ...], dtype: torch.dtype | None) -> Tensor:
        """Read cells of one array, as a tensor with an axis of channels."""
        part = self._tensor(array[self._index(array, cells)], dtype)
        self._release(part.nbytes)
        return part if self.channels else part.unsqueeze(0)

    def _index(self, array: ArrayLike, cells: Sequence[slice]) -> tuple[Any, ...]:
        """The index of spatial cells in an array, which has batch dimensions only if it is the stored one."""
        item = self.item if array is self.array else ()
        return (*item, *([slice(None)] if self.channels else []), *cells)

    def _tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Convert values of an array to a tensor; NumPy's are copied, in the byte order of the machine."""
        if not isinstance(values, Tensor):
            values = np.asarray(values)
            values = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
        return values.detach().to(device=self.device, dtype=dtype or self.dtype or values.dtype)

    def write(self, start: Sequence[int], values: Tensor) -> None:
        """Write a box ``(channels, *size)``, all of whose rows are stored here."""
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
        """Add a box ``(channels, *size)`` to the field; sums for rows of other processes go to :attr:`remote_sums`."""
        per_axis = [
            pieces(s, n, length, wrap)
            for s, n, length, wrap in zip(start, values.shape[1:], self.size, self.wraps, strict=True)
        ]
        for places in itertools.product(*per_axis):
            for offset, rows, array in self._array_rows(*places[0][1:], self.remote_sums):
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
        """Release the memory of mapped pages now and then, so that no whole file stays in memory."""
        self._mapped += nbytes
        if self._mapped < 2**26 or not isinstance(self.array, np.memmap) or self.array.mode == "c":
            return
        self._mapped = 0
        base: Any = self.array.base
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)

    def stored_rows(self, first: int, count: int) -> Tensor:
        """Rows ``first`` to ``first + count``, all stored here, as one tensor ``(*channels, count, *size[1:])``."""
        cells = [slice(first - self.first, first - self.first + count), *(slice(0, n) for n in self.size[1:])]
        return self._tensor(self.array[self._index(self.array, cells)]).contiguous()


def pieces(start: int, count: int, size: int, wraps: bool) -> list[tuple[int, int, int]]:
    """Split an interval of cells into runs inside a field: (offset in the interval, first cell, number of cells).

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
