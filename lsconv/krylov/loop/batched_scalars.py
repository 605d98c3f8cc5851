"""Per-item arithmetic: every batch item is an independent linear system with scalars of its own.

A vector is a tensor ``(*batch, *item_shape)``; a scalar of the method (a step length, a norm) is a tensor of shape
``batch``, in float64 whatever the dtype of the vectors: scalars are cheap, and a float32 norm over half a million
entries is wrong in its sixth digit. Nothing here reads a value on the host, so nothing waits for a GPU.

The scalars of a single item on the CPU may be Python numbers (:class:`OneItem`), which are much cheaper than tensors of
one entry. The functions below take both kinds, so that a recurrence is written once.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lsconv.operators.dtypes import double

__all__ = [
    "ItemSpace",
    "OneItem",
    "Scalar",
    "any_item",
    "at_least",
    "binary_unit",
    "divide",
    "hypot",
    "maximum",
    "minimum",
    "quotient",
    "root",
    "rotation",
    "scalar_dtype",
    "unbounded",
    "where",
]

# One number per batch item: a tensor of shape ``batch``, or a Python number for a single item on the CPU.
Scalar: TypeAlias = Any

# The row length of two-level sums: short enough for an accurate float32 sum, long enough to be fast.
_ROW = 1024
_DOUBLE = (torch.float64, torch.complex128)


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the methods' scalars: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ItemSpace:
    """Norms, inner products and scaling of vectors ``(*batch, *item_shape)``, item by item.

    Args:
        item_shape: shape of one vector.
        dtype: dtype of the vectors.
        device: device of the vectors.

    Example:
        >>> space = ItemSpace((2, 2), torch.float32, torch.device("cpu"))
        >>> space.norm(torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))
        tensor([5., 0.], dtype=torch.float64)
    """

    def __init__(self, item_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.item_shape = tuple(item_shape)
        self.dtype = dtype
        self.scalar = scalar_dtype(device)
        self._ones = (1,) * len(self.item_shape)

    @functools.cached_property
    def _rows(self) -> int:
        """The number of dimensions of an item that make a row of the two-level reductions."""
        rows = 1
        while rows < len(self.item_shape) and math.prod(self.item_shape[-rows:]) < _ROW // 16:
            rows += 1
        return rows

    # ------------------------------------------------------------------ from vectors to scalars

    def norm(self, v: Tensor) -> Tensor:
        """The Euclidean norm of every item, ``batch``."""
        if v.is_complex() and self.item_shape:
            v = _real_view(v)
        total: Tensor
        if not self.item_shape:
            total = v.abs()
        elif math.prod(self.item_shape[-self._rows :]) > 4 * _ROW:
            total = self._chunked_norm(v.flatten(v.ndim - len(self.item_shape)))
        else:
            total = torch.linalg.vector_norm(v, dim=tuple(range(-self._rows, 0)))
            if self._rows < len(self.item_shape):
                outer = tuple(range(self._rows - len(self.item_shape), 0))
                total = torch.linalg.vector_norm(total, dim=outer, dtype=self.scalar)
        return _gathered(total.to(self.scalar))

    def _chunked_norm(self, flat: Tensor) -> Tensor:
        """Norm over one long dimension: float32 within rows, float64 across them."""
        count = flat.shape[-1] // _ROW
        body, tail = flat[..., : count * _ROW], flat[..., count * _ROW :]
        rows = torch.linalg.vector_norm(body.unflatten(-1, (count, _ROW)), dim=-1)
        total: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=self.scalar)
        if tail.shape[-1]:
            total = torch.hypot(total, torch.linalg.vector_norm(tail, dim=-1).to(self.scalar))
        return total

    def safe_norm(self, v: Tensor) -> Tensor:
        """Norm that neither overflows nor underflows; it may wait for the device, so not inside a loop."""
        norm = ItemSpace.norm(self, v)
        if norm.numel() == 0:
            return norm
        smallest, largest = _safe_range(v.dtype)
        low, high = (float(extreme) for extreme in torch.aminmax(norm))
        if low >= smallest and high <= largest:
            return norm
        precise = v.to(double(v.dtype))
        dims = tuple(range(-len(self.item_shape), 0))
        size = precise.abs().amax(dims) if dims else precise.abs()
        unit = binary_unit(torch.where(torch.isfinite(size), size, 1.0))
        precise = precise / unit.reshape(*unit.shape, *self._ones)
        scaled = (torch.linalg.vector_norm(precise, dim=dims) if dims else precise.abs()) * unit
        # Only items out of range take the scaled norm, so that no item's norm depends on the others.
        return torch.where((norm >= smallest) & (norm <= largest), norm, scaled.to(self.scalar))

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The real part of ``<u, v> = sum(conj(u) v)`` of every item, ``batch``."""
        rows = torch.linalg.vecdot(u, v, dim=-1).real if self.item_shape else (u.conj() * v).real
        rows = rows.to(self.scalar)
        return _gathered(rows.sum(tuple(range(1 - len(self.item_shape), 0))) if len(self.item_shape) > 1 else rows)

    # ------------------------------------------------------------------ from scalars to vectors

    def broadcast(self, scalar: Tensor) -> Tensor:
        """A scalar per item in the vectors' dtype, shaped to multiply them."""
        return scalar.to(self.dtype).reshape(scalar.shape + self._ones)

    def add(self, a: Tensor, scalar: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """``a + scalar b``; in ``out``, which may be a or b, or in a tensor of its own."""
        return torch.addcmul(a, b, self.broadcast(scalar), out=out)

    def scale(self, v: Tensor, scalar: Tensor) -> Tensor:
        """``scalar v``, in place."""
        return v.mul_(self.broadcast(scalar))

    def combine(self, v: Tensor, factor: Tensor, scalar: Tensor, b: Tensor) -> Tensor:
        """``factor v + scalar b``, in v."""
        return self.add(self.scale(v, factor), scalar, b, out=v)

    def active(self, running: Tensor) -> Tensor:
        """1 for the items that are running and 0 for the others, to multiply scalars with."""
        return running.to(self.scalar)


class OneItem(ItemSpace):
    """An :class:`ItemSpace` for a batch of one item on the CPU, with Python numbers for scalars.

    Example:
        >>> OneItem((2,), torch.float32, torch.device("cpu")).norm(torch.tensor([3.0, 4.0]))
        5.0
    """

    def __init__(self, item_shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(item_shape, dtype, device)
        self._largest = torch.finfo(dtype).max

    @functools.cached_property
    def _one(self) -> Tensor:
        return torch.ones(1, dtype=self.dtype)

    def norm(self, v: Tensor) -> Scalar:
        """Euclidean norm."""
        if v.is_complex() and self.item_shape and v.is_contiguous():
            v = _real_view(v)
        if v.dtype in _DOUBLE:
            return torch.linalg.vector_norm(v).item()
        row = _row_length(v.numel())
        if row is None or not v.is_contiguous():  # a tensor that is not contiguous would be copied
            return super().norm(v).item()
        rows = torch.linalg.vector_norm(v.reshape(-1, row), dim=-1)
        return torch.linalg.vector_norm(rows, dtype=self.scalar).item()

    def safe_norm(self, v: Tensor) -> Scalar:
        """Norm that neither overflows nor underflows."""
        smallest, largest = _safe_range(v.dtype)
        norm = self.norm(v)
        return norm if smallest <= norm <= largest else super().safe_norm(v).item()

    def inner(self, u: Tensor, v: Tensor) -> Scalar:
        """Real part of the inner product."""
        return super().inner(u, v).item()

    def broadcast(self, scalar: Scalar) -> Scalar:
        """The number itself; infinite where the vectors' dtype cannot hold it, because torch would raise an error."""
        if -self._largest <= scalar <= self._largest or scalar != scalar:
            return scalar
        return math.copysign(math.inf, scalar)

    def add(self, a: Tensor, scalar: Scalar, b: Tensor, out: Tensor | None = None) -> Tensor:
        """``a + scalar b``."""
        factor = self.broadcast(scalar)
        return a.add_(b, alpha=factor) if out is a else torch.add(a, b, alpha=factor, out=out)

    def combine(self, v: Tensor, factor: Scalar, scalar: Scalar, b: Tensor) -> Tensor:
        """``factor v + scalar b``, in v."""
        if not (v.is_contiguous() and b.is_contiguous()):
            return super().combine(v, factor, scalar, b)
        # The outer product with a vector of one entry is torch's only sum of two scaled vectors in one pass.
        v.view(-1, 1).addr_(b.view(-1), self._one, beta=self.broadcast(factor), alpha=self.broadcast(scalar))
        return v

    def active(self, running: Scalar) -> Scalar:
        """1 while the item is running."""
        return 1.0 if running else 0.0


def _real_view(v: Tensor) -> Tensor:
    """Complex vectors as real ones of twice the length and the same norm, which torch finds many times faster."""
    return torch.view_as_real(v.resolve_conj()).flatten(-2)


@functools.cache
def _row_length(count: int) -> int | None:
    """A row length that divides so many entries, near the longest that float32 sums well; None: there is none."""
    return next((row for row in range(_ROW, _ROW // 4, -1) if count % row == 0), None)


@functools.cache
def _safe_range(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest norm for which squares of entries stay in the range of the dtype."""
    return (torch.finfo(torch.float64).tiny ** 0.45, 1e138) if dtype in _DOUBLE else (1e-15, 1e15)


def _gathered(scalars: Tensor) -> Tensor:
    """Gather scalars that a reduction of a DTensor has left distributed, so that every device has all."""
    gather = getattr(scalars, "full_tensor", None)
    return scalars if gather is None else gather()


# ---------------------------------------------------------------------- scalars of either kind


def divide(numerator: Scalar, denominator: Scalar) -> Scalar:
    """``numerator / denominator``, and exactly 0 where the denominator is 0, so that finished items do not change."""
    if isinstance(denominator, Tensor):
        return (numerator / denominator).masked_fill_(denominator == 0, 0.0)
    return numerator / denominator if denominator != 0 else 0.0


def quotient(numerator: Scalar, denominator: Scalar) -> Scalar:
    """``numerator / denominator`` as for tensors: infinite or NaN where the denominator is 0."""
    if isinstance(denominator, Tensor) or denominator != 0:
        return numerator / denominator
    return math.nan if numerator == 0 or numerator != numerator else math.copysign(math.inf, numerator)


def hypot(a: Scalar, b: Scalar) -> Scalar:
    """``sqrt(a^2 + b^2)``."""
    return torch.hypot(a, b) if isinstance(a, Tensor) else math.hypot(a, b)


def rotation(a: Scalar, b: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """The Givens rotation ``(c, s, r)`` with ``c a + s b = r = hypot(a, b)`` and ``s a - c b = 0``, for real a, b.

    ``a = b = 0`` gives ``c = s = r = 0``, which stops an item that has broken down instead of making it NaN.

    Example:
        >>> rotation(torch.tensor(3.0), torch.tensor(4.0))
        (tensor(0.6000), tensor(0.8000), tensor(5.))
        >>> rotation(0.0, 2.0)
        (0.0, 1.0, 2.0)
    """
    r = hypot(a, b)
    if isinstance(r, Tensor):
        # Only infinities from 1 / 0 are replaced; NaN stays NaN.
        inverse: Scalar = r.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
    else:
        inverse = 1 / r if 2 * r >= sys.float_info.min else 0.0 * r  # whose inverse is finite
    return a * inverse, b * inverse, r


def maximum(a: Scalar, b: Scalar) -> Scalar:
    """The larger one; NaN when either is."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b)
    return b if b >= a or b != b else a


def minimum(a: Scalar, b: Scalar) -> Scalar:
    """The smaller one; NaN when either is."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b)
    return b if b <= a or b != b else a


def at_least(a: Scalar, bound: float) -> Scalar:
    """``max(a, bound)``; NaN stays NaN."""
    if isinstance(a, Tensor):
        return a.clamp_min(bound)
    return bound if a < bound else a


def root(square: Scalar) -> Scalar:
    """The square root, and 0 for numbers that rounding has made negative."""
    if isinstance(square, Tensor):
        return square.clamp_min(0).sqrt()
    return 0.0 if square < 0 else math.sqrt(square)


def where(condition: Any, a: Scalar, b: Scalar) -> Scalar:
    """``a`` for the items where the condition holds, ``b`` for the others."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def unbounded(a: Scalar) -> Any:
    """Tell, per item, whether a number is infinite or NaN."""
    if isinstance(a, Tensor):
        return (a - a).ne(0)  # inf - inf and NaN are not 0
    return not math.isfinite(a)


def any_item(items: Scalar) -> bool:
    """Tell whether a condition holds for at least one item; the host waits for the device."""
    return bool(items.any()) if isinstance(items, Tensor) else bool(items)


def binary_unit(norm: Scalar) -> Scalar:
    """The power of two next above ``norm`` (1 for 0 and non-finite): dividing by it loses no digit.

    Example:
        >>> binary_unit(torch.tensor([0.0, 3.0])), binary_unit(3.0)
        (tensor([1., 4.]), 4.0)
    """
    if isinstance(norm, Tensor):
        exponent = torch.frexp(norm).exponent
        return torch.where((norm > 0) & torch.isfinite(norm), torch.ldexp(torch.ones_like(norm), exponent), 1.0)
    return math.ldexp(1.0, min(math.frexp(norm)[1], 1023)) if norm > 0 and math.isfinite(norm) else 1.0
