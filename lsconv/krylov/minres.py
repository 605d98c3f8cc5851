r"""MINRES for Hermitian A, indefinite or singular.

.. math:: A x = b, \qquad x_k = \arg\min_{x \in x_0 + K_k} \|b - A x\|

Lanczos' process with a QR factorisation of its tridiagonal matrix. Paige and Saunders, "Solution of sparse indefinite
systems of linear equations", SIAM J. Numer. Anal. 12 (1975), 617-629; the preconditioned form as in Choi, Paige and
Saunders, "MINRES-QLP: A Krylov subspace method for indefinite or singular symmetric systems", SIAM J. Sci. Comput. 33
(2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov.golub_kahan import normalise
from lsconv.krylov.loop.batch_groups import solve, unmodified
from lsconv.krylov.loop.batched_scalars import Scalar, any_item, divide, hypot, maximum, rotation, where
from lsconv.krylov.loop.certificate import Certificate
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.method import Converged, Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["minres"]


def minres(
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
    r"""Solve ``A x = b``, or minimise ``||b - A x||``, with A Hermitian, every batch item on its own.

    A may be indefinite, or singular. When ``A x = b`` has solutions, the one found from ``x0 = 0`` has the least norm.
    When it has none, the item ends at a least-squares solution, by the test on the gradient ``A (b - A x)``; its
    residual is the smallest possible, its norm in general is not. Its gradient is negligible only up to about
    ``sqrt(eps) ||A|| ||r||``, which a smaller rtol does not accept: the status is then :attr:`Status.STAGNATION`.
    (``lsmr`` has neither limit.)

    Args:
        A: a LinearOperator with ``in_shape == out_shape``; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        M: inverse preconditioner, Hermitian positive definite, :math:`M \approx |A|^{-1}`. The answer is unchanged when
            ``A x = b`` has one solution; otherwise another norm of the residual, or of x, is made least.
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
        Paige and Saunders, SIAM J. Numer. Anal. 12 (1975), 617-629.

    Example:
        >>> A = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> lsconv.minres(A, torch.tensor([2.0, 4.0])).x
        tensor([2.0000, 1.0000])
    """
    problem = prepare(A, b, M=M, x0=x0, check_finite=check_finite, square=True, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, max_iter=max_iter, check_every=check_every, callback=callback,
                         progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    return solve(problem, options, unmodified(_MINRES), name="minres")


class _MINRES(Method):
    """The three-term recurrences of Lanczos, of R and of the directions ``w``.

    ``v`` is a unit vector in the inner product of M, ``raw`` the same before M is applied to it.
    """

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.A, self.M, self.space = problem.A, problem.M, problem.domain
        self.negligible = 4 * torch.finfo(self.A.dtype).eps ** 0.5
        active = self.space.active(running)
        self.x = problem.start(x)
        r = problem.residual(x, running)
        norm: Scalar = self.space.safe_norm(r)
        self.raw = self.space.scale(r, divide(active, norm))
        zero, self.one = 0 * active, 0 * active + 1
        scale, self.v, v_norm, self.failure = normalise(self.raw, self.one, active, self.M, self.space)
        self.v_norm = self.one if v_norm is None else v_norm
        self.r = None if self.M is None else self.raw.clone()
        self.previous = torch.zeros_like(self.raw)
        self.w, self.w_previous = torch.zeros_like(self.raw), torch.zeros_like(self.raw)
        self.beta, self.phibar = zero, norm * scale
        self.dbar, self.epsilon, self.c, self.s = zero, zero, -self.one, zero
        self.residual = norm
        self.operator_norm = self.weighted_norm = zero

    def solution(self) -> Tensor:
        return self.x

    def converged(self, problem: Problem, x: Tensor, certificate: Certificate, judge: Judge) -> Converged:
        gradient_ok = certificate.gradient_ok
        if problem.M is None and any_item(gradient_ok & certificate.excused):
            # MINRES may have left out a small eigenvalue as singular, along which the shortest x has no part.
            negligible, space = judge.tolerances.eps**0.5, problem.domain
            small = certificate.residual_norm <= 4 * negligible * space.safe_norm(problem.y)
            along = abs(space.inner(x, problem.y - problem.A.apply(x)))
            orthogonal = along <= negligible * space.safe_norm(x) * certificate.residual_norm
            gradient_ok = gradient_ok & ((certificate.excused == 0) | (small == 0) | orthogonal)
        return certificate.residual_ok, gradient_ok

    def step(self, running: Scalar) -> None:
        """Take one Lanczos step (``alpha, beta_{k+1}, v_{k+1}``), and with it a column of R, a direction w and x."""
        space, active = self.space, self.space.active(running)
        # Lanczos: A v = beta_k v_{k-1} + alpha v_k + beta_{k+1} v_{k+1}, in place of the oldest vector.
        av = self.A.apply(self.v)
        alpha: Scalar = space.inner(self.v, av)
        if self.M is not None:
            self.operator_norm = maximum(self.operator_norm, divide(space.norm(av), space.norm(self.v)))
        space.add(av, -self.beta, self.previous, out=self.previous)
        space.add(self.previous, -alpha, self.raw, out=self.previous)
        self.previous, self.raw = self.raw, self.previous
        v, beta_before = self.v, self.beta
        if self.M is None:
            # w needs the old v, which `previous` holds after the exchange above.
            v = self.previous
        self.beta, self.v, v_norm, failure = normalise(self.raw, None, active, self.M, space)
        self.v_norm = self.one if v_norm is None else v_norm
        if failure is not None:
            self.failure = failure if self.failure is None else self.failure | failure
        column = hypot(hypot(beta_before, alpha), self.beta)
        self.weighted_norm = maximum(self.weighted_norm, column)
        if self.M is None:
            self.operator_norm = self.weighted_norm
        self._advance(v, alpha, active)

    def _advance(self, v: Tensor, alpha: Scalar, active: Scalar) -> None:
        """Append a column to R and a direction to w, and step along it."""
        space = self.space
        epsilon = self.epsilon
        delta = self.c * self.dbar + self.s * alpha
        gbar = self.s * self.dbar - self.c * alpha
        self.epsilon = self.s * self.beta
        self.dbar = -self.c * self.beta
        residual_in_range = hypot(gbar, self.dbar)
        # ||A r_{k-1}|| = phibar_{k-1} residual_in_range. Where that is negligible r_{k-1} is a least-squares residual,
        # and x is not changed, because the step would divide by a (nearly) singular pivot.
        self.self_converged = done = residual_in_range <= self.negligible * self.weighted_norm
        moving = active * (done == 0)
        self.c, self.s, gamma = rotation(gbar, self.beta)
        inverse = divide(active, gamma)
        space.combine(self.w_previous, -epsilon * inverse, -delta * inverse, self.w)
        space.add(self.w_previous, inverse, v, out=self.w_previous)
        self.w, self.w_previous = self.w_previous, self.w
        space.add(self.x, self.c * self.phibar * moving, self.w, out=self.x)
        self.gradient = divide(residual_in_range, self.weighted_norm) * self.operator_norm * self.residual
        self.phibar = where(done, self.phibar, self.s * self.phibar)
        if self.r is None:
            self.residual = self.phibar
        else:
            # r_k = phibar_k d_k with d_k = s d_{k-1} - c v_{k+1}: the plain norm, where phibar is that of M.
            space.combine(self.r, where(done, self.one, self.s), -self.c * (done == 0), self.raw)
            self.residual = self.phibar * space.norm(self.r)
