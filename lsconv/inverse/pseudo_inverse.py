r"""pinv: the (regularised) pseudo-inverse as an operator."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError, ShapeError, unreported, warn
from lsconv.inverse.fallback import Fallback
from lsconv.inverse.observation import Observation
from lsconv.inverse.route import route
from lsconv.inverse.solve import solve, with_start
from lsconv.krylov.gradients.attach import LeastSquares, adjoint_answer, attach, needs_gradient, start_as_prior
from lsconv.krylov.gradients.parameters import parameters_of
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, check_damp, prepare
from lsconv.krylov.loop.solution import Solution, join_parts
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, on_parts, over_items, select
from lsconv.operators.dtypes import direct_rtol
from lsconv.operators.observed import observed as measured
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import hidden_by_vmap, untraced

__all__ = ["PseudoInverse", "pinv"]


@untraced
@checks_numbers
def pinv(
    A: OperatorLike,
    *,
    damp: float | Tensor = 0.0,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    rcond: float | None = None,
    memory_limit: int | None = None,
) -> PseudoInverse:
    r"""The pseudo-inverse of A as an operator: ``pinv(A)(y)`` is the x of ``lstsq(A, y)``.

    .. math:: A^+, \quad\text{or}\quad (A^H A + \mathrm{damp}^2)^{-1} A^H

    The setup (symbols, factors) is done here, once, and kept; applying it costs the solve alone. ``pinv(A).H`` is its
    adjoint, and :meth:`PseudoInverse.solve` gives the whole :class:`Solution`. As an operator has no status, items that
    hold NaN or infinity are NaN in the answer, with a :class:`ConvergenceWarning`; others are not touched.

    Both are differentiable as :func:`lstsq` is. With ``damp=0`` that is for changes of A that keep its rank (Golub and
    Pereyra); where the symbol of A has zeros they do not, :math:`A^+` jumps, and ``damp > 0`` is what has a gradient.
    The plan holds the values that A and damp had when it was made: after a step on a parameter make another
    (:mod:`lsconv.nn` does it by itself).

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        damp: the damping, a number or a tensor with one per batch item.
        observed: as in :func:`lstsq`: the data that :meth:`PseudoInverse.apply` reads.
        weights: as in :func:`lstsq`; ``pinv(A, weights=w)(y)`` is the x of ``lstsq(A, y, weights=w)``.
        method: as in :func:`lstsq`.
        preconditioner: as in :func:`lstsq`.
        rcond: as in :func:`lstsq`.
        memory_limit: as in :func:`lstsq`.

    Returns:
        An operator from ``A.out_shape`` to ``A.in_shape``.

    Raises:
        MethodError: the method cannot serve the operator.
        PlanMemoryError: the setup would not fit.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(4, 4, 3, 3, dtype=torch.float64), in_size=(16, 16))
        >>> Ap = lsconv.pinv(A)
        >>> y = torch.randn(10, 4, 14, 14, dtype=torch.float64)
        >>> torch.allclose(A(Ap(y)), y)
        True
        >>> Ap.dot_test() < 1e-6
        True
    """
    A = accept_operator(A)
    observation = Observation.of(A, observed, weights)
    A = observation.operator(A)
    if any(hidden_by_vmap(t) for t in (damp, *parameters_of(A)) if isinstance(t, Tensor)):
        raise MethodError(
            "pinv: vmap hides the values that the setup needs; use lstsq inside vmap, or make pinv outside of it with "
            "a kernel or a damp per batch item"
        )
    if check_damp(damp, A).numel() == 0:
        raise ShapeError("damp: expected a number or a tensor with one value per batch item, got an empty tensor")
    if method == "hybrid":
        raise MethodError(
            'method: "hybrid" chooses the damping by y, so it is no linear map; use lstsq, or "lsqr" here'
        )
    damp = damp if isinstance(damp, Tensor) else float(damp)
    setup = _Setup(A, method, preconditioner, memory_limit, rcond)
    return PseudoInverse(setup, damp, setup.plan(damp.detach() if isinstance(damp, Tensor) else damp), observation)


@dataclass(frozen=True)
class _Setup:
    """The arguments of :func:`pinv` but for the damping."""

    A: LinearOperator
    method: str = "auto"
    preconditioner: LinearOperator | str | None = "auto"
    memory_limit: int | None = None
    rcond: float | None = None

    def plan(self, damp: float | Tensor) -> Plan:
        """The plan for a damping."""
        return route(
            self.A,
            damp,
            method=self.method,
            preconditioner=self.preconditioner,
            memory_limit=self.memory_limit,
            rcond=self.rcond,
        )

    def fallback(self, damp: float | Tensor, plan: Plan) -> Fallback | None:
        """The fallback beside a plan for a damping; None where the method is the user's choice."""
        return Fallback(self.A, damp, plan, self.rcond) if self.method in ("auto", "border") else None


