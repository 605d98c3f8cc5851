"""The Krylov methods as plans: the setup is that of the preconditioner, and every iteration applies A."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError, unreported
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.plans.dense_stack import DenseStack
from lsconv.krylov.cg import cg
from lsconv.krylov.cgls import cgls
from lsconv.krylov.craig import craig
from lsconv.krylov.gmres import gmres
from lsconv.krylov.gradients.backward_solves import gram_by_cg, normal_by_apply
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.loop.certificate import NormBounds, default_rtol
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres
from lsconv.krylov.plan import PenalisedPlan, Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import select

__all__ = [
    "KRYLOV",
    "KRYLOV_ONLY",
    "LEAST_SQUARES",
    "SQUARE",
    "KrylovPlan",
    "KrylovStack",
    "PenalisedBackward",
]

LEAST_SQUARES: dict[str, Callable[..., Solution]] = {"lsmr": lsmr, "lsqr": lsqr, "cgls": cgls, "craig": craig}
SQUARE: dict[str, Callable[..., Solution]] = {"cg": cg, "minres": minres, "gmres": gmres}
KRYLOV = {**LEAST_SQUARES, **SQUARE, "hybrid": hybrid}
KRYLOV_ONLY = frozenset(
    {"x0", "callback", "progress", "check_every", "conlim", "restart", "rule", "noise_std", "safety"}
)


class KrylovPlan(Plan):
    """A Krylov method with its preconditioner; the only setup is that of the preconditioner.

    Args:
        A: the operator.
        damp: the damping, a number or one per batch item.
        method: a name of :data:`KRYLOV`.
        preconditioners: M and N of the method.
        max_iter: limit on the iterations of :meth:`solve` where it is given none; None: that of the method.
    """

    reason = "no structure, or a null space that the border does not resolve: an iteration that only applies A"
    options = KRYLOV_ONLY
    iterates = True
    default_rtol = staticmethod(default_rtol)

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        method: str,
        preconditioners: tuple[LinearOperator | None, LinearOperator | None] = (None, None),
        max_iter: int | None = None,
    ) -> None:
        self.A, self.damp, self.method, self.max_iter = A, damp, method, max_iter
        self.M, self.N = preconditioners
        self.last_iterations: int | None = None

    def solve(
        self,
        y: Tensor,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
        **options: Any,
    ) -> Solution:
        """The certified solution for ``y``; ``options`` are those of the method.

        Raises:
            MethodError: an option that the method does not have.
        """
        method = KRYLOV[self.method]
        extra = sorted(set(options) - set(inspect.signature(method).parameters))
        if extra:
            raise MethodError(f'{", ".join(extra)}: method "{self.method}" has no such option')
        terms = self._terms(self.M, self.N)
        rtol, max_iter = self.rtol if rtol is None else rtol, self.max_iter if max_iter is None else max_iter
        solution = method(self.A, y, rtol=rtol, atol=atol, max_iter=max_iter, **terms, **options)
        self.last_iterations = int(solution.iterations.max())
        return solution

    def _terms(self, M: LinearOperator | None, N: LinearOperator | None) -> dict[str, Any]:
        """The arguments of the method for damping and preconditioners."""
        if self.method in LEAST_SQUARES:
            return {"damp": self.damp, "M": M, "N": N}
        return {"M": M} if self.method in SQUARE else {}

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``."""
        return KrylovPlan.solve(self, y, rtol=rtol).x

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`: the same problem for ``A^H``, with the preconditioners' sides exchanged."""
        return self._adjoint_solution(v, rtol).x

    def _adjoint_solution(self, v: Tensor, rtol: float | None) -> Solution:
        rtol = self.rtol if rtol is None else rtol
        if self.method in SQUARE:
            return KRYLOV[self.method](self.A.H, v, rtol=rtol, **self._terms(self.M and self.M.H, None))
        # craig needs a consistent system, which A^H u = v need not be; hybrid would choose another damping
        method = lsmr if self.method in ("craig", "hybrid") else LEAST_SQUARES[self.method]
        return method(self.A.H, v, damp=self.damp, M=self.N, N=self.M, rtol=rtol)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        rtol = self.rtol if rtol is None else rtol
        return normal_by_apply(self.A, self.damp, lambda y, rtol: self.apply(y, rtol=rtol), g, rtol=rtol)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g``."""
        rtol = self.rtol if rtol is None else rtol
        if self.method in SQUARE:
            return None
        return gram_by_cg(self.A, g, rtol=rtol, N=self.N, forward_iterations=self.last_iterations)

    def __repr__(self) -> str:
        preconditioner = self.M if self.M is not None else self.N
        return (
            f"KrylovPlan({self.method!r}, preconditioner={type(preconditioner).__name__ if preconditioner else None})"
        )


class KrylovStack(PenalisedPlan):
    """LSMR on ``[A; damp L]``, preconditioned where the stack has an FFT-diagonal surrogate.

    Args:
        A: the operator.
        L: the penalty.
        damp: the damping, a number or one per batch item.
    """

    reason = "A and L share no grid: LSMR on [A; damp L]"
    options = frozenset({"x0"})
    iterates = True
    default_rtol = staticmethod(default_rtol)

    def __init__(self, A: LinearOperator, L: LinearOperator, damp: Tensor | float) -> None:
        self.A, self.L, self.damp = A, L, torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        self.problem = Penalised(A, self.damp, L)
        self.stack = self.problem.stack
        self.preconditioner: LinearOperator | None = None
        if bool((self.damp > 0).all()):
            with contextlib.suppress(MethodError):
                self.preconditioner = CirculantPreconditioner(self.stack, side="solution")

    @torch.no_grad()
    def solve(
        self,
        y: Tensor,
        *,
        x_prior: Tensor | None = None,
        x0: Tensor | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
    ) -> Solution:
        """The certified solution for ``y``; see :func:`tikhonov`."""
        data = self.problem.data(y, x_prior)
        start = x0 if x0 is None or x_prior is None else x0 - x_prior
        with unreported():
            found = lsmr(self.stack, data, N=self.preconditioner, rtol=rtol, atol=atol, max_iter=max_iter, x0=start)
        norm = None if found.history is None else found.history.largest_norm
        solution = self.problem.solution(
            self.problem.judge(self.tolerances(rtol, atol), self.A.dtype, norm=NormBounds(norm)),
            found.x,
            y,
            x_prior=x_prior,
            iterations=found.iterations,
            otherwise=torch.where(found.converged, Status.STAGNATION.code, found.codes),
        )
        # the test of LSMR itself decides too: the certificate accepts gradients at the level of rounding
        return replace(
            solution,
            history=found.history,
            codes=torch.where(found.converged, solution.codes, found.codes),
            converged=solution.converged & found.converged,
        )

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``; warns where it fails."""
        with unreported():
            found = cg(self.stack.H @ self.stack, g, M=self.preconditioner, rtol=rtol)
        failed = ~found.converged
        if not bool(failed.any()):
            return found.x
        if not DenseStack.is_quick(self.A, self.L, self.damp):
            report(found, "cg")
            return found.x
        dense = DenseStack(self.A, self.L, self.damp).normal_solve(g)
        return select(failed, dense, found.x)

    def __repr__(self) -> str:
        return f"KrylovStack('lsmr', L={type(self.L).__name__}, preconditioner={self.preconditioner!r})"


class PenalisedBackward:
    """The solves of the backward pass of a penalised problem: with L where ``damp > 0``, elsewhere by LSMR with A."""

    def __init__(self, A: LinearOperator, plan: PenalisedPlan) -> None:
        self.normal_solve = plan.normal_solve
        alone = KrylovPlan(A, 0.0, "lsmr")
        self.apply, self.adjoint, self.gram_solve = alone.apply, alone.adjoint, alone.gram_solve
