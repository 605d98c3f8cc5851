"""LSMR tried before the border: for as many iterations as cost what the border's setup would, with a forecast."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.border.cost_model import plan_bytes
from lsconv.factored.direct_plan import in_double
from lsconv.inverse.plans import KrylovPlan
from lsconv.krylov.loop.batched_scalars import divide
from lsconv.krylov.loop.options import IterationState
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import Tolerances, certified, norm_from_below
from lsconv.krylov.lsmr import lsmr
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import direct_rtol
from lsconv.operators.fft_convolution import short_fft_length, transform_cost

__all__ = ["TrialPlan", "trial_iterations"]

# Operations of LSMR that take the time of the border's setup, per byte of it; those that a call is worth; and the
# iterations below which LSMR is not tried.
_OPERATIONS_PER_BYTE, _CALLS, _FEWEST_ITERATIONS = 25, 8e6, 30


def trial_iterations(A: LinearOperator, damp: Tensor | float) -> int:
    """The iterations of LSMR that cost what the border's setup does; none where they would not do.

    The bytes of the border's plan are the measure of its setup. Blurs, and square operators without damping, take
    hundreds or thousands of iterations; layers, whose symbol is a matrix, often some tens. So do blurs that read as
    much as the field: few of their singular values are above the damping, and their border is the field.
    """
    assert isinstance(A, Convolution)
    shapes, damping = sorted((A.in_numel, A.out_numel)), torch.as_tensor(damp, dtype=torch.float64)
    undamped = bool((damping == 0).any())
    if undamped and shapes[1] < 1.5 * shapes[0]:
        return 0
    direct = A.out_numel * A.c_in // A.groups * math.prod(A.kernel_size)
    grid = [short_fft_length(n + k - 1) for n, k in zip(A.spatial_in, A.kernel_extent, strict=True)]
    iteration = 4 * min(direct, 10 * (A.c_in + A.c_out) * transform_cost(grid)) + _CALLS
    most = int(_OPERATIONS_PER_BYTE * plan_bytes(A, tuple(damping.shape)) / iteration)
    if most < _FEWEST_ITERATIONS:
        return 0
    if (A.c_in + A.c_out) // A.groups > 2:
        return most
    if all(step == 1 for step in A.stride):
        covers = all(2 * k > n for k, n in zip(A.kernel_extent, A.spatial_in, strict=True))
        return most if covers and not undamped else 0
    # a blur of a stride takes as many as conjugate gradients' bound says
    needed = 0.5 * norm_bound(A) / damping.to(A.device) * math.log(2 / direct_rtol(A.dtype))
    return most if undamped or bool((needed <= most).all()) else 0


class TrialPlan(KrylovPlan):
    r"""LSMR without preconditioner, for as many iterations as cost what another plan's setup would.

    The items that it leaves open are for that plan. An iteration that is then on its way to end before it has taken
    twice as many goes on. Only :meth:`solve` has the limit, which no backward pass has.

    What rounding adds to x along the null space of A is no more than ``eps (||A|| / damp)^2`` of x: where that may be
    too much, the iteration is in double precision.

    Args:
        A: the operator.
        damp: the damping.
        most: the limit.
    """

    def __init__(self, A: LinearOperator, damp: Tensor | float, most: int) -> None:
        super().__init__(A, damp, "lsmr")
        self.most, self.rtol = most, direct_rtol(A.dtype)

    def solve(  # type: ignore[override]  # nothing else to choose
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The solution for ``y``, to the tolerance of the direct methods and with their certificate, in float64."""
        tolerances = Tolerances.of(self.A.dtype, self.rtol if rtol is None else rtol, atol)
        precise = in_double(self.A)
        # where x leaves a tenth of the data, a certificate of a single-precision x would not show its null-space part
        A = self.A
        if A.dtype != precise.dtype:
            narrow = _rounds_little(self.damp, self._norm, 0.1 * tolerances.eps, tolerances)
            A = self.A if bool(narrow.all()) else precise
        most = 2 * self.most if max_iter is None else min(max_iter, 2 * self.most)
        limit = _Limit(self.most, tolerances.rtol)
        found = lsmr(A, y.to(A.dtype), damp=self.damp, rtol=tolerances.rtol, atol=atol, max_iter=most, callback=limit)
        ended = torch.where(found.codes == Status.CALLBACK.code, Status.ITERATION_LIMIT.code, found.codes)
        self.spent, batch = int(found.iterations.max()), found.codes.shape
        norm = None if found.history is None else found.history.largest_norm
        rounding = torch.finfo(A.dtype).eps
        little = found.damp == 0 if norm is None else _rounds_little(found.damp, norm, rounding, tolerances)
        judged = certified(
            precise,
            found.x.to(precise.dtype),
            y.to(precise.dtype).expand(*batch, *A.out_shape),
            found.damp,
            tolerances=tolerances,
            dtype=self.A.dtype,
            iterations=found.iterations,
            history=found.history,
            otherwise=torch.where(found.converged, Status.STAGNATION.code, ended),
            operator_norm=norm,
            null_share=torch.where(little, torch.inf, tolerances.null_share),
            of_form=True,
        )
        # What LSMR has seen of the null space, and of data that are not finite, the norms do not show; and rounding is
        # no excuse for the gradient of an iteration that a limit has ended.
        blind = torch.zeros_like(found.converged)
        for status in (Status.RANK_DEFICIENT, Status.NON_FINITE, Status.ITERATION_LIMIT):
            blind = blind | (ended == status.code)
        return replace(
            judged,
            codes=torch.where(blind, ended, judged.codes),
            converged=judged.converged & ~blind,
        )

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``; in double precision, for a difference over damp^2."""
        precise = KrylovPlan(in_double(self.A), self.damp, "lsmr")
        rtol = self.rtol if rtol is None else rtol
        return precise.normal_solve(g.to(precise.A.dtype), rtol=rtol).to(g.dtype)

    @functools.cached_property
    def _norm(self) -> Tensor:
        """``||A||``, from below."""
        with torch.no_grad():
            return norm_from_below(self.A, 3)

    def __repr__(self) -> str:
        return f"TrialPlan('lsmr', at most {self.most} iterations)"


def _rounds_little(damp: Tensor | float, norm: Tensor, eps: float, tolerances: Tolerances) -> Tensor:
    """The items along whose null space rounding in units of eps adds no more to x than it may have there."""
    damping = torch.as_tensor(damp, dtype=torch.float64, device=norm.device)
    return (damping == 0) | (eps * norm.square() <= tolerances.null_share * damping.square())


class _Limit:
    """The callback that ends a trial which is not about to end by itself.

    Args:
        most: iterations after which it decides.
        rtol: the tolerance of the gradient.
    """

    def __init__(self, most: int, rtol: float) -> None:
        self.most, self.rtol = most, rtol

    def __call__(self, state: IterationState) -> bool:
        if state.iteration == 0:
            # a lower bound of ||A||: the forecast is late rather than early
            self.goal = self.rtol * divide(state.gradient_norm, state.residual_norm)
        relative = divide(state.gradient_norm, state.residual_norm)
        if state.iteration <= self.most // 2:
            self.half, self.at = relative, state.iteration
        if state.iteration < self.most:
            return False
        fall = (self.half / relative).log() / max(state.iteration - self.at, 1)
        left = (relative / self.goal).log() / fall
        soon = (left <= 2 * self.most - state.iteration) & (fall > 0)
        return not bool(soon[state.running].all())
