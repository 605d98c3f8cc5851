r"""tikhonov: regularised least squares with a general penalty and a prior; and its plan for fixed A, L and damp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, MethodError, unreported
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.bounded import bounded_least_squares
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.damping.selection import Selection
from lsconv.inverse.fallback import Fallback, penalised_fallback_plan
from lsconv.inverse.lstsq import lstsq
from lsconv.inverse.observation import Observation, mask_of_data
from lsconv.inverse.plans.krylov_plan import KrylovPlan, PenalisedBackward
from lsconv.inverse.route import penalty_plan, route
from lsconv.inverse.sharded import solves_shards
from lsconv.inverse.solve import without_items
from lsconv.krylov.gradients.attach import LeastSquares, attach
from lsconv.krylov.gradients.backward_solves import Inverse
from lsconv.krylov.gradients.parameters import parameters_of, rebuild
from lsconv.krylov.loop.certificate import NormBounds
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.problem import Problem, accept_operator, accept_penalty, as_complex, check_damp, prepare
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.krylov.plan import PenalisedPlan, Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import double, remedy
from lsconv.operators.elementary import Identity
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["penalised_inverse", "tikhonov"]

# The norms of residual and gradient count as unchanged by adding the prior where they grow by at most this factor.
_UNCHANGED_NORM = 1.1


@untraced
@checks_numbers
@solves_shards
@serves_empty_batches()
def tikhonov(
    A: OperatorLike,
    y: Tensor,
    damp: float | Tensor | str,
    *,
    L: OperatorLike | None = None,
    x_prior: Tensor | None = None,
    penalty_data: Tensor | None = None,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    noise_std: float | Tensor | None = None,
    bounds: tuple[float | None, float | None] | None = None,
    at_least: Tensor | None = None,
    method: str = "auto",
    x0: Tensor | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    memory_limit: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Least squares with a quadratic penalty.

    .. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|L (x - x_{prior}) - w\|^2

    with w = ``penalty_data``, zero unless given. A convolution with a convolutional L (Gradient, Laplacian, Identity,
    stride-1 convolutions, scaled and stacked) is solved exactly: in closed form when everything is circular, otherwise
    through the border. Everything else goes to LSMR on the stacked operator ``[A; damp L]``, with an FFT-diagonal
    preconditioner where A and L have one. The minimiser is unique when no x but 0 has ``A x = 0`` and ``L x = 0``;
    otherwise it is determined up to such x.

    x is differentiable with respect to y, damp, x_prior, w and every tensor A and L are made of, once and again, by one
    more solve with the same plan. A damp chosen by a rule is held fixed. With ``damp=0`` the gradient is that for
    changes of A that keep its rank (see :func:`lstsq`): where the symbol of A has zeros there is none; use
    ``damp > 0``.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: data, ``(*batch, *out_shape)``; it may be complex where A is real, and the batch empty.
        damp: the damping, a number or a tensor with one per batch item (in units of A over L); or the rule that chooses
            it: "gcv", "discrepancy" or "upre" (these two need ``noise_std``), "lcurve", "evidence". With ``damp=0`` the
            answer is the least-squares solution nearest to ``x_prior``, whatever L is.
        L: the penalty, an operator on ``A.in_shape``; None: the identity.
        x_prior: what the penalty pulls to, ``(*batch, *in_shape)``; None: zero. It changes the answer.
        penalty_data: w, what the penalty wants ``L (x - x_prior)`` to be, ``(*batch, *L.out_shape)``; None: zero. Since
            :math:`\|Lx - w\|^2 = \|L(x - L^+w)\|^2 + \mathrm{const}`, it is a prior that costs one more solve, with L.
        observed: True where y was measured, a bool tensor that broadcasts with y (one mask for all items, or one per
            item). What stands elsewhere, NaN included, is not read.
        weights: the weights w >= 0 of :math:`\sum_i w_i |(Ax)_i - y_i|^2`, a tensor that broadcasts with y; data of
            weight 0 are missing, and the gradient by such a weight is 0. None: ones.
        noise_std: standard deviation of the noise in every entry of y, in the units of y; with ``weights`` that of an
            entry of weight one.
        bounds: ``(lowest, highest)`` for x, each a number or None, for real A; see :func:`lstsq`. A rule chooses damp
            without a look at them.
        at_least: True where a datum is a lower bound of the truth, as that of a saturated pixel is: its residual counts
            only where Ax falls short of it, :math:`\min((Ax - y)_i, 0)^2`. Bool, broadcasts with y, for real A; solved
            as with ``bounds``. A rule chooses damp without these data.
        method: "auto", or "fourier", "border", "lsmr" to insist on one.
        x0: where the Krylov methods start. It does not change the answer; the exact methods have no use for it.
        rtol: relative tolerance on residual or gradient; None: 1e-6 in float32 and 1e-10 in float64 for the exact
            methods, ``10 eps^0.75`` for LSMR.
        atol: absolute tolerance on the residual norm, in the units of y.
        max_iter: limit on the iterations.
        memory_limit: bytes the setup may use; None: 60 % of what is free on the device.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`: ``residual_norm`` is :math:`\|y - Ax\|`, ``gradient_norm``
        :math:`\|A^H(y - Ax) - \mathrm{damp}^2 L^HL(x - x_{prior})\|`, ``damp`` the damping used, ``selection`` how it
        was chosen.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, ArgumentError, MethodError, ...).
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Hansen, "Discrete Inverse Problems: Insight and Algorithms" (2010), chapter 8, for the general form.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, in_size=(32, 32))
        >>> x = torch.linspace(0, 1, 32).expand(1, 32, 32)
        >>> solution = lsconv.tikhonov(A, A(x), 1e-3, L=lsconv.Gradient((1, 32, 32)))
        >>> bool(solution.converged), bool((solution.x - x).abs().max() < 1e-2)
        (True, True)
    """
    A = accept_operator(A, y)
    L = _check_penalty(L, A)
    A.check_output(y, "y")
    A, y = Observation.of(A, observed, weights).of_data(A, y)
    if at_least is not None:
        at_least = mask_of_data("at_least", at_least, A, "a datum is a lower bound")
    x_prior, x0 = _check_prior(as_complex(x_prior, A), A), as_complex(x0, A)
    if penalty_data is not None:
        if not isinstance(damp, str) and not bool((torch.as_tensor(damp) > 0).all()):
            raise ArgumentError(f"penalty_data: needs damp > 0, without which nothing is asked of L x, got damp={damp}")
        target = _prior_of(as_complex(penalty_data, A), A, L)
        x_prior = target if x_prior is None else x_prior + target
    selection = None
    if isinstance(damp, str):
        certain = None if at_least is None else ~at_least
        selection = choose_damp(A, y, damp, L=L, x_prior=x_prior, noise_std=noise_std, observed=certain)
        strength: float | Tensor = selection.damp
    else:
        strength = damp
    if selection is None and noise_std is not None:
        raise ArgumentError('noise_std: only damp="discrepancy" and damp="upre" use it')
    if bounds is not None or at_least is not None:
        if method != "auto" or atol:
            raise MethodError("method, atol: not with bounds or at_least, whose solver takes x0, rtol and max_iter")
        bounds = (-math.inf, None) if bounds is None else bounds
        solution = bounded_least_squares(
            "tikhonov", A, y, bounds, strength, L=L, x_prior=x_prior, x0=x0, rtol=rtol, max_iter=max_iter,
            raise_on_failure=raise_on_failure, check_finite=check_finite, at_least=at_least,
        )  # fmt: skip
        return replace(solution, selection=selection)

    options = {"rtol": rtol, "atol": atol, "max_iter": max_iter}
    solver = _TikhonovSolver(method, memory_limit, x0, check_finite, raise_on_failure, selection, options)
    return attach(solver, LeastSquares(A, y, strength, L, x_prior), rtol=rtol)


