"""What the ways of solving a border system cost, and when a plan changes from one to the next.

An iteration is charged the flops that a factorisation does in the same time. After a few iterations of a solve the fall
of its residual says how many are to come. If these cost more than the factors of the whole border the plan makes the
factors, for good, unless they are many times what it has seen of the iteration; if wider crossings of the
preconditioner cost less than what they would spare, and no more than what has been spent, it widens them. What a solve
does not foretell its past decides: as soon as a plan would have been spared what the factors cost, had it had them from
the beginning, it makes them, and before a solve it widens the crossings that those until now have earned. A plan whose
solves are as quick as with factors iterates however many there are. Where an iteration gives up the factors may cost a
few times what it has.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsconv.border.direct.border_inverse import Cost

__all__ = ["GLANCE", "Effort", "Way"]

# The iterations that a solve has before another way is considered; then twice as many, and so on.
GLANCE = 12
# The first crossings are as wide as may be made in the time of so many border iterations; of one where few are to be
# expected, for damp of at least this part of sigma_max. ("same", 512², damp 1e-1, box and disk, float64: 7 iterations
# instead of 5, and 0.16 s instead of 0.22 in all.)
_CROSSING_WORK = 5
_STRONG_DAMP = 0.03
# The iterations after which a solve that has not foretold them is slow, and after which, in hindsight, wider crossings
# are considered.
_SLOW = 8 * GLANCE
_PATIENCE = 20
# The part of the iterations that wider crossings spare, until some have shown it.
_SPARED = 0.5
# Before a solve the crossings are widened when those before have cost this many times as much.
_EARNED = 6
# Factors end the iteration, wider crossings may shorten it: they may cost this many times as much.
_CERTAINTY = 3
# Where iterations are foretold that cost as much, the factors may cost this many times what the solve has.
_LEAP = 2
# The solves with the border that an answer takes, each of which is foretold by itself.
_STEPS = 2
# Where iterating does not arrive the factors may cost this many times what was spent on it.
_LAST_RESORT = 4
# Flops in the time of the calls of an iteration, whatever they compute. (Disk, valid, 256², damp 1e-3, float64, in all:
# 80 ms, and 207 ms with 0, by which factors seemed too dear.)
_CALL_WORK = 3e7
# The setup of another grid takes as long as so many border iterations.
_GRID_WORK = 5
# Flops in the time that it takes to make room for, gather and add up a number of the factors (one CPU core and two).
_ENTRY_WORK = 150
# The same for reading one in a solve with them, which takes the transforms of so many iterations besides. What is found
# in one solve by iterating may take so many with factors; what they spare counts where it takes so many times as long.
# (Motion, "same", 512², damp 1e-3: 11 iterations, 87 ms, and 113 ms by factors. Disk, valid: 119, 400 ms, and 23 ms.)
_READ_WORK = 12
_READ_ITERATIONS = 2
_REFINED = 3
_CLEARLY = 2


class Way(enum.Enum):
    """What a plan does when iterating has become too dear."""

    NONE = "go on"
    CROSSING = "widen the crossings"
    WHOLE = "factorise the whole border"


class Effort:
    """The work that a border system has cost, and that it would.

    Args:
        blocks: independent systems.
        cells: grid cells, per channel, that one product with the system transforms.
        channels: its channels.
        definite: whether it is definite: half of a factorisation, and a third of an iteration.
        damp: the least damping, relative to sigma_max.
        single: whether factors are made in single precision, which takes half as long.
        exchanged: whether those of crossings are of complex matrices of half the size, which takes half as long too.

    Attributes:
        spent: on iterations since the crossings were last widened.
        missed: what factors of the whole border would have spared the solves until now.
        latest: the iterations of the latest solve.
        spared: the part of the iterations that wider crossings are expected to spare.
    """

    def __init__(
        self,
        blocks: int,
        cells: int,
        channels: int,
        *,
        definite: bool,
        damp: float = 0.0,
        single: bool = False,
        exchanged: bool = False,
    ) -> None:
        self.blocks, self.cells, self.channels, self.definite = blocks, cells, channels, definite
        self._share = 0.5 if single else 1.0
        self._crossing_share = self._share * (0.5 if exchanged else 1.0)
        self._crossing_work = 1 if damp >= _STRONG_DAMP else _CROSSING_WORK
        self.spent = self.missed = 0.0
        self.latest = 0
        self.spared = _SPARED
        self._expected = math.inf  # to come, when last asked
        self._rate: float | None = None  # latest seen, and that before the crossings were widened
        self._before: float | None = None
        self._costs = {Way.NONE: math.inf, Way.CROSSING: math.inf, Way.WHOLE: math.inf}

    def iteration(self, rest: int) -> float:
        """One border iteration for ``rest`` right-hand sides a block (fitted on a CPU)."""
        weight, channels = 1 if self.definite else 3, self.channels
        each = channels * (20 * math.log2(self.cells) + 16 * channels)
        return _CALL_WORK + float(weight * rest * self.blocks * self.cells * each)

    def factors(self, unknowns: int) -> float:
        """Factorising so many unknowns of a crossing."""
        return self._crossing_share * self._flops(unknowns)

    def _flops(self, unknowns: int) -> float:
        return self.blocks * unknowns**3 * (1 if self.definite else 2) / 3

    def remember(self, iterations: int, rest: int, whole: Cost | None) -> None:
        """Take note of a solve that has ended; ``whole`` are the factors that it could have had."""
        self.latest = iterations
        if whole is not None:
            by_factors = _REFINED * (self.blocks * _READ_WORK * whole.entries + _READ_ITERATIONS * self.iteration(rest))
            by_iterations = iterations * self.iteration(rest)
            self.missed += by_iterations - by_factors if by_iterations > _CLEARLY * by_factors else 0.0

    def whole(self, cost: Cost) -> float:
        """Factorising the whole border, at this cost for each of ``blocks``, on a grid of its own."""
        work = self.blocks * (self._share * (cost.factors + cost.products) + _ENTRY_WORK * cost.entries)
        return work + _GRID_WORK * self.iteration(1) if work else 0.0

    def next_way(self, crossing: int, whole: float) -> Way:
        """What comes after iterating as now.

        Args:
            crossing: unknowns of the next wider crossing, 0 for none.
            whole: what the factors of the whole border cost, 0 where they cannot be made.
        """
        self._costs[Way.CROSSING] = self.factors(crossing) if crossing else math.inf
        self._costs[Way.WHOLE] = whole or math.inf
        if whole and (not crossing or whole <= _CERTAINTY * self._costs[Way.CROSSING]):
            return Way.WHOLE
        return Way.CROSSING if crossing else Way.NONE

    def due(self, way: Way) -> bool:
        """Whether, before a solve, wider crossings have been earned by the solves until now."""
        earned = self.spared * self.spent >= _SPARED * _EARNED * self._costs[way]
        return way is Way.CROSSING and self.latest >= _PATIENCE and earned

    @property
    def overdue(self) -> bool:
        """Whether, before a solve, those until now have earned the factors of the whole border."""
        return self.missed >= self._costs[Way.WHOLE]

    def choose(self, rest: int, already: int, done: int, expected: float, rate: float) -> Way:
        """The way that costs least, where a solve has done some iterations.

        Args:
            rest: right-hand sides a block.
            already: iterations of this solve before it last went another way.
            done: those since.
            expected: iterations to come.
            rate: by which the logarithm of the residual has fallen in one.
        """
        if self._before is not None:  # what the latest widening has spared is what the next one will
            self.spared, self._before = max(0.0, 1 - self._before / rate) if rate > 0 else 0.0, None
        self._rate = rate
        each = self.iteration(rest)
        to_come, spent = expected * each, (already + done) * each
        crossing, whole = self._costs[Way.CROSSING], self._costs[Way.WHOLE]
        due = self.spent + done * each >= crossing and self.spared > 0 and self.spared * to_come >= crossing
        left = (1 - self.spared) * to_come + crossing if due else to_come
        faster = already + done > GLANCE and expected < self._expected / 2
        self._expected = expected
        slow = already + done >= _SLOW and self.missed + spent >= whole
        if slow or (whole <= min(_STEPS * left, _LEAP * spent) and not faster):
            return Way.WHOLE
        return Way.CROSSING if due else Way.NONE

    def widened(self) -> None:
        """Take note that the crossings have been widened."""
        self.spent, self._before = 0.0, self._rate

    def worth(self, already: int, rest: int) -> bool:
        """Whether the factors of the whole border are the way to go on where the iteration has given up."""
        return self._costs[Way.WHOLE] <= _LAST_RESORT * (self.missed + already * self.iteration(rest))

    @property
    def first_crossing(self) -> float:
        """What the first crossings may cost, per cube of their unknowns."""
        return self._crossing_work * self.iteration(1) / self._flops(1)
