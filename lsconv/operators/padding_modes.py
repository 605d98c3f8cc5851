r"""The table of torch's padding modes, one row each with all properties that the package uses.

Padding is separable: along one axis of length n a mode is a matrix P of shape (left + n + right, n). Each row of the
four modes holds one 1, or for zeros at most one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["MODES", "PaddingMode", "Pairs"]

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PaddingMode:
    """A padding mode.

    Attributes:
        pad: the padding itself, ``pad(x, pairs)``, of the last ``len(pairs)`` axes.
        fold: its adjoint along one axis, ``fold(inside, before, after, axis)``: adds the padded cells before and after
            the inside, in place, to the cells inside that they were made of. None where padded cells are zero.
        widest: the most cells by which one side of an axis of length n can be padded, ``widest(n)``; None: any number.
        column_sum: an upper bound of how often one tap of a kernel reads one input cell, weighted by the moduli in P,
            ``column_sum(n, (left, right), stride, outputs)``; it enters the bound of ``||A||``.
        row_sum: the largest sum of the moduli of a row of P.
        most_axes: the most axes that are padded together; None: any number.
        zero: padded cells are zero.
        periodic: padded cells are those of the other side of the axis.
        copies: every padded cell is a copy of one inside cell near the same side.
        even: padded cells continue x to a signal that is even about its first and about its last cell.
    """

    pad: Callable[[Tensor, Sequence[tuple[int, int]]], Tensor]
    fold: Callable[[Tensor, Tensor, Tensor, int], None] | None
    widest: Callable[[int], int | None] = lambda n: None
    column_sum: Callable[[int, tuple[int, int], int, int], float] = lambda n, pair, stride, outputs: 1
    row_sum: float = 1.0
    most_axes: int | None = None
    zero: bool = False
    periodic: bool = False
    copies: bool = False
    even: bool = False


def _torch_pad(x: Tensor, pairs: Sequence[tuple[int, int]], mode: str = "constant") -> Tensor:
    flat_pairs = [amount for pair in reversed(pairs) for amount in pair]
    if mode == "constant" or x.numel() == 0:  # torch's other modes refuse an empty batch
        return torch.nn.functional.pad(x, flat_pairs)
    axes = len(pairs)
    # The other modes of torch take exactly one batch and one channel dimension in front of the padded axes.
    image = x.reshape(1, -1, *x.shape[-axes:]) if x.ndim != axes + 2 else x
    padded = torch.nn.functional.pad(image, flat_pairs, mode)
    return padded if x.ndim == axes + 2 else padded.reshape(*x.shape[:-axes], *padded.shape[-axes:])


def _fold_circular(inside: Tensor, before: Tensor, after: Tensor, axis: int) -> None:
    left, right, size = before.shape[axis], after.shape[axis], inside.shape[axis]
    inside.narrow(axis, size - left, left).add_(before)
    inside.narrow(axis, 0, right).add_(after)


def _fold_reflect(inside: Tensor, before: Tensor, after: Tensor, axis: int) -> None:
    left, right, size = before.shape[axis], after.shape[axis], inside.shape[axis]
    inside.narrow(axis, min(1, left), left).add_(before.flip(axis))
    inside.narrow(axis, size - 1 - right if right else 0, right).add_(after.flip(axis))


def _fold_replicate(inside: Tensor, before: Tensor, after: Tensor, axis: int) -> None:
    inside.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
    inside.narrow(axis, inside.shape[axis] - 1, 1).add_(after.sum(axis, keepdim=True))


MODES = {
    "zeros": PaddingMode(pad=_torch_pad, fold=None, zero=True),
    "circular": PaddingMode(
        most_axes=3,  # of torch
        pad=partial(_torch_pad, mode="circular"),
        fold=_fold_circular,
        widest=lambda n: n,
        column_sum=lambda n, pair, stride, outputs: -(-outputs // (n // math.gcd(n, stride))),
        periodic=True,
    ),
    "reflect": PaddingMode(
        most_axes=3,  # of torch
        pad=partial(_torch_pad, mode="reflect"),
        fold=_fold_reflect,
        widest=lambda n: n - 1,
        column_sum=lambda n, pair, stride, outputs: 1 + (pair[0] > 0) + (pair[1] > 0),
        copies=True,
        even=True,
    ),
    "replicate": PaddingMode(
        most_axes=3,  # of torch
        pad=partial(_torch_pad, mode="replicate"),
        fold=_fold_replicate,
        column_sum=lambda n, pair, stride, outputs: 1 + (sum(pair) if n == 1 else max(pair)),
        copies=True,
    ),
}
