"""The order of batch dimensions for operators with parameters per batch item.

An operator's own batch dimensions broadcast with those of its arguments. Along dimensions that the operator lacks, or
in which it has size one, items share parameters; along the others each index has its own, and is called a block. Arrays
are reordered to ``(*sharing, *differing, *item)``: first the dimensions that share, then one index per block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "CACHE_BYTES",
    "WORK_BYTES",
    "batch_order",
    "broadcast_shapes",
    "in_blocks",
    "in_items",
    "on_parts",
    "over_items",
    "select",
]

# The most bytes of an array that a batched computation makes on a CPU. A transform also makes a few copies, and arrays
# of more than 32 MiB are slow, because glibc's malloc returns them to the system and takes them anew each time.
WORK_BYTES = 2**24
# The most bytes of the vectors that a thread of a CPU iterates on: about the size of its cache.
CACHE_BYTES = 2**20

_Shape = tuple[int, ...]


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that tensors of these shapes broadcast to.

    ``torch.broadcast_shapes`` does the same, but imports SymPy when it is first called.

    Raises:
        RuntimeError: shapes that do not broadcast.

    Example:
        >>> from lsconv.operators.batch_layout import broadcast_shapes
        >>> broadcast_shapes((2,), (3, 1), ())
        torch.Size([3, 2])
    """
    sizes = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for index, size in enumerate(reversed(shape), start=1):
            if size not in (1, sizes[-index]):
                if sizes[-index] != 1:
                    raise RuntimeError(f"shapes {[tuple(shape) for shape in shapes]} do not broadcast")
                sizes[-index] = size
    return torch.Size(sizes)


def over_items(values: Tensor, item_ndim: int) -> Tensor:
    """Shape one value per batch item to meet tensors ``(*batch, *item)``.

    Args:
        values: ``batch``.
        item_ndim: number of dimensions of an item.

    Example:
        >>> from lsconv.operators.batch_layout import over_items
        >>> over_items(torch.ones(5), 2).shape
        torch.Size([5, 1, 1])
    """
    return values.reshape(values.shape + (1,) * item_ndim)


def select(items: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """Select, per batch item, ``chosen`` where ``items`` is true and ``others`` elsewhere.

    Args:
        items: bool, ``batch``.
        chosen: ``(*batch, *item)``.
        others: the same.
    """
    return torch.where(over_items(items, chosen.ndim - items.ndim), chosen, others)


def on_parts(function: Callable[[Tensor], Tensor], x: Tensor, item_ndim: int, operator_batch: _Shape) -> Tensor:
    """Apply a real linear function to complex ``x``: to real and imaginary part, as one batch.

    Args:
        function: takes real tensors ``(*batch, *item)``.
        x: complex, ``(*batch, *item)``.
        item_ndim: number of dimensions of an item.
        operator_batch: the batch shape of the operator.
    """
    missing = max(len(operator_batch) - (x.ndim - item_ndim), 0)
    parts = torch.stack([x.real, x.imag])
    real, imaginary = function(parts.reshape(2, *(1 for _ in range(missing)), *x.shape)).unbind(0)
    return torch.complex(real, imaginary)


def batch_order(batch_ndim: int, operator_batch: _Shape) -> tuple[list[int], list[int]]:
    """Return the batch dimensions along which items share parameters, and those along which they differ.

    Args:
        batch_ndim: number of batch dimensions after broadcasting.
        operator_batch: the batch shape of the operator.
    """
    if not operator_batch:
        return list(range(batch_ndim)), []
    first = batch_ndim - len(operator_batch)
    differing = [first + dim for dim, size in enumerate(operator_batch) if size > 1]
    return [dim for dim in range(batch_ndim) if dim not in differing], differing


def in_blocks(x: Tensor, item_ndim: int, operator_batch: _Shape) -> tuple[Tensor, _Shape]:
    """Reorder ``(*batch, *item)`` to ``(*sharing, *differing, *item)``; return it with the broadcast batch dimensions.

    Args:
        x: the tensor; broadcast with ``operator_batch``.
        item_ndim: number of dimensions of an item.
        operator_batch: the batch shape of the operator.
    """
    batch = tuple(x.shape[: x.ndim - item_ndim])
    if operator_batch:
        item = x.shape[x.ndim - item_ndim :]
        batch = tuple(broadcast_shapes(batch, operator_batch))
        x = x.expand(*batch, *item)
    shared, differing = batch_order(len(batch), operator_batch)
    return (x.permute(*shared, *differing, *range(len(batch), x.ndim)) if differing else x), batch


def in_items(z: Tensor, batch: _Shape, item_shape: _Shape, operator_batch: _Shape) -> Tensor:
    """Undo :func:`in_blocks`; the leading dimensions of ``z`` may be flattened in any way."""
    shared, differing = batch_order(len(batch), operator_batch)
    if not differing:
        return z.reshape(*batch, *item_shape)
    order = shared + differing
    z = z.reshape(*(batch[dim] for dim in order), *item_shape)
    return z.permute(*(order.index(dim) for dim in range(len(batch))), *range(len(batch), z.ndim))
