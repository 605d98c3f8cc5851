r"""The damp path of the tapered image: a cheap surrogate of a large convolution, whose best damp starts a search.

Data tapered to zero at their edges are nearly those of a circular convolution: for a taper w that is smooth on the
scale of the kernel, :math:`w\,(Ax) \approx A(wx)` except along the edges, and white noise stays white but for a slowly
varying variance. All quantities of a rule are then sums over frequencies,

.. math::
    \|r\|^2 = \tfrac1N \sum |f Y|^2, \quad \operatorname{tr} H = \sum (1 - f), \quad
    \|Lx\|^2 = \tfrac1N \sum \frac{p^2 s^2 |Y|^2}{(s^2 + \mu p^2)^2}, \qquad
    f = \frac{\mu p^2}{s^2 + \mu p^2},

with s and p the moduli of the symbols of A and L, and Y the transform of the tapered data, scaled so that the noise
keeps its energy. One transform serves all damps. The best damp is within 35 % of that of the whole data on images of
256², and mostly within a factor of three on small volumes (tests/inverse/damping/test_surrogate.py); the search then
goes on with a path of the whole data (:mod:`lsconv.inverse.damping.paths`).

Harris, "On the use of windows for harmonic analysis with the discrete Fourier transform" (1978), for the taper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.fourier.frequency_matrices import Grid
from lsconv.inverse.damping.paths import Evaluation
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.elementary import Identity
from lsconv.operators.fft_convolution import good_fft_length
from lsconv.operators.padding_modes import MODES

__all__ = ["TaperedPath", "taper", "without_padding"]

# The part of an axis, both ends together, over which the taper falls to zero, by the number of axes. Most data of a
# volume are near its faces, and the discontinuity there would dominate: it gets a Hann window, which tapers all along.
_TAPER = {1: 0.25, 2: 0.25, 3: 1.0}
# The least size of an axis, which also has to be as long as the kernel.
_LEAST_DATA = 6


class TaperedPath:
    """The surrogate as a :class:`~lsconv.inverse.damping.paths.DampPath`, with exact traces of the circular problem.

    Args:
        A: a convolution with stride 1 and one input and output channel a group; see :meth:`serves`.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp.
        L: the penalty.
        determinant: compute the determinant, which is half of the work of an evaluation.
    """

    exact = True

    @torch.no_grad()
    def __init__(self, A: Convolution, y: Tensor, L: LinearOperator | None, *, determinant: bool = True) -> None:
        ndim, self.determinant = A.ndim, determinant
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - ndim - 1], A.batch_shape))
        inner = y
        for axis, (first, count) in enumerate(without_padding(A), start=-ndim):
            inner = inner.narrow(axis, first, count)
        sizes = tuple(inner.shape[-ndim:])
        grid = tuple(good_fft_length(size) for size in sizes)
        weight = taper(sizes, A)
        # The mean of the tapered data is subtracted, because its spectrum would leak into other frequencies.
        level = (inner * weight).sum(tuple(range(-ndim, 0)), keepdim=True) / weight.sum()
        spectrum = (inner - level) * weight * (math.prod(grid) / weight.square().sum()).sqrt()
        transformed = _transform(spectrum, grid, real=not A.is_complex)
        power = transformed.abs().double().square().sum(0) / math.prod(grid)
        weights = Grid(grid, real=not A.is_complex).weights(power.device, torch.float64)
        found = self.symbol_power(A, A.ndim, grid)
        assert found is not None
        penalty = self.symbol_power(L, A.ndim, grid)
        assert penalty is not None
        self.rhs, self.ndim = y.shape[0], ndim
        self._ratios(found, penalty, power, weights)
        self.data_count: int | Tensor = y.shape[0] * A.out_shape[0] * math.prod(grid)
        scale = (found.flatten(-ndim - 1).amax(-1) / penalty.amax()).sqrt()
        self.scale = scale.expand(self.batch)

    @classmethod
    def serves(cls, A: LinearOperator, L: LinearOperator | None) -> bool:
        """Tell whether A and L have symbols that are numbers, and the data are large against the kernel."""
        if not isinstance(A, Convolution) or not A.in_shape[0] == A.out_shape[0] == A.groups or set(A.stride) != {1}:
            return False
        if any(n < max(_LEAST_DATA, k) for (_, n), k in zip(without_padding(A), A.kernel_extent, strict=True)):
            return False
        return L is None or cls.symbol_power(L, A.ndim, tuple(max(k, 4) for k in A.kernel_extent)) is not None

    @classmethod
    def symbol_power(cls, operator: LinearOperator | None, ndim: int, grid: tuple[int, ...]) -> Tensor | None:
        """``|symbol|^2`` of a stack of channelwise convolutions, summed over the stack; None for other operators.

        Without an operator, L the identity, it is 1.
        """
        if operator is None:
            return torch.ones((), dtype=torch.float64)
        real = not operator.dtype.is_complex
        if isinstance(operator, Identity) and len(operator.in_shape) == ndim + 1:
            return torch.ones((), dtype=torch.float64, device=operator.device)
        if isinstance(operator, Scaled):
            inner, factor = cls.symbol_power(operator.operator, ndim, grid), torch.as_tensor(operator.alpha)
            return None if inner is None or factor.numel() != 1 else inner * factor.abs().double().square().reshape(())
        if isinstance(operator, VStack):
            parts = [cls.symbol_power(part, ndim, grid) for part in operator.operators]
            return None if any(part is None for part in parts) else sum(p for p in parts if p is not None)  # type: ignore[return-value]
        if isinstance(operator, (Gradient, Laplacian)) and operator.ndim == ndim and len(operator.in_shape) == ndim + 1:
            kernels = operator.kernels.reshape(-1, *operator.kernels.shape[-ndim:]).double()
            return _transform(kernels, grid, real=real).abs().square().sum(0)
        if isinstance(operator, Convolution) and operator.ndim == ndim and set(operator.stride) == {1}:
            if not operator.in_shape[0] == operator.out_shape[0] == operator.groups:
                return None
            kernel = operator.weight.detach().squeeze(-ndim - 1)  # *batch, groups, *size
            kernel = kernel.to(torch.float64 if real else torch.complex128)
            for axis, (size, step) in enumerate(zip(operator.kernel_extent, operator.dilation, strict=True), -ndim):
                if step > 1:
                    shape = list(kernel.shape)
                    shape[axis] = size
                    taps = torch.arange(0, size, step, device=kernel.device)
                    kernel = kernel.new_zeros(shape).index_copy(axis % kernel.ndim, taps, kernel)
            return _transform(kernel, grid, real=real).abs().square()
        return None

    def _ratios(self, s: Tensor, p: Tensor, power: Tensor, weights: Tensor) -> None:
        """Store the flattened spectra; everything is a function of the ratio ``q = s / p`` of the squared symbols."""
        ndim = self.ndim
        shape = (*self.batch, *power.shape[-ndim - 1 :])
        s, p = (t.expand(*t.shape[: -ndim - 1], *shape[-ndim - 1 :]).flatten(-ndim - 1) for t in (s, p))
        number = weights.expand(shape[-ndim - 1 :]).flatten()
        constant = torch.where(p > 0, p, torch.where(s > 0, s, 1)).log()
        self.constant = (constant * number).sum(-1)  # the part of the log-determinant that does not depend on damp
        self.power = (power * weights).expand(shape).flatten(-ndim - 1)
        unit = torch.where(p > 0, s, 0).amax(-1, keepdim=True) / p.amax(-1, keepdim=True)
        # At ratios outside these bounds every damp in the range fits the data completely, or not at all.
        self.q = (s / p).nan_to_num(0.0, torch.inf).clamp(1e-15 * unit, 1e10 * unit)
        # The determinant leaves out the null space of L, which q does not show.
        self.number, self.penalised = number, number * (p > 0)

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square().unsqueeze(-1)
        f = mu / (self.q + mu)
        fitted = self.power * self.q / (self.q + mu).square()

        def total(values: Tensor) -> Tensor:
            return values.sum(-1).expand(self.batch)

        unknown = torch.full(self.batch, torch.nan, dtype=torch.float64, device=self.q.device)
        logdet = self.constant + total(self.penalised * torch.log1p(self.q / mu)) if self.determinant else unknown
        return Evaluation(
            total(self.power * f.square()),
            total(fitted),
            self.rhs * total(self.number * (1 - f)),
            torch.zeros_like(unknown),
            self.rhs * logdet,
            total(-2 * fitted / (self.q + mu)) if slope else unknown,
            self.rhs * total(-self.number * f * (1 - f)) if slope else unknown,
        )


def without_padding(A: Convolution) -> list[tuple[int, int]]:
    """Per axis the first output that reads no padding and the number of such outputs, for a stride of one.

    All outputs are taken where the padding is circular, or only few read no padding.
    """
    found = []
    for n, extent, (left, _), outputs in zip(A.spatial_in, A.kernel_extent, A.padding, A.spatial_out, strict=True):
        if MODES[A.padding_mode].periodic:
            found.append((0, outputs))
            continue
        count = min(n - extent + left, outputs - 1) - left + 1
        found.append((left, count) if count >= max(_LEAST_DATA, extent) else (0, outputs))
    return found


def taper(sizes: tuple[int, ...], A: Convolution) -> Tensor:
    """The taper: the product of Tukey windows along the axes; ones where the convolution is circular."""
    real = A.weight.real.dtype
    weight = torch.ones((), dtype=real, device=A.device)
    for n in sizes:
        position = (torch.arange(n, dtype=torch.float64, device=A.device) + 0.5) / n
        edge = torch.minimum(position, 1 - position) / (0.5 * _TAPER[A.ndim])
        window = torch.where(edge < 1, 0.5 - 0.5 * torch.cos(math.pi * edge.clamp_max(1)), 1)
        if MODES[A.padding_mode].periodic:
            window = torch.ones_like(window)
        weight = weight.unsqueeze(-1) * window.to(real)
    return weight


def _transform(values: Tensor, grid: tuple[int, ...], *, real: bool) -> Tensor:
    """The transform of values that are padded with zeros to the grid."""
    dims = tuple(range(-len(grid), 0))
    return torch.fft.rfftn(values, grid, dim=dims) if real else torch.fft.fftn(values, grid, dim=dims)
