r"""The strip H of a crossed border, eliminated frequency by frequency along its rows.

In the spectrum of the plane the rows of H are read and written by a few waves along the first axis, and the operator
between them is one small matrix :math:`D_\omega` for each frequency of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder
from lsconv.fourier.batched_linalg import hermitian_inverse, indefinite_inverse
from lsconv.operators.fft_convolution import FEW_WAVES, plane_waves

__all__ = ["Strip"]


class Strip:
    """``D^-1`` for each frequency along the rows, and the waves that read and write them.

    Args:
        columns: the block-circulant operator, transformed back along the first axis:
            ``(blocks, rows, frequencies, channels, channels)``.
        border: where H is.
        definite: whether the operator is positive definite.
    """

    def __init__(self, columns: Tensor, border: CrossedBorder, *, definite: bool) -> None:
        (n, _), device = border.grid, columns.device
        rows = torch.arange(n - border.depth, n)
        there = (rows >= torch.tensor(border.rows)[:, None]).flatten().to(device)  # channels * rows
        lags = (rows[:, None] - rows) % n
        D = columns[:, lags.to(device)].permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)  # blocks, frequencies
        both = there[:, None] & there
        D = torch.where(both, D, torch.eye(len(there), dtype=D.dtype, device=device))
        self.inverse = hermitian_inverse(D.contiguous()) if definite else indefinite_inverse(D)
        self.inverse *= both
        self._there, self._depth, self._rows = there, border.depth, n
        self._read: Tensor | None = None
        self._write: Tensor | None = None
        if border.depth <= FEW_WAVES:
            waves = plane_waves(rows, n, n).to(device, columns.dtype)
            self._read, self._write = waves / n, waves.mH.contiguous()

    def read(self, spectra: Tensor) -> Tensor:
        """The rows of ``spectra`` ``(rhs, blocks, channels, *frequencies)``, as :meth:`solve` takes them."""
        if self._read is None:
            return torch.fft.ifft(spectra, dim=-2)[..., self._rows - self._depth :, :]
        return self._read @ spectra

    def write(self, rows: Tensor) -> Tensor:
        """The spectra of the rows alone."""
        if self._write is None:
            return torch.fft.fft(torch.nn.functional.pad(rows, (0, 0, self._rows - self._depth, 0)), dim=-2)
        return self._write @ rows

    def solve(self, rows: Tensor) -> Tensor:
        """``D^-1`` times ``rows`` of shape ``(rhs, blocks, channels, rows, frequencies)``."""
        shape = rows.shape
        vectors = rows.flatten(2, 3).permute(1, 3, 2, 0)  # blocks, frequencies, channels * rows, rest
        return (self.inverse @ vectors).permute(3, 0, 2, 1).reshape(shape)

    def logdet(self) -> Tensor:
        """``log |det D|`` of every frequency, ``(blocks, frequencies)``."""
        inverse = self.inverse + torch.diag((~self._there).to(self.inverse))
        return -torch.linalg.slogdet(inverse)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.inverse.nbytes
