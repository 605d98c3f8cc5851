r"""The system on the border of a stack of one column, :math:`I - E P E^H`, by its factors.

A convolution of one channel and its penalty have a symbol E of one column. The product with a border vector then needs
no matrix per frequency, nor a transform for every row: rows with few taps, such as those of a gradient, are applied to
the few grid cells that they read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.border_set import Border, gathered, scattered
from lsconv.border.penalty import Taps
from lsconv.fourier.frequency_matrices import FrequencyMatrices

__all__ = ["StackRows"]


class StackRows:
    """The rows of a stack restricted to its border: E times a spectrum of one column, and the adjoint.

    Args:
        P: the inverse of the normal operator.
        E: the symbol of the stack.
        border: the border of the rows.
        taps: the taps of the last rows, those of the penalty.

    Attributes:
        transforms: the number of transforms in a product.
    """

    def __init__(self, P: FrequencyMatrices, E: FrequencyMatrices, border: Border, taps: Sequence[Taps]) -> None:
        self._inverse = P
        self._few = _Reads.of(border, taps)
        rows = E.rows - (0 if self._few is None else len(taps))
        self._rows = FrequencyMatrices(E.grid, E.matrices[..., :rows, :], elementwise=True)
        self._index = border.index[: int(border.mask[:rows].sum())]
        self.transforms = rows + (self._few is not None)

    def product(self, u: Tensor) -> Tensor:
        """``(I - E P E^H) u`` for border vectors ``(rhs, blocks, size)``."""
        return u - self.values(self._inverse(self.spectrum(u)))

    def values(self, spectrum: Tensor) -> Tensor:
        """The border vector ``(rhs, blocks, size)`` for a spectrum ``(rhs, blocks, 1, *frequencies)``."""
        grid = self._rows.grid
        values = gathered(grid.inverse(self._rows.multiply(spectrum)).flatten(2), self._index)
        if self._few is None:
            return values
        return torch.cat([values, self._few.values(grid.inverse(spectrum).flatten(2))], dim=-1)

    def spectrum(self, u: Tensor) -> Tensor:
        """Apply the adjoint of :meth:`values`."""
        grid, rows, lead = self._rows.grid, self._rows.rows, u.shape[:2]
        on_grid = scattered(u[..., : len(self._index)], self._index, rows * math.prod(grid.sizes))
        spectra = grid.transform(on_grid.reshape(*lead, rows, *grid.sizes))
        matrices = self._rows.matrices[..., 0].movedim(-1, 1)  # blocks, rows, *frequencies
        spectrum = spectra[:, :, :1].mul_(matrices[:, :1].conj())
        for row in range(1, rows):
            spectrum.addcmul_(spectra[:, :, row : row + 1], matrices[:, row : row + 1].conj())
        if self._few is not None:
            cells = self._few.adjoint(u[..., len(self._index) :], math.prod(grid.sizes))
            spectrum.add_(grid.transform(cells.reshape(*lead, 1, *grid.sizes)))
        return spectrum


@dataclass(frozen=True)
class _Reads:
    """Rows with few taps on their border, as a list of reads, each of one cell for one unknown.

    Attributes:
        size: border unknowns of these rows.
        cells: the grid cell of every read.
        owners: the border unknown of every read.
        weights: the weight of every read, ``(blocks, reads)``.
    """

    size: int
    cells: Tensor
    owners: Tensor
    weights: Tensor

    @classmethod
    def of(cls, border: Border, taps: Sequence[Taps]) -> _Reads | None:
        """List the reads of the last rows of the border; None where these are more than the cells of a transform."""
        masks = border.mask[border.channels - len(taps) :]
        counts = masks.flatten(1).sum(1).tolist()
        if not taps or sum(len(row.offsets) * n for row, n in zip(taps, counts, strict=True)) > masks[0].numel():
            return None
        cells = torch.cat([row.cells(mask).flatten() for row, mask in zip(taps, masks, strict=True)])
        reads = [torch.full((n,), len(row.offsets)) for row, n in zip(taps, counts, strict=True)]
        owners = torch.arange(sum(counts)).repeat_interleave(torch.cat(reads))
        weights = torch.cat([row.weights.repeat(1, n) for row, n in zip(taps, counts, strict=True)], dim=-1)
        return cls(sum(counts), cells.to(weights.device), owners.to(weights.device), weights)

    def values(self, grid: Tensor) -> Tensor:
        """Apply the rows to tensors on the grid, ``(rhs, blocks, cells)``."""
        reads = gathered(grid, self.cells) * self.weights
        return reads.new_zeros(*grid.shape[:2], self.size).index_add_(-1, self.owners, reads)

    def adjoint(self, u: Tensor, cells: int) -> Tensor:
        """Apply the adjoint, to a grid of ``cells`` cells."""
        writes = gathered(u, self.owners) * self.weights.conj()
        return writes.new_zeros(*u.shape[:2], cells).index_add_(-1, self.cells, writes)
