"""What the ways of solving a border system cost, and when a plan changes from one to the next.

An iteration is charged the flops that a factorisation does in the same time. As soon as the iterations of a plan have
cost what wider crossings of the preconditioner would, it widens them: within a solve where those to come cost as much
again, or else before the next solve. As soon as its slow solves have cost what the factors of the whole border would,
it makes these, for good. So none costs more than twice what it would have, had it known; and a plan whose solves are
quick iterates however many there are, without a pause for factors that no one asked for. Where an iteration gives up
the factors may cost a few times what it has.
"""

from __future__ import annotations

import enum
import math

__all__ = ["Effort", "Way"]

# The first crossings are as wide as may be made in the time of so many border iterations; of one where few are to be
# expected, for damp of at least this part of sigma_max. ("same", 512², damp 1e-1, box and disk, float64: 7 iterations
# instead of 5, and 0.16 s instead of 0.22 in all.)
_CROSSING_WORK = 5
_STRONG_DAMP = 0.03
# The iterations that a solve has before wider crossings are considered; those after which, in hindsight, they are; and
# after which a solve counts as slow.
_GLANCE = 12
_PATIENCE = 20
_SLOW = 100
# The part of the iterations that wider crossings spare, until some have shown it.
_SPARED = 0.5
# Before a solve the crossings are widened when those before have cost this many times as much.
_EARNED = 6
# Factors end the iteration, wider crossings may shorten it: they may cost this many times as much.
_CERTAINTY = 3
# Where iterating does not arrive the factors may cost this many times what was spent on it.
_LAST_RESORT = 4


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

    Attributes:
        spent: on iterations since the crossings were last widened.
        slow: on iterations of slow solves.
        latest: the iterations of the latest solve.
        spared: the part of the iterations that wider crossings are expected to spare.
    """

    def __init__(
        self, blocks: int, cells: int, channels: int, *, definite: bool, damp: float = 0.0, single: bool = False
    ) -> None:
        self.blocks, self.cells, self.channels, self.definite = blocks, cells, channels, definite
        self._share = 0.5 if single else 1.0
        self._crossing_work = 1 if damp >= _STRONG_DAMP else _CROSSING_WORK
        self.spent = self.slow = 0.0
        self.latest = 0
        self.spared = _SPARED
        self._rate: float | None = None  # latest seen, and that before the crossings were widened
        self._before: float | None = None
        self._costs = {Way.NONE: math.inf, Way.CROSSING: math.inf, Way.WHOLE: math.inf}

    def iteration(self, rest: int) -> float:
        """One border iteration for ``rest`` right-hand sides a block (fitted on a CPU)."""
        weight, channels = 1 if self.definite else 3, self.channels
        return float(weight * rest * self.blocks * self.cells * channels * (20 * math.log2(self.cells) + 16 * channels))

    def factors(self, unknowns: int) -> float:
        """Factorising so many unknowns, of a crossing or of the whole border."""
        return self._share * self._flops(unknowns)

    def _flops(self, unknowns: int) -> float:
        return self.blocks * unknowns**3 * (1 if self.definite else 2) / 3

    def remember(self, iterations: int, rest: int) -> None:
        """Take note of a solve that has ended."""
        self.latest = iterations
        if iterations >= _SLOW:
            self.slow += iterations * self.iteration(rest)

    def next_way(self, crossing: int, border: int) -> Way:
        """What comes after iterating as now.

        Args:
            crossing: unknowns of the next wider crossing, 0 for none.
            border: unknowns of the whole border, 0 where its factors cannot be made.
        """
        self._costs[Way.CROSSING], self._costs[Way.WHOLE] = self.factors(crossing), self.factors(border)
        if border and (not crossing or self._costs[Way.WHOLE] <= _CERTAINTY * self._costs[Way.CROSSING]):
            return Way.WHOLE
        return Way.CROSSING if crossing else Way.NONE

    def iterations(self, way: Way, already: int, rest: int) -> float:
        """How many iterations may be done before ``way`` is due, ``already`` done in this solve."""
        cost, each = self._costs[way], self.iteration(rest)
        if way is Way.CROSSING:
            return max(_GLANCE, (cost - self.spent) / each)
        return max(_SLOW - already, _PATIENCE, (cost - self.slow) / each - already)

    def due(self, way: Way) -> bool:
        """Whether, before a solve, wider crossings have been earned by the solves until now."""
        earned = self.spared * self.spent >= _SPARED * _EARNED * self._costs[way]
        return way is Way.CROSSING and self.latest >= _PATIENCE and earned

    def pays(self, rest: int, iterations: float, rate: float) -> bool:
        """Whether wider crossings cost less than what they spare of so many ``iterations``.

        Args:
            rest: right-hand sides a block.
            iterations: expected.
            rate: by which the logarithm of the residual has fallen in one.
        """
        if self._before is not None:  # what the latest widening has spared is what the next one will
            self.spared, self._before = max(0.0, 1 - self._before / rate) if rate > 0 else 0.0, None
        self._rate = rate
        return self.spared * iterations * self.iteration(rest) >= self._costs[Way.CROSSING]

    def widened(self) -> None:
        """Take note that the crossings have been widened."""
        self.spent, self._before = 0.0, self._rate

    def worth(self, border: int, already: int, rest: int) -> bool:
        """Whether the factors of the whole border are the way to go on where the iteration has given up."""
        return self.factors(border) <= _LAST_RESORT * (self.slow + already * self.iteration(rest))

    @property
    def first_crossing(self) -> float:
        """What the first crossings may cost, per cube of their unknowns."""
        return self._crossing_work * self.iteration(1) / self._flops(1)
