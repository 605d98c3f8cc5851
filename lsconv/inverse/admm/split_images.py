"""The split images on the extended grid: a convolution of x, differences of x, and x itself.

Every image has values on the whole grid. K x, the image of its term, is a window of it; the term does not depend on the
other cells, so that the proximal step leaves them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.inverse.admm.proximal import Term
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.padding import pad, pad_adjoint
from lsconv.operators.padding_modes import Pairs

__all__ = ["ConvolutionImage", "DifferenceImage", "GridLayout", "IdentityImage", "PaddedImage", "SplitImage"]


@dataclass(frozen=True)
class GridLayout:
    """The layout of tensors ``(*batch, channels, *grid)`` on the grid.

    Attributes:
        grid: the periodic grid.
        batch: the batch dimensions.
        channels: input channels, in all groups.
        groups: the independent groups of channels.
        spatial_in: the sizes of x, which is the first part of the grid.
        dtype: the type of the tensors.
        device: the device of the tensors.
    """

    grid: Grid
    batch: tuple[int, ...]
    channels: int
    groups: int
    spatial_in: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def blocks(self) -> int:
        """The number of independent blocks: batch items times groups."""
        return math.prod(self.batch) * self.groups

    def window(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """The view of the first ``sizes`` cells of a tensor on the grid."""
        for a, n in enumerate(sizes):
            tensor = tensor.narrow(a - len(sizes), 0, n)
        return tensor

    def copy_outside(self, source: Tensor, target: Tensor, sizes: Sequence[int]) -> None:
        """Copy the cells outside the window of ``sizes``."""
        ndim = len(sizes)
        for a, n in enumerate(sizes):
            beyond = source.shape[a - ndim] - n
            if beyond:
                target.narrow(a - ndim, n, beyond).copy_(source.narrow(a - ndim, n, beyond))
                source, target = source.narrow(a - ndim, 0, n), target.narrow(a - ndim, 0, n)

    def blocked(self, tensor: Tensor) -> Tensor:
        """Reshape ``(*batch, channels, *grid)`` to ``(1, blocks, channels/groups, *grid)``."""
        return tensor.reshape(1, self.blocks, -1, *self.grid.sizes)


class SplitImage:
    """One split image ``C x`` of shape ``(*batch, *shape)``, of which ``K x`` is the window of ``sizes`` cells."""

    shape: tuple[int, ...]

    def __init__(self, layout: GridLayout, sizes: Sequence[int]) -> None:
        self.layout, self.sizes = layout, tuple(sizes)

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """Write the proximal step of ``s`` into ``out``; cells outside the window are copied."""
        window = self.layout.window
        term.prox(window(s, self.sizes), rho, window(out, self.sizes))
        self.layout.copy_outside(s, out, self.sizes)

    def item(self, z: Tensor) -> Tensor:
        """The window of ``z`` that belongs to ``K x``, ``(*batch, *K.out_shape)``."""
        return self.layout.window(z, self.sizes)

    def normal(self) -> Tensor:
        """``C^H C`` per frequency: ``(blocks or 1, *frequencies, columns, columns)``."""
        raise NotImplementedError

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """``C x``."""
        raise NotImplementedError

    def adjoint(self, r: Tensor) -> Tensor:
        """``C^H r`` on the grid; it may overwrite r."""
        raise NotImplementedError


class ConvolutionImage(SplitImage):
    """A convolution of x, by its symbol."""

    def __init__(self, layout: GridLayout, convolution: Convolution, S: FrequencyMatrices) -> None:
        super().__init__(layout, convolution.spatial_out)
        self.S = S
        self.weighted_adjoint = S  # set to the adjoint times 2 rho by :meth:`weigh`
        self.shape = (convolution.out_shape[0], *layout.grid.sizes)

    def weigh(self, weights: Tensor) -> None:
        """Set the factors, 2 rho per block, of :meth:`adjoint_spectrum`."""
        self.weighted_adjoint = FrequencyMatrices(self.S.grid, weights * self.S.matrices.mH)

    def normal(self) -> Tensor:
        """``C^H C`` per frequency."""
        m = self.S.matrices
        return m.abs().square().sum(-2, keepdim=True) if self.S.columns == 1 else m.mH @ m

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """``C x``, from x or from its spectrum."""
        return self.layout.grid.inverse(self.S(spectrum)).reshape(*self.layout.batch, *self.shape)

    def adjoint_spectrum(self, r: Tensor) -> Tensor:
        """The spectrum of ``C^H r``, times the factors of :meth:`weigh`."""
        return self.weighted_adjoint(self.layout.grid.transform(self.layout.blocked(r)))


class IdentityImage(SplitImage):
    """x itself, for bounds, and for the constraint that x is zero outside the inputs (``zero_outside``)."""

    def __init__(self, layout: GridLayout, *, zero_outside: bool) -> None:
        super().__init__(layout, layout.spatial_in)
        self.zero_outside = zero_outside
        self.shape = (layout.channels, *layout.grid.sizes)

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """Take the proximal step, as in :class:`SplitImage`."""
        if not self.zero_outside:
            return super().proximal(term, s, rho, out)
        window = self.layout.window
        term.prox(window(s, self.sizes), rho, window(out.zero_(), self.sizes))
        return None

    def normal(self) -> Tensor:
        """``C^H C`` per frequency."""
        return _scalar_matrices(self.layout, 1.0)

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """``C x``, from x or from its spectrum."""
        return x

    def adjoint(self, r: Tensor) -> Tensor:
        """``C^H r``."""
        return r.clone()


class PaddedImage(IdentityImage):
    r"""x with cells outside the inputs that are copies of inputs, by reflect or replicate padding P.

    The projection of s onto such x is the mean over the copies, :math:`(P^H P)^{-1} P^H s`, to which the term's own
    proximal step, a projection too, is applied. Cells of the grid that are no copies are left as they are.
    """

    def __init__(self, layout: GridLayout, pairs: Pairs, mode: str) -> None:
        super().__init__(layout, zero_outside=True)
        self.pairs, self.mode = pairs, mode
        self.axes = tuple(range(-len(pairs), 0))
        self.shifts = tuple(left for left, _ in pairs)
        self.padded = tuple(left + n + right for n, (left, right) in zip(self.sizes, pairs, strict=True))
        ones = torch.ones(self.padded, dtype=layout.dtype, device=layout.device)
        self.inverse_count = pad_adjoint(ones, pairs, mode).reciprocal()

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """Write the proximal step, which gives all copies of a cell the same value."""
        rolled = s.roll(self.shifts, self.axes)
        window = self.layout.window(rolled, self.padded)
        mean = pad_adjoint(window, self.pairs, self.mode) * self.inverse_count
        term.prox(mean, rho, mean)
        window.copy_(pad(mean, self.pairs, self.mode))
        out.copy_(rolled.roll([-shift for shift in self.shifts], self.axes))


class DifferenceImage(SplitImage):
    """Periodic forward differences; at a Neumann edge the last one is not part of K x, and is left as it is."""

    def __init__(self, layout: GridLayout, gradient: Gradient) -> None:
        super().__init__(layout, layout.spatial_in)
        self.spacing, self.ndim = gradient.spacing, gradient.ndim
        self.neumann = gradient.boundary == "neumann"
        self.shape = (gradient.ndim, layout.channels, *layout.grid.sizes)
        # one array for all iterations, because allocating it anew costs as much as the differences
        self._image = torch.empty(*layout.batch, *self.shape, dtype=layout.dtype, device=layout.device)

    def normal(self) -> Tensor:
        """``C^H C`` per frequency."""
        sizes = self.layout.grid.sizes
        total = torch.zeros(sizes, dtype=torch.float64, device=self.layout.device)
        for a, (n, h) in enumerate(zip(sizes, self.spacing, strict=True)):
            angle = torch.arange(n, dtype=torch.float64, device=self.layout.device) * (math.pi / n)
            shape = [1] * len(sizes)
            shape[a] = n
            total = total + ((2 * torch.sin(angle) / h) ** 2).reshape(shape)
        return _scalar_matrices(self.layout, total[..., : self.layout.grid.frequencies[-1]])

    def apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """``C x``, from x or from its spectrum."""
        out = self._image
        for a, h in enumerate(self.spacing):
            axis, part = a - self.ndim, out.select(-self.ndim - 2, a)
            n = x.shape[axis]
            torch.sub(x.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1), out=part.narrow(axis, 0, n - 1))
            torch.sub(x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1), out=part.narrow(axis, n - 1, 1))
            if h != 1:
                part.div_(h)
        return out

    def adjoint(self, r: Tensor) -> Tensor:
        """``C^H r``."""
        total: Tensor | None = None
        for a, h in enumerate(self.spacing):
            axis, part = a - self.ndim, r.select(-self.ndim - 2, a)
            n = part.shape[axis]
            if h != 1:
                part.div_(h)
            total = part.neg() if total is None else total.sub_(part)
            total.narrow(axis, 1, n - 1).add_(part.narrow(axis, 0, n - 1))
            total.narrow(axis, 0, 1).add_(part.narrow(axis, n - 1, 1))
        assert total is not None
        return total

    def _edges(self, window: Tensor) -> list[Tensor]:
        """The views of the last difference along every axis, which is not part of K x at a Neumann edge."""
        parts = [window.select(-self.ndim - 2, a) for a in range(self.ndim)]
        return [part.narrow(a - self.ndim, part.shape[a - self.ndim] - 1, 1) for a, part in enumerate(parts)]

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """Take the proximal step, as in :class:`SplitImage`."""
        if not self.neumann:
            return super().proximal(term, s, rho, out)
        edges = self._edges(self.layout.window(s, self.sizes))
        saved = [edge.clone() for edge in edges]
        for edge in edges:
            edge.zero_()
        super().proximal(term, s, rho, out)
        for edge, other, value in zip(edges, self._edges(self.layout.window(out, self.sizes)), saved, strict=True):
            edge.copy_(value)
            other.copy_(value)
        return None

    def item(self, z: Tensor) -> Tensor:
        """The window of ``z`` that belongs to ``K x``."""
        window = self.layout.window(z, self.sizes)
        if self.neumann:
            window = window.clone()
            for edge in self._edges(window):
                edge.zero_()
        return window


def _scalar_matrices(layout: GridLayout, values: Tensor | float) -> Tensor:
    """``values`` times the identity, per frequency."""
    columns = layout.channels // layout.groups
    dtype = layout.dtype.to_real() if columns == 1 else layout.dtype.to_complex()
    eye = torch.eye(columns, dtype=dtype, device=layout.device)
    scale = torch.as_tensor(values, device=layout.device).to(layout.dtype.to_real()).expand(layout.grid.frequencies)
    return (scale[..., None, None] * eye)[None]