class PseudoInverse(LinearOperator):
    """The (regularised) pseudo-inverse of an operator, made by :func:`pinv`.

    Args:
        setup: how the plan is made.
        damp: the damping.
        plan: the plan for it.
        observation: the data that were measured, and their weights.

    Attributes:
        operator: the operator inverted.
        plan: the setup.
        fallback: solves for the items that the plan leaves unconverged, as in :func:`lstsq`; None: nothing does.
        observation: the data that were measured, and their weights; ``operator`` includes both.
    """

    def __init__(self, setup: _Setup, damp: float | Tensor, plan: Plan, observation: Observation | None = None) -> None:
        operator = setup.A
        super().__init__(
            operator.out_shape,
            operator.in_shape,
            dtype=operator.dtype,
            device=operator.device,
            batch_shape=broadcast_shapes(operator.batch_shape, torch.as_tensor(damp).shape),
        )
        self.operator = operator
        self.damp = damp
        self.plan = plan
        self.fallback = setup.fallback(damp.detach() if isinstance(damp, Tensor) else damp, plan)
        self.observation = Observation() if observation is None else observation
        self._setup = setup

    @untraced
    def with_damp(self, damp: float | Tensor) -> PseudoInverse:
        """The pseudo-inverse for another damping, which shares the decompositions that do not depend on it.

        The plans for separable kernels, disjoint patches, small matrices and even kernels with reflect padding share
        them. All other plans are made anew, because almost all factors of a border or a circulant depend on the
        damping.

        Args:
            damp: the damping, a number or a tensor with one per batch item.

        Example:
            >>> A = lsconv.Conv2d(torch.ones(1, 1, 5, 5, dtype=torch.float64) / 25, in_size=(24, 24))
            >>> first, y = lsconv.pinv(A, damp=0.1), torch.randn(1, 20, 20, dtype=torch.float64)
            >>> torch.allclose(first.with_damp(0.3)(y), lsconv.lstsq(A, y, damp=0.3).x)
            True
        """
        check_damp(damp, self.operator)
        fixed = damp.detach() if isinstance(damp, Tensor) else float(damp)
        plan: Plan | None = None
        with contextlib.suppress(MethodError):
            plan = self.plan.with_damp(fixed)
        return PseudoInverse(self._setup, damp, self._setup.plan(fixed) if plan is None else plan, self.observation)

    def with_gradients_by(self, operator: LinearOperator, damp: float | Tensor) -> PseudoInverse:
        """The same plan, differentiable by an operator and a damping of the same values."""
        other = copy.copy(self)
        other.operator, other.damp = operator, damp
        return other

    @untraced
    @serves_empty_batches(lambda inverse: inverse.in_shape)
    def apply(self, x: Tensor) -> Tensor:
        """The solution for the data ``x``, ``(*batch, *in_shape)``; NaN, with a warning, for nonfinite items."""
        return attach(_UncertifiedSolver(self), LeastSquares(self.operator, self.observation.weighted(x), self.damp))

    @untraced
    @serves_empty_batches()
    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoint of :meth:`apply`."""
        if needs_gradient(self.operator, y, self.damp):
            return self.observation.weighted(adjoint_answer(self.plan, self.operator, y, self.damp))
        v, finite = _finite_items(y.detach(), self.out_shape)
        return self.observation.weighted(_nan_elsewhere(self._adjoint_with_fallback(v), finite, self.in_shape))

    def _apply_with_fallback(self, y: Tensor) -> tuple[Tensor, Plan]:
        """The answer for finite data, from the fallback for items that the plan misses, and the plan that gave it."""
        if self.fallback is None:
            return self.plan.apply(y), self.plan
        first = self._first_plan(self.fallback)
        found = first.attempt_apply(y)
        if found is not None and not bool(found[1].any()):
            return found[0], first
        nonfinite = torch.zeros(y.shape[: y.ndim - len(self.in_shape)], dtype=torch.bool, device=y.device)
        solution, plan = solve(self.plan, y, nonfinite, fallback=self.fallback)
        return solution.x, plan

    def _adjoint_with_fallback(self, v: Tensor) -> Tensor:
        """The adjoint of the answer, from the fallback for items that the plan misses."""
        if self.fallback is None:
            return self.plan.adjoint(v)
        first = self._first_plan(self.fallback)
        found = first.attempt_adjoint(v)
        if found is None:
            return first.adjoint(v)
        y, missed = found
        plan = self.fallback.plan if bool(missed.any()) else None
        if plan is None:
            return y
        with unreported():
            other = plan.adjoint(v, rtol=direct_rtol(self.dtype))
        return select(missed, other, y)

    def _first_plan(self, fallback: Fallback) -> Plan:
        """The plan that solves first: the fallback's where the solves so far have cost its setup, else the plan."""
        return (fallback.plan or self.plan) if self.plan.innermost.exhausted else self.plan

    @untraced
    @checks_numbers
    @serves_empty_batches(lambda inverse: inverse.in_shape)
    def solve(
        self, y: Tensor, *, check_finite: bool = True, raise_on_failure: bool = False, **options: Any
    ) -> Solution:
        """The solution for ``y`` with its certificate; ``options`` are rtol, atol and max_iter, as in :func:`lstsq`."""
        if isinstance(y, Tensor) and y.is_complex() and not self.is_complex:
            return self._solve_parts(y, check_finite=check_finite, raise_on_failure=raise_on_failure, **options)
        self.operator.check_output(y, "y")
        y = self.observation.weighted(y)
        start = start_as_prior(self.operator, self.damp, options.get("x0"))
        solver = _CertifiedSolver(self, check_finite, {**options, "raise_on_failure": raise_on_failure})
        problem = LeastSquares(self.operator, y, self.damp, x_prior=start)
        return attach(solver, problem, rtol=options.get("rtol"))

    def _solve_parts(self, y: Tensor, **options: Any) -> Solution:
        """The solution for complex data and a real operator, from two solves: real and imaginary part."""
        if options.get("x0") is not None:
            raise MethodError("x0: a real plan takes none for complex y; use lstsq")
        parts: list[Solution] = []

        def solve(part: Tensor) -> Tensor:
            parts.append(self.solve(part, **options))
            return parts[0].x

        self.for_dtype(y.dtype).check_input(y, "y")
        x = on_parts(solve, y, len(self.in_shape), self.batch_shape)
        return join_parts(replace(parts[0], x=x))

    def _map(self, *args: Any, **kwargs: Any) -> PseudoInverse:
        raise MethodError("pinv: a plan does not move; make pinv(A.to(...)) instead")

    def __repr__(self) -> str:
        return f"PseudoInverse({self.in_shape} -> {self.out_shape}, {self.plan!r})"


