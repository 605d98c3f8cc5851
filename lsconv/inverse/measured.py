"""Rows of an operator that are zero: what stands there in the data is no measurement."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.base import LinearOperator

__all__ = ["zero_rows"]


def zero_rows(A: LinearOperator) -> Tensor | None:
    """Find the outputs that are zero whatever x is: what a Mask, a padding, or a zero on a diagonal leaves.

    They are the exact zeros of ``A x`` for two random x. So the rows are found of whatever A is composed of, products,
    stacks, sums and adjoints, functions and SciPy operators alike. Not found are those that A computes as rounding
    errors, as a convolution by FFT does where it reads nothing but zeros.

    Returns:
        A bool tensor ``(*A.batch_shape, *A.out_shape)``, or None where there are none.

    Example:
        >>> from lsconv.inverse.measured import zero_rows
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3), in_size=6)
        >>> zero_rows(lsconv.Mask(torch.tensor([[True, False, True, True]])) @ A)
        tensor([[False,  True, False, False]])
        >>> zero_rows(A) is None
        True
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2, *A.batch_shape, *A.in_shape)
    # Away from zero: a row of the identity is none. Two of them: one may cancel in a row such as (1, -1).
    probes = torch.rand(shape, dtype=torch.float64, generator=generator) + 1
    probes = torch.where(torch.rand(shape, generator=generator) < 0.5, -probes, probes)
    zero = (A.apply(probes.to(A.device, A.dtype)) == 0).all(0)
    return zero.expand(*A.batch_shape, *A.out_shape) if bool(zero.any()) else None
