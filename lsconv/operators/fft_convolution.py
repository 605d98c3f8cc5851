r"""Convolution by FFT: the backend for large kernels.

A convolution is a circulant on a periodic grid, restricted to some inputs and some outputs (Reeves 2005 calls the other
cells the border). With the dilated kernel placed at the cells (d t - l) mod N of a grid of N cells per axis,

    y = crop_out F^-1 conj(F K) F crop_in^T x,          x = crop_in F^-1 (F K)^T F crop_out^T y   (the adjoint),

exact when N >= n_in + max(left, right) and N >= n_in + left + right - extent + 1, so that a read that wraps around the
grid lands on a zero. Stride keeps every s-th output. Periodic padding needs no zeros: N = n_in. The other padding
modes are padded first and then convolved without padding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.operators.batch_layout import WORK_BYTES
from lsconv.operators.padding import pad, pad_adjoint
from lsconv.operators.padding_modes import MODES, Pairs

__all__ = [
    "FEW_WAVES",
    "FrequencyGrid",
    "good_fft_length",
    "inverse_transform",
    "plane_waves",
    "short_fft_length",
    "transform_cost",
    "work_groups",
]


# Up to this many positions of an axis are transformed by a product with plane waves; for more, an FFT of the axis costs
# less.
FEW_WAVES = 48


def good_fft_length(n: int) -> int:
    """The smallest length of at least ``n`` that the FFT likes.

    That is a multiple of 4 (of 2 up to 16) without prime factors above 7.

    MKL is slow for odd lengths and prime factors above 13, cuFFT for prime factors above 7.

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
    """The smallest even length of at least ``n`` without prime factors above 13, for grids with a border to be solved.

    Per cell it takes somewhat longer than the lengths of :func:`good_fft_length`.

    Args:
        n: the length needed, at least 1.

    Example:
        >>> from lsconv.operators.fft_convolution import short_fft_length
        >>> [short_fft_length(n) for n in (1, 7, 127, 257, 1021)]
        [1, 8, 128, 260, 1024]
    """
    return _smooth_length(n, 2, (2, 3, 5, 7, 11, 13)) if n > 1 else 1


def plane_waves(positions: Tensor, n: int, frequencies: int) -> Tensor:
    """``exp(2 pi i position frequency / n)`` in double precision: ``(positions, frequencies)``."""
    turns = (positions[:, None].long() * torch.arange(frequencies)) % n
    return torch.polar(torch.ones(turns.shape, dtype=torch.float64), turns.double() * (2 * math.pi / n))


def transform_cost(grid: Sequence[int]) -> float:
    """Relative cost of one FFT on ``grid``: cells times log2 of the cells, more along lengths that the FFT dislikes.

    Prime factors above 13 cost 5 times as much, lines that leave the cache (above 2^13 cells) 2.5 times.
    """
    levels = 0.0
    for n in grid:
        factor = 1.0 if _without_factors(n, (2, 3, 5, 7, 11, 13)) == 1 else 5.0
        levels += math.log2(n) * factor * (2.5 if n > 2**13 else 1.0)
    return math.prod(grid) * levels


