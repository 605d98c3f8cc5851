"""What the ways of solving a border system cost, and when a plan changes from one to the next.

An iteration is charged the flops that a factorisation does in the same time. As soon as the iterations of a plan have
cost what the next stronger way would (wider crossings of the preconditioner, or the factors of the whole border), the
plan takes it, for good: so none costs more than twice what it would have, had it known. Where an iteration gives up
the factors may cost a few times what it has.
"""

from __future__ import annotations

import math

from lsconv.fourier.embedding import Embedding

__all__ = ["Effort", "border_cells"]

# The first crossings are as wide as may be made in the time of so many border iterations.
_CROSSING_WORK = 5
# Factors end the iteration, wider crossings may shorten it: they may cost this many times as much.
_CERTAINTY = 3
# Where iterating does not arrive the factors may cost this many times what was spent on it.
_LAST_RESORT = 4


class Effort:
    """The work that a border system has cost, and that it would.

    Args:
        blocks: independent systems.
        cells: grid cells, per channel, that one product with the system transforms.
        channels: its channels.
        definite: whether it is definite: half of a factorisation, and a third of an iteration.

    Attributes:
        spent: on iterations since the last change of way.
        total: on iterations in all.
    """

    def __init__(self, blocks: int, cells: int, channels: int, *, definite: bool) -> None:
        self.blocks, self.cells, self.channels, self.definite = blocks, cells, channels, definite
        self.spent = self.total = 0.0

    def iteration(self, rest: int) -> float:
        """One border iteration for ``rest`` right-hand sides a block (fitted on a CPU)."""
        weight, channels = 1 if self.definite else 3, self.channels
        return float(weight * rest * self.blocks * self.cells * channels * (20 * math.log2(self.cells) + 16 * channels))

    def charge(self, work: float) -> None:
        """Count work as spent."""
        self.spent += work
        self.total += work

    def factors(self, unknowns: int) -> float:
        """Factorising so many unknowns, of a crossing or of the whole border."""
        return self.blocks * unknowns**3 * (1 if self.definite else 2) / 3

    def next_way(self, crossing: int, border: int) -> tuple[float, bool]:
        """What comes after iterating as now: its cost, and whether that is to factorise the whole border.

        Args:
            crossing: unknowns of the next wider crossing, 0 for none.
            border: unknowns of the whole border, 0 where its factors cannot be made.
        """
        wider, whole = self.factors(crossing), self.factors(border)
        factorise = border > 0 and (crossing == 0 or whole <= _CERTAINTY * wider)
        return (whole, True) if factorise else (wider, False)

    def worth(self, factors: float) -> bool:
        """Whether factors of this cost are the way to go on where the iteration has given up."""
        return 0 < factors <= _LAST_RESORT * self.total

    @property
    def first_crossing(self) -> float:
        """What the first crossings may cost, on the whole grid."""
        return _CROSSING_WORK * self.iteration(1) / self.factors(1)


def border_cells(embedding: Embedding, positions: list[list[list[int]]]) -> int:
    """How many cells lie on the border of these positions per channel and axis."""
    cells = math.prod(embedding.grid)
    return sum(
        cells - math.prod(n - len(places) for n, places in zip(embedding.grid, axes, strict=True)) for axes in positions
    )
