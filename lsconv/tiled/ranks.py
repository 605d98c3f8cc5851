"""The processes that share a field by rows: halos are sent to whoever reads them, sums and failures are everyone's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, LsconvError, NonFiniteError, RankError
from lsconv.tiled.field import Field, pieces

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Ranks", "rows_of"]


def rows_of(size: int, rank: int, ranks: int) -> slice:
    """The rows of a field of ``size`` rows that a rank has.

    Example:
        >>> from lsconv.tiled.ranks import rows_of
        >>> [rows_of(10, rank, 3) for rank in range(3)]
        [slice(0, 3, None), slice(3, 7, None), slice(7, 10, None)]
    """
    return slice(round(rank * size / ranks), round((rank + 1) * size / ranks))


class Ranks:
    """The ranks of a mesh of one dimension; None: this process alone.

    Attributes:
        rank: the number of this one.
        size: how many there are.
        sent: bytes of halos that this rank has sent.
        received: bytes that it has received.
    """

    def __init__(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        self.rank, self.size, self.device, self.sent, self.received = 0, 1, device, 0, 0
        self.group: Any = None
        if mesh is None:
            return
        if not hasattr(mesh, "get_group"):
            raise ArgumentTypeError(f"mesh: expected a torch DeviceMesh, got {type(mesh).__name__}")
        if mesh.ndim != 1:
            raise ArgumentError(f"mesh: expected one of one dimension, got {mesh.ndim}; pass mesh[name] of one of them")
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def rows(self, size: int) -> slice:
        """The rows of a field of ``size`` rows that this rank has."""
        return rows_of(size, self.rank, self.size)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            with self._lost():
                dist.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest of a tensor over all ranks."""
        if self.size > 1:
            with self._lost():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send a complex tensor to every rank, and receive one of each, of these shapes."""
        mine = torch.cat([torch.view_as_real(part.contiguous()).flatten() for part in parts])
        sizes = [2 * math.prod(shape) for shape in shapes]
        theirs = mine.new_empty(sum(sizes))
        with self._lost():
            dist.all_to_all_single(theirs, mine, sizes, [2 * part.numel() for part in parts], group=self.group)
        self.sent += mine.nbytes - parts[self.rank].nbytes
        self.received += theirs.nbytes - sizes[self.rank] * theirs.itemsize
        received = zip(theirs.split(sizes), shapes, strict=True)
        return [torch.view_as_complex(part.view(*shape, 2)) for part, shape in received]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without communication, and raise the error of one rank on all of them.

        Raises:
            NonFiniteError: data of a rank are not finite.
            RankError: anything else failed on another rank.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        said: list[Any] = [None] * self.size
        mine = None if error is None else (isinstance(error, NonFiniteError), f"{type(error).__name__}: {error}")
        with self._lost():
            dist.all_gather_object(said, mine, group=self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise (NonFiniteError if text[0] else RankError)(f"rank {rank} failed: {text[1]}")

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """Say that a rank is gone, where torch says that a collective call failed."""
        try:
            yield
        except LsconvError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank}: another rank has ended, or has not answered within the time-out of the process "
                f"group (init_process_group(timeout=)): {error}"
            ) from error

    def minimum(self, value: int) -> int:
        """The smallest of a number over all ranks."""
        if self.size > 1:
            found = torch.tensor(value, device=self.device)
            with self._lost():
                dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
            value = int(found)
        return value

    def exchange(self, field: Field, needed: tuple[int, int]) -> None:
        """Fetch the rows ``needed`` of a field that other ranks have into its halos.

        Args:
            field: the field; all ranks pass theirs.
            needed: the first row and the end; beyond the edges of a field that wraps they are those of the other side.
        """
        field.halos = []
        if self.size > 1:
            runs = self._runs(field, needed)
            field.halos = [(first, _rows_like(field, count)) for _, first, count in runs.theirs]
            parts = [(other, field.part(first, count)) for other, first, count in runs.mine]
            self._send(parts, [(other, halo) for (other, *_), (_, halo) in zip(runs.theirs, field.halos, strict=True)])

    def open_spills(self, field: Field, needed: tuple[int, int]) -> None:
        """Make room for what is added to the rows ``needed`` that other ranks have."""
        field.spills = []
        if self.size > 1:
            runs = self._runs(field, needed)
            field.spills = [(first, _rows_like(field, count)) for _, first, count in runs.theirs]

    def collect(self, field: Field, needed: tuple[int, int]) -> None:
        """Send the spills of a field to the ranks that have these rows, which add them."""
        if self.size > 1:
            runs = self._runs(field, needed)
            parts = [(other, spill) for (other, *_), (_, spill) in zip(runs.theirs, field.spills, strict=True)]
            received = [(other, _rows_like(field, count)) for other, _, count in runs.mine]
            self._send(parts, received)
            field.spills = []
            for (_, first, _), (_, part) in zip(runs.mine, received, strict=True):
                field.add((first, *(0 for _ in field.size[1:])), part if field.channels else part.unsqueeze(0))

    def _runs(self, field: Field, needed: tuple[int, int]) -> _Runs:
        """The rows that other ranks need of mine, and I of theirs, in an order that sender and receiver share."""
        table: list[Any] = [None] * self.size
        mine = (field.first, field.first + field.rows, *needed)
        with self._lost():
            dist.all_gather_object(table, mine, group=self.group)
        others = [rank for rank in range(self.size) if rank != self.rank]
        size, wraps = field.size[0], field.wraps[0]
        return _Runs(
            [(o, *run) for o in others for run in _shared(mine[:2], table[o][2:], size, wraps)],
            [(o, *run) for o in others for run in _shared(table[o][:2], needed, size, wraps)],
        )

    def _send(self, parts: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]]) -> None:
        """Send tensors to ranks, and receive those of others, without an order among them."""
        sends = [dist.P2POp(dist.isend, part, self._global(other), self.group) for other, part in parts]
        receives = [dist.P2POp(dist.irecv, part, self._global(other), self.group) for other, part in received]
        self.sent += sum(part.nbytes for _, part in parts)
        self.received += sum(part.nbytes for _, part in received)
        with self._lost():
            for request in dist.batch_isend_irecv([*sends, *receives]) if sends or receives else []:
                request.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class _Runs:
    """Runs of rows (other rank, first, number) to send, and to receive."""

    mine: list[tuple[int, int, int]]
    theirs: list[tuple[int, int, int]]


def _rows_like(field: Field, count: int) -> Tensor:
    """Zeros for so many rows of a field."""
    like = field.part(field.first, 0)
    axis = like.ndim - len(field.size)
    return like.new_zeros(*like.shape[:axis], count, *like.shape[axis + 1 :])


def _shared(owned: tuple[int, int], needed: tuple[int, int], size: int, wraps: bool) -> list[tuple[int, int]]:
    """The runs of rows (first, number) that one rank has and another needs."""
    first, end = needed
    runs = []
    for _, at, count in pieces(first, min(end - first, size), size, wraps):
        low, high = max(at, owned[0]), min(at + count, owned[1])
        if low < high:
            runs.append((low, high - low))
    return runs
