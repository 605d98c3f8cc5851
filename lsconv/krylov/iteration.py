"""The loop around every method: masks, stopping tests, restarts after a failed audit, callback, progress, history.

A method is an object with one ``step``. It never decides when to stop; it keeps three estimates, and the loop compares
them on the device at every iteration, so that an item stops at the same iteration whatever ``check_every`` is. What the
estimates claim is then checked by A itself. Where the claim was wrong (rounding, or a preconditioned norm) the item
starts again from where it is, until the claim holds or restarting no longer helps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ConvergenceError, ConvergenceWarning, PreconditionerError
from lsconv.krylov.method import CURVATURE, KERNEL, STUCK, Method
from lsconv.krylov.options import IterationState, Options
from lsconv.krylov.problem import Problem
from lsconv.krylov.solution import History, Solution, Status
from lsconv.krylov.stopping import Certificate, certify

__all__ = ["iterate"]

_CLAIMED, _CONDITION, _OVERFLOW, _LIMIT = 1, 2, 4, 8


def iterate(
    problem: Problem,
    options: Options,
    start: Callable[[Tensor | None, Tensor], Method],
    *,
    collapse: Callable[[Tensor], Tensor] = lambda z: z,
    square: bool = False,
    selection: Callable[[], tuple[Tensor, Any]] | None = None,
    name: str = "",
) -> Solution:
    """Run a method on a problem until every item has stopped, and certify the answer.

    Args:
        problem: the problem as the user posed it; the certificate is about this one.
        options: limits, tolerances and who watches.
        start: builds the method at a start (None for zero) for the items that are running.
        collapse: from the method's iterate to x, where the method works on a folded problem.
        square: only the residual decides.
        selection: the damping that the method chose, and what to report about it.
        name: of the method, for messages.
    """
    return _Loop(problem, options, start, collapse, square, selection, name).run()


class _Loop:
    def __init__(
        self,
        problem: Problem,
        options: Options,
        start: Callable[[Tensor | None, Tensor], Method],
        collapse: Callable[[Tensor], Tensor],
        square: bool,
        selection: Callable[[], tuple[Tensor, Any]] | None,
        name: str,
    ) -> None:
        self.problem, self.options, self.start, self.collapse = problem, options, start, collapse
        self.square, self.selection, self.name = square, selection, name
        self.running = ~(problem.broken | problem.zero)
        self.codes = torch.zeros(problem.batch, dtype=torch.int64, device=problem.A.device)
        self.iterations = torch.zeros_like(self.codes)
        self.y_norm = problem.codomain.safe_norm(problem.y)
        tolerances = options.tolerances
        # Below the rounding of the dtype an estimate is a number without a meaning, so there a claim is due anyway.
        self.residual_bound = torch.maximum(tolerances.residual_bound(self.y_norm), tolerances.eps * self.y_norm)
        self.rtol = max(tolerances.rtol, tolerances.eps)
        self.operator_norm = torch.zeros_like(self.y_norm)
        self.rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.stopped = False
        self.bar: Any = None

    @torch.no_grad()
    def run(self) -> Solution:
        damp = 0.0 if self.problem.damp is None else self.problem.damp
        z: Tensor | None = self.problem.x0
        certificate: Certificate | None = None
        try:
            while True:
                method = self._one_pass(z)
                x_new, damp = method.solution(), self._damp(damp)
                new = self._certify(self.collapse(x_new), damp)
                if z is None or certificate is None:
                    z, certificate, improved = x_new, new, torch.ones_like(self.running)
                else:
                    better = ~(new.merit >= certificate.merit)
                    improved = new.merit < 0.5 * certificate.merit
                    keep = better.reshape(better.shape + (1,) * (x_new.ndim - better.ndim))
                    z = torch.where(keep, x_new, z)
                    certificate = _choose(better, new, certificate)
                retry = (self.codes == _CLAIMED) & ~certificate.converged & improved & torch.isfinite(certificate.merit)
                retry = retry & (self.iterations < self.options.max_iter)
                if self.stopped or not bool(retry.any()):
                    break
                self.running = retry
                self.codes = torch.where(retry, 0, self.codes)
        finally:
            if self.bar is not None:
                self.bar.close()
        return self._finish(self.collapse(z), certificate, damp)

    # ------------------------------------------------------------------ one pass: start, step, test

    def _one_pass(self, z: Tensor | None) -> Method:
        method = self.start(z, self.running)
        self._test(method, record=not self.rows)
        for step in range(self.options.max_iter + 1):
            if step % self.options.check_every == 0 and not self._look(method, step):
                break
            method.step(self.running)
            self.iterations += self.running
            self._test(method)
        return method

    def _test(self, method: Method, record: bool = True) -> None:
        """Compare the estimates with the tolerances, item by item, on the device."""
        residual, norm = method.residual, method.operator_norm
        self.operator_norm = torch.fmax(self.operator_norm, norm)
        gradient = residual if method.gradient is None else method.gradient
        claim = residual <= self.residual_bound
        if not self.square and method.gradient is not None:
            bound = self.rtol * residual
            if self.options.tolerances.atol > 0:
                bound.clamp_min_(self.options.tolerances.atol)
            claim = claim | (gradient <= bound.mul_(self.operator_norm))
        if method.settled is not None:
            claim = claim | method.settled
        total = residual + gradient + norm
        code = claim * _CLAIMED
        code.add_(total.sub_(total).ne(0), alpha=_OVERFLOW)  # inf - inf and NaN are not 0
        if method.condition is not None:
            code.add_(method.condition > self.options.tolerances.conlim, alpha=_CONDITION)
        if method.trouble is not None:
            code.add_(method.trouble)
        code.add_(self.iterations >= self.options.max_iter, alpha=_LIMIT)
        if record:
            self.rows.append((residual, gradient, self.operator_norm, self.running))
        self.codes = torch.addcmul(self.codes, code, self.running.to(code.dtype))
        self.running = self.codes.eq(0) & self.running

    def _look(self, method: Method, step: int) -> bool:
        """The only place where the host waits for the device: is anything still running?"""
        running = bool(self.running.any())
        if self.options.progress:
            self._show(method)
        if self.options.callback is not None and running:
            residual, gradient = self.rows[-1][0], self.rows[-1][1]
            state = IterationState(step, self.running, residual, gradient, lambda: self.collapse(method.solution()))
            if self.options.callback(state):
                self.stopped = True
                return False
        return running

    def _show(self, method: Method) -> None:
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(desc=self.name, unit=" it")
        worst = (method.residual / self.y_norm.clamp_min(torch.finfo(self.y_norm.dtype).tiny))[self.running]
        if worst.numel():
            self.bar.set_postfix(residual=f"{float(worst.max()):.2e}", running=worst.numel(), refresh=False)
        self.bar.update(int(self.iterations.max()) - self.bar.n)

    # ------------------------------------------------------------------ the certificate and the answer

    def _damp(self, damp: Tensor | float) -> Tensor | float:
        return damp if self.selection is None else self.selection()[0]

    def _certify(self, x: Tensor, damp: Tensor | float) -> Certificate:
        problem, tolerances = self.problem, self.options.tolerances
        return certify(problem.A, x, problem.y, damp, tolerances=tolerances, operator_norm=self.operator_norm,
                       square=self.square)  # fmt: skip

    def _finish(self, x: Tensor, certificate: Certificate, damp: Tensor | float) -> Solution:
        problem = self.problem
        if bool((self.codes & KERNEL).any()):
            raise PreconditionerError(
                "M or N: the preconditioner is not Hermitian positive definite (p^H M p <= 0 for some p != 0). "
                "A pseudo-inverse with a kernel cannot be one; add damping to it."
            )
        unsolved = problem.broken | (self.codes & _OVERFLOW).bool()
        x = x.masked_fill_(problem.domain.spread(problem.zero).bool(), 0)
        x = x.masked_fill_(problem.domain.spread(unsolved).bool(), torch.nan)
        status = torch.full_like(self.codes, Status.ITERATION_LIMIT.code)
        if self.stopped:
            status = torch.where(self.codes == 0, Status.CALLBACK.code, status)
        causes = [
            (self.codes & (_CLAIMED | STUCK), Status.STAGNATION),
            (self.codes & _CONDITION, Status.CONDITION_LIMIT),
            (self.codes & CURVATURE, Status.NEGATIVE_CURVATURE),
            (certificate.gradient_ok, Status.GRADIENT),
            (certificate.residual_ok, Status.RESIDUAL),
            (problem.zero, Status.ZERO),
            (unsolved, Status.NON_FINITE),
        ]
        for happened, member in causes:
            status = torch.where(happened.bool(), member.code, status)
        converged = (certificate.converged | problem.zero) & ~unsolved
        chosen = None if self.selection is None else self.selection()[1]
        dtype = self.y_norm.dtype
        solution = Solution(
            x=x,
            codes=status,
            converged=converged,
            iterations=self.iterations,
            residual_norm=_nan_where(unsolved, certificate.residual_norm, problem.zero),
            gradient_norm=_nan_where(unsolved, certificate.gradient_norm, problem.zero),
            damp=torch.as_tensor(damp, dtype=dtype, device=x.device).expand(problem.batch),
            history=self._history(),
            selection=chosen,
        )
        self._report(solution)
        return solution

    def _history(self) -> History:
        """The rows of every item, closed up: an item that rested while another restarted has no gap."""
        residual, gradient, norm, alive = (torch.stack(column) for column in zip(*self.rows, strict=True))
        alive = alive.to(torch.bool)
        order = torch.argsort((~alive).to(torch.int8), dim=0, stable=True)
        length = int(alive.sum(0).max()) if alive.any() else 0

        def close_up(values: Tensor) -> Tensor:
            values = values.masked_fill(~alive, torch.nan)
            return values.gather(0, order)[:length]

        return History(close_up(residual), close_up(gradient), close_up(norm))

    def _report(self, solution: Solution) -> None:
        failed = ~solution.converged & (solution.codes != Status.CALLBACK.code)
        if not bool(failed.any()):
            return
        text = (
            f"{self.name}: {int(failed.sum())} of {failed.numel()} item(s) did not converge. {solution.failure_text()}"
        )
        if self.options.raise_on_failure:
            raise ConvergenceError(text)
        warnings.warn(text, ConvergenceWarning, stacklevel=5)


def _choose(better: Tensor, new: Certificate, old: Certificate) -> Certificate:
    pairs = ((getattr(new, name), getattr(old, name)) for name in Certificate.__dataclass_fields__)
    return Certificate(*(torch.where(better, a, b) for a, b in pairs))


def _nan_where(unsolved: Tensor, norm: Tensor, zero: Tensor) -> Tensor:
    return torch.where(unsolved, torch.nan, torch.where(zero, 0.0, norm))
