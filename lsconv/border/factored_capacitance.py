"""The capacitance matrix of an operator of one channel, by factors: its rows are computed when they are needed."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier.frequency_matrices import FrequencyMatrices

__all__ = ["FactoredCapacitance"]


class FactoredCapacitance:
    """``I - E P E^H`` for E of one column; P and E are stored, and a row of the product is computed when needed.

    Args:
        P: one number per frequency.
        E: one column per frequency.
    """

    def __init__(self, P: FrequencyMatrices, E: FrequencyMatrices) -> None:
        self.P, self.E, self.grid = P, E, E.grid
        self.rows = self.columns = E.rows
        self.blocks, self.dtype, self.device = E.blocks, E.dtype, E.device
        self.nbytes = 0  # P and E are counted by their owner

    def _row(self, row: int) -> FrequencyMatrices:
        """A row of ``-E P E^H``."""
        E = self.E.matrices
        row_of_EP = (E[..., row : row + 1, :] * self.P.matrices).neg_()
        return FrequencyMatrices(self.grid, row_of_EP * E.mH, elementwise=True)

    def kernel(self) -> Tensor:
        """The first block column: ``(blocks, rows, columns, *grid.sizes)``."""
        kernel = torch.cat([self._row(row).kernel() for row in range(self.rows)], dim=1)
        kernel.flatten(3)[..., 0].diagonal(dim1=1, dim2=2).add_(1)
        return kernel

    def prefers_lags(self, axes: tuple[int, ...], lags: int) -> bool:
        """Tell whether :meth:`at_lags` costs less than :meth:`kernel`: always, but for lags along all axes."""
        return len(axes) < len(self.grid.sizes)

    def at_lags(self, axes: tuple[int, ...], lags: list[Tensor]) -> Tensor:
        """Compute as :meth:`FrequencyMatrices.at_lags`, a row at a time."""
        rows = torch.cat([self._row(row).at_lags(axes, lags) for row in range(self.rows)], dim=-2)
        at_zero = torch.ones((), dtype=torch.bool)
        for places in lags:
            at_zero = at_zero.unsqueeze(-1) & (places == 0)
        rows.diagonal(dim1=-2, dim2=-1).add_(at_zero.to(rows.device).unsqueeze(-1))
        return rows
