"""The cost of a convolution: torch's own and that by FFT, in nanoseconds of one core."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lsconv.operators.batch_layout import WORK_BYTES
from lsconv.operators.fft_convolution import transform_cost

__all__ = ["ConvolutionCost", "matrix_operations"]


class _Nanoseconds(NamedTuple):
    """The cost of a convolution by parts, on one core of an x86 server (AVX-512, torch 2.13, MKL and oneDNN).

    Fitted by hand to the table that ``python -m benchmarks.convolution_backend`` prints, towards torch's own
    convolution where it scatters.

    Attributes:
        gather: of torch's convolution, per tap, output cell and channel read; forward and transposed.
        gather_lone: the same where a group has one channel only, which leaves nothing to vectorise over.
        gather_fresh: the same where the columns of the matrix product of float64 are fresh memory in every call.
        multiply: of torch's convolution, per tap, output cell and pair of channels.
        transform: of the FFT, per cell, channel and factor log2(cells).
        product: of the FFT, per cell and pair of channels.
        call: of the FFT, beyond a call of torch's convolution.
    """

    gather: tuple[float, float]
    gather_lone: tuple[float, float]
    gather_fresh: float | None
    multiply: float
    transform: float
    product: float
    call: float = 92e3


# The FFT's costs are set higher than measured, so that it is taken where it is clearly faster.
_COST = {
    torch.float32: _Nanoseconds((0.3, 0.5), (0.8, 2.0), None, 0.015, 0.39, 0.65),
    torch.float64: _Nanoseconds((0.6, 1.5), (0.6, 1.5), 7.5, 0.06, 0.52, 1.95),
}


@dataclasses.dataclass(frozen=True)
class ConvolutionCost:
    """The cost of a convolution and of its adjoint, each beyond that of a call of torch's convolution.

    Complex numbers cost three real products in torch's convolution, and two in an FFT.

    Attributes:
        dtype: float32, float64, complex64 or complex128.
        groups: number of groups, all kernels counted.
        c_out: output channels of a group.
        c_in: input channels of a group.
        taps: taps of a kernel.
        cells_in: input cells of a channel.
        cells_out: output cells of a channel.
        flips: the adjoint is a convolution with the flipped kernels.
    """

    dtype: torch.dtype
    groups: int
    c_out: int
    c_in: int
    taps: int
    cells_in: int
    cells_out: int
    flips: bool

    def direct(self, items: int, *, transposed: bool) -> float:
        """Nanoseconds that torch's convolution takes for so many items."""
        if transposed and self.flips:
            other = dataclasses.replace(self, c_out=self.c_in, c_in=self.c_out, cells_out=self.cells_in)
            return other.direct(items, transposed=False)
        real = self.dtype.to_real()
        cost = _COST[real]
        gather = (cost.gather_lone if self.c_out == self.c_in == 1 else cost.gather)[transposed]
        channels = self.c_in
        if cost.gather_fresh is not None:
            # groups are convolved one after the other, so the columns are those of one group
            if self.c_in * self.taps * self.cells_out * real.itemsize > 2 * WORK_BYTES:
                gather = cost.gather_fresh
        elif transposed:
            channels = max(self.c_out, self.c_in)
        each = channels * gather + self.c_out * self.c_in * cost.multiply
        return items * self.groups * self.taps * self.cells_out * each * (3 if self.dtype.is_complex else 1)

    def by_fft(self, items: int, grid: Sequence[int], *, cached: bool) -> float:
        """Nanoseconds that the FFT takes for so many items.

        Args:
            items: batch items.
            grid: cells per axis.
            cached: the products of a certificate and of some iterations share one transform of the kernels.
        """
        cost = _COST[self.dtype.to_real()]
        pairs = self.groups * self.c_out * self.c_in
        transforms = items * self.groups * (self.c_out + self.c_in) + pairs / (10 if cached else 1)
        nanoseconds = (
            transforms * transform_cost(grid) * cost.transform + items * pairs * math.prod(grid) * cost.product
        )
        return nanoseconds * (2 if self.dtype.is_complex else 1) + cost.call


def matrix_operations(nanoseconds: float) -> float:
    """The operations of float64 matrix products that take as long; a multiplication and an addition are two."""
    return 2 * nanoseconds / _COST[torch.float64].multiply
