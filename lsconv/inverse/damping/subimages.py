"""Windows of a convolution's data: small problems with the same kernel, noise and prior as the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient

__all__ = ["Windows", "as_windows"]


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of the data as one problem, with the windows as a batch dimension.

    Attributes:
        A: the convolution of one window, without padding.
        y: the data ``(windows, *batch, *A.out_shape)``.
        L: the penalty on ``A.in_shape``.
    """

    A: Convolution
    y: Tensor
    L: LinearOperator | None


def as_windows(A: Convolution, y: Tensor, L: LinearOperator | None, data: int = 96**2) -> Windows | None:
    """Cut two windows along every axis, from the middles of both halves of the outputs that read no padding.

    The outputs in a window are those of a convolution without padding of the inputs that they read, so that noise and
    prior are the same.

    Args:
        A: the convolution.
        y: data ``(*batch, *out_shape)``.
        L: None or a Gradient; on a window it stops at the edge.
        data: number of data per window and channel.

    Returns:
        The windows; None where they would hold more than half of the data, or L has no counterpart on them.
    """
    if L is not None and not isinstance(L, Gradient):
        return None
    side = max(8, round(data ** (1 / A.ndim)))
    starts: list[list[int]] = []
    sizes = []
    for a in range(A.ndim):
        n, stride, extent, left = A.spatial_in[a], A.stride[a], A.kernel_extent[a], A.padding[a][0]
        first = -(-left // stride)
        last = min((n - extent + left) // stride, A.spatial_out[a] - 1)
        count = last - first + 1
        size = min(side, count)
        if size < 1:
            return None
        middles = [first + (count - size) // 2] if count < 2 * size else [
            first + (count // 2 - size) // 2, first + count // 2 + (count // 2 - size) // 2]  # fmt: skip
        starts.append(middles)
        sizes.append(size)
    fraction = math.prod(len(firsts) * size for firsts, size in zip(starts, sizes, strict=True)) / math.prod(
        A.spatial_out
    )
    if 2 * fraction > 1:
        return None
    parts = []
    lead = y.ndim - A.ndim
    for corner in torch.cartesian_prod(*(torch.tensor(firsts) for firsts in starts)).reshape(-1, A.ndim).tolist():
        part = y
        for a, (start, size) in enumerate(zip(corner, sizes, strict=True)):
            part = part.narrow(lead + a, start, size)
        parts.append(part)
    in_size = tuple((size - 1) * s + extent for size, s, extent in zip(sizes, A.stride, A.kernel_extent, strict=True))
    window = Convolution(A.weight, in_size, A.stride, 0, A.dilation, A.groups, check_finite=False)
    if L is not None:
        L = Gradient(window.in_shape, L.ndim, "neumann", L.spacing, dtype=L.dtype, device=L.device)
    return Windows(window, torch.stack(parts), L)
