r"""CGLS: conjugate gradients on the normal equations, without forming them.

.. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2

The residual r and the gradient s = A^H r - damp^2 x are carried as vectors, so a start x0 and damping need nothing
special. Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl. Bur. Stand. 49
(1952), section 10; this form is algorithm 7.4.1 of Björck, "Numerical Methods for Least Squares Problems", SIAM (1996).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.krylov.loop.batch_groups import solve, unmodified
from lsconv.krylov.loop.batched_scalars import ItemSpace, Scalar, binary_unit, divide, hypot, maximum, root
from lsconv.krylov.loop.damping import augmented_columns
from lsconv.krylov.loop.lagrange_multipliers import CGLSMultipliers
from lsconv.krylov.loop.method import Cause, Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["cgls"]


def cgls(
    A: OperatorLike,
    b: Tensor,
    *,
    damp: float | Tensor = 0.0,
    M: LinearOperator | None = None,
    N: LinearOperator | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
    x0: Tensor | None = None,
    callback: Callable[[IterationState], bool | None] | None = None,
    progress: bool = False,
    check_every: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Least squares by CGLS, every batch item on its own.

    .. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2

    Without damping and from ``x0 = 0`` the answer is the minimum-norm solution :math:`A^+ b`; from another x0 it is
    :math:`A^+ b` plus the null-space part of x0. With damping the answer does not depend on x0.

    Args:
        A: a LinearOperator; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        damp: the damping, a number or a tensor with one per batch item.
        M: inverse preconditioner on the residual side, Hermitian positive definite, :math:`M \approx (AA^H)^{-1}`.
            The answer is unchanged when :math:`Ax = b` has a solution or damp > 0; otherwise M reweights the equations.
            Where it has none, a damp below about ``eps^0.25 ||A|| / 10`` is beyond the dtype; N serves there.
        N: inverse preconditioner on the solution side, Hermitian positive definite, :math:`N \approx (A^HA)^{-1}`.
            The answer is unchanged when A has full column rank or damp > 0; otherwise another least-squares solution
            is found.
        rtol: tolerance, relative (see :mod:`lsconv.krylov.loop.judge`); None: ``10 eps^0.75`` of the dtype.
        atol: absolute tolerance on the residual norm, in the units of b.
        max_iter: iteration limit per item; None: ``4 min(m, n)``, at least 500 and at most 10000.
        x0: where to start, ``(*batch, *in_shape)``.
        callback: called with an :class:`IterationState` every ``check_every`` iterations; returning True stops.
        progress: show a progress bar (needs tqdm).
        check_every: how often the host looks at the device; None: 1 on the CPU, 10 on a GPU. It does not change the
            answer.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in b and x0; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, DeviceError, ArgumentError, ...).
        PreconditionerError: when M or N shows itself not to be positive definite.
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952), section 10; Björck, "Numerical Methods for Least
        Squares Problems", SIAM (1996), algorithm 7.4.1.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> lsconv.cgls(A, torch.tensor([1.0, 2.0, 3.0])).x
        tensor([1.0000, 1.0000])
    """
    problem = prepare(A, b, damp=damp, M=M, N=N, x0=x0, check_finite=check_finite, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, max_iter=max_iter, check_every=check_every, callback=callback,
                         progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip

    def build(part: Problem) -> Any:
        return (
            augmented_columns(part, _CGLS) if part.damp is not None and part.M is not None else unmodified(_CGLS)(part)
        )

    return solve(problem, options, build, name="cgls")


class _CGLS(Method):
    """The iteration on scaled vectors, whose squares stay in the range of float32.

    x and r are divided by the norm of the first residual, p by that of the newest gradient. Unscaled, p and A p are of
    the order of ``||A|| ||b||`` and ``||A||^2 ||b||``, whose squares can overflow although A and b are harmless.
    """

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.A, self.M, self.N = problem.A, problem.M, problem.N
        self.damp: Scalar | None = None if problem.damp is None else problem.scalar(problem.damp)
        self.domain, self.codomain = problem.domain, problem.codomain
        active = self.domain.active(running)
        r = problem.residual(x, running)
        self.unit: Scalar = binary_unit(self.codomain.safe_norm(r))
        self.r = self.codomain.scale(r, 1 / self.unit)
        self.x = self.domain.scale(problem.start(x), 1 / self.unit)
        self.failure = None if self.M is None and self.N is None else (self.unit < 0) * Cause.NOT_DEFINITE
        self.operator_norm = self.weighted_norm = self.next_diagonal = 0 * self.unit
        g, self.root = self._gradient()
        self.p = g * self.domain.broadcast(divide(active, self.root))
        self.dual = CGLSMultipliers(self.r, self.codomain) if problem.multipliers else None
        if self.dual is not None:
            self.dual.update_direction(0 * self.root, divide(active, self.root), self.r)
        # With M the recurrence gives the residual in the norm of M, from which its Euclidean norm does not follow.
        self.residual_recurrence = _ResidualRecurrence() if problem.host_scalars and self.M is None else None
        self._estimates(0.0)

    def solution(self) -> Tensor:
        return self.x * self.domain.broadcast(self.unit)

    def multipliers(self) -> Tensor | None:
        return None if self.dual is None else self.dual.z * self.codomain.broadcast(self.unit)

    def step(self, running: Scalar) -> None:
        """Compute ``q = A p``, the next x and r, the gradient ``s = A^H M r - damp^2 x``, and the next direction p."""
        domain, codomain = self.domain, self.codomain
        active = domain.active(running)
        q = self.A.apply(self.p)
        delta = self._curvature(q)
        step = divide(active, delta) * self.root
        codomain.add(self.r, -step, q, out=self.r)
        domain.add(self.x, step, self.p, out=self.x)
        if self.dual is not None:
            self.dual.step(step)
        previous = self.root
        g, self.root = self._gradient()
        ratio = divide(self.root, previous)
        self.next_diagonal = ratio * ratio * delta
        domain.combine(self.p, ratio * active, divide(active, self.root), g)
        if self.dual is not None:
            self.dual.update_direction(ratio * active, divide(active, self.root), self.r)
        self._estimates(step * previous)

    def _curvature(self, q: Tensor) -> Scalar:
        """Return ``p^H (A^H M A + damp^2) p``, and raise the lower bounds of the norm of A by it."""
        q_norm: Scalar = self.codomain.norm(q)
        delta = q_norm * q_norm if self.M is None else self.codomain.inner(q, self.M.apply(q))
        if self.damp is not None or self.failure is not None:
            p_norm: Scalar = self.domain.norm(self.p)
            bound = divide(q_norm, p_norm)
            if self.damp is not None:
                shift = self.damp * p_norm
                delta, bound = delta + shift * shift, hypot(bound, self.damp)
            self.operator_norm = maximum(self.operator_norm, bound)
        # A diagonal entry of the Lanczos matrix of A^H M A + damp^2, whose norm it cannot exceed.
        self.weighted_norm = maximum(self.weighted_norm, root(delta + self.next_diagonal))
        if self.failure is None:
            self.operator_norm = self.weighted_norm
        return delta

    def _gradient(self) -> tuple[Tensor, Scalar]:
        """Return ``N s`` with ``s = A^H M r - damp^2 x``, and the square root of ``s^H N s``."""
        weighted = self.r if self.M is None else self.M.apply(self.r)
        s = self.A.adjoint(weighted)
        self.weighted_r: Scalar | None = None
        if self.M is not None:
            self.weighted_r = self._root(self.r, weighted, self.codomain)
            bound = divide(self.domain.norm(s), self.codomain.norm(weighted))
            self.operator_norm = maximum(self.operator_norm, bound)
        if self.damp is not None:
            s = self.domain.add(s, -self.damp * self.damp, self.x)
        self.s_norm: Scalar = self.domain.norm(s)
        if self.N is None:
            return s, self.s_norm
        g = self.N.apply(s)
        return g, self._root(s, g, self.domain)

    def _root(self, v: Tensor, image: Tensor, space: ItemSpace) -> Scalar:
        """The norm of v in the inner product of a preconditioner P, from ``image = P v``."""
        square, norm = space.inner(v, image), space.norm(v)
        if self.failure is not None:
            small = torch.finfo(space.dtype).eps * norm * space.norm(image)
            self.failure = self.failure | ((square <= small) & (norm > 0)) * Cause.NOT_DEFINITE
        return root(square)

    def _residual_norm(self) -> Scalar:
        """``||(r, damp x)||``, computed from the vectors."""
        r_norm: Scalar = self.codomain.norm(self.r)
        return r_norm if self.damp is None else hypot(r_norm, self.damp * self.domain.norm(self.x))

    def _estimates(self, decrease: Scalar) -> None:
        """Set the estimates after a step that reduced ``||r||^2 + damp^2 ||x||^2`` by ``decrease``."""
        recurrence = self.residual_recurrence
        norm = self._residual_norm() if recurrence is None else recurrence.norm(decrease, self._residual_norm)
        self.residual = norm * self.unit
        self.gradient = self.s_norm * self.unit
        if self.weighted_r is not None:
            # With M the gradient A^H M r vanishes at the answer, A^H r does not: it is tested relative to its own
            # norms.
            self.weighted_norm = maximum(self.weighted_norm, divide(self.root, self.weighted_r))
            relative = divide(self.root, self.weighted_norm * self.weighted_r)
            self.gradient = relative * self.operator_norm * self.residual


class _ResidualRecurrence:
    r"""The residual norm of one item, which most iterations get without a pass over r and x.

    The residual after a step is orthogonal to the step that it took, so that

    .. math:: \|\bar r_{k+1}\|^2 = \|\bar r_k\|^2 - \|\bar A p_k\|^2 \mathrm{step}_k^2 .

    The difference cancels digits, and rounding slowly spoils the orthogonality. So the norm is computed from the
    vectors whenever its square has fallen to a quarter, and every eighth step.
    """

    _RECOMPUTE_BELOW, _RECOMPUTE_AFTER = 0.25, 8

    def __init__(self) -> None:
        self.measured = self.square = 0.0
        self.steps = 0

    def norm(self, decrease: float, measure: Callable[[], Scalar]) -> Scalar:
        """The norm after a step that reduced its square by ``decrease``; ``measure`` computes it from the vectors."""
        self.square -= decrease
        self.steps += 1
        if self.square > self._RECOMPUTE_BELOW * self.measured and self.steps < self._RECOMPUTE_AFTER:
            return math.sqrt(self.square)
        norm: Scalar = measure()
        self.measured = self.square = norm * norm
        self.steps = 0
        return norm
