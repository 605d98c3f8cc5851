r"""lstsq and pinv: the (regularised) least-squares solution, and the pseudo-inverse as an operator."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning, MethodError
from lsconv.fourier.dtypes import direct_rtol
from lsconv.inverse.plans import FourierPlan, KrylovPlan, Plan
from lsconv.inverse.route import BORDER_PLANS, route
from lsconv.inverse.solve import Fallback, solve
from lsconv.krylov.gradients.attach import adjoint_answer, attach, follows, start_as_prior
from lsconv.krylov.gradients.parameters import parameters_of
from lsconv.krylov.loop.empty_batch import serves_empty_batches
from lsconv.krylov.loop.problem import as_complex, as_operator, check_damp, prepare
from lsconv.krylov.loop.scalar_options import checks_numbers
from lsconv.krylov.loop.solution import Solution, together
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, on_parts
from lsconv.operators.transforms import hidden_by_vmap, untraced

__all__ = ["PseudoInverse", "lstsq", "pinv"]


@untraced
@checks_numbers
@serves_empty_batches()
def lstsq(
    A: Any,
    y: Tensor,
    *,
    damp: float | Tensor = 0.0,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    rcond: float | None = None,
    memory_limit: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
    **options: Any,
) -> Solution:
    r"""The least-squares solution of ``A x = y`` of least norm, or its Tikhonov regularisation.

    .. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|x\|^2

    With ``damp=0`` and several minimisers, x is the one of least norm, :math:`A^+ y`. Where floating point cannot tell
    (a square convolution whose smallest singular values are below rounding) the status says so; it never regularises
    silently. With ``method="auto"`` the items that the method chosen leaves in doubt get the answer of a dense singular
    value decomposition where A is small, else that of LSMR where LSMR converges within 500 iterations.

    ``solution.converged`` promises, of every item for which it is True, what A itself says of x in double precision:
    the residual is within ``rtol`` of zero, or the gradient is within ``rtol``, or within rounding, of zero and the
    objective no larger than at x = 0. With damping x is then the minimiser, up to what these tolerances leave. Without,
    it is the shortest minimiser for the A whose singular values up to ``rcond ||A||`` are zero; where a direct method
    has decided that rank, ``solution.rank`` and ``solution.nullity`` tell it. An x that may have a part in the null
    space (:attr:`Status.RANK_DEFICIENT`), or depends on singular values that stand on the threshold
    (:attr:`Status.RANK_UNDECIDED`), is not converged.

    x is differentiable with respect to y, damp and every tensor A is made of (in reverse and in forward mode, under
    torch.func too) by implicit differentiation: one more solve of the same kind, to the same rtol, and memory that does
    not depend on the iterations. With ``damp=0`` the gradient is that of Golub and Pereyra, for changes of A that keep
    its rank. Where the symbol of A has zeros a change of the kernel turns singular values that are zero into small
    ones, :math:`A^+` jumps, and the gradient does not know: use ``damp > 0``, with which x is smooth in everything.
    A damping chosen by "hybrid" is held fixed. A preconditioner that chooses among several answers (``damp=0``; M with
    more rows than columns, N with fewer) leaves the gradient by y only. torch.compile does not look into the solve.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: right-hand side, ``(*batch, *out_shape)``; it may be complex where A is real, and the batch empty.
        damp: the damping, in the units of A (a number, or a tensor with one per batch item).
        method: "auto", "fourier" (exact; circular padding), "border" (exact; any but circular padding), "svd" (exact;
            any small operator, by its dense matrix), or a Krylov method: "lsmr", "lsqr", "cgls", "craig"; "cg",
            "minres", "gmres" (square A, ``damp=0``); "hybrid" (which chooses the damping). See
            :func:`lsconv.inverse.route.route` for the choice of "auto" and what each serves.
        preconditioner: for the Krylov methods: "auto", "circulant", None, or an operator.
        rtol: relative tolerance on residual or gradient. None: 1e-6 in float32 and 1e-10 in float64 for the exact
            methods, ``10 eps^0.75`` for the Krylov methods.
        atol: absolute tolerance on the residual norm, in the units of y.
        max_iter: limit on the iterations.
        rcond: singular values of A up to ``rcond ||A||`` count as zero where ``damp = 0``, as in
            ``torch.linalg.lstsq``; None: 1e-7 in float32, 1e-12 in float64. One of your own is for "auto", "fourier",
            "border" where that is direct (square convolutions) and "svd"; the iterations decide no rank.
        memory_limit: bytes the setup may use; None: 60 % of what is free on the device.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.
        options: further options of the Krylov methods (x0, callback, progress, check_every, conlim; restart of
            "gmres"; rule, noise_std and safety of "hybrid").

    Returns:
        A :class:`Solution`; residual and gradient in it are recomputed with A, in float64 for the exact methods.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, ArgumentError, MethodError, ...).
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973), for the gradient without damping.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(4, 8, 3, 3), in_size=(32, 32))
        >>> y = A(torch.randn(8, 32, 32))
        >>> solution = lsconv.lstsq(A, y)
        >>> bool(solution.converged), bool(torch.dist(A(solution.x), y) < 1e-4 * y.norm())
        (True, True)
    """
    options.update(rtol=rtol, atol=atol, max_iter=max_iter, raise_on_failure=raise_on_failure)

    def run(
        A: LinearOperator, y: Tensor, damp: Any, _: LinearOperator | None, start: Tensor | None
    ) -> tuple[Solution, Plan]:
        problem = prepare(A, y, damp=damp, check_finite=check_finite, name="y")
        if start is not None:
            options["x0"] = start
        plan = route(A, damp, method=method, preconditioner=preconditioner, memory_limit=memory_limit, rcond=rcond)
        # a start stays in the answer, and who limits the iterations or watches them wants these
        own = {name for name in ("x0", "callback", "max_iter") if options.get(name) is not None}
        asked = method == "auto" and (not own or isinstance(plan, BORDER_PLANS))
        second = Fallback(A, damp, plan, rcond) if asked else None
        solution = solve(plan, problem.y, problem.broken, second=second, **options)
        if method == "hybrid":  # the backward pass takes the damping as chosen
            return solution, KrylovPlan(A, solution.damp, "lsmr")
        return solution, plan if second is None else second.answering

    A = as_operator(A, y)
    A.check_output(y, "y")
    if "x0" in options:
        options["x0"] = as_complex(options["x0"], A)
    return attach(run, A, y, damp=damp, x_prior=start_as_prior(A, damp, options.get("x0")), rtol=rtol)


def _nan_items(
    function: Callable[[Tensor], Tensor], given: Tensor, item: tuple[int, ...], result: tuple[int, ...]
) -> Tensor:
    """``function(given)``, where items that hold NaN or infinity give NaN and do not disturb the others."""
    finite = torch.isfinite(given)
    if bool(finite.all()):
        return function(given)
    good = finite.flatten(given.ndim - len(item)).all(-1)
    answer = function(torch.where(good.reshape(*good.shape, *(1 for _ in item)), given, 0))
    return torch.where(good.reshape(*good.shape, *(1 for _ in result)), answer, torch.nan)


@untraced
@checks_numbers
def pinv(
    A: Any,
    *,
    damp: float | Tensor = 0.0,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    rcond: float | None = None,
    memory_limit: int | None = None,
) -> PseudoInverse:
    r"""The pseudo-inverse of A as an operator: ``pinv(A)(y)`` is the x of ``lstsq(A, y)``.

    .. math:: A^+, \quad\text{or}\quad (A^H A + \mathrm{damp}^2)^{-1} A^H

    The setup (symbols, factors) is done here, once, and kept; applying it costs the solve alone. ``pinv(A).H`` is its
    adjoint, and :meth:`PseudoInverse.solve` gives the whole :class:`Solution`.

    Both are differentiable as :func:`lstsq` is. With ``damp=0`` that is for changes of A that keep its rank (Golub and
    Pereyra); where the symbol of A has zeros they do not, :math:`A^+` jumps, and ``damp > 0`` is what has a gradient.
    The plan holds the values that A and damp had when it was made: after a step on a parameter make another
    (:mod:`lsconv.nn` does it by itself).

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        damp: the damping, a number or a tensor with one per batch item.
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
    A = as_operator(A)
    if any(hidden_by_vmap(t) for t in (damp, *parameters_of(A)) if isinstance(t, Tensor)):
        raise MethodError(
            "pinv: vmap hides the values that the setup needs; use lstsq inside vmap, or make pinv outside of it with "
            "a kernel or a damp per batch item"
        )
    check_damp(damp, A)
    if method == "hybrid":
        raise MethodError(
            'method: "hybrid" chooses the damping by y, so it is no linear map; use lstsq, or "lsqr" here'
        )
    fixed = damp.detach() if isinstance(damp, Tensor) else damp
    plan = route(A, fixed, method=method, preconditioner=preconditioner, memory_limit=memory_limit, rcond=rcond)
    return PseudoInverse(A, damp, plan, Fallback(A, fixed, plan, rcond) if method == "auto" else None)


