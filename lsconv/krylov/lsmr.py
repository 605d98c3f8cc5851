r"""LSMR: least squares by Golub-Kahan bidiagonalisation, with a gradient that falls monotonically.

.. math:: \min_x \|Ax - b\|^2 + \mathrm{damp}^2 \|x\|^2

In exact arithmetic the same iterates as MINRES on the normal equations, where LSQR's are those of conjugate gradients
on them. Since the gradient norm never rises, stopping early is safest here.
Fong and Saunders, "LSMR: An iterative algorithm for sparse least-squares problems", SIAM J. Sci. Comput. 33 (2011),
2950-2971; the names below are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov.golub_kahan import GolubKahan
from lsconv.krylov.loop.batch_groups import solve
from lsconv.krylov.loop.batched_scalars import (
    Scalar,
    divide,
    hypot,
    maximum,
    minimum,
    quotient,
    root,
    rotation,
)
from lsconv.krylov.loop.damping import augmented
from lsconv.krylov.loop.lagrange_multipliers import LSMRMultipliers
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.scipy import OperatorLike

__all__ = ["LSMR", "lsmr"]


def lsmr(
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
    r"""Least squares by LSMR, every batch item on its own.

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
        Fong and Saunders, SIAM J. Sci. Comput. 33 (2011), 2950-2971.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> lsconv.lsmr(A, torch.tensor([1.0, 2.0, 3.0])).x
        tensor([1.0000, 1.0000])
    """
    problem = prepare(A, b, damp=damp, M=M, N=N, x0=x0, check_finite=check_finite, host_scalars=True)
    options = Options.of(problem, rtol=rtol, atol=atol, conlim=conlim, max_iter=max_iter, check_every=check_every,
                         callback=callback, progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    return solve(problem, options, lambda part: augmented(part, LSMR), name="lsmr")


class LSMR(Method):
    """The iteration, from any start; see :func:`lsmr`."""

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar) -> None:
        self.process = process = GolubKahan(problem, x, running, keep_av=problem.M is not None)
        self.domain = problem.domain
        self.damp: Scalar | None = None if problem.damp is None else problem.scalar(problem.damp)
        self.x = problem.start(x)
        self.h = process.v.clone()
        self.hbar = torch.zeros_like(self.h)
        self.zetabar, self.alphabar = process.alpha * process.beta, process.alpha
        self.rho = self.rhobar = self.cbar = process.one
        self.sbar = self.largest = 0 * process.one
        self.smallest = math.inf * process.one
        self.estimate = _ResidualEstimate(process)
        self.v_norm = process.v_norm
        self.tracked = None if problem.M is None else _TrackedResidual(process, problem.residual(x, running))
        self.residual = process.r_norm
        self.dual: LSMRMultipliers | None = None
        if problem.multipliers:
            self.dual = LSMRMultipliers(process.u, process.codomain, process.beta)
        self._norms()

    def solution(self) -> Tensor:
        """The iterate."""
        return self.x

    def multipliers(self) -> Tensor | None:
        """The multipliers z with ``x = A^H z``."""
        return None if self.dual is None else self.dual.z

    def step(self, running: Scalar) -> None:
        """Advance the bidiagonalisation, update the two QR factorisations, and from them h-bar, x and h."""
        process, domain = self.process, self.domain
        active = domain.active(running)
        process.step(active)
        chat, shat, alphahat = None, None, self.alphabar
        if self.damp is not None:
            chat, shat, alphahat = rotation(self.alphabar, self.damp)
        c, s, rho = rotation(alphahat, process.beta)
        thetanew = s * process.alpha
        self.alphabar = c * process.alpha
        thetabar, rhotemp = self.sbar * rho, self.cbar * rho
        cbar, sbar, rhobar = rotation(rhotemp, thetanew)
        zeta = cbar * self.zetabar
        self.zetabar = -sbar * self.zetabar
        back = -divide(thetabar * rho * active, self.rho * self.rhobar)
        forward = divide(zeta * active, rho * rhobar)
        along = -divide(thetanew * active, rho)
        if self.dual is not None:
            self.dual.step(back, divide(cbar * active, rho * rhobar), divide(process.beta, rhobar))
            self.dual.update_direction(c, s, divide(process.alpha, rho), process.u)
        domain.add(self.h, back, self.hbar, out=self.hbar)
        domain.add(self.x, forward, self.hbar, out=self.x)
        domain.add(process.v, along, self.h, out=self.h)
        # The newest diagonal entry of R-bar is rhotemp until the next rotation; the initial rhobar = 1 is not one.
        self.condition = quotient(maximum(self.largest, rhotemp), minimum(self.smallest, rhotemp))
        self.largest, self.smallest = maximum(self.largest, rhobar), minimum(self.smallest, rhobar)
        self.rho, self.rhobar, self.cbar, self.sbar = rho, rhobar, cbar, sbar
        if self.tracked is None:
            self.residual = self.estimate.update(chat, shat, c, s, thetabar, rhobar, zeta)
        else:
            self.residual = self.tracked.update(back, forward, along)
        self._norms()

    def _norms(self) -> None:
        """Set the estimates of the norms of A and of the gradient, which M and N change."""
        process = self.process
        self.failure = process.failure
        norm = process.operator_norm
        self.operator_norm = norm if self.damp is None else hypot(norm, self.damp)
        self.gradient = abs(self.zetabar)
        if process.M is not None:
            # With M the gradient A^H M r vanishes at the answer, A^H r does not: it is tested relative to its own
            # norms.
            weighted = self.estimate.value if self.tracked is None else self.tracked.weighted
            self.gradient = divide(self.gradient, process.weighted_norm * weighted) * self.operator_norm * self.residual
        elif process.N is not None:
            # The gradient is a combination of all v, which are orthonormal only in the inner product of N.
            self.v_norm = maximum(self.v_norm, process.v_norm)
            self.gradient = self.gradient * self.v_norm


class _ResidualEstimate:
    """The norm of the damped residual by a third QR factorisation (section 5.1 of the paper)."""

    def __init__(self, process: GolubKahan) -> None:
        self.value = self.betadd = process.beta
        self.betad = self.thetatilde = self.tautilde = self.zeta = self.damped_away = 0 * process.one
        self.rhod = process.one

    def update(
        self,
        chat: Scalar | None,
        shat: Scalar | None,
        c: Scalar,
        s: Scalar,
        thetabar: Scalar,
        rhobar: Scalar,
        zeta: Scalar,
    ) -> Scalar:
        """Return the norm after one more step, given its rotations; ``chat, shat`` are None without damping."""
        betaacute = self.betadd
        if chat is not None and shat is not None:
            self.damped_away = hypot(self.damped_away, shat * self.betadd)
            betaacute = chat * self.betadd
        betahat = c * betaacute
        self.betadd = -s * betaacute
        thetatildeold = self.thetatilde
        ctilde, stilde, rhotilde = rotation(self.rhod, thetabar)
        self.thetatilde = stilde * rhobar
        self.rhod = ctilde * rhobar
        self.betad = -stilde * self.betad + ctilde * betahat
        self.tautilde = divide(self.zeta - thetatildeold * self.tautilde, rhotilde)
        taud = divide(zeta - self.thetatilde * self.tautilde, self.rhod)
        self.zeta = zeta
        self.value = hypot(hypot(self.damped_away, self.betad - taud), self.betadd)
        return self.value


class _TrackedResidual:
    """The residual, updated along with x: with M the recurrences know only its norm in the inner product of M."""

    def __init__(self, process: GolubKahan, r: Tensor) -> None:
        self.process, self.space, self.r = process, process.codomain, r
        self.h = torch.zeros_like(r)
        self.hbar = torch.zeros_like(r)
        self.along: Scalar = 0 * process.one
        self.weighted = process.beta

    def update(self, back: Scalar, forward: Scalar, along: Scalar) -> Scalar:
        """Return the norm after one more step, given its factors of h-bar, x and h."""
        space, process = self.space, self.process
        assert process.av is not None
        assert process.M is not None
        # A h_k = A v_k + along_{k-1} A h_{k-1}, and so on: the images follow the vectors.
        space.add(process.av, self.along, self.h, out=self.h)
        space.add(self.h, back, self.hbar, out=self.hbar)
        space.add(self.r, -forward, self.hbar, out=self.r)
        self.along = along
        self.weighted = root(space.inner(self.r, process.M.apply(self.r)))
        return space.norm(self.r)
