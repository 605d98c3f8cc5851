r"""Craig's method: the least-norm solution of a consistent system.

.. math:: \min_x \|x\| \quad\text{such that}\quad Ax = b

In exact arithmetic the same iterates as conjugate gradients on :math:`AA^H z = b, x = A^H z`: the smallest error of all
methods on this Krylov space.
Craig, "The N-step iteration procedures", J. Math. and Phys. 34 (1955), 64-73; this form, by Golub-Kahan, is that of
Paige and Saunders (1982), section 7.2, and with damping that of Saunders, "Solution of sparse rectangular systems using
LSQR and CRAIG", BIT 35 (1995), 588-604.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.krylov.golub_kahan import GolubKahan
from lsconv.krylov.loop.batch_groups import solve, unmodified
from lsconv.krylov.loop.batched_scalars import Scalar, divide, hypot, maximum, quotient, where
from lsconv.krylov.loop.certificate import Certificate
from lsconv.krylov.loop.damping import augmented_columns
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.lagrange_multipliers import CRAIGMultipliers
from lsconv.krylov.loop.method import Cause, Converged, Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["craig"]


def craig(
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
    r"""The least-norm solution of a consistent system by Craig's method, every batch item on its own.

    .. math:: \min_x \|x\| \quad\text{such that}\quad Ax = b, \qquad\text{or with damping}\qquad
              \min_{x, s} \|x\|^2 + \|s\|^2 \quad\text{such that}\quad Ax + \mathrm{damp}\, s = b

    The damped problem is :math:`\min \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2` in other words, and always consistent.
    Every iterate is the point nearest to the solution in its Krylov space. Only the residual decides about convergence;
    an item whose system turns out to be inconsistent ends with :attr:`Status.STAGNATION`. From another x0 the answer
    is the solution nearest to x0.

    Args:
        A: a LinearOperator; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        damp: the damping, a number or a tensor with one per batch item.
        M: inverse preconditioner on the residual side, Hermitian positive definite, :math:`M \approx (AA^H)^{-1}`.
            It never changes the answer.
        N: inverse preconditioner on the solution side, Hermitian positive definite, :math:`N \approx (A^HA)^{-1}`.
            The answer is unchanged when A has full column rank; otherwise :math:`x^H N^{-1} x` is made least instead of
            :math:`\|x\|`. Not together with damp > 0.
        rtol: tolerance, relative (see :mod:`lsconv.krylov.loop.judge`); None: ``10 eps^0.75`` of the dtype.
        atol: absolute tolerance on the residual norm, in the units of b.
        conlim: stop when the estimated condition number of A passes this; None: ``0.1 / eps``, at most 1e12.
        max_iter: iteration limit per item; None: ``4 min(m, n)``, at least 500 and at most 10000.
        x0: where to start, ``(*batch, *in_shape)``; not together with damp > 0.
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
        Craig, J. Math. and Phys. 34 (1955), 64-73; Saunders, BIT 35 (1995), 588-604.

    Example:
        >>> A = torch.tensor([[1.0, 1.0]])
        >>> lsconv.craig(A, torch.tensor([2.0])).x
        tensor([1.0000, 1.0000])
    """
    problem = prepare(A, b, damp=damp, M=M, N=N, x0=x0, check_finite=check_finite, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, conlim=conlim, max_iter=max_iter, check_every=check_every,
                         callback=callback, progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip

    def build(part: Problem) -> Any:
        return unmodified(_CRAIG)(part) if part.damp is None else augmented_columns(part, _CRAIG)

    return solve(problem, options, build, name="craig")


# A system whose residual is within this many tolerances counts as consistent when its gradient is tested.
_CONSISTENT = 100.0


class _CRAIG(Method):
    """Forward substitution with the bidiagonal: ``zeta_k = -(beta_k / alpha_k) zeta_{k-1}``, ``x += zeta_k v_k``."""

    leaves_range = True

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.process = process = GolubKahan(problem, x, running)
        self.space = problem.domain
        self.x = problem.start(x)
        self.zeta = -process.one
        self.column, self.inverse_norm = 0 * process.one, 0 * process.one
        self.limit = 0.1 * torch.finfo(problem.A.dtype).eps ** -0.75 * process.beta
        self.dual = CRAIGMultipliers(process.u, process.codomain) if problem.multipliers else None
        self.residual = process.r_norm
        self.operator_norm = process.operator_norm
        self.failure = process.failure

    def solution(self) -> Tensor:
        return self.x

    def converged(self, problem: Problem, x: Tensor, certificate: Certificate, judge: Judge) -> Converged:
        # An undamped system that is far from consistent has no least-norm solution.
        y_norm, tolerances = problem.codomain.safe_norm(problem.y), judge.tolerances
        bound = maximum(tolerances.residual_bound(y_norm), tolerances.eps * y_norm)
        near = (judge.damp > 0) | (certificate.residual_norm <= _CONSISTENT * bound)
        return certificate.residual_ok, certificate.gradient_ok & near

    def multipliers(self) -> Tensor | None:
        return None if self.dual is None else self.dual.z

    def step(self, running: Scalar) -> None:
        """Compute zeta_k, add ``zeta_k v_k`` to x, and advance the bidiagonalisation to u_{k+1} and v_{k+1}."""
        process = self.process
        zeta = -divide(process.beta, process.alpha) * self.zeta
        # ||x|| >= |zeta|. A zeta that implies a condition number beyond the dtype means that alpha is only rounding:
        # the Krylov space is exhausted, and b has a part outside the range of A.
        exhausted = running & ((process.alpha == 0) | (abs(zeta) * process.weighted_norm > self.limit))
        active = self.space.active(running & (exhausted == 0))
        # A^H maps the columns of U_k L_k^{-H} to unit vectors, so that their norms are lower bounds of ||A^+||.
        self.column = quotient(hypot(1.0 + 0 * self.column, process.beta * self.column), process.alpha)
        self.inverse_norm = maximum(self.inverse_norm, self.column)
        self.condition = self.inverse_norm * process.weighted_norm
        self.space.add(self.x, zeta * active, process.v, out=self.x)
        if self.dual is not None:
            self.dual.step(zeta, process.beta, divide(active, process.alpha), process.u)
        process.step(active)
        # r = -beta_{k+1} zeta_k u_{k+1}; u has norm one in the inner product of M, but the test is of the Euclidean
        # norm.
        residual = process.beta * abs(zeta) * process.u_norm
        self.residual = where(exhausted, self.residual, residual)
        self.zeta = zeta
        self.operator_norm = process.operator_norm
        self.failure = exhausted * Cause.STUCK if process.failure is None else process.failure | exhausted * Cause.STUCK
