"""The loop around every method: stopping tests, restarts after a refused certificate, callback, progress, history.

A method is an object with one ``step``. It does not decide when to stop: it has estimates of residual, gradient and
``||A||``, which the loop compares with the tolerances on the device at every iteration, so that an item stops at the
same iteration whatever ``check_every`` is. The answer is then certified by products with A. Where the estimates were
wrong, by rounding or by a preconditioned norm, the item is restarted from its x, until the certificate holds or
restarts no longer help. An item is also restarted where its gradient passes only because of rounding, which can hide an
error along small singular values: the restart solves for the residual, and would find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import PreconditionerError
from lsconv.krylov.loop.batched_scalars import Scalar, any_item, at_least, hypot, no_item, unbounded, where
from lsconv.krylov.loop.certificate import (
    LENGTH_LIMIT,
    Certificate,
    NormBounds,
    NullSpaceBound,
    RankThreshold,
    norm_from_below,
)
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.lagrange_multipliers import record_multipliers
from lsconv.krylov.loop.method import Cause, Method
from lsconv.krylov.loop.monitor import Monitor
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.operators.batch_layout import select

__all__ = ["iterate"]


def iterate(
    problem: Problem,
    options: Options,
    start: Callable[[Tensor | None, Scalar], Method],
    *,
    extract: Callable[[Tensor], Tensor] = lambda z: z,
    square: bool = False,
    selection: Callable[[], tuple[Tensor, Any]] | None = None,
    name: str = "",
    quiet: bool = False,
) -> Solution:
    """Run a method on a problem until every item has stopped, and certify the answer.

    Args:
        problem: the problem as the user posed it; the certificate is about this one.
        options: limits, tolerances, callback and progress bar.
        start: builds the method at a start (None for zero) for the items that are running.
        extract: a function from the method's iterate to x, for methods that work on an augmented problem.
        square: convergence is tested by the residual only.
        selection: returns the damping that the method chose, and the record of the choice.
        name: of the method, for messages.
        quiet: do not :func:`report` items that did not converge.
    """
    solution = _Loop(problem, options, start, extract, square, selection, name).run()
    if not quiet:
        report(solution, name, raise_on_failure=options.raise_on_failure)
    return solution


class _Loop:
    """One solve: the arguments of :func:`iterate`, and the state of its items."""

    def __init__(
        self,
        problem: Problem,
        options: Options,
        start: Callable[[Tensor | None, Scalar], Method],
        extract: Callable[[Tensor], Tensor],
        square: bool,
        selection: Callable[[], tuple[Tensor, Any]] | None,
        name: str,
    ) -> None:
        self.problem, self.options, self.start, self.extract = problem, options, start, extract
        self.square, self.selection, self.name = square, selection, name
        self.y_norm: Scalar = problem.codomain.safe_norm(problem.y)
        self.monitor = Monitor(problem, options, self.y_norm, square=square)
        self.damp: Scalar = 0.0 if problem.damp is None else problem.scalar(problem.damp)
        # Items for which a restart has shown that the gradient is only rounding. A method that chooses the damping is
        # not restarted, so all of its items count as confirmed.
        self.confirmed: Scalar = problem.scalar(torch.full_like(problem.nonfinite, selection is not None))
        self._sharper_norm: Scalar | None = None
        self.stopped = False
        self.bar: Any = None

    @torch.no_grad()
    def run(self) -> Solution:
        """Iterate and certify, and restart the items whose certificate refutes the estimates, while that helps."""
        monitor = self.monitor
        iterate, multipliers, certificate = self.problem.x0, None, None
        excused = no_item(self.confirmed)
        try:
            while True:
                method = self._one_pass(iterate)
                new_iterate, new_multipliers = method.solution(), method.multipliers()
                if multipliers is not None and new_multipliers is not None:
                    new_multipliers = multipliers + new_multipliers
                if self.selection is not None:
                    self.damp = self.selection()[0]
                # The sharper bound of ||A|| is expensive, and only computed where a restart has not helped.
                claimed = any_item(monitor.codes & Cause.CLAIMED != 0)
                new = self._judge().certify(
                    self.extract(new_iterate),
                    self.problem.y,
                    host_scalars=self.problem.host_scalars,
                    sharpen=certificate is not None or not claimed,
                )
                if iterate is None or certificate is None:
                    improved = new.tolerance_ratio == new.tolerance_ratio  # not NaN
                    iterate, multipliers, certificate = new_iterate, new_multipliers, new
                else:
                    improved = new.tolerance_ratio < 0.5 * certificate.tolerance_ratio
                    worse = where(
                        excused,
                        (new.converged == 0) | (new.objective >= certificate.objective),
                        new.tolerance_ratio >= certificate.tolerance_ratio,
                    )
                    no_longer_falls = (monitor.codes == Cause.CLAIMED) & (new.objective > 0.5 * certificate.objective)
                    self.confirmed = self.confirmed | (excused & no_longer_falls)
                    iterate = _select(worse, iterate, new_iterate)
                    if multipliers is not None and new_multipliers is not None:
                        multipliers = _select(worse, multipliers, new_multipliers)
                    certificate = certificate.select(worse, new)
                excused = certificate.excused & (self.confirmed == 0)
                refused = (certificate.converged == 0) & improved & (unbounded(certificate.tolerance_ratio) == 0)
                may_go_on = (monitor.codes == Cause.CLAIMED) & (monitor.iterations < self.options.max_iter)
                retry = (refused | excused) & may_go_on
                if self.stopped or not any_item(retry):
                    break
                monitor.resume(retry, certificate.tolerance_ratio)
                # freed before the next pass allocates its own
                del method, new_iterate, new_multipliers, new
        finally:
            if self.bar is not None:
                self.bar.close()
        return self._finish(method, self.extract(iterate), certificate, multipliers)

    # ------------------------------------------------------------------ one pass: start, step, test

    def _one_pass(self, start: Tensor | None) -> Method:
        """Iterate from a start until, by the estimates, every item has converged or cannot continue."""
        monitor, every = self.monitor, self.options.check_every
        method = self.start(start, monitor.running)
        monitor.test(method, record=not monitor.rows)
        for step in range(self.options.max_iter + 1):
            if step % every == 0 and not self._synchronise(method, step):
                break
            if monitor.running is False:  # a Python bool, which costs no synchronisation
                break
            method.step(monitor.running)
            monitor.count()
            monitor.test(method)
        return method

    def _synchronise(self, method: Method, step: int) -> bool:
        """Call the callback and the progress bar, and tell whether an item runs; the host waits for the device."""
        running = any_item(self.monitor.running)
        if self.options.progress:
            self._show(method)
        if self.options.callback is not None and running:
            residual, gradient, _, _ = self.monitor.rows[-1]
            now = [self.problem.tensor(scalar).clone() for scalar in (self.monitor.running, residual, gradient)]
            state = IterationState(step, now[0], now[1], now[2], lambda: self.extract(method.solution()).clone())
            if self.options.callback(state):
                self.stopped = True
                return False
        return running

    def _show(self, method: Method) -> None:
        """Update the progress bar."""
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(desc=self.name, unit=" it")
        relative = method.residual / at_least(self.y_norm, torch.finfo(torch.float32).tiny)
        worst = self.problem.tensor(relative)[self.problem.tensor(self.monitor.running)]
        if worst.numel():
            self.bar.set_postfix(residual=f"{float(worst.max()):.2e}", running=worst.numel(), refresh=False)
        self.bar.update(int(self.problem.tensor(self.monitor.iterations).max()) - self.bar.n)

    # ------------------------------------------------------------------ the certificate and the answer

    def _judge(self) -> Judge:
        """The tests of a certificate, with the lower bound of ||A|| that the iterations have found so far."""
        problem, tolerances = self.problem, self.options.tolerances
        return Judge(
            problem.A,
            tolerances,
            self.damp,
            rounding=tolerances.rounding,
            square=self.square,
            norm=NormBounds(self.monitor.operator_norm, sharper=self._sharpen),
            rank=RankThreshold(length_limit=LENGTH_LIMIT),
            null_space=NullSpaceBound(
                where(self.damp > 0, tolerances.null_share, math.inf),
                tolerances.eps if problem.x0 is None and problem.N is None else None,
            ),
        )

    def _sharpen(self) -> Scalar:
        """Return a better lower bound of ``||A||``, found once for all certificates."""
        if self._sharper_norm is None:
            self._sharper_norm = norm_from_below(self.problem.A, host_scalars=self.problem.host_scalars)
            self.monitor.raise_norm(hypot(self._sharper_norm, self.damp + 0 * self._sharper_norm))
        return self._sharper_norm

    def _finish(self, method: Method, x: Tensor, certificate: Certificate, multipliers: Tensor | None) -> Solution:
        """Make the :class:`Solution` of the last pass, with the status of every item."""
        problem, codes = self.problem, self.monitor.codes
        if any_item(codes & Cause.NOT_DEFINITE):
            raise PreconditionerError(
                "M or N: the preconditioner is not Hermitian positive definite (p^H M p <= 0 for some p != 0). "
                "A pseudo-inverse with a kernel cannot be one; add damping to it."
            )
        zero, unsolved = problem.scalar(problem.zero), problem.scalar(problem.nonfinite) | (codes & Cause.OVERFLOW != 0)
        if any_item(zero | unsolved):
            for items, value in ((zero, 0.0), (unsolved, torch.nan)):
                x = _select(items, torch.full_like(x, value), x)
        status: Scalar = 0 * codes + Status.ITERATION_LIMIT.code
        if self.stopped:
            status = where(codes == 0, Status.CALLBACK.code, status)
        judge = self._judge()
        residual_ok, gradient_ok = method.converged(problem, x, certificate, judge)
        gradient_ok = gradient_ok & ((certificate.excused == 0) | self.confirmed)
        met = (residual_ok | gradient_ok) & (problem.scalar(problem.zero) == 0)
        doubtful = no_item(met)
        # A start or N takes iterates out of the range of A^H; with [A, damp I] rounding does, where s is large.
        if judge.null_space.range_eps is None or problem.M is not None or method.leaves_range:
            doubtful = met & judge.exceeds_null_share(certificate)
        causes = [
            (codes & (Cause.CLAIMED | Cause.STUCK), Status.STAGNATION),
            (codes & Cause.CONDITION, Status.CONDITION_LIMIT),
            (codes & Cause.CURVATURE, Status.NEGATIVE_CURVATURE),
            (gradient_ok, Status.GRADIENT),
            (residual_ok, Status.RESIDUAL),
            (doubtful, Status.RANK_DEFICIENT),
            (zero, Status.ZERO),
            (unsolved, Status.NON_FINITE),
        ]
        for happened, member in causes:
            status = where(happened != 0, member.code, status)
        residual_norm, gradient_norm = (
            where(unsolved, math.nan, where(zero, 0.0, norm))
            for norm in (certificate.residual_norm, certificate.gradient_norm)
        )
        tensor = problem.tensor
        solution = Solution(
            x=x,
            codes=tensor(status),
            converged=tensor((residual_ok | gradient_ok | zero) & (unsolved == 0) & (doubtful == 0)),
            iterations=tensor(self.monitor.iterations),
            residual_norm=tensor(residual_norm),
            gradient_norm=tensor(gradient_norm),
            damp=tensor(self.damp),
            history=self.monitor.history(),
            selection=None if self.selection is None else self.selection()[1],
        )
        if multipliers is not None and not any_item((certificate.residual_ok | zero | unsolved) == 0):
            record_multipliers(problem.A, x, multipliers, self.options.tolerances.rtol)
        return solution


def _select(items: Scalar, a: Tensor, b: Tensor) -> Tensor:
    """Return the vectors ``a`` for these items, ``b`` for the others."""
    if isinstance(items, Tensor):
        return select(items, a, b)
    return a if items else b
