r"""The distributed Fourier transform of a field whose rows the ranks share: every rank gets some frequencies.

.. math:: \text{rows} \xrightarrow{\ \text{rfft along the others}\ } \xrightarrow{\ \text{all to all}\ }
          \text{share} \xrightarrow{\ \text{fft along the rows}\ } \text{frequencies of the share}

Fields are real, so half of the frequencies of the second axis are enough; a rank has a share of these, and all
frequencies of the other axes.

Pippig, "PFFT: an extension of FFTW to massively parallel architectures", SIAM J. Sci. Comput. 35 (2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import plane_waves
from lsconv.tiled.ranks import Ranks, rows_of

__all__ = ["PencilGrid", "share_size"]


class PencilGrid:
    """A periodic grid of two axes or more, whose rows and frequencies the ranks share.

    Args:
        sizes: cells of the grid, per axis.
        inputs: cells of a field, per axis; the grid is zero outside the field.
        ranks: the processes; the rows of a field are shared by :func:`~lsconv.tiled.ranks.rows_of`.

    Attributes:
        part: the frequencies of the second axis that this rank has.
        frequencies: the number of frequencies per axis, on all ranks together.
    """

    def __init__(self, sizes: Sequence[int], inputs: Sequence[int], ranks: Ranks) -> None:
        self.sizes, self.inputs, self.ranks = tuple(sizes), tuple(inputs), ranks
        self.frequencies = (sizes[0], sizes[1] // 2 + 1, *sizes[2:])
        self.part = ranks.rows(self.frequencies[1])
        self._rows = [rows_of(inputs[0], rank, ranks.size) for rank in range(ranks.size)]
        self._parts = [rows_of(self.frequencies[1], rank, ranks.size) for rank in range(ranks.size)]
        self._others = range(2, len(sizes))

    def transform(self, rows: Tensor) -> Tensor:
        """Transform a field: its rows here, ``(blocks, channels, rows, *inputs)``, to the spectrum's share here."""
        s = torch.fft.rfft(rows, n=self.sizes[1], dim=3)
        for a in self._others:
            s = torch.fft.fft(s, n=self.sizes[a], dim=2 + a)
        if self.ranks.size > 1:
            others = s.shape[4:]
            shapes = [(*s.shape[:2], _length(r), _length(self.part), *others) for r in self._rows]
            s = torch.cat(self.ranks.all_to_all([s[:, :, :, p] for p in self._parts], shapes), dim=2)
        return torch.fft.fft(s, n=self.sizes[0], dim=2)

    def inverse(self, share: Tensor) -> Tensor:
        """The inverse of :meth:`transform`."""
        s = torch.fft.ifft(share, dim=2)[:, :, : self.inputs[0]]
        if self.ranks.size > 1:
            rows = _length(self._rows[self.ranks.rank])
            shapes = [(*s.shape[:2], rows, _length(p), *s.shape[4:]) for p in self._parts]
            s = torch.cat(self.ranks.all_to_all([s[:, :, r] for r in self._rows], shapes), dim=3)
        for a in self._others:
            s = torch.fft.ifft(s, dim=2 + a).narrow(2 + a, 0, self.inputs[a])
        return torch.fft.irfft(s, n=self.sizes[1], dim=3)[:, :, :, : self.inputs[1]]

    def waves(self, a: int, places: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``exp(2 pi i place frequency / size)`` along axis a, ``(places, frequencies of this rank)``."""
        found = plane_waves(places.cpu(), self.sizes[a], self.frequencies[a])
        return (found[:, self.part] if a == 1 else found).to(device=device, dtype=dtype)

    def weights(self, device: torch.device) -> Tensor:
        """The weights in sums over the second axis: 2 for a frequency that stands for a conjugate pair, else 1."""
        weights = torch.full((self.frequencies[1],), 2.0, dtype=torch.float64)
        weights[0] = 1
        if self.sizes[1] % 2 == 0:
            weights[-1] = 1
        return weights[self.part].to(device)

    def symbol(self, convolution: Convolution, embedding: Embedding) -> FrequencyMatrices:
        """The symbol of a convolution of stride 1 at the frequencies of this rank, by sums over its taps."""
        k = embedding.weight_blocks(convolution.weight.detach())
        k = k.movedim((1, 2), (-2, -1)).to(k.dtype.to_complex()).contiguous()  # blocks, *taps, rows, columns
        for a in reversed(range(embedding.ndim)):
            waves = self.waves(a, torch.tensor([tau for _, tau in embedding.axes[a].taps]), k.dtype, k.device)
            k = torch.tensordot(waves, k, ([0], [1 + a])).movedim(0, 1 + a)
        return FrequencyMatrices(Grid(self.sizes, real=True), k)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def share_size(grid: Sequence[int], ranks: int) -> int:
    """The number of frequencies of the rank that has most."""
    return -(-(grid[1] // 2 + 1) // ranks) * math.prod(grid) // grid[1]
