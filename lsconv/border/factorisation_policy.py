"""The policy of a border: it is factorised when the iterations on it have cost as much as its factors would."""

from __future__ import annotations

import math

import torch

from lsconv.border.cost_model import CostModel, FactorCost, Factorise, Limits
from lsconv.border.system.border_krylov import Allowance
from lsconv.operators.memory import allowed_bytes

__all__ = ["FactorisationPolicy", "expected_iterations"]


def expected_iterations(condition: float) -> float:
    """The iterations that a border is expected to take: 1.5 times the binary logarithm of the condition.

    With the Schwarz preconditioner their number grows with that logarithm, and not with the root of the condition: most
    blurs take 0.8 to 3 times it.

    Args:
        condition: of the normal equations, the square of that of A with its damping.
    """
    return 1.5 * math.log2(max(condition, 1.0))


class FactorisationPolicy:
    """The choice between iterating on a border and factorising it, once for all solves of a plan.

    Factors that cost less than the iterations expected are made before any. Otherwise iterations are paid from a
    budget, the work of the factors, and these are made when it is used up. All solves together then cost at most twice
    as much as the better of both ways from the beginning.

    Args:
        model: the cost model of the border.
        cost: the cost of its factors, per block.
        limits: when the border is factorised, and the bytes that factors may take.
        condition: of the normal equations, for the iterations expected.
        device: the device of the factors.

    Attributes:
        due: an iteration has ended because the budget is used up, and the factors fit in memory.
    """

    def __init__(
        self, model: CostModel, cost: FactorCost, limits: Limits, condition: float, device: torch.device
    ) -> None:
        self._model, self._cost, self._limits, self._device = model, cost, limits, device
        self._expected, self.due = expected_iterations(condition), False
        # the work that iterations may still cost; infinite: no factors are made
        self._budget = math.inf if limits.factorise is Factorise.NEVER else model.factor_work(cost)

    def forecast(self, rhs: int) -> tuple[float, float, bool]:
        """The cost of the factors in iterations, the iterations expected, and whether the factors fit in memory.

        Args:
            rhs: the right-hand sides of an iteration, per block.
        """
        cost = self._model.factor_work(self._cost) / self._model.iteration_work(rhs)
        return cost, self._expected, self._factors_fit()

    def should_factorise(self, rhs: int, solves: int) -> bool:
        """Tell whether to factorise before any iteration.

        Args:
            rhs: the right-hand sides of a solve, per block.
            solves: the solves that are expected, one after the other.
        """
        if self._budget == math.inf or self._limits.factorise is Factorise.AFTER_ITERATIONS:
            return False
        cost, expected, fits = self.forecast(rhs)
        return fits and (self._limits.factorise is Factorise.AT_ONCE or cost <= solves * expected)

    def allowance(self, rhs: int) -> Allowance | None:
        """The iterations that the budget allows for ``rhs`` right-hand sides; None: any number."""
        if self._budget == math.inf:
            return None
        return Allowance(math.ceil(self._budget / self._model.iteration_work(rhs)))

    def record(self, iterations: int, rhs: int, *, exceeded: bool) -> None:
        """Charge a solve to the budget, less what a solve with the factors would have cost.

        Args:
            iterations: those taken.
            rhs: the right-hand sides, per block.
            exceeded: they have ended because their allowance was exceeded, which uses the budget up.
        """
        work = iterations * self._model.iteration_work(rhs) - self._model.read_work(self._cost)
        self._budget -= max(0.0, work)
        if exceeded:
            self._budget = min(self._budget, 0.0)

    def is_due(self) -> bool:
        """Update and return :attr:`due`; where the factors do not fit in memory, give them up."""
        if self._budget <= 0:
            self.due = self._factors_fit()
            if not self.due:
                self.give_up()
        return self.due

    def give_up(self) -> None:
        """Iterate from now on, whatever it costs."""
        self._budget, self.due = math.inf, False

    def _factors_fit(self) -> bool:
        """Tell whether the factors fit in memory."""
        return self._model.peak_bytes(self._cost) <= allowed_bytes(self._limits.spare_bytes, self._device)