@dataclass(frozen=True)
class _TikhonovSolver:
    """The solver that makes a plan by :func:`route` or :func:`penalty_plan` for a problem, and uses it once."""

    method: str
    memory_limit: int | None
    x0: Tensor | None
    check_finite: bool
    raise_on_failure: bool
    selection: Selection | None
    options: dict[str, Any]

    def answer(self, problem: LeastSquares) -> tuple[Solution, Inverse]:
        """The solution, and the solves of its backward pass, by the plan that gave it."""
        A, x0 = problem.A, self.x0
        data = prepare(A, problem.y, damp=problem.damp, x0=x0, check_finite=self.check_finite, name="y")
        damping = check_damp(problem.damp, A)
        plan: Plan
        inverse: Inverse
        if problem.L is None or not bool((damping > 0).any()):
            solution, plan = self._without_penalty(A, data.y, damping, problem.x_prior)
            inverse = plan
        else:
            solution, penalised = self._with_penalty(A, problem.L, data, damping, problem.x_prior)
            plan, inverse = penalised, PenalisedBackward(A, penalised)
        if bool(data.nonfinite.any()):
            solution = without_items(solution, data.nonfinite)
        solution = replace(solution, selection=self.selection)
        report(solution, plan, raise_on_failure=self.raise_on_failure)
        return solution, inverse

    def _without_penalty(
        self, A: LinearOperator, y: Tensor, damping: Tensor, x_prior: Tensor | None
    ) -> tuple[Solution, Plan]:
        """Solve with the identity as penalty, by a plan of :func:`route`; return that of the backward pass too."""
        plan, options = self._plan(A, damping), self.options
        if self.x0 is not None and "x0" in plan.options:
            options = {**options, "x0": self.x0 if x_prior is None else self.x0 - x_prior}
        # a fallback would ignore x0 and max_iter, and there is none where the caller has given them
        may_fall_back = self.method in ("auto", "border") and self.x0 is None and options["max_iter"] is None
        fallback = Fallback(A, damping, plan) if may_fall_back else None
        with unreported():
            return _with_prior(plan, A, y, damping, x_prior, options, fallback)

    def _with_penalty(
        self, A: LinearOperator, L: LinearOperator, data: Problem, damping: Tensor, x_prior: Tensor | None
    ) -> tuple[Solution, PenalisedPlan]:
        """Solve with L, by a plan of :func:`penalty_plan`; a second plan solves for items in doubt."""
        plan, options = penalty_plan(A, L, damping, method=self.method, memory_limit=self.memory_limit), self.options
        start: dict[str, Any] = {"x0": self.x0} if "x0" in plan.options else {}
        with unreported():
            solution = plan.solve(data.y, x_prior=x_prior, **options, **start)
        may_fall_back = self.method == "auto" and self.x0 is None and options["max_iter"] is None
        doubtful = ~solution.converged
        if solution.excused is not None:  # rounding of the gradient may hide an error along small singular values
            doubtful = doubtful | solution.excused
        doubtful = doubtful & ~data.nonfinite
        other_plan = penalised_fallback_plan(A, L, damping, plan) if may_fall_back and bool(doubtful.any()) else None
        if other_plan is None:
            return solution, plan
        other = other_plan.solve(data.y, x_prior=x_prior, rtol=options["rtol"], atol=options["atol"])
        return solution.replaced(doubtful & other.converged, other), other_plan

    def _plan(self, A: LinearOperator, damping: Tensor) -> Plan:
        """The plan without a penalty; a damped start needs the preconditioner on the solution side."""
        needs_krylov = self.x0 is not None
        plan = route(A, damping, method=self.method, memory_limit=self.memory_limit, needs_krylov=needs_krylov)
        if self.x0 is None or not isinstance(plan, KrylovPlan) or plan.M is None:
            return plan
        return KrylovPlan(A, damping, plan.method, (None, CirculantPreconditioner(A, damping, side="solution")))