@dataclasses.dataclass(frozen=True)
class FrequencyGrid:
    """The periodic grid of one convolution, and the positions of inputs, outputs and kernel on it.

    Attributes:
        grid: cells per axis.
        source: size of the tensor that is transformed: the inputs' size, or that of the padded inputs.
        padding: padding done before the transform, ``(left, right)`` per axis.
        mode: mode of that padding.
        shift: left padding per axis that needs no cells, because reads wrap around to zeros or to the other side.
        dense: number of outputs per axis at stride 1.
        stride: step between outputs.
        dilation: step between the taps of the kernel.
    """

    grid: tuple[int, ...]
    source: tuple[int, ...]
    padding: Pairs
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
        if MODES[mode].zero:
            # The last bound keeps two taps of a kernel that is wider than the inputs off the same cell.
            needed = [
                max(n + max(pair), d, e) for n, pair, d, e in zip(spatial_in, padding, dense, extent, strict=True)
            ]
            grid = tuple(map(good_fft_length, needed))
            return cls(grid, spatial_in, nothing, mode, left, dense, stride, dilation)
        explicit = cls(
            tuple(map(good_fft_length, padded)), padded, padding, mode, (0,) * len(left), dense, stride, dilation
        )
        if MODES[mode].periodic and all(max(d, e) <= n for d, e, n in zip(dense, extent, spatial_in, strict=True)):
            wrapped = cls(spatial_in, spatial_in, nothing, mode, left, dense, stride, dilation)
            return min(wrapped, explicit, key=lambda choice: transform_cost(choice.grid))
        return explicit

    def spectrum(self, weight: Tensor) -> Tensor:
        """The symbol of every kernel on the grid.

        Args:
            weight: kernels of shape ``(groups, c_out / groups, c_in / groups, *kernel_size)``.

        Returns:
            ``(groups, c_out / groups, c_in / groups, *frequencies)``; real kernels keep half of the last axis.
        """
        if max(weight.shape[-len(self.grid) :]) <= FEW_WAVES:
            return self._sum_over_taps(weight)
        lead = weight.shape[: -len(self.grid)]
        extent = [d * (k - 1) + 1 for d, k in zip(self.dilation, weight.shape[-len(self.grid) :], strict=True)]
        if any(d > 1 for d in self.dilation):
            dilated = weight.new_zeros(*lead, *extent)
            dilated[_window(extent, self.dilation)] = weight
            weight = dilated
        placed = pad(weight, [(0, n - e) for n, e in zip(self.grid, extent, strict=True)])
        placed = torch.roll(placed, [-s for s in self.shift], tuple(range(-len(self.grid), 0)))
        return self._transform(placed.conj().resolve_conj()).conj().resolve_conj()

    def _sum_over_taps(self, weight: Tensor) -> Tensor:
        """Compute :meth:`spectrum` by a sum over the taps of one axis after the other."""
        real, ndim = not weight.is_complex(), len(self.grid)
        frequencies = (*self.grid[:-1], self.grid[-1] // 2 + 1) if real else self.grid
        places = zip(weight.shape[-ndim:], self.dilation, self.shift, self.grid, frequencies, strict=True)
        weight = weight.to(torch.complex128 if weight.dtype in (torch.float64, torch.complex128) else torch.complex64)
        *others, last = (plane_waves(d * torch.arange(k) - s, n, f).to(weight) for k, d, s, n, f in places)
        sums = weight @ last
        for waves in reversed(others):
            sums = (waves.mT @ sums).flatten(-2)
        return sums.reshape(*weight.shape[:-ndim], *frequencies)

    def apply(self, x: Tensor, spectrum: Tensor, *, work_bytes: int = WORK_BYTES) -> Tensor:
        """The convolution of ``x``, of shape ``(items, groups * c_in, *spatial_in)``, in groups of some items."""
        return _in_groups(self._apply, x, spectrum, work_bytes)

    def _apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """Compute :meth:`apply` for all items at once."""
        groups, c_out, c_in = spectrum.shape[:3]
        x = pad(x, self.padding, self.mode)
        frequencies = self._transform(x.reshape(x.shape[0], groups, c_in, *self.source))
        dense = inverse_transform(_multiply(spectrum, frequencies), self.grid, real=not x.is_complex())
        y = dense[_window(self.dense, self.stride)]
        return y.reshape(x.shape[0], groups * c_out, *y.shape[3:])

    def adjoint(self, y: Tensor, spectrum: Tensor, *, work_bytes: int = WORK_BYTES) -> Tensor:
        """The adjoint on ``y``, of shape ``(items, groups * c_out, *spatial_out)``, in groups of some items."""
        return _in_groups(self._adjoint, y, spectrum, work_bytes)

    def _adjoint(self, y: Tensor, spectrum: Tensor) -> Tensor:
        """Compute :meth:`adjoint` for all items at once."""
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
        return pad_adjoint(x, self.padding, self.mode)

    def _transform(self, x: Tensor) -> Tensor:
        transform = torch.fft.fftn if x.is_complex() else torch.fft.rfftn
        result: Tensor = transform(x, s=self.grid, dim=tuple(range(-len(self.grid), 0)))
        return result


def _window(sizes: Sequence[int], steps: Sequence[int]) -> tuple[Any, ...]:
    """The index of the first ``sizes`` cells of the last axes, every ``steps``-th of them."""
    return (Ellipsis, *(slice(0, size, step) for size, step in zip(sizes, steps, strict=True)))


def _in_groups(function: Callable[[Tensor, Tensor], Tensor], items: Tensor, spectrum: Tensor, max_bytes: int) -> Tensor:
    """Apply a function to groups of items whose spectra take at most ``max_bytes``."""
    groups, c_out, c_in, *grid = spectrum.shape
    one = groups * max(c_out, c_in) * math.prod(grid) * spectrum.element_size()
    parts = [function(some, spectrum) for some in work_groups(items, one, work_bytes=max_bytes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _multiply(spectrum: Tensor, x: Tensor) -> Tensor:
    """``sum_c spectrum[g, o, c, f] x[e, g, c, f]`` for every item e, group g and frequency f."""
    # One pass per channel, because batched products of tiny complex matrices are slow and need both factors reordered.
    # Not in place, because torch.func.vmap has no rule for addcmul_.
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


def work_groups(items: Tensor, bytes_each: int, dim: int = 0, *, work_bytes: int = WORK_BYTES) -> Sequence[Tensor]:
    """Split items into groups whose arrays take at most ``work_bytes`` on a CPU; on other devices there is one group.

    Args:
        items: the items.
        bytes_each: bytes of the arrays that are made of one item.
        dim: the dimension of the items.
        work_bytes: the most bytes of a group.
    """
    if items.device.type != "cpu" or items.shape[dim] * bytes_each <= work_bytes:
        return (items,)
    return items.split(max(1, work_bytes // bytes_each), dim)


def inverse_transform(spectra: Tensor, sizes: Sequence[int], *, real: bool, work_bytes: int = WORK_BYTES) -> Tensor:
    """Transform frequencies back to a grid of ``sizes``, the last dimensions; a large batch is transformed in parts.

    Args:
        spectra: ``(..., *frequencies)``, where ``real`` with half of the frequencies of the last axis.
        sizes: sizes of the grid; empty for scalars.
        real: True when the arrays on the grid are real.
        work_bytes: the most bytes of a part.
    """
    if not sizes:
        return spectra
    for dim, size in enumerate(spectra.shape[: spectra.ndim - len(sizes)]):
        if size > 1:
            one = spectra.element_size() * spectra.numel() // size
            parts = work_groups(spectra, one, dim, work_bytes=work_bytes)
            if len(parts) > 1:
                done = [inverse_transform(part, sizes, real=real, work_bytes=work_bytes) for part in parts]
                return torch.cat(done, dim)
            break
    dims = tuple(range(-len(sizes), 0))
    result: Tensor
    if real and sizes[-1] == 1:  # a last axis of one cell has no frequencies to leave out, and MKL is slow along it
        result = torch.fft.ifftn(spectra, s=tuple(sizes), dim=dims).real.contiguous()
    else:
        result = (torch.fft.irfftn if real else torch.fft.ifftn)(spectra, s=tuple(sizes), dim=dims)
    return result
