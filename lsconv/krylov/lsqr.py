r"""LSQR: least squares by Golub-Kahan bidiagonalisation.

.. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2

In exact arithmetic the same iterates as CGLS, that is as conjugate gradients on the normal equations; better behaved
when A is ill conditioned.
Paige and Saunders, "LSQR: An algorithm for sparse linear equations and sparse least squares",
ACM Trans. Math. Softw. 8 (1982), 43-71; the names below are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lsconv.krylov.golub_kahan import GolubKahan
from lsconv.krylov.loop.batch_groups import solve
from lsconv.krylov.loop.batched_scalars import Scalar, divide, hypot, maximum, minimum, quotient, rotation
from lsconv.krylov.loop.damping import augmented
from lsconv.krylov.loop.lagrange_multipliers import LSQRMultipliers
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["lsqr"]


def lsqr(
    A: OperatorLike,
    b: Tensor,
    *,
    damp: float | Tensor = 0.0,
    M: LinearOperator | None = None,
    N: LinearOperator | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    conlim: float | None = None,
    max_iter: int | None = None,
    x0: Tensor | None = None,
    callback: Callable[[IterationState], bool | None] | None = None,
    progress: bool = False,
    check_every: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Least squares by LSQR, every batch item on its own.

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
        conlim: stop when the estimated condition number of A passes this; None: ``0.1 / eps``, at most 1e12.
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
        Paige and Saunders, ACM Trans. Math. Softw. 8 (1982), 43-71.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> lsconv.lsqr(A, torch.tensor([1.0, 2.0, 3.0])).x
        tensor([1.0000, 1.0000])
    """
    problem = prepare(A, b, damp=damp, M=M, N=N, x0=x0, check_finite=check_finite, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, conlim=conlim, max_iter=max_iter, check_every=check_every,
                         callback=callback, progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    return solve(problem, options, lambda part: augmented(part, _LSQR), name="lsqr")


class _LSQR(Method):
    """The iteration of LSQR: the QR factorisation of the bidiagonal matrix, a rotation a step."""

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.process = process = GolubKahan(problem, x, running)
        self.domain = problem.domain
        self.damp: Scalar | None = None if problem.damp is None else problem.scalar(problem.damp)
        self.failure = process.failure
        self.x = problem.start(x)
        self.w = process.v.clone()
        self.rhobar, self.phibar = process.alpha, process.beta
        self.damped_away = self.largest = 0 * process.one
        self.smallest = math.inf * process.one
        # The residual vector up to a factor: with M the recurrence gives only its norm in the inner product of M.
        self.r = None if problem.M is None else process.raw_u.clone()
        self.residual = process.r_norm
        self.gradient = self._gradient(self.phibar * process.alpha)
        self.dual = LSQRMultipliers(process.u, process.codomain) if problem.multipliers else None

    def solution(self) -> Tensor:
        return self.x

    def multipliers(self) -> Tensor | None:
        return None if self.dual is None else self.dual.z

    def step(self, running: Scalar) -> None:
        """Advance the bidiagonalisation, compute ``rho, theta, phi`` by a rotation, and with them x and w."""
        active = self.domain.active(running)
        process, domain = self.process, self.domain
        process.step(active)
        rhobar, phibar = self.rhobar, self.phibar
        if self.damp is not None:
            c1, s1, rhobar = rotation(rhobar, self.damp)
            self.damped_away = hypot(self.damped_away, s1 * phibar)
            phibar = c1 * phibar
        c, s, rho = rotation(rhobar, process.beta)
        theta = s * process.alpha
        self.rhobar = -c * process.alpha
        phi = c * phibar
        self.phibar = s * phibar
        inverse = divide(active, rho)
        if self.dual is not None:
            self.dual.step(phibar, inverse)
            self.dual.update_direction(c, s, divide(process.alpha, rho), process.u)
        domain.add(self.x, phi * inverse, self.w, out=self.x)
        domain.add(process.v, -theta * inverse, self.w, out=self.w)
        self._estimates(c, s, rho, phi)

    def _estimates(self, c: Scalar, s: Scalar, rho: Scalar, phi: Scalar) -> None:
        """Set the estimates of the condition number, the residual and the gradient after a step."""
        process = self.process
        self.failure = process.failure
        self.largest, self.smallest = maximum(self.largest, rho), minimum(self.smallest, rho)
        self.condition = quotient(self.largest, self.smallest)
        self.residual = self.phibar if self.damp is None else hypot(self.phibar, self.damped_away)
        if self.r is not None:
            # r_k = phibar_{k+1} d_k with d_k = s d_{k-1} - c u_{k+1}: the last column of U_{k+1} Q_k^T.
            space = process.codomain
            space.combine(self.r, s, -c, process.raw_u)
            self.residual = self.phibar * space.norm(self.r)
        self.gradient = self._gradient(process.alpha * abs(s * phi))

    def _gradient(self, gradient: Scalar) -> Scalar:
        """Set the estimate of the norm of A, and correct that of the gradient for M and N."""
        process = self.process
        norm = process.operator_norm
        self.operator_norm = norm if self.damp is None else hypot(norm, self.damp)
        if process.M is not None:
            # With M the gradient A^H M r vanishes at the answer, A^H r does not: it is tested relative to its own
            # norms.
            return divide(gradient, process.weighted_norm * self.phibar) * self.operator_norm * self.residual
        return gradient if process.N is None else gradient * process.v_norm
