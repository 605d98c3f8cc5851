"""Windows of a field, all of one size: read as a batch, and its adjoint, which adds them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["add_windows", "read_windows", "window_slices"]


def window_slices(starts: Tensor, size: Sequence[int]) -> list[tuple[slice, ...]]:
    """The slices of windows that begin at ``starts``, ``(windows, axes)``."""
    return [tuple(slice(s, s + n) for s, n in zip(start, size, strict=True)) for start in starts.tolist()]


def read_windows(x: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """Read windows of ``x``, ``(*batch, channels, *field)``, as ``(*batch, windows, channels, *size)``.

    Args:
        x: the field.
        starts: the first cell of every window, ``(windows, axes)``.
        size: the size of a window.

    Example:
        >>> from lsconv.operators.windows import read_windows
        >>> read_windows(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0], [2]]), (2,))
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 4.]]])
    """
    ndim = len(size)
    view = x
    for axis, n in enumerate(size):
        view = view.unfold(x.ndim - ndim + axis, n, 1)
    cells: tuple[Any, ...] = (..., *starts.unbind(1), *(slice(None),) * ndim)
    return view[cells].movedim(-ndim - 1, -ndim - 2)


def add_windows(windows: Tensor, starts: Tensor, size: Sequence[int]) -> Tensor:
    """Add windows to a field of zeros, each at its start: the adjoint of :func:`read_windows`.

    Args:
        windows: ``(*batch, windows, channels, *window)``.
        starts: the first cell of every window, ``(windows, axes)``.
        size: the size of the field.
    """
    ndim = len(size)
    x = windows.new_zeros(*windows.shape[: -ndim - 2], windows.shape[-ndim - 1], *size)
    for part, slices in zip(windows.unbind(-ndim - 2), window_slices(starts, windows.shape[-ndim:]), strict=True):
        cells: tuple[Any, ...] = (..., *slices)
        x[cells] += part
    return x
