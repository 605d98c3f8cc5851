"""LSMR tried before the border: for as many iterations as cost what the border's setup would."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import DirectWork, direct_work
from lsconv.factored.direct_plan import in_double
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.plans.lsmr_cost import (
    CALLS,
    border_iteration_work,
    border_setup_work,
    iteration_work,
    iterations_needed,
)
from lsconv.inverse.plans.planes import Planes, is_one_sided
from lsconv.krylov.loop.batch_groups import in_groups
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import (
    LENGTH_LIMIT,
    TALL_NULL_SHARE,
    NormBounds,
    NullSpaceBound,
    RankThreshold,
    Tolerances,
)
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.options import IterationState
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.lsmr import lsmr
from lsconv.operators.algebra import Adjoint
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import direct_rtol
from lsconv.operators.fft_convolution import short_fft_length
from lsconv.operators.memory import allowed_bytes

__all__ = ["TrialPlan", "trial"]

# The first solve by the border calls torch about as often as this many iterations, and a layer seldom needs fewer.
_FEWEST_ITERATIONS = 30


def trial(A: Convolution, damp: Tensor | float, planes: Planes | None) -> TrialPlan | None:
    """Choose whether LSMR is tried before the border is set up, and for how many iterations; None: not at all.

    The limit is the number of iterations that cost what the setup of the border does (:func:`border_setup_work`, or
    that of :class:`Planes`). A blur has one input and one output channel in each group, a layer has more. The first
    case that applies decides:

    1. Undamped (some item has ``damp = 0``) and nearly square, the larger of inputs and outputs less than 1.5 times the
       smaller: no trial.
    2. A damped blur of lines or volumes, of stride one and without padding: LSMR preconditioned by the circulant. A
       volume whose expected iterations are too many goes on to the other cases.
    3. A damped blur: LSMR where the bound of conjugate gradients on the iterations is within the limit.
    4. A limit below :data:`_FEWEST_ITERATIONS`, or an undamped blur of stride one: no trial.
    5. A layer, or an undamped blur with a stride: LSMR.

    Args:
        A: a convolution that the border serves.
        damp: the damping, a number or one per batch item.
        planes: A as an image whose channels are its planes, where A is such a volume.
    """
    fewer, more = sorted((A.in_numel, A.out_numel))
    damping = torch.as_tensor(damp, dtype=torch.float64)
    undamped = bool((damping == 0).any())
    if undamped and more < 1.5 * fewer:
        return None
    iteration = iteration_work(A)
    blur, unit_stride = (A.c_in + A.c_out) // A.groups <= 2, all(step == 1 for step in A.stride)
    if blur and unit_stride and not undamped and A.ndim != 2 and is_one_sided(A, range(A.ndim)):
        preconditioned = _preconditioned(A, damp, planes, iteration)
        if preconditioned is not None or A.ndim == 1:
            return preconditioned
    setup = border_setup_work(A, tuple(damping.shape)) if planes is None else planes.work
    if not blur or undamped:
        limit = int(setup / iteration)
        return None if limit < _FEWEST_ITERATIONS or (blur and unit_stride) else TrialPlan(A, damp, limit)
    limit = int((setup + _FEWEST_ITERATIONS * CALLS) / iteration)
    # norm_bound is far above ||A|| for kernels of mixed sign, and the norm of the circulant is close to ||A||
    needed = iterations_needed(A, damp, _circulant_norm(A) if A.ndim < 3 else norm_bound(A))
    return TrialPlan(A, damp, limit, expected=float(needed.max())) if bool((needed <= limit).all()) else None


def _preconditioned(A: Convolution, damp: Tensor | float, planes: Planes | None, iteration: float) -> TrialPlan | None:
    """LSMR preconditioned by the circulant, for as long as the factors of the border, or of the planes, would take.

    None where it is expected to take longer.
    """
    work = direct_work(A, tuple(torch.as_tensor(damp).shape)).setup if planes is None else planes.work
    if A.ndim == 1:  # on a line, an iteration with the preconditioner costs as much as three without
        limit = int(work / (3 * iteration))
        return TrialPlan(A, damp, limit, preconditioned=True) if limit >= _FEWEST_ITERATIONS else None
    # in a volume, an iteration with the preconditioner costs as much as 1.5 without
    limit = int(work / (1.5 * iteration))
    # with the circulant, LSMR takes two to five times the square root of the bound without a preconditioner
    expected = 4 * float(iterations_needed(A, damp, norm_bound(A)).sqrt().max())
    if expected > limit:
        return None
    return TrialPlan(A, damp, int(min(limit, 4 * expected)), preconditioned=True, expected=expected)


def _circulant_norm(A: Convolution) -> Tensor:
    r"""The norm of the circulant of a blur, which bounds that of the blur, ``(*A.batch_shape)``.

    A stride of s folds the symbol: the squared norm is the largest mean of its squared modulus over the :math:`s^d`
    frequencies that the stride does not tell apart.
    """
    grid = [
        step * short_fft_length(-(-(n + k - 1) // step))
        for n, k, step in zip(A.spatial_in, A.kernel_extent, A.stride, strict=True)
    ]
    transform = torch.fft.rfftn if set(A.stride) == {1} and not A.is_complex else torch.fft.fftn
    squares = transform(A.weight.detach(), s=grid, dim=tuple(range(-A.ndim, 0))).abs().double().square()
    for a, step in enumerate(A.stride, start=-A.ndim):
        if step > 1:
            squares = squares.unflatten(a, (step, -1)).mean(a - 1)
    return squares.flatten(len(A.batch_shape)).amax(-1).sqrt()


class TrialPlan(KrylovPlan):
    r"""LSMR with a limit on its iterations; the border solves for the items that have not converged by then.

    Where LSMR has half of its digits at the limit, it goes on, to twice the limit. The limit applies to :meth:`solve`,
    and not to the solves of a backward pass.

    Rounding adds to x a part in the null space of A, of length at most ``eps (||A|| / damp)^2 ||x||``, eps the unit
    roundoff. Where that may exceed what the certificate allows, LSMR runs in double precision.

    Args:
        A: the operator; with a limit, a convolution or the adjoint of one.
        damp: the damping, a number or one per batch item.
        most: the limit, the number of iterations that cost what the setup of the border does; None: no limit.
        preconditioned: precondition by the inverse of the circulant, in double precision throughout.
        expected: the number of iterations that a right-hand side is expected to take; None: not known.

    Attributes:
        total: the number of iterations of all right-hand sides so far.
        solved: the number of right-hand sides so far.
    """

    reason = "the setup of the border would cost more than LSMR may need: LSMR first, then the border"
    options = frozenset()

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        most: int | None,
        *,
        preconditioned: bool = False,
        expected: float | None = None,
    ) -> None:
        precise = in_double(A)
        M = CirculantPreconditioner(precise, damp) if preconditioned else None
        sides = (M, None) if M is None or M.side == "residual" else (None, M)
        super().__init__(precise if preconditioned else A, damp, "lsmr", sides)
        self.precise, self.dtype, self._in_single = precise, A.dtype, self.A.dtype != precise.dtype
        self.most, self.rtol, self.expected = most, direct_rtol(A.dtype), expected
        self.total = self.solved = 0

    def solve(  # type: ignore[override]  # nothing else to choose
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The solution for ``y``, ``(*batch, *out_shape)``, with tolerance and certificate of the direct methods."""
        self.last_iterations = 0
        answer = functools.partial(self._answer, tolerances=self.tolerances(rtol, atol), max_iter=max_iter)
        solution = answer(y, self.damp) if self.M or self.N else in_groups(self.A, y, self.damp, answer)
        self._count(solution)
        return solution

    def _count(self, solution: Solution) -> None:
        self.total += int(solution.iterations.sum())
        self.solved += solution.iterations.numel()

    def _answer(self, y: Tensor, damp: Tensor | float, *, tolerances: Tolerances, max_iter: int | None) -> Solution:
        """Solve by LSMR and certify with A in double precision; leaves :attr:`total` and :attr:`solved` unchanged."""
        precise = self.precise
        found, A, norm = self._run_lsmr(y, damp, tolerances, max_iter)
        ended = torch.where(found.codes == Status.CALLBACK.code, Status.ITERATION_LIMIT.code, found.codes)
        # with a preconditioner N on the side of x the iterates are not of the form A^H z, and no rounding bounds their
        # part in the null space of A
        rounding = torch.finfo(A.dtype).eps if self.N is None else None
        harmless, null_share = found.damp == 0, tolerances.null_share
        if rounding is None:
            null_share = null_share if A.in_numel > A.out_numel else TALL_NULL_SHARE
        elif norm is not None:
            harmless = _rounding_is_harmless(found.damp, norm, rounding, tolerances)
        judge = Judge(
            precise,
            tolerances,
            found.damp,
            self.dtype,
            rounding=Tolerances.of(A.dtype, tolerances.rtol, 0.0).rounding,
            norm=NormBounds(norm, sharper=None if norm is None or self.M or self.N else lambda: norm),
            rank=RankThreshold(length_limit=LENGTH_LIMIT),
            null_space=NullSpaceBound(torch.where(harmless, torch.inf, null_share), rounding),
        )
        judged = judge.solution(
            found.x.to(precise.dtype),
            y.to(precise.dtype),
            iterations=found.iterations,
            history=found.history,
            otherwise=torch.where(found.converged, Status.STAGNATION.code, ended),
        )
        # the certificate consists of norms, which do not show these three causes: there LSMR's status is returned
        status_of_lsmr = torch.zeros_like(found.converged)
        for status in (Status.RANK_DEFICIENT, Status.NON_FINITE, Status.ITERATION_LIMIT):
            status_of_lsmr = status_of_lsmr | (ended == status.code)
        return replace(
            judged,
            codes=torch.where(status_of_lsmr, ended, judged.codes),
            converged=judged.converged & ~status_of_lsmr,
        )

    def _run_lsmr(
        self, y: Tensor, damp: Tensor | float, tolerances: Tolerances, max_iter: int | None
    ) -> tuple[Solution, LinearOperator, Tensor | None]:
        """Run LSMR, in single precision where its rounding is harmless.

        Returns:
            The solution; the operator that was applied, A in single or double precision; the lower bound of ``||A||``
            per item that the iteration has found, None if none.
        """
        limits: dict[str, Any] = {"max_iter": max_iter}
        if self.most is not None:
            most = 2 * self.most if max_iter is None else min(max_iter, 2 * self.most)
            limits = {"max_iter": most, "callback": _Limit(self.most, tolerances.rtol)}
        terms = {**self._terms(self.M, self.N), "damp": damp}
        # single precision may use a tenth of the null-space part that is allowed, because no certificate of an x in
        # single precision shows that part
        harmless = functools.partial(_rounding_is_harmless, damp, eps=0.1 * tolerances.eps, tolerances=tolerances)
        spent, in_single = 0, self._in_single and bool(harmless(self._norm_from_data(y)).all())
        while True:
            A = self.A if in_single else self.precise
            found = lsmr(A, y.to(A.dtype), rtol=tolerances.rtol, atol=tolerances.atol, **terms, **limits)
            spent += int(found.iterations.max())
            norm = None if found.history is None else found.history.largest_norm
            if not in_single or norm is None or bool(harmless(norm).all()):
                self.last_iterations = max(self.last_iterations or 0, spent)
                return found, A, norm
            # the iteration has found a larger ||A|| than the data show, and is repeated in double precision
            self._in_single = in_single = False

    def _norm_from_data(self, y: Tensor) -> Tensor:
        """``||A^H y|| / ||y||``, a lower bound of ``||A||`` per item."""
        A = self.A
        y = y.to(A.dtype)
        inputs, outputs = (ItemSpace(shape, A.dtype, A.device) for shape in (A.in_shape, A.out_shape))
        return divide(inputs.safe_norm(A.adjoint(y)), outputs.safe_norm(y))

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether all solves so far have cost so much that the border should solve from now on.

        For a blur it suffices that LSMR has taken :attr:`most` iterations, which cost what the border's setup does. For
        a layer, whose border may take longer in every solve than LSMR, solves with the factors of the border have to
        have saved their cost by now.
        """
        if self.most is None or not bool((torch.as_tensor(self.damp) > 0).all()):
            return False
        A = _convolution(self.A if self._in_single else self.precise)
        if (A.c_in + A.c_out) // A.groups <= 2 and self.total >= self.most:
            return True
        spent = self.total * iteration_work(A)
        return spent - self._factors.solve * self.solved >= self._factors.setup

    @functools.cached_property
    def _factors(self) -> DirectWork:
        """The work of the border's factors, of making and of solving with them; infinite where they do not fit."""
        A = _convolution(self.A)
        work = direct_work(A, tuple(torch.as_tensor(self.damp).shape))
        fits = work.bytes <= allowed_bytes(None, A.device)
        return work if fits else DirectWork(math.inf, math.inf, work.bytes)

    def gives_way(self, y: Tensor) -> bool:
        """Tell whether the fallback should solve for ``y``, ``(*batch, *out_shape)``.

        It should where the plan is :attr:`exhausted`, or where the iterations that all items of y are expected to take
        exceed twice the limit. Where :attr:`expected` is None, :data:`_FEWEST_ITERATIONS` are assumed of each item, and
        the limit is that of a border that iterates, which has no factors before its solves have cost as much.
        """
        items = y.numel() // self.A.out_numel
        return items * (self.expected or _FEWEST_ITERATIONS) > 2 * self._most_of_batch or self.exhausted

    @functools.cached_property
    def _most_of_batch(self) -> float:
        """The limit with which the expected iterations of a whole batch are compared."""
        if self.most is None:
            return math.inf
        if self.expected is not None:
            return self.most
        A, damping = _convolution(self.A), torch.as_tensor(self.damp)
        return max(self.most, border_iteration_work(A, tuple(damping.shape)) / iteration_work(A))

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, ``(*batch, *out_shape)``, without a limit on the iterations."""
        return super().apply(y.to(self.A.dtype), rtol=rtol).to(self.dtype)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        solution = self._adjoint_solution(v.to(self.A.dtype), rtol)
        self._count(solution)
        return solution.x.to(self.dtype)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``; in double precision: it divides by damp^2."""
        precise = KrylovPlan(self.precise, self.damp, "lsmr", (self.M, self.N))
        rtol = self.rtol if rtol is None else rtol
        return precise.normal_solve(g.to(precise.A.dtype), rtol=rtol).to(g.dtype)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g``."""
        v = super().gram_solve(g.to(self.A.dtype), rtol=rtol)
        return v if v is None else v.to(self.dtype)

    def tolerances(self, rtol: float | None, atol: float = 0.0) -> Tolerances:
        """The tolerances of a solve, those of the direct methods."""
        return Tolerances.of(self.dtype, self.rtol if rtol is None else rtol, atol)

    def __repr__(self) -> str:
        limit = "" if self.most is None else f", at most {self.most} iterations"
        preconditioner = self.M if self.M is not None else self.N
        by = "" if preconditioner is None else f", preconditioner={type(preconditioner).__name__}"
        return f"TrialPlan('lsmr'{by}{limit})"


def _convolution(A: LinearOperator) -> Convolution:
    """The convolution that A is, or is the adjoint of."""
    core = A.operator if isinstance(A, Adjoint) else A
    assert isinstance(core, Convolution)
    return core


def _rounding_is_harmless(damp: Tensor | float, norm: Tensor, eps: float, tolerances: Tolerances) -> Tensor:
    """Mark the items for which rounding adds less to the part of x in the null space of A than the certificate allows.

    Args:
        damp: the damping, a number or one per batch item.
        norm: ``||A||``, per item.
        eps: the unit roundoff of the arithmetic.
        tolerances: their ``null_share`` is the part in the null space that is allowed, relative to ``||x||``.
    """
    damping = torch.as_tensor(damp, dtype=torch.float64, device=norm.device)
    return (damping == 0) | (eps * norm.square() <= tolerances.null_share * damping.square())


class _Limit:
    """The callback that stops LSMR at its limit, unless it has half of its digits by then and as many may follow.

    Args:
        most: the number of iterations after which it decides.
        rtol: the relative tolerance of ``||A^H r|| / ||r||``, r the residual, whose first value is about ``||A||``.
    """

    def __init__(self, most: int, rtol: float) -> None:
        self.most, self.rtol = most, rtol

    def __call__(self, state: IterationState) -> bool:
        ratio = divide(state.gradient_norm, state.residual_norm)
        if state.iteration == 0:
            self.start = ratio
        return state.iteration >= self.most and not bool((ratio <= self.rtol**0.5 * self.start)[state.running].all())
