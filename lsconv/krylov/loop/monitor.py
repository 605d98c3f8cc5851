"""The stopping tests of one solve, item by item and on the device, and the history of the estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import Scalar, at_least, divide, maximum, unbounded, where
from lsconv.krylov.loop.method import Cause, Method
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.loop.solution import History

__all__ = ["Monitor"]


class Monitor:
    """Compares a method's estimates with the tolerances at every iteration.

    All state is one scalar per item, of the kind that the problem's methods use: nothing here waits for a device.

    Attributes:
        running: the items that iterate.
        codes: the reasons why the others stopped, bits of :class:`Cause`.
        iterations: the number of iterations of each.
        operator_norm: the largest lower bound of ``||A||`` so far.
    """

    def __init__(self, problem: Problem, options: Options, y_norm: Scalar, *, square: bool) -> None:
        self.problem, self.max_iter, self.square = problem, options.max_iter, square
        tolerances = options.tolerances
        self.atol: Scalar = tolerances.atol
        self.has_atol, self.conlim = tolerances.atol > 0, tolerances.conlim
        # Estimates below the rounding of the dtype are meaningless, so no bound is smaller than that.
        self.eps, self.y_norm = tolerances.eps, y_norm
        self.residual_bound = maximum(tolerances.residual_bound(y_norm), self.eps * y_norm)
        self.rtol: Scalar = max(tolerances.rtol, self.eps)
        self.running = problem.scalar(~(problem.nonfinite | problem.zero))
        self.codes, self.iterations = 0 * self.running, 0 * self.running
        self.operator_norm = 0 * y_norm
        self.rows: list[tuple[Scalar, Scalar, Scalar, Scalar]] = []

    def resume(self, items: Scalar, tolerance_ratio: Scalar) -> None:
        """Restart these items with tighter bounds; all others are stopped.

        With the same bounds the estimates, which have only a lower bound of ``||A||``, would stop an item at once.

        Args:
            items: the items whose certificate refutes the estimates.
            tolerance_ratio: the tolerance ratio of the certificate, above 1.
        """
        self.codes, self.running = where(items, 0, self.codes), items
        tighter = where(items, at_least(0.9 / tolerance_ratio, 0.5), 1.0)
        self.rtol = maximum(self.rtol * tighter, self.eps + 0 * tighter)
        self.residual_bound = maximum(self.residual_bound * tighter, self.eps * self.y_norm)
        self.atol = self.atol * tighter

    def raise_norm(self, bound: Scalar) -> None:
        """Record a larger lower bound of ``||A||``, and lower rtol and atol so that the bound of the gradient stays."""
        raised = _raised(self.operator_norm, bound + 0 * self.operator_norm)
        ratio = divide(self.operator_norm, raised)
        self.rtol, self.atol, self.operator_norm = self.rtol * ratio, self.atol * ratio, raised
        residual, gradient, _, running = self.rows[-1]
        self.rows[-1] = (residual, gradient, raised, running)

    def count(self) -> None:
        """Count an iteration of the items that are running."""
        self.iterations += self.running

    def test(self, method: Method, record: bool = True) -> None:
        """Stop the items whose estimates meet the tolerance, or that cannot go on; ``record`` keeps the estimates."""
        residual, norm = method.residual, method.operator_norm
        gradient = residual if method.gradient is None else method.gradient
        self.operator_norm = _raised(self.operator_norm, norm)
        claim = residual <= self.residual_bound
        if not self.square and method.gradient is not None:
            bound = self.rtol * residual
            if self.has_atol:
                bound = maximum(bound, self.atol + 0 * bound)
            claim = claim | (gradient <= bound * self.operator_norm)
        if method.self_converged is not None:
            claim = claim | method.self_converged
        code = claim * Cause.CLAIMED + unbounded(residual + gradient + norm) * Cause.OVERFLOW
        if method.condition is not None:
            code = code + (method.condition > self.conlim) * Cause.CONDITION
        if method.failure is not None:
            code = code + method.failure
        code = code + (self.iterations >= self.max_iter) * Cause.LIMIT
        if record:
            self.rows.append((residual, gradient, self.operator_norm, self.running))
        self.codes = self.codes + code * self.running
        self.running = (self.codes == 0) & self.running

    def history(self) -> History:
        """The estimates of every item, without the iterations during which only others were running."""
        problem = self.problem
        if problem.host_scalars:
            rows = torch.tensor([row[:3] for row in self.rows if row[3]], dtype=problem.domain.scalar).reshape(-1, 3)
            return History(*(column.reshape(-1, *problem.batch) for column in rows.unbind(-1)))
        residual, gradient, norm, alive = (torch.stack(column) for column in zip(*self.rows, strict=True))
        order = torch.argsort((~alive).to(torch.int8), dim=0, stable=True)
        length = int(alive.sum(0).max()) if alive.any() else 0

        def close_up(values: Tensor) -> Tensor:
            values = values.masked_fill(~alive, torch.nan)
            return values.gather(0, order)[:length]

        return History(close_up(residual), close_up(gradient), close_up(norm))


def _raised(bound: Scalar, other: Scalar) -> Scalar:
    """The larger one; where one is NaN, the other."""
    if isinstance(bound, Tensor):
        return torch.fmax(bound, other)
    return other if other > bound else bound
