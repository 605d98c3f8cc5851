"""The processes that share a field by rows: they exchange halos, and all have the same sums and errors."""

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
    """The rows, of a field of ``size`` rows, that a rank stores.

    Example:
        >>> from lsconv.tiled.ranks import rows_of
        >>> [rows_of(10, rank, 3) for rank in range(3)]
        [slice(0, 3, None), slice(3, 7, None), slice(7, 10, None)]
    """
    return slice(round(rank * size / ranks), round((rank + 1) * size / ranks))


class Ranks:
    """The ranks of a DeviceMesh of one dimension, and the communication between them; without a mesh, one rank.

    Attributes:
        rank: the number of this rank.
        size: the number of ranks.
        sent: bytes that this rank has sent to single ranks.
        received: bytes that it has received from them.
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
        """The rows, of a field of ``size`` rows, that this rank stores."""
        return rows_of(size, self.rank, self.size)

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            with self._as_rank_error():
                dist.all_reduce(values, group=self.group)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """Take the largest of a tensor over all ranks, entry by entry and in place."""
        if self.size > 1:
            with self._as_rank_error():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send ``parts[r]`` to each rank r, and receive from each a complex tensor of the shape ``shapes[r]``."""
        mine = torch.cat([torch.view_as_real(part.contiguous()).flatten() for part in parts])
        sizes = [2 * math.prod(shape) for shape in shapes]
        theirs = mine.new_empty(sum(sizes))
        with self._as_rank_error():
            dist.all_to_all_single(theirs, mine, sizes, [2 * part.numel() for part in parts], group=self.group)
        self.sent += mine.nbytes - parts[self.rank].nbytes
        self.received += theirs.nbytes - sizes[self.rank] * theirs.itemsize
        received = zip(theirs.split(sizes), shapes, strict=True)
        return [torch.view_as_complex(part.view(*shape, 2)) for part, shape in received]

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Run a block without communication; an error on one rank is raised on all, so that none waits for another.

        Raises:
            NonFiniteError: data of a rank are not finite.
            RankError: another rank has failed otherwise.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages: list[Any] = [None] * self.size
        mine = None if error is None else (isinstance(error, NonFiniteError), f"{type(error).__name__}: {error}")
        with self._as_rank_error():
            dist.all_gather_object(messages, mine, group=self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(messages):
            if text is not None:
                raise (NonFiniteError if text[0] else RankError)(f"rank {rank} failed: {text[1]}")

    @contextlib.contextmanager
    def _as_rank_error(self) -> Iterator[None]:
        """Turn a failure of a collective call of torch into a :class:`RankError`."""
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
        """The smallest of the ranks' values of an integer."""
        if self.size > 1:
            found = torch.tensor(value, device=self.device)
            with self._as_rank_error():
                dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
            value = int(found)
        return value

    def exchange(self, field: Field, needed: tuple[int, int]) -> None:
        """Copy the rows ``needed`` of a field that other ranks store into its ``halos``.

        Args:
            field: the field; all ranks pass theirs.
            needed: the first row and the end; outside a periodic field they are the rows of its other side.
        """
        field.halos = []
        if self.size > 1:
            runs = self._runs(field, needed)
            field.halos = [(first, _rows_like(field, count)) for _, first, count in runs.receive]
            parts = [(other, field.stored_rows(first, count)) for other, first, count in runs.send]
            self._send(parts, [(other, halo) for (other, *_), (_, halo) in zip(runs.receive, field.halos, strict=True)])

    def open_remote_sums(self, field: Field, needed: tuple[int, int]) -> None:
        """Make ``remote_sums`` of zeros for the rows ``needed`` that other ranks store, for :meth:`Field.add`."""
        field.remote_sums = []
        if self.size > 1:
            runs = self._runs(field, needed)
            field.remote_sums = [(first, _rows_like(field, count)) for _, first, count in runs.receive]

    def send_remote_sums(self, field: Field, needed: tuple[int, int]) -> None:
        """Send the ``remote_sums`` of a field to the ranks that store these rows, which add them to theirs."""
        if self.size > 1:
            runs = self._runs(field, needed)
            parts = [(other, part) for (other, *_), (_, part) in zip(runs.receive, field.remote_sums, strict=True)]
            received = [(other, _rows_like(field, count)) for other, _, count in runs.send]
            self._send(parts, received)
            field.remote_sums = []
            for (_, first, _), (_, part) in zip(runs.send, received, strict=True):
                field.add((first, *(0 for _ in field.size[1:])), part if field.channels else part.unsqueeze(0))

    def _runs(self, field: Field, needed: tuple[int, int]) -> _Runs:
        """The runs of rows to send and to receive, in the same order on the sender and on the receiver."""
        table: list[Any] = [None] * self.size
        mine = (field.first, field.first + field.rows, *needed)
        with self._as_rank_error():
            dist.all_gather_object(table, mine, group=self.group)
        others = [rank for rank in range(self.size) if rank != self.rank]
        size, wraps = field.size[0], field.wraps[0]
        return _Runs(
            [(o, *run) for o in others for run in _needed_runs(mine[:2], table[o][2:], size, wraps)],
            [(o, *run) for o in others for run in _needed_runs(table[o][:2], needed, size, wraps)],
        )

    def _send(self, parts: list[tuple[int, Tensor]], received: list[tuple[int, Tensor]]) -> None:
        """Send tensors to ranks and receive others, (rank, tensor), all at once so that no cycle of ranks waits."""
        sends = [dist.P2POp(dist.isend, part, self._global(other), self.group) for other, part in parts]
        receives = [dist.P2POp(dist.irecv, part, self._global(other), self.group) for other, part in received]
        self.sent += sum(part.nbytes for _, part in parts)
        self.received += sum(part.nbytes for _, part in received)
        with self._as_rank_error():
            for request in dist.batch_isend_irecv([*sends, *receives]) if sends or receives else []:
                request.wait()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


@dataclass(frozen=True)
class _Runs:
    """Runs of consecutive rows, (other rank, first row, number of rows), to send and to receive."""

    send: list[tuple[int, int, int]]
    receive: list[tuple[int, int, int]]


def _rows_like(field: Field, count: int) -> Tensor:
    """Zeros for ``count`` rows of a field, of the type and channels of those stored."""
    like = field.stored_rows(field.first, 0)
    axis = like.ndim - len(field.size)
    return like.new_zeros(*like.shape[:axis], count, *like.shape[axis + 1 :])


def _needed_runs(owned: tuple[int, int], needed: tuple[int, int], size: int, wraps: bool) -> list[tuple[int, int]]:
    """The runs of rows (first, number) that one rank stores and another needs."""
    first, end = needed
    runs = []
    for _, at, count in pieces(first, min(end - first, size), size, wraps):
        low, high = max(at, owned[0]), min(at + count, owned[1])
        if low < high:
            runs.append((low, high - low))
    return runs
