"""A border of rows and columns of a plane, which are the last ones of every channel."""

from __future__ import annotations

from dataclasses import dataclass

from lsconv.border.truncated_circulant import Positions

__all__ = ["CrossedBorder"]


@dataclass(frozen=True)
class CrossedBorder:
    """The cells of channel c from row ``rows[c]`` on, and those from column ``columns[c]`` on.

    The strip H is that of the rows, over all columns; the rest V' is that of the columns above it.

    Attributes:
        grid: sizes of the periodic grid.
        rows: where the rows of each channel begin.
        columns: where its columns begin.
    """

    grid: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, grid: tuple[int, ...], positions: Positions) -> CrossedBorder:
        """The border of these positions per channel and axis, on a grid of one or two dimensions.

        Cells between the outputs and those border cells that read an input read nothing: they may as well be border.
        """
        first = [[min(axis, default=n) for axis, n in zip(axes, grid, strict=True)] for axes in positions]
        if len(grid) == 1:
            grid, first = (1, *grid), [[1, *starts] for starts in first]
        rows, columns = zip(*first, strict=True)
        return cls((grid[0], grid[1]), rows, columns)

    @property
    def turned(self) -> CrossedBorder:
        """The border with rows for columns."""
        return CrossedBorder(self.grid[::-1], self.columns, self.rows)

    @property
    def rest(self) -> int:
        """The cells of V'."""
        return sum(n * (self.grid[1] - m) for n, m in zip(self.rows, self.columns, strict=True))

    @property
    def interior(self) -> tuple[int, ...]:
        """The cells of each channel that are not border."""
        return tuple(n * m for n, m in zip(self.rows, self.columns, strict=True))

    @property
    def shortest(self) -> bool:
        """Tell whether V' is no larger than it would be with rows for columns."""
        return self.rest <= self.turned.rest

    @property
    def height(self) -> int:
        """The rows of V' of the channel that has most."""
        return max(self.rows)

    @property
    def width(self) -> int:
        """The columns of the channel that has most."""
        return self.grid[1] - min(self.columns)

    @property
    def depth(self) -> int:
        """The rows of H of the channel that has most."""
        return self.grid[0] - min(self.rows)
