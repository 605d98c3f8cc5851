r"""A block-circulant operator restricted to a border of rows and columns, by transforms of these alone.

In two dimensions a vector on the border is a few rows of the grid and a few columns. Its transform is that of the rows
and of the columns, each along itself, and a sum over their few positions, a matrix product:

.. math:: \hat u(\omega_1, \omega_2) = \sum_p e^{-i \omega_1 p}\, \hat r_p(\omega_2)
                                     + \sum_q \hat c_q(\omega_1)\, e^{-i \omega_2 q},

and of the way back only the rows and columns are wanted, again a matrix product with the waves of their positions and
transforms along them. Channels come last, where the product per frequency wants them: no transform of the grid, no
change of layout, and the grid is never made. (32 channels, 3x3, 128², valid, float32, one core, in ms: 6.5 to 4.6 for
one vector, 7.5 to 2.8 for each of eight.)

Markel, "FFT pruning", IEEE Trans. Audio Electroacoust. 19 (1971), for transforms of inputs that are mostly zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.border_set import Border, gathered
from lsconv.fourier.symbol import FrequencyMatrices, per_frequency, plane_waves

__all__ = ["PrunedProduct"]

# Where transforms of the grid are cheaper (one core): on a small grid, where it is the number of calls that counts (5
# channels, 32²: 0.12 ms by the grid, 0.24 so; 8 channels, 64²: 0.39 and 0.42), and around a wide border (8 channels,
# 9x9, 128², float64: 1.8 and 2.2; 32 channels, 15x15, 64²: 1.8 and 2.1), unless, up to the limit, vectors come together
# (8 channels, 9x9 again, 8 of them: 3.7 and 1.4 each).
_LEAST_ENTRIES = 2**14
_MOST_POSITIONS = 16
# Bytes of the spectrum that are made, multiplied and collected at once: in the cache, and in memory that malloc has.
_PART_BYTES = 2**20


class PrunedProduct:
    """The product with a block-circulant operator on the border; made by :meth:`of`.

    Args:
        matrices: the operator, on a grid of two axes, with complex matrices of more than a few entries.
        border: the cells; it has rows and columns.
    """

    def __init__(self, matrices: FrequencyMatrices, border: Border) -> None:
        grid, dtype, device = matrices.grid, matrices.matrices.dtype, matrices.matrices.device
        self.grid, self.matrices = grid, matrices
        first, second = border.members
        rows, columns = (m.any(0).nonzero().flatten() for m in (first, second))
        numbers = border.numbering()
        # a cell of a row and of a column counts with the row; cells that are not there have the number after the last
        in_row = numbers[:, rows].masked_fill(~first[:, rows, None], -1).permute(1, 2, 0)
        in_column = numbers[:, :, columns].masked_fill(first[:, :, None] | ~second[:, None, columns], -1)
        in_column = in_column.permute(1, 2, 0)
        self.shapes = (tuple(in_row.shape), tuple(in_column.shape))  # p, n2, channels; n1, q, channels
        taken = torch.cat([in_row.flatten(), in_column.flatten()])
        present = (taken >= 0).nonzero().flatten()
        place = torch.empty(border.size, dtype=torch.int64)
        place[taken[present]] = present
        self.place = place.to(device)
        self.index = torch.where(taken < 0, border.size, taken).to(device)
        there = [plane_waves(p, n, f) for p, n, f in zip((rows, columns), grid.sizes, grid.frequencies, strict=True)]
        self.spread = [w.mH.to(device=device, dtype=dtype).contiguous() for w in there]
        # frequencies left out are the conjugates of others: twice the real part
        kept = grid.weights(torch.device("cpu"), torch.float64)[0]
        back = [there[0] / grid.sizes[0], there[1] * kept / grid.sizes[1]]
        self.collect = [w.to(device=device, dtype=dtype) for w in back]

    @classmethod
    def of(cls, matrices: FrequencyMatrices, border: Border) -> PrunedProduct | None:
        """The product, or None where it would not be the cheaper way."""
        positions = [int(members.any(0).sum()) for members in border.members]
        if matrices.matrices.device.type != "cpu":  # measured on CPUs alone
            return None
        if not border.cellwise or len(positions) != 2 or not all(positions) or sum(positions) > _MOST_POSITIONS:
            return None
        small = math.prod(matrices.grid.frequencies) * border.channels < _LEAST_ENTRIES
        if small or matrices.elementwise or not matrices.matrices.is_complex():
            return None
        return cls(matrices, border)

    def pays(self, rest: int) -> bool:
        """Whether it is the cheaper way for ``rest`` vectors a block."""
        (p, _, channels), (_, q, _) = self.shapes
        return rest > 1 or p + q <= channels + 4

    def __call__(self, u: Tensor) -> Tensor:
        """``(Q u)`` on the border, of ``(rest, blocks, size)``."""
        matrices = self.matrices.matrices
        if len(matrices) < u.shape[1]:  # one block serves all
            return self(u.flatten(0, 1).unsqueeze(1)).reshape(u.shape)
        (rest, blocks), (n1, f2) = u.shape[:2], self.grid.frequencies
        p, q = self.shapes[0][0], self.shapes[1][1]
        rows, columns = self._transformed(u)
        rows_out = rows.new_zeros(blocks, p, f2 * rest * self.matrices.rows)
        columns_out = columns.new_empty(blocks, n1, q, rest * self.matrices.rows)
        waves, back = self.spread, self.collect
        for some, part in self._parts(u):
            spectrum = waves[0][part].expand(rows[some].shape[0], -1, p) @ rows[some]
            m = spectrum.shape[0] * spectrum.shape[1]
            spectrum = spectrum.view(m, f2, -1).baddbmm_(waves[1].expand(m, f2, q), columns[some, part].flatten(0, 1))
            product = per_frequency(matrices[some, part].flatten(0, 2), spectrum.view(m * f2, rest, -1))
            along = back[0][:, part].expand(rows[some].shape[0], p, -1)
            rows_out[some].baddbmm_(along, product.reshape(len(along), along.shape[-1], -1))
            columns_out[some, part] = (back[1] @ product.reshape(m, f2, -1)).view_as(columns_out[some, part])
        return self._on_border(rows_out.view(blocks, p, f2, rest, -1), columns_out.view(blocks, n1, q, rest, -1))

    def _parts(self, u: Tensor) -> list[tuple[slice, slice]]:
        """The frequencies a part at a time: whole blocks, or some along the first axis of one block."""
        (rest, blocks), (n1, f2) = u.shape[:2], self.grid.frequencies
        most = max(1, _PART_BYTES // (f2 * rest * self.shapes[0][2] * self.matrices.matrices.element_size()))
        if most >= n1:
            return [(slice(b, b + most // n1), slice(0, n1)) for b in range(0, blocks, most // n1)]
        return [(slice(b, b + 1), slice(k, k + most)) for b in range(blocks) for k in range(0, n1, most)]

    def _transformed(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Border vectors as spectra of rows ``(blocks, p, -1)`` and of columns ``(blocks, n1, q, -1)``."""
        rest, blocks = u.shape[:2]
        (p, n2, channels), (n1, q, _) = self.shapes
        cells = gathered(torch.nn.functional.pad(u.movedim(0, 1), (0, 1)), self.index)
        rows, columns = cells.split([p * n2 * channels, n1 * q * channels], dim=-1)
        rows = rows.reshape(blocks, rest, p, n2, channels)
        rows = torch.fft.rfft(rows, dim=3) if self.grid.real else torch.fft.fft(rows, dim=3)
        columns = torch.fft.fft(columns.reshape(blocks, rest, n1, q, channels), dim=2)
        rows, columns = (part.permute(0, 2, 3, 1, 4).contiguous() for part in (rows, columns))
        return rows.flatten(2), columns.flatten(3)

    def _on_border(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The border cells, from rows ``(blocks, p, f2, rest, channels)`` and columns ``(blocks, n1, q, ...)``."""
        if self.grid.real:
            rows = torch.fft.irfft(rows, n=self.grid.sizes[1], dim=2)
            columns = torch.fft.ifft(columns, dim=1).real
        else:
            rows, columns = torch.fft.ifft(rows, dim=2), torch.fft.ifft(columns, dim=1)
        cells = [part.permute(3, 0, 1, 2, 4).flatten(2) for part in (rows, columns)]
        return gathered(torch.cat(cells, dim=-1), self.place)

    @property
    def nbytes(self) -> int:
        """Bytes of the waves and numbers kept, without the matrices."""
        tensors = [self.place, self.index, *self.spread, *self.collect]
        return sum(t.numel() * t.element_size() for t in tensors)
