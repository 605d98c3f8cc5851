r"""The damp path of the tapered image with weighted data: a surrogate whose best damp starts a search.

With weights w that change slowly, the solution near a datum is that of a circular convolution with one weight
:math:`\omega`: the mean of the weights of the data that depend on the same inputs, computed by two passes with the
squared kernel. The fit

.. math:: A x \approx F^{-1} \frac{\omega s^2}{\omega s^2 + \mu p^2} F \frac{w}{\omega} y

is computed for a few values of :math:`\omega`, and interpolated between them datum by datum. Let :math:`\omega h` be
the mean of the fraction over the frequencies. A datum whose weight w exceeds :math:`\omega` is a perturbation of rank
one: by the formula of Sherman and Morrison its fit and its influence are divided by :math:`1 + (w - \omega) h`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.fourier.frequency_matrices import Grid
from lsconv.inverse.damping.paths import Evaluation
from lsconv.inverse.damping.surrogate import TaperedPath, taper, without_padding
from lsconv.operators.algebra import Product
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.elementary import Mask
from lsconv.operators.fft_convolution import good_fft_length
from lsconv.operators.observed import MeasuredRows

__all__ = ["WeightedTaperedPath", "constant_weight_in_kernel", "weighted_convolution"]

# The ratio between successive weights omega, of at most eight, for which fits are computed.
_RATIO = 4.0


class WeightedTaperedPath:
    """The surrogate as a :class:`~lsconv.inverse.damping.paths.DampPath`; it does not compute the determinant.

    Args:
        A: a convolution that :class:`TaperedPath` serves.
        diagonal: the roots of the weights, ``(*batch, *A.out_shape)``.
        y: data of the weighted operator, ``(rhs, *batch, *A.out_shape)``, summed over the first dimension.
        L: the penalty.
    """

    exact = True

    @torch.no_grad()
    def __init__(self, A: Convolution, diagonal: Tensor, y: Tensor, L: LinearOperator | None) -> None:
        self.ndim = ndim = A.ndim
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - ndim - 1], A.batch_shape))
        for axis, (first, count) in enumerate(without_padding(A), start=-ndim):
            y, diagonal = (z.narrow(axis, first, count) for z in (y, diagonal))
        w = diagonal.abs().square().double()
        z = torch.where(w > 0, diagonal.conj() * y / torch.where(w > 0, w, 1), 0)
        sizes = tuple(y.shape[-ndim:])
        self.grid = Grid(tuple(good_fft_length(size) for size in sizes), real=not A.is_complex)
        self.dims = self.grid.dims
        window = taper(sizes, A).double()
        total_weight = (w * window).sum(self.dims, keepdim=True)
        level = (z * w * window).sum(self.dims, keepdim=True) / torch.where(total_weight > 0, total_weight, 1)
        z = (z - level) * window * (math.prod(sizes) / window.square().sum()).sqrt()
        extra = [n for g, m in zip(reversed(self.grid.sizes), reversed(sizes), strict=True) for n in (0, g - m)]
        self.z, self.w = (torch.nn.functional.pad(t, extra) for t in (z, w))
        self.data_count: int | Tensor = y.shape[0] * self._sum((self.w > 0).double()).sum(-1)
        self.rhs = y.shape[0]
        power, penalty = (TaperedPath.symbol_power(operator, ndim, self.grid.sizes) for operator in (A, L))
        squared_kernel_symbol = TaperedPath.symbol_power(
            A.with_parameters([A.weight.detach().abs().square().to(A.dtype)]), ndim, self.grid.sizes
        )
        assert power is not None
        assert penalty is not None
        assert squared_kernel_symbol is not None
        self.s, self.p = power, penalty
        self.number = self.grid.weights(y.device, torch.float64) / math.prod(self.grid.sizes)
        mean = self.grid.inverse(
            self.grid.transform(self.w.to(self.z.dtype))
            * squared_kernel_symbol
            / squared_kernel_symbol.flatten(-ndim)[..., 0].reshape(*squared_kernel_symbol.shape[:-ndim], *(1,) * ndim)
        )
        self.mean_weights = mean.real.clamp_min(0)
        high = float(self.mean_weights.max())
        low = min(high, max(_RATIO**-7 * high, float(self.mean_weights.min())))
        steps = math.ceil(math.log(high / low) / math.log(_RATIO)) if high > 0 else 0
        self.levels = [low * (high / low) ** (k / max(1, steps)) for k in range(steps + 1)]
        position = (self.mean_weights.clamp(low, high) / low).log() * (steps / math.log(high / low) if steps else 0)
        self.interpolation = [(1 - (position - k).abs()).clamp_min(0) for k in range(steps + 1)]
        self.spectrum = self.grid.transform(self.w * self.z / torch.where(self.mean_weights > 0, self.mean_weights, 1))
        size = (self.w.mean(self.dims) * self.s.flatten(-ndim).amax(-1)).amax(-1)
        self.scale = (size / penalty.amax()).sqrt().expand(self.batch)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the pixels."""
        return values.sum(self.dims)

    @torch.no_grad()
    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square()
        over = over_items(mu, self.ndim + 1)
        fit = change = torch.zeros_like(self.z)
        h = h_slope = torch.zeros_like(self.mean_weights)
        for level, share in zip(self.levels, self.interpolation, strict=True):
            denominator = level * self.s + over * self.p
            f = self.s / torch.where(denominator > 0, denominator, 1)
            f_slope = -f * over * self.p / torch.where(denominator > 0, denominator, 1)
            fit = fit + share * self.grid.inverse(level * f * self.spectrum)
            h = h + share * (f * self.number).sum(self.dims, keepdim=True)
            if slope:
                change = change + share * self.grid.inverse(level * f_slope * self.spectrum)
                h_slope = h_slope + share * (f_slope * self.number).sum(self.dims, keepdim=True)
        excess = (self.w - self.mean_weights).clamp_min(0)
        divisor = 1 + excess * h
        change = change / divisor - fit * excess * h_slope / divisor.square()
        fit = fit / divisor
        r = self.z - fit

        def total(values: Tensor) -> Tensor:
            return self._sum(values).sum(-1).expand(self.batch)

        residual_rise = total((-2 * self.w * (r.conj() * change).real).sum(0))
        unknown = torch.full(self.batch, torch.nan, dtype=torch.float64, device=mu.device)
        return Evaluation(
            total((self.w * r.abs().square()).sum(0)),
            total((self.w * (r.conj() * fit).real).sum(0)).clamp_min(0) / mu,
            self.rhs * total(self.w * h / divisor),
            torch.zeros_like(unknown),
            unknown,
            -residual_rise / mu.square() if slope else unknown,
            self.rhs * total(self.w * h_slope / divisor.square()) if slope else unknown,
        )