def _with_prior(
    plan: Plan,
    A: LinearOperator,
    y: Tensor,
    damp: Tensor,
    x_prior: Tensor | None,
    options: dict[str, Any],
    fallback: Fallback | None,
) -> tuple[Solution, Plan]:
    """Solve for ``x - x_prior`` and certify ``x``; return the plan of the backward pass too."""
    prior = None if x_prior is None else x_prior.detach()
    data = y if prior is None else y - A.apply(prior)
    solution, backward = plan.solve(data, **options), plan
    if fallback is not None and not solution.all_converged:
        solution, backward = fallback.replace_unconverged(solution, data, **options)
    if prior is None:
        return solution, backward
    precise = A.to(dtype=double(A.dtype)) if isinstance(A, Convolution) else A
    problem = Penalised(precise, damp)
    judge = problem.judge(
        plan.tolerances(options["rtol"], options["atol"]),
        A.dtype,
        norm=NormBounds(upper=norm_bound(A) if isinstance(A, Convolution) else None),
    )
    judged = problem.solution(
        judge,
        solution.x.to(precise.dtype),
        y,
        x_prior=prior,
        iterations=solution.iterations,
        history=solution.history,
    )
    # where x - x_prior is small beside x_prior, the certificate of x does not show what that of x - x_prior does
    ranks = (solution.codes == Status.RANK_DEFICIENT.code) | (solution.codes == Status.RANK_UNDECIDED.code)
    unresolved = ~solution.converged & (ranks | (judged.damp == 0) | ~judged.converged)
    # the certificate of the solve had a better bound of ||A||, and holds where the prior has not changed the norms
    prior_changes_nothing = (judged.residual_norm <= _UNCHANGED_NORM * solution.residual_norm) & (
        judged.gradient_norm <= _UNCHANGED_NORM * solution.gradient_norm
    )
    prior_changes_nothing = prior_changes_nothing & solution.converged & ~judged.converged
    solution = replace(
        judged,
        codes=torch.where(unresolved | prior_changes_nothing, solution.codes, judged.codes),
        converged=(judged.converged & ~unresolved) | prior_changes_nothing,
        rank=solution.rank,
    )
    return solution, backward


