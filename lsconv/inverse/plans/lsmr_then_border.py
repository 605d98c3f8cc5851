"""LSMR before the border, where it should cost less than the border's setup does: the choice, and the plan."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import PlanCost, direct_plan_cost
from lsconv.inverse.plans.certified_lsmr import CertifiedLsmrPlan
from lsconv.inverse.plans.route_costs import (
    CALL_OVERHEAD,
    Planes,
    border_iteration_work,
    border_setup_work,
    is_one_sided,
    iteration_work,
    iterations_needed,
)
from lsconv.krylov.loop.batched_scalars import divide
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.options import IterationState
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.algebra import Adjoint
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.fft_convolution import short_fft_length
from lsconv.operators.memory import allowed_bytes

__all__ = ["LsmrThenBorderPlan", "lsmr_then_border"]

# The first solve by the border calls torch about as often as this many iterations, and a layer seldom needs fewer.
_FEWEST_ITERATIONS = 30


def lsmr_then_border(A: Convolution, damp: Tensor | float, planes: Planes | None) -> LsmrThenBorderPlan | None:
    """Choose whether LSMR is tried before the border is set up, and for how many iterations; None: not at all.

    The limit is the number of iterations that cost what the setup of the border does (:func:`border_setup_work`, or
    that of :class:`Planes`). A blur has one input and one output channel in each group, a layer has more. The first
    case that applies decides:

    1. Undamped (some item has ``damp = 0``) and nearly square, the larger of inputs and outputs less than 1.5 times the
       smaller: not tried.
    2. A damped blur of lines or volumes, of stride one and without padding: LSMR preconditioned by the circulant. A
       volume whose expected iterations are too many goes on to the other cases.
    3. A damped blur: LSMR where the bound of conjugate gradients on the iterations is within the limit.
    4. A limit below :data:`_FEWEST_ITERATIONS`, or an undamped blur of stride one: not tried.
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
        return None if limit < _FEWEST_ITERATIONS or (blur and unit_stride) else LsmrThenBorderPlan(A, damp, limit)
    limit = int((setup + _FEWEST_ITERATIONS * CALL_OVERHEAD) / iteration)
    # norm_bound is far above ||A|| for kernels of mixed sign, and the norm of the circulant is close to ||A||
    needed = iterations_needed(A, damp, _circulant_norm(A) if A.ndim < 3 else norm_bound(A))
    return LsmrThenBorderPlan(A, damp, limit, expected=float(needed.max())) if bool((needed <= limit).all()) else None


def _preconditioned(
    A: Convolution, damp: Tensor | float, planes: Planes | None, iteration: float
) -> LsmrThenBorderPlan | None:
    """LSMR preconditioned by the circulant, for as long as the factors of the border, or of the planes, would take.

    None where it is expected to take longer.
    """
    work = direct_plan_cost(A, tuple(torch.as_tensor(damp).shape)).setup_work if planes is None else planes.work
    if A.ndim == 1:  # on a line, an iteration with the preconditioner costs as much as three without
        limit = int(work / (3 * iteration))
        return LsmrThenBorderPlan(A, damp, limit, preconditioned=True) if limit >= _FEWEST_ITERATIONS else None
    # in a volume, an iteration with the preconditioner costs as much as 1.5 without
    limit = int(work / (1.5 * iteration))
    # with the circulant, LSMR takes two to five times the square root of the bound without a preconditioner
    expected = 4 * float(iterations_needed(A, damp, norm_bound(A)).sqrt().max())
    if expected > limit:
        return None
    return LsmrThenBorderPlan(A, damp, int(min(limit, 4 * expected)), preconditioned=True, expected=expected)


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


