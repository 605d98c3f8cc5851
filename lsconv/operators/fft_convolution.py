r"""Convolution by FFT: the backend for large kernels.

A convolution is a circulant on a periodic grid, seen through two crops (Reeves 2005 calls the cells outside them the
border). With the dilated kernel placed at the cells (d t - l) mod N of a grid of N cells per axis,

    y = crop_out F^-1 conj(F K) F crop_in^T x,          x = crop_in F^-1 (F K)^T F crop_out^T y   (the adjoint),

exact when N >= n_in + max(left, right) and N >= n_in + left + right - extent + 1, so that a read that wraps around the
grid lands on a zero. Stride keeps every s-th output. Periodic padding needs no zeros: N = n_in. The other padding
modes are padded first and then convolved without padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.operators.inverse_transform import inverse_transform
from lsconv.operators.padding import Pairs, pad, pad_adjoint

__all__ = ["FrequencyGrid", "direct_cost", "fft_cost", "good_fft_length", "short_fft_length", "transform_cost"]

# The cost model behind backend="auto": nanoseconds on one core of an x86 server (AVX-512, torch 2.13, MKL and
# oneDNN), fitted by hand to the table that benchmarks/convolution_backend.py prints. It has to be right about the
# winner where the two differ by much; constants are rounded towards torch's own convolution where they scatter. Over
# the 708 lines of the table auto takes 5.5 s, the faster backend of each line 4.8 s, torch's convolution 93 s; where
# the FFT is taken and is the slower one it takes at most twice as long.
#
# Direct, per tap and output cell: `gather` for every channel read, `multiply` for every pair of channels. float64 runs
# as im2col and a matrix product, and once the columns outgrow malloc's largest reusable block every call pays the page
# faults of fresh memory. float32 runs in oneDNN, whose transposed kernels are slower, most of all without channels to
# vectorise over. Complex is three real convolutions. At stride 1 most adjoints are written as forward convolutions with
# the flipped kernels, and cost what those cost.
_GATHER = {torch.float32: (0.3, 0.5), torch.float64: (0.6, 1.5)}  # (forward, transposed)
_GATHER_LONE_CHANNEL = {torch.float32: (0.8, 2.0), torch.float64: (0.6, 1.5)}
_GATHER_FRESH_MEMORY = 7.5
_FRESH_MEMORY_BYTES = 32 * 2**20
_MULTIPLY = {torch.float32: 0.015, torch.float64: 0.06}
# FFT, per cell: `transform` for every channel and factor log2(cells), `product` for every pair of channels.
_TRANSFORM = {torch.float32: 0.3, torch.float64: 0.4}
_PRODUCT = {torch.float32: 0.5, torch.float64: 1.5}
# Per call.
_DIRECT_CALL = 25e3
_FFT_CALL = 90e3

# The most bytes of the spectra of items transformed together on a CPU: malloc maps larger arrays anew for every step (8
# items of 32 channels, 128², float64: 86 ms each, and 19 ms in groups).
_WORK_BYTES = 2**24


def good_fft_length(n: int) -> int:
    """The smallest length of at least ``n`` that the FFT likes.

    That is a multiple of 4 (of 2 up to 16) without prime factors above 7.

    Measured with one thread on MKL, per cell and against the best length nearby: factors up to 13 cost at most 1.5
    times as much, larger ones 3 to 6 times; in float32 an odd length costs up to twice an even one, and beyond 2^15
    cells twice an odd number costs 2 to 4 times as much as a multiple of 4. cuFFT's fast radices are 2, 3, 5 and 7.

    Args:
        n: the length needed, at least 1.

    Example:
        >>> from lsconv.operators.fft_convolution import good_fft_length
        >>> [good_fft_length(n) for n in (1, 7, 127, 257, 1021)]
        [1, 8, 128, 280, 1024]
    """
    if n <= 2:
        return max(n, 1)
    return _smooth_length(n, 2 if n <= 16 else 4, (2, 3, 5, 7))


def short_fft_length(n: int) -> int:
    """The smallest even length of at least ``n`` without prime factors above 13, for where every cell more costs.

    It takes at most 1.6 times as long per cell as the lengths of :func:`good_fft_length` (1.2 times as a rule).

    Args:
        n: the length needed, at least 1.

    Example:
        >>> from lsconv.operators.fft_convolution import short_fft_length
        >>> [short_fft_length(n) for n in (1, 7, 127, 257, 1021)]
        [1, 8, 128, 260, 1024]
    """
    return _smooth_length(n, 2, (2, 3, 5, 7, 11, 13)) if n > 1 else 1


def transform_cost(grid: Sequence[int]) -> float:
    """Relative cost of one FFT on ``grid``: cells times log2 of the cells, more along lengths that the FFT dislikes.

    Prime factors above 13 cost 5 times as much, lines that leave the cache (above 2^13 cells) 2.5 times.
    """
    levels = 0.0
    for n in grid:
        factor = 1.0 if _without_factors(n, (2, 3, 5, 7, 11, 13)) == 1 else 5.0
        levels += math.log2(n) * factor * (2.5 if n > 2**13 else 1.0)
    return math.prod(grid) * levels


def direct_cost(
    dtype: torch.dtype, groups: int, c_out: int, c_in: int, taps: int, cells: int, items: int, transposed: bool
) -> float:
    """Nanoseconds that torch's convolution takes, by the model above.

    Args:
        dtype: float32, float64, complex64 or complex128.
        groups: number of groups, all kernels counted.
        c_out: output channels of a group.
        c_in: input channels of a group.
        taps: taps of a kernel.
        cells: output cells of a channel.
        items: batch items.
        transposed: for the adjoint.
    """
    real = dtype.to_real()
    gather = (_GATHER_LONE_CHANNEL if c_out == c_in == 1 else _GATHER)[real][transposed]
    channels = c_in
    if real == torch.float64:
        # Groups are convolved one after the other, so the columns are those of one group.
        if c_in * taps * cells * real.itemsize > _FRESH_MEMORY_BYTES:
            gather = _GATHER_FRESH_MEMORY
    elif transposed:
        channels = max(c_out, c_in)
    nanoseconds = items * groups * taps * cells * (channels * gather + c_out * c_in * _MULTIPLY[real])
    return (nanoseconds + _DIRECT_CALL) * (3 if dtype.is_complex else 1)


def fft_cost(
    dtype: torch.dtype, groups: int, c_out: int, c_in: int, grid: Sequence[int], items: int, kernels_too: bool
) -> float:
    """Nanoseconds that the FFT takes, by the model above.

    Args:
        dtype: float32, float64, complex64 or complex128.
        groups: number of groups, all kernels counted.
        c_out: output channels of a group.
        c_in: input channels of a group.
        grid: cells per axis.
        items: batch items.
        kernels_too: whether the kernels are transformed in every call, as they are while autograd follows them.
    """
    real = dtype.to_real()
    transforms = items * groups * (c_out + c_in) + (groups * c_out * c_in if kernels_too else 0)
    products = items * groups * c_out * c_in * math.prod(grid)
    nanoseconds = transforms * transform_cost(grid) * _TRANSFORM[real] + products * _PRODUCT[real]
    return nanoseconds * (2 if dtype.is_complex else 1) + _FFT_CALL


@dataclasses.dataclass(frozen=True)
class FrequencyGrid:
    """Where the inputs, the outputs and the kernel of one convolution lie on the periodic grid.

    Attributes:
        grid: cells per axis.
        source: size of the tensor that is transformed: the inputs' size, or that of the padded inputs.
        before: padding done before the transform, ``(left, right)`` per axis.
        mode: mode of the padding done before.
        shift: left padding per axis that the grid does by itself.
        dense: outputs per axis at stride 1.
        stride: step between outputs.
        dilation: step between the taps of the kernel.
    """

    grid: tuple[int, ...]
    source: tuple[int, ...]
    before: Pairs
    mode: str
    shift: tuple[int, ...]
    dense: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls,
        spatial_in: tuple[int, ...],
        extent: tuple[int, ...],
        padding: Pairs,
        mode: str,
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> FrequencyGrid:
        """The cheapest grid for a convolution of these sizes."""
        nothing = ((0, 0),) * len(spatial_in)
        left = tuple(pair[0] for pair in padding)
        padded = tuple(n + sum(pair) for n, pair in zip(spatial_in, padding, strict=True))
        dense = tuple(n - e + 1 for n, e in zip(padded, extent, strict=True))
        if mode == "zeros":
            # The last bound keeps two taps of a kernel wider than the inputs from falling on the same cell.
            needed = [
                max(n + max(pair), d, e) for n, pair, d, e in zip(spatial_in, padding, dense, extent, strict=True)
            ]
            grid = tuple(map(good_fft_length, needed))
            return cls(grid, spatial_in, nothing, mode, left, dense, stride, dilation)
        before = cls(
            tuple(map(good_fft_length, padded)), padded, padding, mode, (0,) * len(left), dense, stride, dilation
        )
        if mode == "circular" and all(max(d, e) <= n for d, e, n in zip(dense, extent, spatial_in, strict=True)):
            exact = cls(spatial_in, spatial_in, nothing, mode, left, dense, stride, dilation)
            return min(exact, before, key=lambda choice: transform_cost(choice.grid))
        return before

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.grid), 0))

    def spectrum(self, weight: Tensor) -> Tensor:
        """The symbol of every kernel on the grid.

        Args:
            weight: kernels of shape ``(groups, c_out / groups, c_in / groups, *kernel_size)``.

        Returns:
            ``(groups, c_out / groups, c_in / groups, *frequencies)``; real kernels keep half of the last axis.
        """
        lead = weight.shape[: -len(self.grid)]
        extent = [d * (k - 1) + 1 for d, k in zip(self.dilation, weight.shape[-len(self.grid) :], strict=True)]
        if any(d > 1 for d in self.dilation):
            dilated = weight.new_zeros(*lead, *extent)
            dilated[_window(extent, self.dilation)] = weight
            weight = dilated
        placed = pad(weight, [(0, n - e) for n, e in zip(self.grid, extent, strict=True)])
        placed = torch.roll(placed, [-s for s in self.shift], self._axes)
        return self._transform(placed.conj().resolve_conj()).conj().resolve_conj()

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """The convolution of ``x``, of shape ``(items, groups * c_in, *spatial_in)``."""
        if len(parts := _parts(x, spectrum)) > 1:
            return torch.cat([self.apply(part, spectrum) for part in parts])
        groups, c_out, c_in = spectrum.shape[:3]
        x = pad(x, self.before, self.mode)
        frequencies = self._transform(x.reshape(x.shape[0], groups, c_in, *self.source))
        dense = inverse_transform(_multiply(spectrum, frequencies), self.grid, real=not x.is_complex())
        y = dense[_window(self.dense, self.stride)]
        return y.reshape(x.shape[0], groups * c_out, *y.shape[3:])

    def adjoint(self, y: Tensor, spectrum: Tensor) -> Tensor:
        """The adjoint on ``y``, of shape ``(items, groups * c_out, *spatial_out)``."""
        if len(parts := _parts(y, spectrum)) > 1:
            return torch.cat([self.adjoint(part, spectrum) for part in parts])
        groups, c_out, c_in = spectrum.shape[:3]
        if any(s > 1 for s in self.stride):
            dense = y.new_zeros(*y.shape[:2], *self.dense)
            dense[_window(self.dense, self.stride)] = y
            y = dense
        frequencies = self._transform(y.reshape(y.shape[0], groups, c_out, *self.dense))
        x = inverse_transform(
            _multiply(spectrum.conj().transpose(1, 2), frequencies), self.grid, real=not y.is_complex()
        )
        x = x[_window(self.source, (1,) * len(self.source))]
        x = x.reshape(y.shape[0], groups * c_in, *self.source)
        return pad_adjoint(x, self.before, self.mode)

    def _transform(self, x: Tensor) -> Tensor:
        transform = torch.fft.fftn if x.is_complex() else torch.fft.rfftn
        result: Tensor = transform(x, s=self.grid, dim=self._axes)
        return result


def _window(sizes: Sequence[int], steps: Sequence[int]) -> tuple[Any, ...]:
    """The index of every step-th of the first cells of the last axes."""
    return (Ellipsis, *(slice(0, size, step) for size, step in zip(sizes, steps, strict=True)))


def _parts(items: Tensor, spectrum: Tensor) -> Sequence[Tensor]:
    """The items in groups, on a CPU, whose spectra its allocator reuses."""
    groups, c_out, c_in, *grid = spectrum.shape
    one = groups * max(c_out, c_in) * math.prod(grid) * spectrum.element_size()
    if items.device.type != "cpu" or items.shape[0] * one <= _WORK_BYTES:
        return (items,)
    return items.split(max(1, _WORK_BYTES // one))


def _multiply(spectrum: Tensor, x: Tensor) -> Tensor:
    """``sum_c spectrum[g, o, c, f] x[e, g, c, f]`` for every item e, group g and frequency f."""
    # One pass per channel: faster than a small matrix product per frequency up to 32 channels and as fast at 64,
    # because batches of tiny complex products are slow and want both factors reordered. Not in place, which would be a
    # tenth faster, because torch.func.vmap has no rule for addcmul_.
    total = spectrum[:, :, 0] * x[:, :, :1]
    for channel in range(1, x.shape[2]):
        total = torch.addcmul(total, spectrum[:, :, channel], x[:, :, channel : channel + 1])
    return total


def _smooth_length(n: int, step: int, primes: Sequence[int]) -> int:
    """The smallest multiple of ``step`` that is at least ``n`` and has no other prime factors than ``primes``."""
    length = -(-n // step) * step
    while _without_factors(length, primes) != 1:
        length += step
    return length


def _without_factors(n: int, primes: Sequence[int]) -> int:
    for prime in primes:
        while n % prime == 0:
            n //= prime
    return n
