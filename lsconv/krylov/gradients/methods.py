"""The Krylov methods with gradients: each of :mod:`lsconv.krylov`, wrapped once, here.

The methods themselves are plain functions, which the plans and the backward solves call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import Tensor

from lsconv.krylov import cg as _cg
from lsconv.krylov import cgls as _cgls
from lsconv.krylov import craig as _craig
from lsconv.krylov import gmres as _gmres
from lsconv.krylov import hybrid as _hybrid
from lsconv.krylov import lsmr as _lsmr
from lsconv.krylov import lsqr as _lsqr
from lsconv.krylov import minres as _minres
from lsconv.krylov.gradients.attach import LeastSquares, attach, start_as_prior
from lsconv.krylov.gradients.backward_solves import Inverse, gram_by_cg, normal_by_apply
from lsconv.krylov.gradients.parameters import any_requires_grad, parameters_of
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, as_complex
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["cg", "cgls", "craig", "differentiable", "gmres", "hybrid", "lsmr", "lsqr", "minres"]

_Function = TypeVar("_Function", bound=Callable[..., Solution])


class MethodInverse:
    """The backward solves of a Krylov method: by the same method, with the preconditioners' sides exchanged."""

    def __init__(
        self,
        method: Callable[..., Solution],
        transposed: Callable[..., Solution],
        A: LinearOperator,
        damp: Any,
        options: dict[str, Any],
    ) -> None:
        self.method, self.transposed, self.A, self.damp, self.options = method, transposed, A, damp, options
        self.M, self.N = options.get("M"), options.get("N")
        self.last_iterations: int | None = None  # iterations of the forward solve

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The answer for ``y``."""
        return self._run(self.method, self.A, y, rtol, self.M, self.N)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        M, N = self.M, self.N
        if "N" not in inspect.signature(self.method).parameters:
            if M is not None and not isinstance(M, LinearOperator):
                M = None  # a preconditioner given as a function has no adjoint
            return self._run(self.transposed, self.A.H, v, rtol, None if M is None else M.H, None)
        return self._run(self.transposed, self.A.H, v, rtol, N, M)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``."""
        return normal_by_apply(self.A, self.damp, lambda y, rtol: self.apply(y, rtol=rtol), g, rtol=rtol)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g``."""
        limits = {"forward_iterations": self.last_iterations, "max_iter": self.options.get("max_iter")}
        return gram_by_cg(self.A, g, rtol=rtol, N=self.N, **limits)

    def _run(
        self, method: Callable[..., Solution], A: LinearOperator, b: Tensor, rtol: float | None, M: Any, N: Any
    ) -> Tensor:
        """Solve with the options of the forward solve that this method takes."""
        known = inspect.signature(method).parameters
        passed = {
            n: v
            for n, v in self.options.items()
            if n in ("atol", "conlim", "max_iter", "check_every", "restart") and n in known
        }
        passed |= {} if M is None else {"M": M}
        passed |= {} if N is None else {"N": N}
        if "damp" in known:
            passed["damp"] = self.damp
        return method(A, b, rtol=rtol, check_finite=False, **passed).x


@dataclass(frozen=True)
class _MethodSolver:
    """A Krylov method as a solver whose answer can be differentiated; ``transposed`` solves with the adjoint of A."""

    method: Callable[..., Solution]
    transposed: Callable[..., Solution]
    takes_damp: bool
    chooses_damp: bool
    options: dict[str, Any]

    def answer(self, problem: LeastSquares) -> tuple[Solution, Inverse]:
        """The method's solution; an undamped item starts at the prior, its x0, which stays in the answer."""
        if self.chooses_damp:
            solution = self.method(problem.A, problem.y, **self.options)
            return solution, MethodInverse(_lsmr.lsmr, _lsmr.lsmr, problem.A, solution.damp, {})
        damped = {"damp": problem.damp} if self.takes_damp else {}
        start = {} if problem.x_prior is None else {"x0": problem.x_prior}
        solution = self.method(problem.A, problem.y, **damped, **{**self.options, **start})
        inverse = MethodInverse(self.method, self.transposed, problem.A, problem.damp, self.options)
        inverse.last_iterations = int(solution.iterations.max())
        return solution, inverse


def differentiable(
    method: _Function,
    *,
    square: bool = False,
    transposed: Callable[..., Solution] | None = None,
    chooses_damp: bool = False,
) -> _Function:
    """Give a Krylov method, ``method(A, b, *, damp=, M=, N=, ...) -> Solution``, its gradients.

    Args:
        method: the plain method.
        square: the method solves square regular systems.
        transposed: the method for ``A^H``, where the same one will not do; it takes the same arguments.
        chooses_damp: the method chooses the damping, which the backward pass holds fixed; LSMR does its solves.
    """

    @untraced
    @checks_numbers
    @serves_empty_batches()
    @functools.wraps(method)
    def wrapped(A: OperatorLike, b: Tensor, **options: Any) -> Solution:
        if not (isinstance(A, (LinearOperator, Tensor)) and isinstance(b, Tensor)):
            return method(A, b, **options)
        given, x0 = options.get("damp"), options.get("x0")
        tensors = [t for t in (b, A, given, x0) if isinstance(t, Tensor)]
        if isinstance(A, LinearOperator):
            tensors += parameters_of(A)
        if not any_requires_grad(*tensors):
            return method(A, b, **options)
        others = {name: value for name, value in options.items() if name != "damp"}
        operator, damping = accept_operator(A, b), 0.0 if given is None else given
        x0 = as_complex(x0, operator)
        prior = None if square or chooses_damp else start_as_prior(operator, damping, x0)
        solver = _MethodSolver(method, transposed or method, given is not None, chooses_damp, others)
        problem = LeastSquares(operator, b, damping, x_prior=prior)
        return attach(solver, problem, square=square, rtol=options.get("rtol"))

    wrapped.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return cast(_Function, wrapped)


cg = differentiable(_cg.cg, square=True)
minres = differentiable(_minres.minres, square=True)
gmres = differentiable(_gmres.gmres, square=True)
cgls = differentiable(_cgls.cgls)
lsqr = differentiable(_lsqr.lsqr)
lsmr = differentiable(_lsmr.lsmr)
craig = differentiable(_craig.craig, transposed=_lsmr.lsmr)  # in the backward pass A^H u = g need not be consistent
hybrid = differentiable(_hybrid.hybrid, chooses_damp=True)