def constant_weight_in_kernel(A: LinearOperator) -> LinearOperator:
    """Multiply a diagonal of one number and zeros into the kernel of the convolution behind it; zeros become a mask.

    Args:
        A: any operator; it is returned unchanged unless it is such a diagonal times a convolution.
    """
    weighted = weighted_convolution(A)
    if weighted is None or (isinstance(A, Product) and all(isinstance(row, Mask) for row in A.operators[:-1])):
        return A
    diagonal, core = weighted
    items = diagonal.flatten(diagonal.ndim - len(core.out_shape))
    nonzero = items != 0
    factor = items.gather(-1, nonzero.to(torch.uint8).argmax(-1, keepdim=True))
    if bool(((items != factor) & nonzero).any()):
        return A
    axes = (1,) * (core.weight.ndim - len(core.batch_shape))
    scaled = core.with_parameters([core.weight * factor.reshape(*factor.shape[:-1], *axes)], per_item=True)
    if bool(nonzero.all()):
        return scaled
    mask = (diagonal != 0).reshape(-1, *core.out_shape)
    if bool((mask == mask[0]).all()):
        return Mask(mask[0], dtype=A.dtype) @ scaled
    return Mask(diagonal != 0, diagonal.ndim - len(core.out_shape), dtype=A.dtype) @ scaled


def weighted_convolution(A: LinearOperator) -> tuple[Tensor, Convolution] | None:
    """Split masks and diagonals times a convolution into the factors of its outputs and itself; else None."""
    rows = MeasuredRows.of(A)
    if rows is None or not isinstance(rows.core, Convolution) or rows.core.out_shape != A.out_shape:
        return None
    return rows.scale, rows.core