def _check_penalty(L: OperatorLike | None, A: LinearOperator) -> LinearOperator | None:
    """L as an operator on the inputs of A, in its dtype and on its device; None for the identity."""
    L = None if L is None else accept_penalty(L, A)
    if L is None or isinstance(L, Identity):
        return None
    if L.dtype != A.dtype:
        raise DtypeError(f"L: dtype {L.dtype} differs from that of A, {A.dtype}; {remedy('L', L.dtype, 'A', A.dtype)}")
    if L.device != A.device:
        raise DeviceError(f"L: device {L.device} differs from that of A, {A.device}; move it with L.to(A.device)")
    return L


def _check_prior(x_prior: Any, A: LinearOperator) -> Tensor | None:
    if x_prior is None:
        return None
    if not isinstance(x_prior, Tensor):
        raise ArgumentTypeError(
            f"x_prior: expected a torch.Tensor (*batch, {A.in_shape}), got {type(x_prior).__name__}"
        )
    A.check_input(x_prior, "x_prior", finite=True)
    return x_prior


def _prior_of(penalty_data: Any, A: LinearOperator, L: LinearOperator | None) -> Tensor:
    """``L^+ w`` for w, the ``penalty_data``; in double precision, so that its error changes the problem little."""
    if not isinstance(penalty_data, Tensor):
        raise ArgumentTypeError(f"penalty_data: expected a torch.Tensor, got {type(penalty_data).__name__}")
    if L is None:
        A.check_input(penalty_data, "penalty_data", finite=True)
        return penalty_data
    L.check_output(penalty_data, "penalty_data", finite=True)
    precise = double(A.dtype)
    return lstsq(L.to(dtype=precise), penalty_data.to(precise)).x.to(penalty_data.dtype)


@dataclass(frozen=True)
class _FixedPlanSolver:
    """The solver of one plan, for the values of A, L and damp that the plan was made for."""

    A: LinearOperator
    plan: PenalisedPlan

    def answer(self, problem: LeastSquares) -> tuple[Tensor, Inverse]:
        """The x for the data and the prior of the problem, ``(*batch, *in_shape)``, and its backward solves."""
        data, prior = prepare(self.A, problem.y, damp=problem.damp, check_finite=False, name="y"), problem.x_prior
        nonfinite = data.nonfinite
        if prior is not None:
            nonfinite = nonfinite | ~torch.isfinite(prior).flatten(prior.ndim - len(self.A.in_shape)).all(-1)
        with unreported():
            solution = self.plan.solve(data.y, x_prior=prior)
        if bool(nonfinite.any()):
            solution = without_items(solution, nonfinite)
        report(solution, self.plan)
        return solution.x, PenalisedBackward(self.A, self.plan)


def penalised_inverse(
    A: LinearOperator, L: LinearOperator, damp: Tensor, *, method: str = "auto"
) -> Callable[..., Tensor]:
    """The answers of ``tikhonov(A, y, damp, L=L, x_prior=x_prior)``, the setup done once.

    Args:
        A: the operator.
        L: the penalty.
        damp: the damping, > 0.
        method: as in :func:`lsconv.tikhonov`.

    Returns:
        A function of A, y, L, damp and x_prior, differentiable in all of them. A, L and damp have to have the values
        that the setup was made for; what autograd follows may have changed.
    """
    fixed_A, fixed_L = (rebuild(operator, [p.detach() for p in parameters_of(operator)]) for operator in (A, L))
    with torch.no_grad():
        plan = penalty_plan(fixed_A, fixed_L, damp.detach(), method=method)

    solver = _FixedPlanSolver(fixed_A, plan)

    @serves_empty_batches()
    def apply(A: LinearOperator, y: Tensor, L: LinearOperator, damp: Tensor, x_prior: Tensor | None = None) -> Tensor:
        x: Tensor = attach(solver, LeastSquares(A, y, damp, L, x_prior))
        return x

    return apply
