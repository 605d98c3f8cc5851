r"""The system on the border of a stack of one column, :math:`I - E P E^H`, by its factors.

A convolution of one channel and its penalty are a column E of rows. The product with a border vector needs no matrix of
rows by rows per frequency, and not a transform for every row either: rows of few taps, as those of a gradient are, read
the few cells beside their border from the grid, and write to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.border_set import Border, gathered, scattered
from lsconv.border.penalty import Taps
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["StackRows"]


class StackRows:
    """The rows of a stack on its border: E times a spectrum of the one column, there, and the adjoint.

    Args:
        P: the inverse of the normal operator.
        E: the symbol of the stack.
        border: of its rows.
        taps: of its last rows, those of the penalty.

    Attributes:
        transforms: there and back, in a product.
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
        """The adjoint."""
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
    """Rows of few taps on their border, as a list of the cells that they read.

    Attributes:
        size: border unknowns of these rows.
        cells: of the grid.
        owners: the border unknown of every read.
        weights: of the reads, ``(blocks, reads)``.
    """

    size: int
    cells: Tensor
    owners: Tensor
    weights: Tensor

    @classmethod
    def of(cls, border: Border, taps: Sequence[Taps]) -> _Reads | None:
        """The reads of the last rows of the border; None where they are more than the cells of a transform."""
        members = border.mask[border.channels - len(taps) :]
        counts = members.flatten(1).sum(1).tolist()
        if not taps or sum(len(row.offsets) * n for row, n in zip(taps, counts, strict=True)) > members[0].numel():
            return None
        cells = torch.cat([row.cells(cells).flatten() for row, cells in zip(taps, members, strict=True)])
        reads = [torch.full((n,), len(row.offsets)) for row, n in zip(taps, counts, strict=True)]
        owners = torch.arange(sum(counts)).repeat_interleave(torch.cat(reads))
        weights = torch.cat([row.weights.repeat(1, n) for row, n in zip(taps, counts, strict=True)], dim=-1)
        return cls(sum(counts), cells.to(weights.device), owners.to(weights.device), weights)

    def values(self, grid: Tensor) -> Tensor:
        """The rows times tensors on the grid, ``(rhs, blocks, cells)``."""
        reads = gathered(grid, self.cells) * self.weights
        return reads.new_zeros(*grid.shape[:2], self.size).index_add_(-1, self.owners, reads)

    def adjoint(self, u: Tensor, cells: int) -> Tensor:
        """The adjoint, on a grid of so many cells."""
        writes = gathered(u, self.owners) * self.weights.conj()
        return writes.new_zeros(*u.shape[:2], cells).index_add_(-1, self.cells, writes)