@dataclass(frozen=True)
class _UncertifiedSolver:
    """The solver of :meth:`PseudoInverse.apply`, whose answers have no certificate."""

    inverse: PseudoInverse

    def answer(self, problem: LeastSquares) -> tuple[Tensor, Plan]:
        """The x, NaN for the items that are not finite, and the plan that gave it."""
        inverse = self.inverse
        y, finite = _finite_items(measured(inverse.operator, problem.y.detach()), inverse.in_shape)
        x, plan = inverse._apply_with_fallback(y)
        return _nan_elsewhere(x, finite, inverse.out_shape), plan


@dataclass(frozen=True)
class _CertifiedSolver:
    """The solver of :meth:`PseudoInverse.solve`."""

    inverse: PseudoInverse
    check_finite: bool
    options: dict[str, Any]

    def answer(self, problem: LeastSquares) -> tuple[Solution, Plan]:
        """The solution, and the plan of its backward pass."""
        inverse, options = self.inverse, with_start(self.options, problem)
        data = prepare(inverse.operator, problem.y, damp=problem.damp, check_finite=self.check_finite, name="y")
        return solve(inverse.plan, data.y, data.nonfinite, fallback=inverse.fallback, **options)


def _finite_items(given: Tensor, item: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Replace items of shape ``item`` that hold NaN or infinity by zeros, with a warning, and mark the others.

    None instead of the marks where all are finite.
    """
    finite = torch.isfinite(given)
    if bool(finite.all()):
        return given, None
    good = finite.flatten(given.ndim - len(item)).all(-1)
    warn(
        f"pinv: {int((~good).sum())} of {good.numel()} item(s) of what it is applied to contain NaN or infinity, and "
        f"are NaN in the answer; lstsq and pinv(A).solve refuse them"
    )
    return torch.where(over_items(good, len(item)), given, 0), good


def _nan_elsewhere(answer: Tensor, good: Tensor | None, item: tuple[int, ...]) -> Tensor:
    """Replace the items of shape ``item`` that are not marked as good by NaN; with None all are."""
    return answer if good is None else torch.where(over_items(good, len(item)), answer, torch.nan)
