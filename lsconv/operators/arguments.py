"""torch's convolution arguments, checked and spelled out: one value per axis, one (left, right) pair of padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError
from lsconv.operators.checks import require_finite
from lsconv.operators.padding import is_int, normalise_pairs
from lsconv.operators.padding_modes import Pairs

__all__ = ["check_weight", "positive_ints", "resolve_padding", "spatial_dimensions"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def spatial_dimensions(fixed: int | None, in_size: Any) -> int:
    """The number of spatial dimensions: the class's own, or else that of ``in_size``."""
    if fixed is not None:
        return fixed
    ndim = len(in_size) if isinstance(in_size, Sequence) else 0
    if ndim not in (1, 2, 3):
        raise ArgumentTypeError(f"in_size: expected a tuple of 1, 2 or 3 ints, got {in_size!r}")
    return ndim


def positive_ints(name: str, value: Any, count: int, error: type[Exception] = ArgumentError) -> tuple[int, ...]:
    """``value``, an int or a sequence of them, as ``count`` positive ints."""
    entries = [value] if is_int(value) else value
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not all(map(is_int, entries)):
        raise ArgumentTypeError(f"{name}: expected an int or {count} ints, got {value!r}")
    if len(entries) == 1 and (name != "in_size" or is_int(value)):
        entries = list(entries) * count
    if len(entries) != count:
        raise ArgumentError(f"{name}: expected an int or {count} ints, got {value!r}")
    if min(entries) < 1:
        raise error(f"{name}: expected positive ints, got {value!r}")
    return tuple(int(v) for v in entries)


def check_weight(weight: Any, ndim: int, groups: int, check_finite: bool) -> None:
    """Raise unless ``weight`` is a finite kernel ``(*batch, c_out, c_in // groups, *kernel)`` of a usable dtype."""
    layout = f"(*batch, c_out, c_in // groups, {', '.join(['kernel'] * ndim)})"
    if not isinstance(weight, Tensor):
        raise ArgumentTypeError(f"weight: expected a torch.Tensor of shape {layout}, got {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        raise DtypeError(f"weight: expected one of {', '.join(map(str, _DTYPES))}, got {weight.dtype}")
    if weight.ndim < ndim + 2 or weight.numel() == 0:
        raise ShapeError(f"weight: expected a non-empty tensor of shape {layout}, got shape {tuple(weight.shape)}")
    c_out = weight.shape[-ndim - 2]
    if c_out % groups:
        raise ArgumentError(
            f"groups: {groups} does not divide the {c_out} output channels of weight {tuple(weight.shape)}"
        )
    if check_finite:
        require_finite(weight, "weight", ndim + 2)


def resolve_padding(padding: Any, extent: tuple[int, ...], stride: tuple[int, ...]) -> Pairs:
    """``padding`` in any of its spellings as a ``(left, right)`` pair per axis."""
    if padding == "valid":
        return ((0, 0),) * len(extent)
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ArgumentError(f"padding: 'same' needs stride 1, got stride {stride}")
        return tuple(((size - 1) // 2, size - 1 - (size - 1) // 2) for size in extent)
    if isinstance(padding, str):
        raise ArgumentError(f"padding: expected 'valid', 'same', ints or (left, right) pairs, got {padding!r}")
    return normalise_pairs(padding, len(extent))
