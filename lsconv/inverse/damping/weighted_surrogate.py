r"""The damp path of the tapered image where data count differently: a surrogate for finding where to look.

With weights that change slowly, the solution near a datum is that of a circular convolution with one weight
:math:`\omega`, that of the data which see what it sees: the weights, averaged over the squares of the kernel twice. So

.. math:: A x \approx F^{-1} \frac{\omega s^2}{\omega s^2 + \mu p^2} F \frac{w}{\omega} y

is computed for a few :math:`\omega` and interpolated between, datum by datum. With :math:`\omega h` the mean of the
fraction over the frequencies, a datum of more weight than its neighbours adds itself to them by the formula of Sherman
and Morrison: its fit and its influence are divided by :math:`1 + (w - \omega)_+ h`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.inverse.damping.paths import Evaluation
from lsconv.inverse.damping.surrogate import TaperedPath, fading, without_padding
from lsconv.operators.algebra import Product
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.elementary import Diagonal, Mask
from lsconv.operators.fft_convolution import good_fft_length

__all__ = ["WeightedTaperedPath", "constant_weight_in_kernel", "weighted_convolution"]

# The ratio of neighbours among the weights, at most eight, for which solutions are computed; between, they are
# interpolated.
_RATIO = 4.0


class WeightedTaperedPath:
    """The surrogate as a :class:`~lsconv.inverse.damping.paths.DampPath`; it knows no determinant.

    Args:
        A: a convolution that :class:`TaperedPath` serves.
        diagonal: the roots of the weights, ``(*batch, *A.out_shape)``.
        y: data of the weighted operator, ``(together, *batch, *A.out_shape)``, summed over the first dimension.
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
        self.grid = tuple(good_fft_length(size) for size in sizes)
        self.dims = tuple(range(-ndim, 0))
        self.real = not A.is_complex
        taper = fading(sizes, A).double()
        seen = (w * taper).sum(self.dims, keepdim=True)
        level = (z * w * taper).sum(self.dims, keepdim=True) / torch.where(seen > 0, seen, 1)
        z = (z - level) * taper * (math.prod(sizes) / taper.square().sum()).sqrt()
        extra = [n for g, m in zip(reversed(self.grid), reversed(sizes), strict=True) for n in (0, g - m)]
        self.z, self.w = (torch.nn.functional.pad(t, extra) for t in (z, w))
        self.count: int | Tensor = y.shape[0] * self._sum((self.w > 0).double()).sum(-1)
        self.together = y.shape[0]
        power, penalty = (TaperedPath.symbol_power(operator, ndim, self.grid) for operator in (A, L))
        spread = TaperedPath.symbol_power(
            A.with_parameters([A.weight.detach().abs().square().to(A.dtype)]), ndim, self.grid
        )
        assert power is not None
        assert penalty is not None
        assert spread is not None
        self.s, self.p = power, penalty
        number = torch.ones(power.shape[-ndim:], dtype=torch.float64, device=y.device)
        if self.real:
            number[..., 1 : (self.grid[-1] + 1) // 2] = 2
        self.number = number / math.prod(self.grid)
        mean = self._inverse_transform(
            self._transform(self.w.to(self.z.dtype))
            * spread
            / spread.flatten(-ndim)[..., 0].reshape(*spread.shape[:-ndim], *(1,) * ndim)
        )
        self.around = mean.real.clamp_min(0)
        high = float(self.around.max())
        low = min(high, max(_RATIO**-7 * high, float(self.around.min())))
        steps = math.ceil(math.log(high / low) / math.log(_RATIO)) if high > 0 else 0
        self.levels = [low * (high / low) ** (k / max(1, steps)) for k in range(steps + 1)]
        place = (self.around.clamp(low, high) / low).log() * (steps / math.log(high / low) if steps else 0)
        self.interpolation = [(1 - (place - k).abs()).clamp_min(0) for k in range(steps + 1)]
        self.spectrum = self._transform(self.w * self.z / torch.where(self.around > 0, self.around, 1))
        size = (self.w.mean(self.dims) * self.s.flatten(-ndim).amax(-1)).amax(-1)
        self.scale = (size / penalty.amax()).sqrt().expand(self.batch)

    def _transform(self, z: Tensor) -> Tensor:
        return torch.fft.rfftn(z, dim=self.dims) if self.real else torch.fft.fftn(z, dim=self.dims)

    def _inverse_transform(self, z: Tensor) -> Tensor:
        if self.real:
            return torch.fft.irfftn(z, self.grid, dim=self.dims)
        return torch.fft.ifftn(z, dim=self.dims)

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the pixels, which leaves the channels."""
        return values.sum(self.dims)

    @torch.no_grad()
    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square()
        over = over_items(mu, self.ndim + 1)
        fit = change = torch.zeros_like(self.z)
        h = rise = torch.zeros_like(self.around)
        for level, near in zip(self.levels, self.interpolation, strict=True):
            both = level * self.s + over * self.p
            f = self.s / torch.where(both > 0, both, 1)
            slower = -f * over * self.p / torch.where(both > 0, both, 1)
            fit = fit + near * self._inverse_transform(level * f * self.spectrum)
            h = h + near * (f * self.number).sum(self.dims, keepdim=True)
            if slope:
                change = change + near * self._inverse_transform(level * slower * self.spectrum)
                rise = rise + near * (slower * self.number).sum(self.dims, keepdim=True)
        more = (self.w - self.around).clamp_min(0)
        alone = 1 + more * h
        change = change / alone - fit * more * rise / alone.square()
        fit = fit / alone
        r = self.z - fit

        def total(values: Tensor) -> Tensor:
            return self._sum(values).sum(-1).expand(self.batch)

        residual_rise = total((-2 * self.w * (r.conj() * change).real).sum(0))
        unknown = torch.full(self.batch, torch.nan, dtype=torch.float64, device=mu.device)
        return Evaluation(
            total((self.w * r.abs().square()).sum(0)),
            total((self.w * (r.conj() * fit).real).sum(0)).clamp_min(0) / mu,
            self.together * total(self.w * h / alone),
            torch.zeros_like(unknown),
            unknown,
            -residual_rise / mu.square() if slope else unknown,
            self.together * total(self.w * rise / alone.square()) if slope else unknown,
        )


def constant_weight_in_kernel(A: LinearOperator) -> LinearOperator:
    """Move a diagonal that is one number beside zeros into the kernel; the zeros become a mask.

    Args:
        A: any operator; only a diagonal before a convolution is looked at.
    """
    weighted = weighted_convolution(A)
    if weighted is None:
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
    """The diagonal and the convolution behind it; None of another operator."""
    if not isinstance(A, Product) or len(A.operators) != 2 or not isinstance(A.operators[0], Diagonal):
        return None
    core = A.operators[1]
    return (A.operators[0].diagonal.detach(), core) if isinstance(core, Convolution) else None
