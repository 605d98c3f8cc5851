"""Per-item arithmetic: every batch item is an independent linear system with scalars of its own.

A vector is a tensor ``(*batch, *item_shape)``; a scalar of the method (a step length, a norm) is a tensor of shape
``batch``, in float64 whatever the dtype of the vectors: a scalar costs nothing, and a float32 norm over half a million
entries is wrong in its sixth digit. Nothing here looks at a value on the host, so nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ItemSpace", "binary_unit", "divide", "rotation", "scalar_dtype"]

# One row of the two-level reductions: short enough that a float32 sum over it is accurate, long enough to be fast.
_ROW = 1024
_SHORTEST_ROW = 64


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
        rows = 1
        while rows < len(self.item_shape) and math.prod(self.item_shape[-rows:]) < _SHORTEST_ROW:
            rows += 1
        self._row_dims = tuple(range(-rows, 0)) if self.item_shape else ()
        self._rest_dims = tuple(range(-(len(self.item_shape) - rows), 0))
        self._chunked = bool(self.item_shape) and math.prod(self.item_shape[-rows:]) > 4 * _ROW

    def norm(self, v: Tensor) -> Tensor:
        """Euclidean norm of every item."""
        if not self.item_shape:
            return v.abs().to(self.scalar)
        if self._chunked:
            return self._chunked_norm(v.flatten(v.ndim - len(self.item_shape)))
        rows: Tensor = torch.linalg.vector_norm(v, dim=self._row_dims)
        if not self._rest_dims:
            return rows.to(self.scalar)
        total: Tensor = torch.linalg.vector_norm(rows.to(self.scalar), dim=self._rest_dims)
        return total

    def _chunked_norm(self, flat: Tensor) -> Tensor:
        """Norm over one long dimension: float32 within rows, float64 across them."""
        count = flat.shape[-1] // _ROW
        body, tail = flat[..., : count * _ROW], flat[..., count * _ROW :]
        rows = torch.linalg.vector_norm(body.unflatten(-1, (count, _ROW)), dim=-1).to(self.scalar)
        total: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        if tail.shape[-1]:
            total = torch.hypot(total, torch.linalg.vector_norm(tail, dim=-1).to(self.scalar))
        return total

    def safe_norm(self, v: Tensor) -> Tensor:
        """Norm that neither overflows nor underflows in float32; it may wait for the device, so not inside a loop."""
        norm = self.norm(v)
        if v.dtype in (torch.float64, torch.complex128):
            return norm
        suspicious = (norm < 1e-15) | (norm > 1e15) | ~torch.isfinite(norm)
        if not bool(suspicious.any()):
            return norm
        wide = v.to(torch.complex128 if v.is_complex() else torch.float64)
        dims = tuple(range(-len(self.item_shape), 0))
        precise = torch.linalg.vector_norm(wide, dim=dims) if dims else wide.abs()
        # Only where it is needed: an item's norm may not depend on its neighbours.
        return torch.where(suspicious, precise.to(self.scalar), norm)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Real part of ``<u, v> = sum(conj(u) v)`` of every item."""
        if not self.item_shape:
            return (u.conj() * v).real.to(self.scalar)
        rows: Tensor = torch.linalg.vecdot(u, v, dim=-1).real.to(self.scalar)
        return rows.sum(dim=tuple(range(1 - len(self.item_shape), 0))) if len(self.item_shape) > 1 else rows

    def spread(self, scalar: Tensor) -> Tensor:
        """A scalar per item in the vectors' dtype, shaped to multiply them."""
        return scalar.to(self.dtype).reshape(scalar.shape + self._ones)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and exactly 0 where the denominator is 0: a finished item then stands still."""
    return (numerator / denominator).masked_fill_(denominator == 0, 0.0)


def rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Givens rotation ``(c, s, r)`` with ``c a + s b = r = hypot(a, b)`` and ``s a - c b = 0``, for real a, b.

    ``a = b = 0`` gives ``c = s = r = 0``, which stops an item that has broken down instead of making it NaN.

    Example:
        >>> rotation(torch.tensor(3.0), torch.tensor(4.0))
        (tensor(0.6000), tensor(0.8000), tensor(5.))
    """
    r = torch.hypot(a, b)
    # Only 1 / 0 is meant; a NaN stays one.
    inverse = r.reciprocal().nan_to_num_(nan=torch.nan, posinf=0.0)
    return a * inverse, b * inverse, r


def binary_unit(norm: Tensor) -> Tensor:
    """The power of two next above ``norm`` (1 for 0 and non-finite): dividing by it loses no digit.

    Example:
        >>> binary_unit(torch.tensor([0.0, 3.0]))
        tensor([1., 4.])
    """
    exponent = torch.frexp(norm).exponent
    return torch.where((norm > 0) & torch.isfinite(norm), torch.ldexp(torch.ones_like(norm), exponent), 1.0)
