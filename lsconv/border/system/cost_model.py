"""The work of a border system, and when a plan factorises its border instead of iterating on it.

An iteration is charged the flops that a factorisation does in the same time. A plan makes the factors, for good, as
soon as it has spent on iterations what they cost; in a solve whose residual falls so slowly that the iterations to come
would cost as much, already when it has spent half of that. Each way costs then at most twice what the better one would
have cost from the beginning. A plan whose solves are as quick as with factors iterates however many there are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsconv.border.direct.cost import Cost

__all__ = ["FIRST_LOOK", "Effort"]

# The iterations of a solve after which those to come are foretold; then after twice as many, and so on.
FIRST_LOOK = 12
# The solves with the border that an answer takes, each of which is foretold by itself.
_STEPS = 2
# Where iterations are foretold that cost as much, the factors may cost this many times what has been spent.
_LEAP = 2
# Flops in the time of the calls of an iteration, whatever they compute.
_CALL_WORK = 3e7
# The setup of another grid takes as long as so many border iterations.
_GRID_WORK = 5
# Flops in the time that it takes to make room for, gather and add up a number of the factors (one CPU core and two).
_ENTRY_WORK = 150
# The same for reading one in a solve with them, which takes as long as so many iterations besides; what is around the
# border iteration, and is not needed with factors, takes as long as so many (benchmarks/kept_plan.py prints all three).
_READ_WORK = 12
_READ_ITERATIONS = 5
_OUTER_ITERATIONS = 10


class Effort:
    """The work that a border system has cost, and that it would.

    Args:
        blocks: independent systems.
        cells: grid cells, per channel, that one product with the system transforms.
        channels: its channels.
        definite: whether it is definite: an iteration costs a third.

    Attributes:
        missed: what factors of the whole border would have spared the solves until now.
    """

    def __init__(self, blocks: int, cells: int, channels: int, *, definite: bool) -> None:
        self.blocks, self.cells, self.channels, self.definite = blocks, cells, channels, definite
        self.missed = 0.0

    def iteration(self, rest: int) -> float:
        """One border iteration for ``rest`` right-hand sides a block (benchmarks/border_iteration.py prints both)."""
        weight, channels = 1 if self.definite else 3, self.channels
        each = channels * (20 * math.log2(self.cells) + 16 * channels)
        return _CALL_WORK + float(weight * rest * self.blocks * self.cells * each)

    def factors(self, cost: Cost) -> float:
        """Factorising the whole border at this cost for each of ``blocks``, on a grid of its own."""
        return self.blocks * (cost.setup + _ENTRY_WORK * cost.entries) + _GRID_WORK * self.iteration(1)

    def bytes(self, cost: Cost) -> float:
        """The bytes that there are at a time while the factors are made, in double precision."""
        return 8 * self.blocks * cost.peak

    def solve(self, cost: Cost, rest: int, transform: float) -> float:
        """A solve with factors of this cost, for ``rest`` right-hand sides a block.

        Args:
            cost: of the factors.
            rest: right-hand sides a block.
            transform: of a transform of their grid, as :func:`~lsconv.operators.fft_convolution.transform_cost` has it,
                for all channels.
        """
        weight = 1 if self.definite else 3
        products = 16 * self.channels**2 * self.cells
        return self.blocks * (
            _READ_WORK * cost.entries + _READ_ITERATIONS * weight * rest * (20 * transform + products)
        )

    def remember(self, iterations: int, rest: int, cost: Cost) -> None:
        """Take note of a solve that has ended; ``cost`` is that of the factors that it could have had."""
        by_factors = self.blocks * _READ_WORK * cost.entries + _READ_ITERATIONS * self.iteration(rest)
        self.missed += max(0.0, (iterations + _OUTER_ITERATIONS) * self.iteration(rest) - by_factors)

    def overdue(self, cost: Cost) -> bool:
        """Tell whether the solves until now have earned the factors."""
        return self.missed >= self.factors(cost)

    def ends(self, cost: Cost, rest: int, done: int, expected: float) -> bool:
        """Tell whether factors take over from a solve.

        Args:
            cost: of the factors.
            rest: right-hand sides a block.
            done: iterations of the solve.
            expected: iterations to come.
        """
        each, factors = self.iteration(rest), self.factors(cost)
        spent = self.missed + done * each
        return spent >= factors or factors <= min(_STEPS * expected * each, _LEAP * spent)