class LsmrThenBorderPlan(CertifiedLsmrPlan):
    """LSMR with a limit on its iterations; the border solves for the items that have not converged by then.

    Where LSMR has half of its digits at the limit, it goes on, to twice the limit. The limit applies to :meth:`solve`,
    and not to the solves of a backward pass.

    Args:
        A: a convolution, or the adjoint of one.
        damp: the damping, a number or one per batch item.
        max_iterations: the limit, the number of iterations that cost what the setup of the border does.
        preconditioned: precondition by the inverse of the circulant, in double precision throughout.
        expected: the number of iterations that a right-hand side is expected to take; None: not known.

    Attributes:
        total: the number of iterations of all right-hand sides so far.
    """

    reason = "the setup of the border would cost more than LSMR may need: LSMR first, then the border"
    gives_way_to_border = True

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        max_iterations: int,
        *,
        preconditioned: bool = False,
        expected: float | None = None,
    ) -> None:
        super().__init__(A, damp, preconditioned=preconditioned)
        self.max_iterations, self.expected = max_iterations, expected
        self.total = self.solved = 0

    def solve(self, y: Tensor, **options: Any) -> Solution:
        """The solution for ``y``, ``(*batch, *out_shape)``; the options are rtol, atol and max_iter."""
        solution = super().solve(y, **options)
        self._count(solution)
        return solution

    def _adjoint_solution(self, v: Tensor, rtol: float | None) -> Solution:
        solution = super()._adjoint_solution(v, rtol)
        self._count(solution)
        return solution

    def _count(self, solution: Solution) -> None:
        self.total += int(solution.iterations.sum())
        self.solved += solution.iterations.numel()

    def _limits(self, max_iter: int | None, tolerances: Tolerances) -> dict[str, Any]:
        twice = 2 * self.max_iterations
        callback = _Limit(self.max_iterations, tolerances.rtol)
        return {"max_iter": twice if max_iter is None else min(max_iter, twice), "callback": callback}

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether all solves so far have cost so much that the border should solve from now on.

        For a blur it suffices that LSMR has taken :attr:`max_iterations` iterations, which cost what the border's setup
        does. For a layer, whose border may take longer in every solve than LSMR, solves with the factors of the border
        have to have saved their cost by now.
        """
        if not bool((torch.as_tensor(self.damp) > 0).all()):
            return False
        A = _convolution(self.A if self._in_single else self.precise)
        if (A.c_in + A.c_out) // A.groups <= 2 and self.total >= self.max_iterations:
            return True
        spent = self.total * iteration_work(A)
        return self.solved > 0 and spent - self._factors.solve_work * self.solved >= self._factors.setup_work

    @functools.cached_property
    def _factors(self) -> PlanCost:
        """The work of the border's factors, of making and of solving with them; infinite where they do not fit."""
        A = _convolution(self.A)
        work = direct_plan_cost(A, tuple(torch.as_tensor(self.damp).shape))
        fits = work.peak_bytes <= allowed_bytes(None, A.device)
        return work if fits else PlanCost(math.inf, math.inf, work.peak_bytes)

    def gives_way(self, y: Tensor) -> bool:
        """Tell whether the fallback should solve for ``y``, ``(*batch, *out_shape)``.

        It should where the plan is :attr:`exhausted`, or where the iterations that all items of y are expected to take
        exceed twice the limit. Where :attr:`expected` is None, :data:`_FEWEST_ITERATIONS` are assumed of each item, and
        the limit is that of a border that iterates, which has no factors before its solves have cost as much.
        """
        items = y.numel() // self.A.out_numel
        return items * (self.expected or _FEWEST_ITERATIONS) > 2 * self._batch_limit or self.exhausted

    @functools.cached_property
    def _batch_limit(self) -> float:
        """The limit with which the expected iterations of a whole batch are compared."""
        if self.expected is not None:
            return self.max_iterations
        A, damping = _convolution(self.A), torch.as_tensor(self.damp)
        return max(self.max_iterations, border_iteration_work(A, tuple(damping.shape)) / iteration_work(A))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, at most {self.max_iterations} iterations)"


def _convolution(A: LinearOperator) -> Convolution:
    """The convolution that A is, or is the adjoint of."""
    core = A.operator if isinstance(A, Adjoint) else A
    assert isinstance(core, Convolution)
    return core


class _Limit:
    """The callback that stops LSMR at its limit, unless it has half of its digits by then and as many may follow.

    Args:
        max_iterations: the number of iterations after which it decides.
        rtol: the relative tolerance of ``||A^H r|| / ||r||``, r the residual, whose first value is about ``||A||``.
    """

    def __init__(self, max_iterations: int, rtol: float) -> None:
        self.max_iterations, self.rtol = max_iterations, rtol

    def __call__(self, state: IterationState) -> bool:
        ratio = divide(state.gradient_norm, state.residual_norm)
        if state.iteration == 0:
            self.start = ratio
        return state.iteration >= self.max_iterations and not bool(
            (ratio <= self.rtol**0.5 * self.start)[state.running].all()
        )
