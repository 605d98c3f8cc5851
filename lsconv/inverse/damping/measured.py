"""Rows of an operator that are zero, in which data are not measurements, and interpolation of such data."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.base import LinearOperator

__all__ = ["interpolated", "zero_rows"]


def zero_rows(A: LinearOperator) -> Tensor | None:
    """Find the rows of A that are zero: those of a Mask, of a padding, of a zero on a diagonal.

    They are the exact zeros of ``A x`` for two random x, which finds them in any operator, products, stacks, functions
    and SciPy operators alike. Rows that A computes as rounding errors are not found: those of a convolution by FFT that
    read nothing but zeros.

    Returns:
        A bool tensor ``(*A.batch_shape, *A.out_shape)``, or None where there are none.

    Example:
        >>> from lsconv.inverse.damping.measured import zero_rows
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3), in_size=6)
        >>> zero_rows(lsconv.Mask(torch.tensor([[True, False, True, True]])) @ A)
        tensor([[False,  True, False, False]])
        >>> zero_rows(A) is None
        True
    """
    generator = torch.Generator().manual_seed(0)
    shape, real = (*A.batch_shape, *A.in_shape), torch.empty(0, dtype=A.dtype).real.dtype
    zero: Tensor | None = None
    for _ in range(2):  # twice, because one x may cancel in a row such as (1, -1)
        # entries away from zero, because a row may read one of them only
        x = torch.rand(shape, dtype=real, generator=generator).add_(1)
        x = torch.where(torch.randint(2, shape, generator=generator, dtype=torch.bool), x, -x)
        found = A.apply(x.to(A.device, A.dtype)) == 0
        zero = found if zero is None else zero & found
        if not bool(zero.any()):
            return None
    assert zero is not None
    return zero.expand(*A.batch_shape, *A.out_shape)


def interpolated(y: Tensor, mask: Tensor) -> Tensor:
    """Fill unmeasured data with the mean of the measured ones around them.

    Args:
        y: ``(*batch, *out_shape)``, channels first.
        mask: True where data were measured, ``out_shape``; not False everywhere.
    """
    ndim = mask.ndim - 1
    pool = (torch.nn.functional.avg_pool1d, torch.nn.functional.avg_pool2d, torch.nn.functional.avg_pool3d)[ndim - 1]
    weight, filled = mask.to(y.real.dtype)[None], torch.where(mask, y, 0)
    known, values = mask, filled.reshape(-1, *mask.shape)
    parts = torch.view_as_real(values).movedim(-1, 0).flatten(0, 1) if y.is_complex() else values
    while not bool(known.all()):
        count = pool(weight, 3, 1, 1)
        means = pool(parts * weight, 3, 1, 1) / count.clamp_min(1e-6)
        found = (count[0] > 0) & ~known
        parts = torch.where(found, means, parts)
        known = known | found
        weight = known.to(weight.dtype)[None]
    if y.is_complex():
        parts = torch.view_as_complex(parts.reshape(2, *values.shape).movedim(0, -1).contiguous())
    return parts.reshape(y.shape)