class PseudoInverse(LinearOperator):
    """The (regularised) pseudo-inverse of an operator, made by :func:`pinv`.

    Attributes:
        operator: the operator inverted.
        plan: the setup.
        fallback: answers the items that the plan leaves unconverged, as in :func:`lstsq`; None: nothing does.
    """

    def __init__(
        self, operator: LinearOperator, damp: float | Tensor, plan: Plan, fallback: Fallback | None = None
    ) -> None:
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
        self.fallback = fallback

    @untraced
    @serves_empty_batches(lambda inverse: inverse.in_shape)
    def apply(self, x: Tensor) -> Tensor:
        """The solution for ``x``; NaN for the items that are not finite."""

        def run(A: LinearOperator, y: Tensor, *_: Any) -> tuple[Tensor, Plan]:
            second = self._second()
            x = _nan_items(lambda y: self._forward(y, second), y.detach(), self.in_shape, self.out_shape)
            return x, self.plan if second is None else second.answering

        return attach(run, self.operator, x, damp=self.damp)

    @untraced
    @serves_empty_batches()
    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoint of :meth:`apply`."""
        if follows(self.operator, y, self.damp):
            return adjoint_answer(self.plan, self.operator, y, self.damp)
        return _nan_items(self._backward, y.detach(), self.out_shape, self.in_shape)

    def _forward(self, y: Tensor, second: Fallback | None) -> Tensor:
        if second is None or isinstance(self.plan, FourierPlan):
            return self.plan.apply(y)
        if isinstance(self.plan, BORDER_PLANS):
            x, missed = self.plan.attempt(y=y)
            if not bool(missed.any()):
                return x
        healthy = torch.zeros(y.shape[: y.ndim - len(self.in_shape)], dtype=torch.bool, device=y.device)
        return solve(self.plan, y, healthy, second=second).x

    def _backward(self, v: Tensor) -> Tensor:
        second = self._second()
        if second is None or not isinstance(self.plan, BORDER_PLANS):
            return self.plan.adjoint(v)
        y, missed = self.plan.attempt(v=v)
        plan = second.plan() if bool(missed.any()) else None
        if plan is None:
            return y
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            other = plan.adjoint(v, rtol=direct_rtol(self.dtype))
        return torch.where(missed.reshape(*missed.shape, *(1 for _ in self.out_shape)), other, y)

    def _second(self) -> Fallback | None:
        return None if self.fallback is None else self.fallback.for_another_solve()

    @untraced
    @checks_numbers
    @serves_empty_batches(lambda inverse: inverse.in_shape)
    def solve(
        self, y: Tensor, *, check_finite: bool = True, raise_on_failure: bool = False, **options: Any
    ) -> Solution:
        """The solution for ``y`` with its certificate; ``options`` are rtol, atol and max_iter, as in :func:`lstsq`."""
        if isinstance(y, Tensor) and y.is_complex() and not self.is_complex:
            return self._solve_parts(y, check_finite=check_finite, raise_on_failure=raise_on_failure, **options)

        def run(
            A: LinearOperator, y: Tensor, damp: Any, _: LinearOperator | None, start: Tensor | None
        ) -> tuple[Solution, Plan]:
            if start is not None:
                options["x0"] = start
            problem = prepare(self.operator, y, damp=damp, check_finite=check_finite, name="y")
            options.update(raise_on_failure=raise_on_failure)
            second = self._second()
            solution = solve(self.plan, problem.y, problem.broken, second=second, **options)
            return solution, self.plan if second is None else second.answering

        self.operator.check_output(y, "y")
        start = start_as_prior(self.operator, self.damp, options.get("x0"))
        return attach(run, self.operator, y, damp=self.damp, x_prior=start, rtol=options.get("rtol"))

    def _solve_parts(self, y: Tensor, **options: Any) -> Solution:
        """The solution of complex data under a real operator."""
        if options.get("x0") is not None:
            raise MethodError("x0: a real plan takes none for complex y; use lstsq")
        parts: list[Solution] = []

        def solve(part: Tensor) -> Tensor:
            parts.append(self.solve(part, **options))
            return parts[0].x

        self.for_dtype(y.dtype).check_input(y, "y")
        x = on_parts(solve, y, len(self.in_shape), self.batch_shape)
        return together(replace(parts[0], x=x))

    def _map(self, *args: Any, **kwargs: Any) -> PseudoInverse:
        raise MethodError("pinv: a plan does not move; make pinv(A.to(...)) instead")

    def __repr__(self) -> str:
        return f"PseudoInverse({self.in_shape} -> {self.out_shape}, {self.plan!r})"
