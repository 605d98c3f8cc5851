r"""Iterative refinement: a solver in low precision, residuals in float64, certificates of float64.

.. math:: r = b - A x \ (\text{float64}), \qquad d \approx A^+ r \ (\text{low precision}), \qquad x \leftarrow x + t\, d

For a least-squares problem r does not vanish, and correcting by :math:`A^+ r` would leave an error of the order of the
low precision times :math:`\|r\|`. There the gradient :math:`g = A^H r`, which does vanish, is what is corrected for, by
two solves of consistent systems: :math:`A^H w = g`, then :math:`A d = w`, so that :math:`d = (A^H A)^+ g`.
For a least-norm solution no residual sees the part of d in the null space of A, so rounding there would stay: d is
brought back into the range of :math:`A^H` by solving :math:`A^H z = d` and forming :math:`A^H z` in float64.
The step t minimises the objective in float64, along d and former directions: a poor d costs time, never the answer.
Wilkinson, "Rounding Errors in Algebraic Processes" (1963); for least squares, Björck, "Iterative refinement of linear
least squares solutions I", BIT 7 (1967).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, DtypeError, unreported
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit, divide
from lsconv.krylov.loop.certificate import LENGTH_LIMIT, Certificate, NullSpaceBound, RankThreshold, Tolerances
from lsconv.krylov.loop.damping import augmented_rows
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.null_space import verify_null_space
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.krylov.lsmr import lsmr
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.scipy import OperatorLike

__all__ = ["refine"]

_LOWER = {torch.float64: torch.float32, torch.complex128: torch.complex64}
# An item stagnates after this many steps in a row that do not lower its tolerance ratio.
_PATIENCE = 3
# The number of directions that a step minimises over: those of previous steps make inexact inner solves converge.
_DIRECTIONS = 8


@checks_numbers
@serves_empty_batches()
def refine(
    A: OperatorLike,
    b: Tensor,
    *,
    solver: Callable[..., Solution] = lsmr,
    damp: float | Tensor = 0.0,
    inner_dtype: torch.dtype | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_refinements: int = 20,
    least_norm: bool | None = None,
    x0: Tensor | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
    **options: Any,
) -> Solution:
    r"""Solve in low precision, and correct until the float64 certificate is met; every batch item on its own.

    .. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2, \qquad\text{or } Ax = b \text{ with cg, minres, gmres}

    The residuals are computed by A itself in float64 (complex128). The inner solver works on ``A.to(inner_dtype)``.

    Args:
        A: an operator in float64 or complex128: a LinearOperator, or a dense or sparse tensor.
        b: right-hand side ``(*batch, *out_shape)``, in the same dtype.
        solver: any solver of this package: lsmr, lsqr, cgls, craig, or for square systems cg, minres, gmres.
        damp: the damping, a number or a tensor with one per batch item.
        inner_dtype: dtype of the inner solves; None: float32 (complex64).
        rtol: relative tolerance of the answer; None: ``10 eps^0.75`` of float64.
        atol: absolute tolerance on the residual norm, in the units of b.
        max_refinements: limit of refinement steps.
        least_norm: keep rounding out of the null space of A, at one more inner solve a step, so that the answer is the
            least-norm one to float64 accuracy. None: where A has more unknowns than equations and there is no damping;
            give True for other operators without full column rank.
        x0: where to start, ``(*batch, *in_shape)``.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in b and x0; False gives such items :attr:`Status.NON_FINITE`.
        options: for the inner solver (``rtol`` is the answer's; ``max_iter``, ``check_every``, ...). Preconditioners M
            and N must be in the inner dtype, and M only with ``damp = 0``.

    Returns:
        A :class:`Solution` in float64; ``iterations`` counts those of the inner solves.

    Raises:
        DtypeError: when A is not in float64 or complex128.
        LsconvError: for arguments that do not fit.
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Wilkinson, "Rounding Errors in Algebraic Processes" (1963); Björck, BIT 7 (1967).

    Example:
        >>> from lsconv.krylov.refinement import refine
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> solution = refine(A, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
        >>> bool(solution.gradient_norm < 1e-10)
        True
    """
    square = solver.__name__ in ("cg", "minres", "gmres")
    problem = prepare(A, b, damp=damp, x0=x0, check_finite=check_finite, square=square)
    if problem.A.dtype not in _LOWER:
        raise DtypeError(f"A: refinement computes residuals in float64 or complex128, got {problem.A.dtype}")
    if problem.damp is not None and (square or options.get("M") is not None):
        raise ArgumentError("damp: not with a solver for square systems, nor together with M")
    inner_dtype = _LOWER[problem.A.dtype] if inner_dtype is None else inner_dtype
    tolerances = Tolerances.of(problem.A.dtype, rtol, atol)
    if least_norm is None:
        least_norm = math.prod(problem.A.in_shape) > math.prod(problem.A.out_shape)
    undamped = problem.damp is None or bool((problem.damp == 0).any())
    least_norm = least_norm and undamped and not square
    loop = _Refinement(problem, solver, inner_dtype, tolerances, square, least_norm, options)
    with torch.no_grad():
        solution = loop.run(max_refinements)
        shortest = functools.partial(loop.shortest, max_refinements=max_refinements)
        solution = verify_null_space(solution, solution.x, problem.y, problem.A, tolerances, shortest, loop.solution_of)
    report(solution, "refine", raise_on_failure=raise_on_failure)
    return solution


class _Refinement:
    """One refinement: the problem, its inner solver in low precision, and the judge in float64."""

    def __init__(
        self,
        problem: Problem,
        solver: Callable[..., Solution],
        inner_dtype: torch.dtype,
        tolerances: Tolerances,
        square: bool,
        least_norm: bool,
        options: dict[str, Any],
    ) -> None:
        self.problem, self.solver, self.tolerances = problem, solver, tolerances
        self.square, self.options = square, options
        # With damping the rows damp I are appended to A, so that the loop solves min ||A x - y|| only.
        self.augmented = problem if problem.damp is None else augmented_rows(problem)
        self.least_norm = least_norm
        self.low: LinearOperator = self.augmented.A.to(dtype=inner_dtype)
        self.inner_dtype = inner_dtype
        # Rounding of the inner solves along the null space lengthens x, which must not raise the rounding allowed.
        self.judge = Judge(
            problem.A,
            tolerances,
            0.0 if problem.damp is None else problem.damp,
            rounding=tolerances.rounding,
            square=square,
            rank=RankThreshold(length_limit=LENGTH_LIMIT),
        )
        self.directions: list[tuple[Tensor, Tensor]] = []
        self.iterations = torch.zeros(problem.batch, dtype=torch.int64, device=problem.A.device)

    def shortest(self, y: Tensor, rtol: float, max_refinements: int) -> Tensor:
        """The refinement to the least-norm solution for consistent data, without damping and from zero."""
        problem = replace(self.problem, y=y, damp=None, x0=None, nonfinite=torch.zeros_like(self.problem.nonfinite))
        exact = replace(self.tolerances, rtol=rtol, atol=0.0)
        loop = _Refinement(problem, self.solver, self.inner_dtype, exact, self.square, True, self.options)
        return loop.run(max_refinements).x

    def run(self, max_refinements: int) -> Solution:
        """Refine until the certificate is met or corrections no longer help."""
        problem, augmented = self.problem, self.augmented
        x = problem.start(problem.x0)
        running = ~(problem.nonfinite | problem.zero)
        consistent = torch.ones_like(running)
        certificate = self._certify(x)
        running = running & ~certificate.converged
        limit = torch.zeros_like(running)
        stalled, best = torch.zeros_like(self.iterations), certificate.tolerance_ratio
        for step in range(max_refinements):
            if not bool(running.any()):
                break
            r = augmented.residual(x, running)
            before = augmented.codomain.safe_norm(r)
            d = self._correction(r, running, consistent)
            candidate = x + self._step(d, r, running)
            new = self._certify(candidate)
            after = augmented.codomain.safe_norm(augmented.residual(candidate, running))
            # Far from the answer a step is accepted by the objective, near it only by the certificate.
            better = running & ((new.tolerance_ratio < certificate.tolerance_ratio) | (after < (1 - 1e-8) * before))
            x = torch.where(augmented.domain.broadcast(better).bool(), candidate, x)
            # Items that did not take the step have no direction to be made conjugate to.
            d, image = self.directions[-1]
            self.directions[-1] = d * augmented.domain.broadcast(better), image * augmented.codomain.broadcast(better)
            certificate = new.select(better, certificate)
            stalled = torch.where(certificate.tolerance_ratio < best, 0, stalled + 1)
            best = torch.minimum(best, certificate.tolerance_ratio)
            consistent = consistent & (after < 0.5 * before)  # a residual that is no longer halved will not vanish
            running = running & ~certificate.converged & (stalled < _PATIENCE)
            limit = running & (step == max_refinements - 1)
        x, doubtful = self._confirm(x, certificate.excused, max_refinements)
        return self._finish(x, limit, doubtful)

    def _confirm(self, x: Tensor, excused: Tensor, max_solves: int) -> tuple[Tensor, Tensor]:
        """Correct, by solves in float64, the items that passed only because of the rounding of their gradient.

        An error along small singular values can hide in that rounding, and the inner solves do not find it.

        Returns:
            x, and the items that are still in doubt.
        """
        augmented, doubtful = self.augmented, torch.zeros_like(excused)
        options = {name: value for name, value in self.options.items() if name not in ("M", "N")}
        for _ in range(max_solves):
            if not bool(excused.any()):
                break
            r = augmented.residual(x, excused)
            with unreported():
                correction = self.solver(augmented.A, r, rtol=self.tolerances.rtol, check_finite=False, **options)
            self.iterations = self.iterations + correction.iterations * excused
            before = augmented.codomain.safe_norm(r)
            doubtful = doubtful | (excused & ~correction.converged)
            better = excused & correction.converged & (correction.residual_norm < before)
            x = torch.where(augmented.domain.broadcast(better).bool(), x + correction.x, x)
            excused = better & (correction.residual_norm <= 0.5 * before) & self._certify(x).excused
        return x, doubtful | excused

    def _step(self, d: Tensor, r: Tensor, running: Tensor) -> Tensor:
        """The step in float64 that minimises the residual along d and the last few directions (conjugate residuals).

        Images under A are kept orthogonal, so that the step has one coefficient. The previous directions make inexact
        inner solves a flexible Krylov method; an exact one needs only d.
        """
        augmented = self.augmented
        image = augmented.A.apply(d)
        for direction, direction_image in self.directions:
            c = self._coefficient(direction_image, image)
            d = d - augmented.domain.broadcast(c) * direction
            image = image - augmented.codomain.broadcast(c) * direction_image
        self.directions = [*self.directions[1 - _DIRECTIONS :], (d, image)]
        return augmented.domain.broadcast(self._coefficient(image, r) * running) * d

    def _coefficient(self, q: Tensor, v: Tensor) -> Tensor:
        """``<q, v> / <q, q>`` per item."""
        dims = tuple(range(len(self.problem.batch), q.ndim))
        product = (q.conj() * v).sum(dims)
        return divide(product, (q.conj() * q).sum(dims))

    def _certify(self, x: Tensor) -> Certificate:
        return self.judge.certify(x, self.problem.y)

    def _correction(self, r: Tensor, running: Tensor, consistent: Tensor) -> Tensor:
        """``A^+ r`` for consistent items, ``(A^H A)^+ A^H r`` for the others, each by low-precision solves."""
        augmented = self.augmented
        two_stage = running & ~consistent
        if not self.square and bool(two_stage.any()):
            g = augmented.A.adjoint(r) * augmented.domain.broadcast(two_stage)
            w = self._solve(self.low.H, g, augmented.domain, two_stage, swap=True)
            r = torch.where(augmented.codomain.broadcast(two_stage).bool(), w, r)
        d = self._solve(self.low, r, augmented.codomain, running)
        if self.least_norm:
            d = augmented.A.adjoint(self._solve(self.low.H, d, augmented.domain, running, swap=True))
        return d

    def _solve(self, A: LinearOperator, y: Tensor, space: ItemSpace, running: Tensor, swap: bool = False) -> Tensor:
        """Solve in low precision for a right-hand side scaled to norm one, which keeps it in range.

        Args:
            A: the operator in low precision, or its adjoint.
            y: the right-hand side.
            space: the arithmetic of y.
            running: the items to solve for.
            swap: A is an adjoint, so that M and N exchange their sides.
        """
        unit = binary_unit(space.safe_norm(y))
        options = dict(self.options)
        if swap:
            options["M"], options["N"] = options.pop("N", None), options.pop("M", None)
        scaled = (y * space.broadcast(running / unit)).to(self.inner_dtype)
        # An inner solve need not converge, because its result is judged in float64.
        with unreported():
            solution = self.solver(A, scaled, check_finite=False, **options)
        self.iterations = self.iterations + solution.iterations
        x = torch.nan_to_num(solution.x.to(y.dtype))
        return x * over_items(unit.to(x.dtype), x.ndim - unit.ndim)

    def _finish(self, x: Tensor, limit: Tensor, doubtful: Tensor) -> Solution:
        """Certify x, given the items that the limit has stopped, and those in doubt."""
        problem = self.problem
        x = x.masked_fill(problem.domain.broadcast(problem.zero).bool(), 0)
        x = x.masked_fill(problem.domain.broadcast(problem.nonfinite).bool(), torch.nan)
        share = self.tolerances.null_share
        # The rounding of the inner solves has parts in the null space of A.
        part = None if problem.damp is None else torch.where(problem.damp > 0, share, torch.inf)
        solution = self.solution_of(x, replace(self.judge, null_space=NullSpaceBound(part)))
        codes = torch.where(limit & ~solution.converged, Status.ITERATION_LIMIT.code, solution.codes)
        codes = torch.where(doubtful, Status.STAGNATION.code, codes)
        return replace(solution, codes=codes, converged=solution.converged & ~doubtful)

    def solution_of(self, x: Tensor, judge: Judge | None = None) -> Solution:
        """Return the certified solution with this x, by another judge or (None) by that of every step."""
        judge = self.judge if judge is None else judge
        return judge.solution(x, self.problem.y, iterations=self.iterations)
