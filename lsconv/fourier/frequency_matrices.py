"""Block-circulant operators as one matrix per frequency, and the periodic grid that they act on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.operators.fft_convolution import FEW_WAVES, inverse_transform, plane_waves

__all__ = ["ELEMENTWISE_ENTRIES", "FrequencyMatrices", "Grid", "repeat_for_items"]

# Up to this many entries a matrix per frequency is multiplied elementwise in the layout of the FFT; above it, as a
# batched matrix product after moving the channels last.
ELEMENTWISE_ENTRIES = 16


class Grid:
    """The discrete Fourier transform of a periodic grid, real-to-complex for real tensors.

    Args:
        sizes: the grid sizes, the last dimensions of every tensor transformed.
        real: True when tensors on the grid are real.
    """

    def __init__(self, sizes: tuple[int, ...], *, real: bool) -> None:
        self.sizes = sizes
        self.real = real
        self.dims = tuple(range(-len(sizes), 0))
        self.frequencies = (*sizes[:-1], sizes[-1] // 2 + 1) if real and sizes else sizes

    def transform(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Transform from the grid to frequencies; into ``out`` where it is given."""
        if not self.sizes:
            return tensor
        if self.real and self.sizes[-1] > 1:
            return torch.fft.rfftn(tensor, dim=self.dims, out=out)
        return torch.fft.fftn(tensor, dim=self.dims, out=out)

    def inverse(self, tensor: Tensor) -> Tensor:
        """Transform from frequencies to the grid."""
        return inverse_transform(tensor, self.sizes, real=self.real)

    def weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weights of stored frequencies in sums over all: 2 for one that stands for a conjugate pair, else 1."""
        weights = torch.ones(self.frequencies, device=device, dtype=dtype)
        if self.real:
            weights[..., 1 : (self.sizes[-1] + 1) // 2] = 2
        return weights


class FrequencyMatrices:
    """One matrix per block and frequency: a block-circulant operator.

    Args:
        grid: the periodic grid.
        matrices: shape ``(blocks, *grid.frequencies, rows, columns)``, complex (real where all are real).
        elementwise: multiply entry by entry in the layout of the transforms; None: only if the matrices are small.
    """

    def __init__(self, grid: Grid, matrices: Tensor, *, elementwise: bool | None = None) -> None:
        self.grid = grid
        self.rows, self.columns = matrices.shape[-2:]
        few = self.rows * self.columns <= ELEMENTWISE_ENTRIES
        self.elementwise = few if elementwise is None else elementwise
        if self.elementwise:  # the entries of one (row, column) contiguous over the frequencies
            matrices = matrices.movedim((-2, -1), (1, 2)).contiguous().movedim((1, 2), (-2, -1))
        else:  # a lazy conjugate would be computed again for every product
            matrices = matrices.contiguous().resolve_conj()
        self.matrices = matrices
        self.blocks, self.dtype, self.device = matrices.shape[0], matrices.dtype, matrices.device

    @property
    def H(self) -> FrequencyMatrices:  # noqa: N802 - the field's name for the adjoint
        """The adjoint operator."""
        return FrequencyMatrices(self.grid, self.matrices.mH)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.matrices.numel() * self.matrices.element_size()

    def __call__(self, spectra: Tensor) -> Tensor:
        """Multiply the matrices with ``spectra`` of shape ``(rhs, blocks, columns, *frequencies)``."""
        if self.elementwise:
            return self.multiply(spectra)
        vectors = spectra.movedim(0, -1).movedim(1, -1).contiguous()  # blocks, *frequencies, rhs, columns
        if vectors.is_complex() and not self.matrices.is_complex():
            pairs = torch.view_as_real(vectors).movedim(-1, -2).flatten(-3, -2)
            parts = (pairs @ self.matrices.mT).unflatten(-2, (-1, 2)).movedim(-2, -1).contiguous()
            result = torch.view_as_complex(parts)
        else:
            result = vectors @ self.matrices.mT
        return result.movedim(-1, 1).movedim(-1, 0)

    def multiply(self, spectra: Tensor, out: Tensor | None = None) -> Tensor:
        """Multiply entry by entry, in the layout of the transforms; into ``out`` where it is given."""
        factors = self.matrices.movedim((-2, -1), (1, 2))  # blocks, rows, columns, *frequencies
        total = torch.mul(factors[:, :, 0], spectra[:, :, :1], out=out)
        # Accumulated in place, because a sum over columns would store every product first.
        for column in range(1, self.columns):
            total.addcmul_(factors[:, :, column], spectra[:, :, column : column + 1])
        return total

    def on_grid(self, tensor: Tensor) -> Tensor:
        """Apply the operator to a tensor ``(rhs, blocks, columns, *grid.sizes)``."""
        if tensor.numel() == 0:  # which some FFTs refuse
            return tensor.new_zeros(*tensor.shape[:2], self.rows, *self.grid.sizes)
        return self.grid.inverse(self(self.grid.transform(tensor)))

    def block(self, rows: slice, columns: slice) -> FrequencyMatrices:
        """Some rows and columns of the matrices, as a view of them."""
        part = FrequencyMatrices.__new__(FrequencyMatrices)
        part.grid, part.elementwise, part.matrices = self.grid, self.elementwise, self.matrices[..., rows, columns]
        part.rows, part.columns = part.matrices.shape[-2:]
        part.blocks, part.dtype, part.device = self.blocks, self.dtype, self.device
        return part

    def map(self, function: Callable[[Tensor], Tensor]) -> FrequencyMatrices:
        """Make the operator whose matrices are ``function`` of these."""
        return FrequencyMatrices(self.grid, function(self.matrices))

    def repeated(self, blocks: int) -> FrequencyMatrices:
        """Repeat the matrices of all groups for every batch item, unless there is one block, which broadcasts."""
        if self.blocks in (1, blocks):
            return self
        return self.map(lambda m: repeat_for_items(m, blocks))

    def prefers_lags(self, axes: tuple[int, ...], lags: int) -> bool:
        """Tell whether :meth:`at_lags` costs less than :meth:`kernel` for so many lags along ``axes``."""
        return not self.elementwise and lags <= FEW_WAVES

    def at_lags(self, axes: tuple[int, ...], lags: list[Tensor]) -> Tensor:
        """The first block column at given lags along ``axes``, and at all frequencies of the other axes.

        Returns:
            ``(blocks, *other frequencies, *lags, rows, columns)``, the other frequencies halved as in the :class:`Grid`
            of the other axes, and real where there are none and the grid is real.
        """
        grid, ndim = self.grid, len(self.grid.sizes)
        others = [a for a in range(ndim) if a not in axes]
        m = self.matrices
        for a, places in zip(axes, lags, strict=True):
            waves = plane_waves(places.cpu(), grid.sizes[a], grid.frequencies[a]) / grid.sizes[a]
            # One frequency of each conjugate pair is summed; the other one is added below.
            if grid.real and a == ndim - 1:
                half = torch.ones(grid.frequencies[a], dtype=torch.float64)
                half[0] = 0.5
                if grid.sizes[a] % 2 == 0:
                    half[-1] = 0.5
                waves = waves * half
            shape = list(m.shape)
            m = waves.to(m) @ m.reshape(math.prod(shape[: 1 + a]), shape[1 + a], -1)
            shape[1 + a] = len(places)
            m = m.reshape(shape)
        m = m.permute(0, *(1 + a for a in others), *(1 + a for a in axes), -2, -1)
        if not grid.real or ndim - 1 not in axes:
            return m
        if not others:
            return 2 * m.real
        dims = [1 + d for d in range(len(others))]
        m = m + m.flip(dims).roll([1] * len(dims), dims).conj()
        return m.narrow(len(dims), 0, grid.sizes[others[-1]] // 2 + 1)

    def kernel(self) -> Tensor:
        """The first block column: ``(blocks, rows, columns, *grid.sizes)``."""
        return self.grid.inverse(self.matrices.movedim((-2, -1), (1, 2)))


def repeat_for_items(matrices: Tensor, blocks: int) -> Tensor:
    """Repeat the matrices of all groups, shared by the batch items, for every item: ``(blocks, ...)``."""
    return matrices.repeat(blocks // matrices.shape[0], *(1 for _ in matrices.shape[1:]))
