r"""Conjugate gradients for Hermitian positive definite A.

.. math:: A x = b, \qquad x_k = \arg\min_{x \in x_0 + K_k} \|x - x^*\|_A

Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl. Bur. Stand. 49 (1952).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov.loop.batch_groups import solve, unmodified
from lsconv.krylov.loop.batched_scalars import Scalar, any_item, binary_unit, divide, maximum, root
from lsconv.krylov.loop.certificate import Certificate
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.method import Cause, Converged, Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["cg"]


def cg(
    A: OperatorLike,
    b: Tensor,
    *,
    M: LinearOperator | None = None,
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
    r"""Solve ``A x = b`` with A Hermitian positive definite, every batch item on its own.

    Only the residual decides about convergence: ``||b - A x|| <= max(rtol ||b||, atol)``. A direction of negative (or
    no) curvature ends the item with :attr:`Status.NEGATIVE_CURVATURE`; ``minres`` serves such operators.

    Args:
        A: a LinearOperator with ``in_shape == out_shape``; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        M: inverse preconditioner, Hermitian positive definite, :math:`M \approx A^{-1}`. It never changes the answer.
        rtol: relative tolerance; None: ``10 eps^0.75`` of the dtype.
        atol: absolute tolerance on the residual norm, in the units of b.
        max_iter: iteration limit per item; None: ``4 n``, at least 500 and at most 10000.
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
        PreconditionerError: when M shows itself not to be positive definite.
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Hestenes and Stiefel, J. Res. Natl. Bur. Stand. 49 (1952).

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> lsconv.cg(A, torch.tensor([3.0, 3.0])).x
        tensor([1.0000, 1.0000])
    """
    problem = prepare(A, b, M=M, x0=x0, check_finite=check_finite, square=True, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, max_iter=max_iter, check_every=check_every, callback=callback,
                         progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    return solve(problem, options, unmodified(_CG), square=True, name="cg")


class _CG(Method):
    """The iteration on scaled vectors, whose squares stay in the range of float32.

    x and r are divided by the norm of the first residual, p by that of the newest one.
    """

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.A, self.M, self.space = problem.A, problem.M, problem.domain
        space, active = self.space, self.space.active(running)
        r = problem.residual(x, running)
        self.unit: Scalar = binary_unit(space.safe_norm(r))
        self.r = space.scale(r, 1 / self.unit)
        self.x = space.scale(problem.start(x), 1 / self.unit)
        self.failure = (self.unit < 0) * Cause.CURVATURE
        r_norm: Scalar = space.norm(self.r)
        self.residual = r_norm * self.unit
        z, self.root = self._precondition(r_norm)
        self.p = z * space.broadcast(divide(active, self.root))
        self.operator_norm = self.next_diagonal = 0 * self.unit
        self.negligible = torch.finfo(problem.A.dtype).eps ** 2

    def solution(self) -> Tensor:
        return self.x * self.space.broadcast(self.unit)

    def converged(self, problem: Problem, x: Tensor, certificate: Certificate, judge: Judge) -> Converged:
        residual_ok = certificate.residual_ok
        if any_item(residual_ok):
            # x^H A x near rounding shows that x lies in the null space of a singular A, where the shortest x has no
            # part.
            space, x_norm = problem.domain, problem.domain.safe_norm(x)
            direction = x * space.broadcast(divide(1.0, x_norm))
            curvature = abs(space.inner(direction, problem.A.apply(direction)))
            assert judge.norm.lower is not None
            regular = curvature * judge.tolerances.conlim >= judge.norm.lower
            residual_ok = residual_ok & (regular | (x_norm == 0))
        return residual_ok, certificate.gradient_ok

    def step(self, running: Scalar) -> None:
        """Compute ``q = A p``, the next iterate x and residual r, and from ``z = M r`` the next direction p."""
        space, active = self.space, self.space.active(running)
        q = self.A.apply(self.p)
        delta: Scalar = space.inner(self.p, q)
        if self.M is None:
            # A diagonal entry of the Lanczos matrix of A, whose norm it cannot exceed.
            self.operator_norm = maximum(self.operator_norm, delta + self.next_diagonal)
        # A curvature p^H A p below eps^2 ||A|| is zero up to rounding, and its step length would overflow.
        indefinite = (delta <= self.negligible * self.operator_norm) & (active > 0)
        self.failure = self.failure | indefinite * Cause.CURVATURE
        step = divide(active * (indefinite == 0), delta) * self.root
        space.add(self.x, step, self.p, out=self.x)
        space.add(self.r, -step, q, out=self.r)
        r_norm: Scalar = space.norm(self.r)
        self.residual = r_norm * self.unit
        previous = self.root
        z, self.root = self._precondition(r_norm)
        ratio = divide(self.root, previous)
        self.next_diagonal = ratio * ratio * delta
        space.combine(self.p, ratio * active, divide(active, self.root), z)

    def _precondition(self, r_norm: Scalar) -> tuple[Tensor, Scalar]:
        """``M r`` and the square root of ``r^H M r``."""
        if self.M is None:
            return self.r, r_norm
        z = self.M.apply(self.r)
        square = self.space.inner(self.r, z)
        small = torch.finfo(self.space.dtype).eps * r_norm * self.space.norm(z)
        self.failure = self.failure | ((square <= small) & (r_norm > 0)) * Cause.NOT_DEFINITE
        return z, root(square)
