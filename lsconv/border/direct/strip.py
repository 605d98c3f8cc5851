r"""The strip H of a crossed border, eliminated frequency by frequency along its rows.

In the spectrum of the plane the rows of H are read and written by a few waves along the first axis, and the operator
between them is one small matrix :math:`D_\omega` for each frequency of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder
from lsconv.fourier.batched_linalg import inverse_of_hermitian
from lsconv.operators.fft_convolution import FEW_WAVES, plane_waves

__all__ = ["Strip"]


class Strip:
    """``D^-1`` for each frequency along the rows, and the waves that transform between H and the spectrum.

    Args:
        row_kernels: the block-circulant operator transformed back along the first axis: a kernel over the rows for
            each frequency along them, ``(blocks, rows, frequencies, channels, channels)``.
        border: the border of which H is a part.
        definite: the operator is positive definite.
    """

    def __init__(self, row_kernels: Tensor, border: CrossedBorder, *, definite: bool) -> None:
        (n, _), device = border.grid, row_kernels.device
        rows = torch.arange(n - border.depth, n)
        present = (rows >= torch.tensor(border.rows)[:, None]).flatten().to(device)  # channels * rows
        lags = (rows[:, None] - rows) % n
        D = row_kernels[:, lags.to(device)].permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)  # blocks, frequencies
        pairs = present[:, None] & present
        D = torch.where(pairs, D, torch.eye(len(present), dtype=D.dtype, device=device))
        self.inverse = inverse_of_hermitian(D, definite=definite)
        self.inverse *= pairs
        self._present, self._depth, self._rows = present, border.depth, n
        self._read: Tensor | None = None
        self._write: Tensor | None = None
        if border.depth <= FEW_WAVES:
            waves = plane_waves(rows, n, n).to(device, row_kernels.dtype)
            self._read, self._write = waves / n, waves.mH.contiguous()

    def eliminate(self, u: Tensor, t: Tensor) -> None:
        """Subtract the rows ``D^-1 t`` of one spectrum from another, in place: with ``t = Q u``, Q u vanishes there.

        Args:
            u: the spectrum that is changed, ``(rhs, blocks, channels, *frequencies)``.
            t: the spectrum whose rows are read, of that shape.
        """
        if self._read is None:
            rows = self._solve(torch.fft.ifft(t, dim=-2)[..., self._rows - self._depth :, :])
            u -= torch.fft.fft(torch.nn.functional.pad(rows, (0, 0, self._rows - self._depth, 0)), dim=-2)
            return
        assert self._write is not None
        if t.shape[-1] == 1:  # a signal: one product for all right-hand sides
            rows = self._solve((t.squeeze(-1) @ self._read.mT).unsqueeze(-1)).flatten(0, 2).squeeze(-1)
            u.view(-1, self._rows).addmm_(rows, self._write.mT, alpha=-1)
            return
        rows = self._solve(self._read @ t).flatten(0, 2)
        u.view(-1, *u.shape[-2:]).baddbmm_(self._write.expand(rows.shape[0], -1, -1), rows, alpha=-1)

    def _solve(self, rows: Tensor) -> Tensor:
        """``D^-1`` times ``rows`` of shape ``(rhs, blocks, channels, rows, frequencies)``."""
        vectors = rows.flatten(2, 3).permute(1, 3, 2, 0)  # blocks, frequencies, channels * rows, rhs
        return (self.inverse @ vectors).permute(3, 0, 2, 1).reshape(rows.shape)

    def logdet(self) -> Tensor:
        """``log |det D|`` of every frequency, ``(blocks, frequencies)``."""
        inverse = self.inverse + torch.diag((~self._present).to(self.inverse))
        return -torch.linalg.slogdet(inverse)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        return self.inverse.nbytes
