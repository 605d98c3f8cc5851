r"""The split image of a quadratic data term, stored as a spectrum and as values on the strips without data.

The proximal step of :math:`\tfrac12 |z - y|^2` is affine with the same factors in every measured cell, so that with
:math:`\theta = \rho / (1 + \rho)` an iteration of :mod:`lsconv.inverse.admm.iteration` is linear there,

.. math:: s \leftarrow (1 - \alpha\theta)\, s + \alpha\, C x - \frac{\alpha}{1 + \rho}\, y, \qquad
          2 z - s = (2\theta - 1)\, s + \frac{2}{1 + \rho}\, y,

so that it needs no values on the grid. Let v be what s would be if the whole grid were measured: v is stored as a
spectrum. On the strips outside the outputs there are no data, so z = s there, and the difference adds a correction
:math:`s - (2\theta - 1)\, v`. The strips are read and written by transforms of a narrow grid. The iterates are those of
:class:`~lsconv.inverse.admm.split_images.ConvolutionImage`, with half of the transforms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.operators.batch_layout import CACHE_BYTES
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import good_fft_length

__all__ = ["SpectralImage"]


class SpectralImage:
    """The image ``C x`` of the term ``1/2 ||R C x - y||^2``, R cropping the grid to the outputs.

    Tensors on the grid have the shape ``(1, blocks, channels, *grid)``.

    Args:
        convolution: the operator R C on the inputs.
        S: the symbol of C.
        rho: the penalty parameter.
        blocks: the number of blocks of the tensors.
    """

    def __init__(self, convolution: Convolution, S: FrequencyMatrices, rho: float, blocks: int) -> None:
        self.rho, self.theta = rho, rho / (1 + rho)
        self.grid, self.adjoint_symbol = S.grid, S.H.map(Tensor.resolve_conj)
        m = S.matrices
        self._normal = rho * (m.abs().square().sum(-2, keepdim=True) if S.columns == 1 else m.mH @ m)
        self._curvature = FrequencyMatrices(S.grid, self._normal.to(m.dtype) * (2 * self.theta - 1))
        cropped = [a for a, n in enumerate(convolution.spatial_out) if S.grid.sizes[a] > n]
        self.strips = [_Strip(convolution, S, a, blocks) for a in cropped]

    @staticmethod
    def serves(convolution: Convolution, grid: Grid, blocks: int) -> bool:
        """Tell whether the strips fit on the grid, and save more time than reading and writing them takes.

        They save none for images whose four arrays fit in the cache of a CPU; other devices have not been measured.
        """
        pairs = [(a, n, m) for a, (n, m) in enumerate(zip(grid.sizes, convolution.spatial_out, strict=True)) if n > m]
        if not pairs:
            return True
        rows, columns = convolution.out_shape[0], convolution.in_shape[0]
        image = blocks * (rows // convolution.groups) * math.prod(grid.sizes) * convolution.weight.element_size()
        if convolution.device.type != "cpu" or 4 * image <= CACHE_BYTES:
            return False
        lengths = [good_fft_length(n - m + _span(convolution, a) - 1) for a, n, m in pairs]
        shares = [length / n for length, (_, n, _) in zip(lengths, pairs, strict=True)]
        return max(shares) <= 1 and sum(shares) * (rows + columns) < rows

    def normal(self) -> Tensor:
        """``rho C^H C`` per frequency: ``(blocks or 1, *frequencies, columns, columns)``."""
        return self._normal

    def begin(self, x: Tensor, spectrum: Tensor, y: Tensor) -> None:
        """Start from the image of x.

        Args:
            x: x on the grid.
            spectrum: the spectrum of x.
            y: the data, with zeros outside the outputs.
        """
        self._data = self.adjoint_symbol(self.grid.transform(y)).mul_(self.theta)
        self._force = self._curvature(spectrum).add_(self._data, alpha=2)
        for strip in self.strips:
            strip.s = strip.read(x).clone()
            strip.v = strip.s.clone()

    def force(self, x: Tensor) -> Tensor:
        """Return the spectrum of ``rho C^H (2 z - s)`` without the correction of the strips, which is added to x.

        Args:
            x: a tensor on the grid, changed in place.
        """
        for strip in self.strips:
            strip.write(torch.sub(strip.s, strip.v, alpha=2 * self.theta - 1).mul_(self.rho), x)
        return self._force

    def advance(self, x: Tensor, spectrum: Tensor, relaxation: float) -> None:
        """Do the update of an iteration, ``s <- s + relaxation (C x - z)``.

        Args:
            x: the minimiser on the grid.
            spectrum: the spectrum of x.
            relaxation: the over-relaxation alpha.
        """
        shrink = 1 - relaxation * self.theta
        change = self._curvature(spectrum).add_(self._data)
        self._force.mul_(shrink).add_(change, alpha=relaxation)
        for strip in self.strips:
            values = strip.read(x)
            strip.s.mul_(1 - relaxation).add_(values, alpha=relaxation)
            strip.v.mul_(shrink).add_(values, alpha=relaxation)


class _Strip:
    """The cells outside the outputs along one axis but inside along earlier ones, and the application of C to them.

    Only few positions along the axis are read by these cells, so that C acts as a circulant on a narrow grid.

    Attributes:
        s: ``z + u`` of the cells, ``(1, blocks, rows, *cells)``.
        v: what ``z + u`` would be if the cells were measured.
    """

    s: Tensor
    v: Tensor

    def __init__(self, convolution: Convolution, S: FrequencyMatrices, a: int, blocks: int) -> None:
        sizes, outputs = S.grid.sizes, convolution.spatial_out
        ndim, n = len(sizes), sizes[a]
        self.axis, self.width = a - ndim, n - outputs[a]
        self.inside = [(e - ndim, outputs[e]) for e in range(a)]
        span, left = _span(convolution, a), convolution.padding[a][0]
        self.length = self.width + span - 1
        first = (outputs[a] - left) % n
        until_end = min(self.length, n - first)
        # (position on the grid, on the narrow one, number): the cells that are read may wrap around
        self.parts = [(first, 0, until_end), (0, until_end, self.length - until_end)]
        narrow = good_fft_length(self.length)
        self.grid = Grid((*sizes[:a], narrow, *sizes[a + 1 :]), real=S.grid.real)
        taps = torch.arange(span)
        kernel = S.kernel()
        part = kernel.index_select(self.axis, ((left - taps) % n).to(kernel.device))
        shape = list(kernel.shape)
        shape[self.axis] = narrow
        column = kernel.new_zeros(shape).index_copy_(self.axis, (-taps % narrow).to(kernel.device), part)
        self.S = FrequencyMatrices(self.grid, self.grid.transform(column).movedim((1, 2), (-2, -1)))
        self.adjoint_symbol = self.S.H.map(Tensor.resolve_conj)
        # zero in the cells that are never written
        self._inputs = kernel.new_zeros(1, blocks, self.S.columns, *self.grid.sizes)
        self._outputs = kernel.new_zeros(1, blocks, self.S.rows, *self.grid.sizes)

    def _cells(self, narrow: Tensor) -> Tensor:
        """The view of the strip's cells on the narrow grid."""
        narrow = narrow.narrow(self.axis, 0, self.width)
        for axis, n in self.inside:
            narrow = narrow.narrow(axis, 0, n)
        return narrow

    def read(self, x: Tensor) -> Tensor:
        """Compute ``C x`` on the cells of the strip, for x on the grid."""
        for start, to, count in self.parts:
            self._inputs.narrow(self.axis, to, count).copy_(x.narrow(self.axis, start, count))
        return self._cells(self.S.on_grid(self._inputs))

    def write(self, values: Tensor, x: Tensor) -> None:
        """Add ``C^H values``, for values on the cells of the strip, to x on the grid, in place."""
        self._cells(self._outputs).copy_(values)
        narrow = self.adjoint_symbol.on_grid(self._outputs)
        for start, to, count in self.parts:
            x.narrow(self.axis, start, count).add_(narrow.narrow(self.axis, to, count))


def _span(convolution: Convolution, a: int) -> int:
    """The length of the dilated kernel along an axis."""
    return (convolution.kernel_size[a] - 1) * convolution.dilation[a] + 1
