r"""The damp path of the tapered picture: a cheap likeness of a large convolution, for finding where to look.

Data that fade to zero towards their edges are nearly those of a circular convolution, whatever lies beyond them: with a
weight w that is smooth on the scale of the kernel, :math:`w\,(Ax) \approx A(wx)` except along the edges, and white
noise stays white up to the slow change of its strength. Everything that a rule for damp looks at is then a sum over
frequencies,

.. math::
    \|r\|^2 = \tfrac1N \sum |f Y|^2, \quad \operatorname{tr} H = \sum (1 - f), \quad
    \|Lx\|^2 = \tfrac1N \sum \frac{p^2 s^2 |Y|^2}{(s^2 + \mu p^2)^2}, \qquad
    f = \frac{\mu p^2}{s^2 + \mu p^2},

with s and p the moduli of the symbols of A and L, and Y the transform of the tapered data, scaled so that the noise
keeps its energy. One transform serves all damps. Its minima lie within 35 % of
the damp of those of the whole data on pictures of 256² (tests/inverse/damping/test_surrogate.py); the paths of
:mod:`lsconv.inverse.damping.paths` have the last word.

Harris, "On the use of windows for harmonic analysis with the discrete Fourier transform" (1978), for the taper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.inverse.damping.paths import Evaluation
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.elementary import Identity
from lsconv.operators.fft_convolution import good_fft_length

__all__ = ["TaperedPath"]

# The share of the data, at both ends of every axis together, over which they fade.
_TAPER = 0.25
# The values of q = s / p that many frequencies are added up at, and their range in units of the largest: beyond it a
# damp that is searched fits everything or nothing.
_CELLS, _RANGE = 2**16, (1e-15, 1e10)
# The least size of an axis: this many data, and this many times the kernel.
_LEAST_DATA, _LEAST_KERNELS = 6, 1
# Below so many data, or times the kernel, the edges weigh: of stacks of 8 and 16 slices the likeness chose 0.2 to 0.9
# times the best damp. Small damps are dear, so the search of the whole starts this much higher.
_EDGE_DATA, _EDGE_KERNELS, _EDGE_SHIFT = 48, 4, math.log(2.5)


class TaperedPath:
    """The likeness as a :class:`~lsconv.inverse.damping.paths.DampPath`; its traces are exact, for what it is.

    Args:
        A: a convolution with stride 1 and one input and output channel a group; see :meth:`serves`.
        y: data ``(together, *batch, *out_shape)``, summed over the first dimension.
        L: the penalty.

    Attributes:
        shift: how far beyond the damp chosen here to expect that of the whole, in its logarithm.
    """

    exact = True

    @torch.no_grad()
    def __init__(self, A: Convolution, y: Tensor, L: LinearOperator | None) -> None:
        ndim = A.ndim
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - ndim - 1], A.batch_shape))
        inner = y
        for axis, (first, count) in enumerate(_without_padding(A), start=-ndim):
            inner = inner.narrow(axis, first, count)
        sizes = tuple(inner.shape[-ndim:])
        edges = A.padding_mode != "circular" and not _large(A, _EDGE_DATA, _EDGE_KERNELS)
        self.shift = _EDGE_SHIFT if edges else 0.0
        grid = tuple(good_fft_length(size) for size in sizes)
        weight = _taper(sizes, A)
        # the constant, which would leak, is what the mean of the tapered data says
        level = (inner * weight).sum(tuple(range(-ndim, 0)), keepdim=True) / weight.sum()
        spectrum = (inner - level) * weight * (math.prod(grid) / weight.square().sum()).sqrt()
        self.real = not A.is_complex
        dims = tuple(range(-ndim, 0))
        transform = torch.fft.rfftn if self.real else torch.fft.fftn
        power = transform(spectrum, grid, dim=dims).abs().double().square().sum(0) / math.prod(grid)
        weights = torch.ones(power.shape[-ndim:], dtype=torch.float64, device=power.device)
        if self.real:
            weights[..., 1 : (grid[-1] + 1) // 2] = 2
        found = self._power(A, A.ndim, grid)
        assert found is not None
        one = torch.ones((), dtype=torch.float64, device=power.device)
        penalty = one if L is None else self._power(L, A.ndim, grid)
        assert penalty is not None
        self.together, self.ndim = y.shape[0], ndim
        self._sort(found, penalty, power, weights)
        self.count: int | Tensor = y.shape[0] * A.out_shape[0] * math.prod(grid)
        scale = (found.flatten(-ndim - 1).amax(-1) / penalty.amax()).sqrt()
        self.scale = scale.expand(self.batch)

    @classmethod
    def serves(cls, A: LinearOperator, L: LinearOperator | None) -> bool:
        """Whether A and L have symbols that are numbers, and the data are large against the kernel."""
        if not isinstance(A, Convolution) or not A.in_shape[0] == A.out_shape[0] == A.groups or set(A.stride) != {1}:
            return False
        if not _large(A, _LEAST_DATA, _LEAST_KERNELS):
            return False
        return L is None or cls._power(L, A.ndim, tuple(max(k, 4) for k in A.kernel_extent)) is not None

    @classmethod
    def _power(cls, operator: LinearOperator, ndim: int, grid: tuple[int, ...]) -> Tensor | None:
        """``|symbol|^2`` of a stack of convolutions channel by channel, or None where it is none."""
        real = not operator.dtype.is_complex
        dims = tuple(range(-ndim, 0))
        if isinstance(operator, Identity) and len(operator.in_shape) == ndim + 1:
            return torch.ones((), dtype=torch.float64, device=operator.device)
        if isinstance(operator, Scaled):
            inner, factor = cls._power(operator.operator, ndim, grid), torch.as_tensor(operator.alpha)
            return None if inner is None or factor.numel() != 1 else inner * factor.abs().double().square().reshape(())
        if isinstance(operator, VStack):
            parts = [cls._power(part, ndim, grid) for part in operator.operators]
            return None if any(part is None for part in parts) else sum(p for p in parts if p is not None)  # type: ignore[return-value]
        if isinstance(operator, (Gradient, Laplacian)) and operator.ndim == ndim and len(operator.in_shape) == ndim + 1:
            kernels = operator.kernels.reshape(-1, *operator.kernels.shape[-ndim:]).double()
            return _transform(kernels, grid, dims, real=real).abs().square().sum(0)
        if isinstance(operator, Convolution) and operator.ndim == ndim and set(operator.stride) == {1}:
            if not operator.in_shape[0] == operator.out_shape[0] == operator.groups:
                return None
            kernel = operator.weight.detach().squeeze(-ndim - 1)  # *batch, groups, *size
            kernel = kernel.to(torch.float64 if real else torch.complex128)
            for axis, (size, step) in enumerate(zip(operator.kernel_extent, operator.dilation, strict=True), -ndim):
                if step > 1:
                    shape = list(kernel.shape)
                    shape[axis] = size
                    places = torch.arange(0, size, step, device=kernel.device)
                    kernel = kernel.new_zeros(shape).index_copy(axis % kernel.ndim, places, kernel)
            return _transform(kernel, grid, dims, real=real).abs().square()
        return None

    def _sort(self, s: Tensor, p: Tensor, power: Tensor, weights: Tensor) -> None:
        """Everything depends on ``q = s / p`` alone: the frequencies are added up by it, once for all damps.

        Few frequencies stay as they are; many are shared among the two nearest of fixed q, whose distance w = 9e-4 of
        log q makes an error of ``w^2 / 8`` times a second derivative: of 1e-6 of each sum at most.
        """
        ndim = self.ndim
        shape = (*self.batch, *power.shape[-ndim - 1 :])
        s, p = (t.expand(*t.shape[: -ndim - 1], *shape[-ndim - 1 :]).flatten(-ndim - 1) for t in (s, p))
        constant = torch.where(p > 0, p, torch.where(s > 0, s, 1)).log()
        self.constant = (constant * weights.expand(shape[-ndim - 1 :]).flatten()).sum(-1)  # of the determinant
        power = (power * weights).expand(shape).flatten(-ndim - 1)
        number = weights.expand(shape[-ndim - 1 :]).flatten()
        unit = torch.where(p > 0, s, 0).amax(-1, keepdim=True) / p.amax(-1, keepdim=True)
        low, high = _RANGE
        # where L sees nothing every damp fits the data, which no function of q says of the determinant
        q = (s / p).nan_to_num(0.0, torch.inf).clamp(low * unit, high * unit)
        number, seen = (t.expand(q.shape) for t in (number, number * (p > 0)))
        if q.shape[-1] <= _CELLS:
            self.q, self.power, self.number, self.seen = q, power, number, seen
            return
        place = (q / (low * unit)).log_() * ((_CELLS - 1) / math.log(high / low))
        below = place.floor().clamp_(0, _CELLS - 2)
        share, index = place - below, below.long()

        def added(values: Tensor) -> Tensor:
            where, part = index.expand(values.shape), share * values
            whole = values.new_zeros(*values.shape[:-1], _CELLS)
            return whole.scatter_add_(-1, where, values - part).scatter_add_(-1, where + 1, part)

        steps = torch.linspace(math.log(low), math.log(high), _CELLS, dtype=torch.float64, device=q.device).exp()
        self.q, self.power, self.number, self.seen = steps * unit, added(power), added(number), added(seen)

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Everything at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square().unsqueeze(-1)
        f = mu / (self.q + mu)
        fitted = self.power * self.q / (self.q + mu).square()

        def total(values: Tensor) -> Tensor:
            return values.sum(-1).expand(self.batch)

        nothing = torch.full(self.batch, torch.nan, dtype=torch.float64, device=self.q.device)
        return Evaluation(
            total(self.power * f.square()),
            total(fitted),
            self.together * total(self.number * (1 - f)),
            torch.zeros_like(nothing),
            self.together * (self.constant + total(self.seen * torch.log1p(self.q / mu))),
            total(-2 * fitted / (self.q + mu)) if slope else nothing,
            self.together * total(-self.number * f * (1 - f)),
        )


def _without_padding(A: Convolution) -> list[tuple[int, int]]:
    """Per axis the first output that reads no padding, and how many do not; all of them where the padding is circular.

    Stride 1.
    """
    found = []
    for n, extent, (left, _), outputs in zip(A.spatial_in, A.kernel_extent, A.padding, A.spatial_out, strict=True):
        if A.padding_mode == "circular":
            found.append((0, outputs))
            continue
        last = min(n - extent + left, outputs - 1)
        found.append((left, last - left + 1))
    return found


def _large(A: Convolution, data: int, kernels: int) -> bool:
    """Whether every axis has so many outputs that read no padding, and so many times the kernel's."""
    inner = _without_padding(A)
    return all(count >= max(data, kernels * extent) for (_, count), extent in zip(inner, A.kernel_extent, strict=True))


def _taper(sizes: tuple[int, ...], A: Convolution) -> Tensor:
    """The product of Tukey's windows along the axes, one in the middle; ones where the convolution is circular."""
    real = A.weight.real.dtype
    weight = torch.ones((), dtype=real, device=A.device)
    for n in sizes:
        place = (torch.arange(n, dtype=torch.float64, device=A.device) + 0.5) / n
        edge = torch.minimum(place, 1 - place) / (0.5 * _TAPER)
        window = torch.where(edge < 1, 0.5 - 0.5 * torch.cos(math.pi * edge.clamp_max(1)), 1)
        if A.padding_mode == "circular":
            window = torch.ones_like(window)
        weight = weight.unsqueeze(-1) * window.to(real)
    return weight


def _transform(kernel: Tensor, grid: tuple[int, ...], dims: tuple[int, ...], *, real: bool) -> Tensor:
    return torch.fft.rfftn(kernel, grid, dim=dims) if real else torch.fft.fftn(kernel, grid, dim=dims)
