"""A border of rows and columns of a plane, the last ones of every channel, and the symmetries of operators on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.penalty import Penalty
from lsconv.border.truncated_circulant import Positions
from lsconv.fourier.embedding import Embedding

__all__ = ["CrossedBorder", "crossed_border", "is_even", "one_channel_saddle"]


@dataclass(frozen=True)
class CrossedBorder:
    """The cells of channel c from row ``rows[c]`` on, and those from column ``columns[c]`` on.

    The strip H is that of the rows, over all columns; the rest V' is that of the columns above it.

    Attributes:
        grid: sizes of the periodic grid.
        rows: the first row of the border, per channel.
        columns: the first column of the border, per channel.
    """

    grid: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, grid: tuple[int, ...], positions: Positions) -> CrossedBorder:
        """The border of these positions per channel and axis, on a grid of one or two dimensions.

        Cells between the outputs and the border influence no output, and count as border.
        """
        first = [[min(axis, default=n) for axis, n in zip(axes, grid, strict=True)] for axes in positions]
        if len(grid) == 1:
            grid, first = (1, *grid), [[1, *starts] for starts in first]
        rows, columns = zip(*first, strict=True)
        return cls((grid[0], grid[1]), rows, columns)

    @property
    def turned(self) -> CrossedBorder:
        """The border with its two axes exchanged."""
        return CrossedBorder(self.grid[::-1], self.columns, self.rows)

    @property
    def column_cells(self) -> int:
        """The cells of V'."""
        return sum(n * (self.grid[1] - m) for n, m in zip(self.rows, self.columns, strict=True))

    @property
    def interior(self) -> tuple[int, ...]:
        """The cells of each channel that are not border."""
        return tuple(n * m for n, m in zip(self.rows, self.columns, strict=True))

    @property
    def shortest(self) -> bool:
        """Tell whether V' is no larger than it would be with rows for columns."""
        return self.column_cells <= self.turned.column_cells

    @property
    def height(self) -> int:
        """The largest number of rows of V' in a channel."""
        return max(self.rows)

    @property
    def width(self) -> int:
        """The largest number of border columns in a channel."""
        return self.grid[1] - min(self.columns)

    @property
    def depth(self) -> int:
        """The largest number of rows of H in a channel."""
        return self.grid[0] - min(self.rows)


def is_even(spectrum: Tensor, condition: float) -> bool:
    """Tell whether a real operator is even along both axes, up to the rounding that its condition amplifies."""
    spectrum = torch.view_as_real(spectrum) if spectrum.is_complex() else spectrum
    other = spectrum.flip(1).roll(1, 1)
    rounding = 100 * torch.finfo(spectrum.dtype).eps * condition
    return bool(torch.linalg.vector_norm(spectrum - other) <= rounding * torch.linalg.vector_norm(spectrum))


def crossed_border(form: str, embedding: Embedding, penalty: Penalty | None) -> CrossedBorder:
    """The border, of rows and columns, of a truncated block-circulant operator.

    Args:
        form: "valid", "full" or "saddle".
        embedding: its grid.
        penalty: the further rows below the convolution, if any.
    """
    if penalty is not None:
        embedding = penalty.embedding(embedding.batch_shape)
    out_border = embedding.output_border() if penalty is None else penalty.border(embedding)
    positions = (out_border if form != "full" else []) + (embedding.input_border() if form != "valid" else [])
    return CrossedBorder.of(embedding.grid, positions)


def one_channel_saddle(border: CrossedBorder, *, definite: bool) -> bool:
    """Tell whether a border is one of the saddle operator of one channel, with as many cells of either component."""
    return not definite and len(border.rows) == 2 and len({*zip(border.rows, border.columns, strict=True)}) == 1
