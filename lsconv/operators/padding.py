r"""Padding as a linear map with its exact adjoint, in the modes of :mod:`lsconv.operators.padding_modes`."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.padding_modes import MODES, Pairs

__all__ = ["Pad", "check_pairs", "is_int", "normalise_pairs", "pad", "pad_adjoint"]


def pad(x: Tensor, pairs: Sequence[tuple[int, int]], mode: str = "zeros") -> Tensor:
    """Pad the last ``len(pairs)`` axes of ``x``, as ``torch.nn.functional.pad`` does.

    Args:
        x: tensor of shape ``(..., *sizes)``.
        pairs: ``(left, right)`` for each padded axis, in the order of the axes (torch's own call reverses them).
        mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.

    Returns:
        The padded tensor, of shape ``(..., *(left + size + right))``.

    Example:
        >>> from lsconv.operators.padding import pad
        >>> pad(torch.tensor([1.0, 2.0, 3.0]), [(2, 1)], "reflect")
        tensor([3., 2., 1., 2., 3., 2.])
    """
    return MODES[mode].pad(x, pairs) if any(map(any, pairs)) else x


def pad_adjoint(y: Tensor, pairs: Sequence[tuple[int, int]], mode: str = "zeros") -> Tensor:
    """The exact adjoint of :func:`pad`: crop, and add each padded cell to the cells inside that it was made of.

    Args:
        y: tensor of shape ``(..., *(left + size + right))``.
        pairs: ``(left, right)`` for each padded axis, in the order of the axes.
        mode: the mode of :func:`pad`.

    Returns:
        Tensor of shape ``(..., *sizes)``.

    Example:
        >>> from lsconv.operators.padding import pad_adjoint
        >>> pad_adjoint(torch.tensor([1.0, 10.0, 100.0, 1000.0]), [(1, 1)], "replicate")
        tensor([  11., 1100.])
    """
    fold = MODES[mode].fold
    for axis, (left, right) in enumerate(pairs, start=-len(pairs)):
        if left == right == 0:
            continue
        size = y.shape[axis] - left - right
        before, after = y.narrow(axis, 0, left), y.narrow(axis, left + size, right)
        y = y.narrow(axis, left, size)
        if fold is not None:
            y = y.clone()
            fold(y, before, after, axis)
    return y


def normalise_pairs(padding: Any, axes: int) -> Pairs:
    """``padding`` as one ``(left, right)`` pair per axis.

    Args:
        padding: an int (all sides), one int per axis (both sides), or one ``(left, right)`` pair per axis; ints and
            pairs may be mixed.
        axes: number of padded axes.

    Raises:
        ArgumentTypeError: something is not an int.
        ArgumentError: a wrong number of entries or a negative amount.

    Example:
        >>> from lsconv.operators.padding import normalise_pairs
        >>> normalise_pairs((1, (2, 3)), 2)
        ((1, 1), (2, 3))
    """
    expected = f"an int, {axes} int(s), or {axes} (left, right) pair(s)"
    entries = [padding] * axes if is_int(padding) else padding
    if isinstance(entries, str) or not isinstance(entries, Sequence):
        raise ArgumentTypeError(f"padding: expected {expected}, got {padding!r}")
    if len(entries) == 1 and is_int(entries[0]):
        entries = list(entries) * axes
    if len(entries) != axes:
        hint = f"; an asymmetric padding of one axis is written (({entries[0]}, {entries[1]}),)" if axes == 1 else ""
        raise ArgumentError(f"padding: expected {expected}, got {padding!r}{hint if len(entries) == 2 else ''}")
    pairs = []
    for entry in entries:
        pair = (entry, entry) if is_int(entry) else entry
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_int, pair))):
            raise ArgumentTypeError(f"padding: expected {expected}, got {padding!r}")
        if min(pair) < 0:
            raise ArgumentError(f"padding: amounts must not be negative, got {padding!r}")
        pairs.append((int(pair[0]), int(pair[1])))
    return tuple(pairs)


def check_pairs(pairs: Pairs, sizes: Sequence[int], mode: str) -> None:
    """Raise when ``mode`` is unknown, or cannot pad axes of ``sizes`` by ``pairs``.

    Raises:
        ArgumentError: an unknown mode, or more padding than the mode can read from the axis.
    """
    if mode not in MODES:
        raise ArgumentError(f"padding_mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    limits = [MODES[mode].widest(size) for size in sizes]
    if any(limit is not None and max(pair) > limit for pair, limit in zip(pairs, limits, strict=True)):
        raise ArgumentError(
            f"padding: {mode!r} padding reads the inside, of which sizes {tuple(sizes)} allow at most {tuple(limits)} "
            f"per side, got {pairs}"
        )


class Pad(LinearOperator):
    r"""Padding of the last axes of a tensor, ``y = P x``, in torch's padding modes.

    The adjoint crops and adds every padded cell to the cell that it is a copy of. For ``mode="zeros"`` it is the
    crop, and ``P.H @ P`` is the identity.

    Args:
        shape: shape of one input item.
        padding: an int (all axes of ``shape``), or one entry per *padded* axis, counted from the last: an int or a
            ``(left, right)`` pair. ``shape=(3, 8, 8), padding=(1, 2)`` pads the last two axes.
        mode: ``"zeros"``, ``"circular"`` (at most the size), ``"reflect"`` (at most the size minus one) or
            ``"replicate"``.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.
        device: device of inputs and outputs.

    Raises:
        ArgumentError: a negative padding, an unknown mode, or more padding than the mode allows.
        ArgumentTypeError: ``padding`` is not made of ints.
        ShapeError: more padded axes than ``shape`` has.

    Source:
        ``torch.nn.functional.pad`` for the modes; the adjoint is the transpose of the selection matrix that it is.

    Example:
        >>> P = lsconv.Pad((4,), padding=((2, 1),), mode="circular")
        >>> P(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([3., 4., 1., 2., 3., 4., 1.])
        >>> P.H(torch.ones(7))
        tensor([2., 1., 2., 2.])
    """

    _only_torch = True

    def __init__(
        self,
        shape: Sequence[int],
        padding: int | Sequence[int | tuple[int, int]],
        mode: str = "zeros",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = tuple(int(size) for size in shape)
        axes = len(padding) if isinstance(padding, (list, tuple)) else len(shape)
        if not 1 <= axes <= len(shape):
            raise ShapeError(f"padding: {axes} padded axes do not fit shape {shape}, got padding {padding!r}")
        pairs = normalise_pairs(padding, axes)
        # Leading axes that are not padded are dropped, so that torch's limit counts only the axes that are.
        while len(pairs) > 1 and not any(pairs[0]):
            pairs = pairs[1:]
        check_pairs(pairs, shape[-len(pairs) :], mode)
        most = MODES[mode].most_axes
        if most is not None and len(pairs) > most:
            raise ShapeError(f"padding: {mode!r} pads at most {most} axes, got {len(pairs)} for shape {shape}")
        padded = [left + size + right for size, (left, right) in zip(shape[-len(pairs) :], pairs, strict=True)]
        super().__init__(
            shape,
            (*shape[: -len(pairs)], *padded),
            dtype=dtype,
            device=device,
        )
        self.padding = pairs
        self.mode = mode

    def apply(self, x: Tensor) -> Tensor:
        """``P x``: the padded tensor."""
        return pad(x, self.padding, self.mode)

    def adjoint(self, y: Tensor) -> Tensor:
        """``P^H y``: cropped, each padded cell added to the cells inside that it was made of."""
        return pad_adjoint(y, self.padding, self.mode)


def is_int(value: Any) -> bool:
    """Tell whether ``value`` is an integer, Python's or numpy's, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
