r"""Damping as rows or columns beside A, so that neither a start nor a preconditioner changes the answer.

*Augmented rows*: :math:`\min \|[A; \mathrm{damp}\,I]\,x - [y; 0]\|`. From any start, and with any preconditioner on the
solution side, its answer is that of the damped problem.

*Augmented columns*: the least-norm solution of :math:`[A, \mathrm{damp}\,I]\,(x, s) = y`. It is the same x, the system
is consistent, and a consistent system keeps its solution when a preconditioner on the residual side reweights it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import Scalar, hypot
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.problem import Problem
from lsconv.operators.algebra import HStack, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Identity

__all__ = ["Build", "augmented", "augmented_columns", "augmented_rows"]

Build = Callable[[Problem, "Tensor | None", Scalar], Method]


def augmented(
    problem: Problem, build: Build
) -> tuple[Callable[[Tensor | None, Scalar], Method], Callable[[Tensor], Tensor]]:
    """Build a Golub-Kahan method for a damped problem, on augmented rows or columns where the method needs them.

    Bidiagonalisation of A takes ``damp`` into account only from a zero start and without preconditioners; in all other
    cases the method gets an augmented problem.

    Returns:
        A function that starts the method, and one that extracts x from its iterate.
    """
    if problem.damp is not None and problem.M is not None:
        return augmented_columns(problem, build)
    if problem.damp is not None:
        inner = augmented_rows(problem)

        def start(x: Tensor | None, running: Scalar) -> Method:
            return build(problem if x is None and problem.N is None else inner, x, running)

        return start, lambda z: z
    return lambda x, running: build(problem, x, running), lambda z: z


def augmented_rows(problem: Problem) -> Problem:
    """The problem with the rows ``damp I`` below A, for problems with damping."""
    stack = VStack([problem.A, _damping(problem, problem.A.in_shape)])
    y = stack.blocks.join([problem.y, problem.start(None)])
    return replace(problem, A=stack, y=y, damp=None)


def augmented_columns(
    problem: Problem, build: Build
) -> tuple[Callable[[Tensor | None, Scalar], Method], Callable[[Tensor], Tensor]]:
    """Build a method on the problem with the columns ``damp I`` beside A; items without damping keep ``s = 0``.

    Raises:
        ArgumentError: with N or a start, for which the solution is not the (x, s) of least norm.
    """
    if problem.x0 is not None or problem.N is not None:
        raise ArgumentError(
            "M: with damp > 0 it cannot be combined with x0 or N; precondition by N instead, or drop x0"
        )
    assert problem.damp is not None
    damp = problem.scalar(problem.damp)
    operator = HStack([problem.A, _damping(problem, problem.A.out_shape)])
    inner = replace(problem, A=operator, damp=None)

    def start(z: Tensor | None, running: Scalar) -> Method:
        return _AugmentedColumnsMethod(build(inner, z, running), inner, damp)

    return start, lambda z: operator.split(z)[0].clone()


def _damping(problem: Problem, shape: tuple[int, ...]) -> LinearOperator:
    """The operator ``damp I`` on items of this shape."""
    assert problem.damp is not None
    return Scaled(Identity(shape, problem.A.dtype, problem.A.device), problem.damp)


class _AugmentedColumnsMethod(Method):
    """A method on (x, s), with the estimates of the problem in x alone.

    With rho = y - A x - damp s, in the row space of [A, damp I], the residual (y - A x, damp x) has the norm
    damp ||(x, s)|| up to rho, and the gradient is A^H rho, at most ||A|| ||rho||.

    Where y is inconsistent s is as large as ||y - A x|| / damp, and rho does not fall below its rounding, of
    eps ||A|| ||(x, s)||. Below ``damp = eps^0.25 ||A|| / 10`` or so the default tolerance is therefore out of reach,
    of any method that takes M: the item is declared finished there, and its certificate says what was reached.
    """

    def __init__(self, inner: Method, problem: Problem, damp: Scalar) -> None:
        self.inner, self.space, self.damp = inner, problem.domain, damp
        self.eps = torch.finfo(problem.A.dtype).eps
        self._update_estimates()

    def solution(self) -> Tensor:
        return self.inner.solution()

    def step(self, running: Scalar) -> None:
        self.inner.step(running)
        self._update_estimates()

    def _update_estimates(self) -> None:
        """Set the estimates of the damped problem in x, from those of the inner method."""
        inner, rho = self.inner, self.inner.residual
        z_norm: Scalar = self.space.safe_norm(inner.solution())
        self.operator_norm = inner.operator_norm
        self.condition, self.failure = inner.condition, inner.failure
        self.residual = hypot(rho, self.damp * z_norm)
        self.gradient = self.operator_norm * rho
        self.self_converged = 2 * rho <= self.eps * self.operator_norm * z_norm
