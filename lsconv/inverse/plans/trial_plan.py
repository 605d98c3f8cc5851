"""LSMR tried before the border: for as many iterations as cost what the border's setup would, with a forecast."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import CostModel, dense_cost, plan_bytes
from lsconv.factored.direct_plan import in_double
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.plans.lsmr_cost import SETUP_BYTE_WORK, iteration_work, iterations_needed, transform_grid
from lsconv.inverse.plans.planes import Planes, is_one_sided
from lsconv.krylov.loop.batch_groups import in_groups
from lsconv.krylov.loop.batched_scalars import divide
from lsconv.krylov.loop.evidence import NormBounds, NullSpaceBound, RankThreshold
from lsconv.krylov.loop.judge import Judge, norm_from_below
from lsconv.krylov.loop.options import IterationState
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import EXCUSED, SQUARE_SHARE, Tolerances
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.plan import LastResort
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import direct_rtol

__all__ = ["TrialPlan", "trial"]

# LSMR that may take fewer iterations is not tried, as it would seldom end; a preconditioned one does the work of three.
_FEWEST_ITERATIONS = 30


def trial(A: LinearOperator, damp: Tensor | float, memory_limit: int | None = None) -> TrialPlan | None:
    """LSMR for as many iterations as cost what the border's setup does; None where they would not do.

    ``most`` is that number, known by the bytes of the border's plan or by the planes of a volume, and ``expected`` are
    those that LSMR should take: it is tried where they are fewer. In this order:

    - undamped operators that are nearly square: never;
    - kernels in one dimension, and volumes without padding: preconditioned by the circulant, and measured by the
      factorisation of their border, one dense matrix;
    - kernels over half of the field: few of their singular values are above the damping, and their border is the field;
    - other blurs: where the damping bounds the iterations;
    - layers, whose symbol is a matrix and whose iterations are often some tens: always.
    """
    assert isinstance(A, Convolution)
    shapes, damping = sorted((A.in_numel, A.out_numel)), torch.as_tensor(damp, dtype=torch.float64)
    undamped = bool((damping == 0).any())
    if undamped and shapes[1] < 1.5 * shapes[0]:
        return None
    grid, iteration = transform_grid(A), iteration_work(A)
    blur, unit_stride = (A.c_in + A.c_out) // A.groups <= 2, all(step == 1 for step in A.stride)
    volume = Planes.of(A, damp, memory_limit)
    if blur and unit_stride and not undamped and A.ndim != 2 and is_one_sided(A, range(A.ndim)):
        if volume is None:
            factors = dense_cost(_border_cells(A), definite=True)
            work = CostModel(A.groups, math.prod(grid), 1, definite=True).factor_work(factors)
        else:
            work = volume.work
        most = int(work / (1.5 * iteration))
        if A.ndim == 1:
            return TrialPlan(A, damp, most, preconditioned=True) if 3 * most >= _FEWEST_ITERATIONS else None
        # the circulant takes the root of the bound of conjugate gradients, two to five times
        expected = 4 * float(iterations_needed(A, damp, norm_bound(A)).sqrt().max())
        if expected <= most:
            return TrialPlan(A, damp, int(min(most, 4 * expected)), preconditioned=True, expected=expected)
    work = SETUP_BYTE_WORK * plan_bytes(A, tuple(damping.shape)) if volume is None else volume.work
    most = int(work / iteration)
    if most < _FEWEST_ITERATIONS:
        return None
    if blur and not undamped:
        kernel_over_half_field = unit_stride and all(
            2 * k > n for k, n in zip(A.kernel_extent, A.spatial_in, strict=True)
        )
        if kernel_over_half_field:
            # of the bound of conjugate gradients it takes a fourth and less
            expected = float(iterations_needed(A, damp, norm_bound(A)).max()) / 4
            definite = is_one_sided(A, range(A.ndim))
            model = CostModel(A.groups, math.prod(grid), 1, definite)
            allowed = int(model.factor_work(dense_cost(_border_cells(A), definite=definite)) / iteration)
            return TrialPlan(A, damp, min(most, allowed), expected=expected) if expected <= allowed else None
        plane = unit_stride and A.ndim < 3
        # a plane's border is factorised in an eighth of the time, and its symbol shows the norm of kernels of any sign
        most = most // 8 if plane else most
        needed = iterations_needed(A, damp, _symbol_norm(A, grid) if plane else norm_bound(A))
        converges_in_time = bool((needed <= (1.5 if A.ndim == 3 and unit_stride else 1) * most).all())
        return TrialPlan(A, damp, most, expected=float(needed.max())) if converges_in_time else None
    return None if blur and unit_stride else TrialPlan(A, damp, most)


def _border_cells(A: Convolution) -> int:
    """The number of border cells of a convolution of one channel a group, on its shortest grid."""
    grid = math.prod(Embedding(A, (1,) * A.ndim).grid)
    return sum(grid - math.prod(sizes) for sizes in (A.spatial_in, A.spatial_out))


def _symbol_norm(A: Convolution, grid: list[int]) -> Tensor:
    """The largest of the symbols of a blur: the norm of its circulant."""
    weight = A.weight.detach()
    transform = torch.fft.fftn if A.is_complex else torch.fft.rfftn
    symbol = transform(weight, s=grid, dim=tuple(range(-A.ndim, 0)))
    return symbol.abs().double().flatten(len(A.batch_shape)).amax(-1)


class TrialPlan(KrylovPlan):
    r"""LSMR for as many iterations as cost what another plan's setup would, or for as many as it takes.

    The items that a limit leaves open are for that plan. An iteration that is then on its way to end before it has
    taken twice as many goes on. Only :meth:`solve` has the limit, which no backward pass has.

    What rounding adds to x along the null space of A is no more than ``eps (||A|| / damp)^2`` of x: where that may be
    too much, the iteration is in double precision.

    Args:
        A: the operator.
        damp: the damping.
        most: the limit; None: there is none.
        preconditioned: by the circulant inverse, in double precision throughout.
        expected: iterations that a right-hand side is expected to take; None: not known.

    Attributes:
        total: the iterations of all solves.
    """

    reason = "the setup of the border would cost more than LSMR may need: LSMR first, then the border"
    options = frozenset()
    fallback = LastResort.BORDER

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
        self.precise, self.dtype = precise, A.dtype
        self.most, self.rtol, self.total, self.expected = most, direct_rtol(A.dtype), 0, expected

    def solve(  # type: ignore[override]  # nothing else to choose
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The solution for ``y``, to the tolerance of the direct methods and with their certificate, in float64."""
        self.spent = 0
        answer = functools.partial(self._answer, tolerances=self.tolerances(rtol, atol), max_iter=max_iter)
        solution = answer(y, self.damp) if self.M or self.N else in_groups(self.A, y, self.damp, answer)
        self.total += self.spent
        return solution

    def _answer(self, y: Tensor, damp: Tensor | float, *, tolerances: Tolerances, max_iter: int | None) -> Solution:
        """The solution for a group of right-hand sides."""
        precise, A = self.precise, self.A
        # where x leaves a tenth of the data, a certificate of a single-precision x would not show its null-space part
        if A.dtype != precise.dtype:
            narrow = _rounds_little(damp, self._norm, 0.1 * tolerances.eps, tolerances)
            A = self.A if bool(narrow.all()) else precise
        limits: dict[str, Any] = {"max_iter": max_iter}
        if self.most is not None:
            most = 2 * self.most if max_iter is None else min(max_iter, 2 * self.most)
            limits = {"max_iter": most, "callback": _Limit(self.most, tolerances.rtol)}
        terms = {**self._terms(self.M, self.N), "damp": damp}
        found = lsmr(A, y.to(A.dtype), rtol=tolerances.rtol, atol=tolerances.atol, **terms, **limits)
        ended = torch.where(found.codes == Status.CALLBACK.code, Status.ITERATION_LIMIT.code, found.codes)
        self.spent = max(self.spent or 0, int(found.iterations.max()))
        norm = None if found.history is None else found.history.largest_norm
        # the iterates of a preconditioner on the side of x are not of the form A^H z
        rounding = torch.finfo(A.dtype).eps if self.N is None else None
        rounds_little, null_share = found.damp == 0, tolerances.null_share
        if rounding is None:
            null_share = null_share if A.in_numel > A.out_numel else SQUARE_SHARE
        elif norm is not None:
            rounds_little = _rounds_little(found.damp, norm, rounding, tolerances)
        judge = Judge(
            precise,
            tolerances,
            found.damp,
            self.dtype,
            rounding=Tolerances.of(A.dtype, tolerances.rtol, 0.0).rounding,
            norm=NormBounds(norm, sharper=lambda: self._norm),
            rank=RankThreshold(length_limit=EXCUSED),
            null_space=NullSpaceBound(torch.where(rounds_little, torch.inf, null_share), rounding),
        )
        judged = judge.solution(
            found.x.to(precise.dtype),
            y.to(precise.dtype),
            iterations=found.iterations,
            history=found.history,
            otherwise=torch.where(found.converged, Status.STAGNATION.code, ended),
        )
        # LSMR's own verdict stands where norms do not show it: a null space, data that are not finite, a limit reached
        blind = torch.zeros_like(found.converged)
        for status in (Status.RANK_DEFICIENT, Status.NON_FINITE, Status.ITERATION_LIMIT):
            blind = blind | (ended == status.code)
        return replace(
            judged,
            codes=torch.where(blind, ended, judged.codes),
            converged=judged.converged & ~blind,
        )

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether all solves together have taken the limit, and the other plan is the faster once it is made.

        The border of damped blurs is, whose factors take little memory; that of layers may be too large to keep.
        """
        A = self.A
        assert isinstance(A, Convolution)
        blur = (A.c_in + A.c_out) // A.groups <= 2 and bool((torch.as_tensor(self.damp) > 0).all())
        return self.most is not None and self.total >= self.most and blur

    def gives_way(self, y: Tensor) -> bool:
        """Tell whether :attr:`exhausted`, or whether so many right-hand sides are expected to take twice the limit."""
        items = y.numel() // self.A.out_numel
        many = self.most is not None and self.expected is not None and items * self.expected > 2 * self.most
        return many or self.exhausted

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``."""
        return super().apply(y.to(self.A.dtype), rtol=rtol).to(self.dtype)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return super().adjoint(v.to(self.A.dtype), rtol=rtol).to(self.dtype)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``; in double precision, for a difference over damp^2."""
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

    @functools.cached_property
    def _norm(self) -> Tensor:
        """``||A||``, from below."""
        with torch.no_grad():
            return norm_from_below(self.A, 3)

    def __repr__(self) -> str:
        limit = "" if self.most is None else f", at most {self.most} iterations"
        preconditioner = self.M if self.M is not None else self.N
        by = "" if preconditioner is None else f", preconditioner={type(preconditioner).__name__}"
        return f"TrialPlan('lsmr'{by}{limit})"


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
        remaining = (relative / self.goal).log() / fall
        soon = (remaining <= 2 * self.most - state.iteration) & (fall > 0)
        return not bool(soon[state.running].all())
