r"""GMRES for square A, restarted, flexible, preconditioned from the right.

.. math:: A x = b, \qquad x_k = \arg\min_{x \in x_0 + Z_k} \|b - A x\|, \qquad A Z_k = V_{k+1} H_k,\ z_j = M_j v_j

The preconditioner acts on the solution side, so the residual minimised is the plain one, and it may differ from step to
step. Saad and Schultz, "GMRES: A generalized minimal residual algorithm for solving nonsymmetric linear systems", SIAM
J. Sci. Stat. Comput. 7 (1986); Saad, "A flexible inner-outer preconditioned GMRES algorithm", SIAM J. Sci. Comput. 14
(1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit, divide
from lsconv.krylov.loop.iteration import iterate
from lsconv.krylov.loop.method import Cause, Method
from lsconv.krylov.loop.options import IterationState, Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.dtypes import double
from lsconv.operators.scipy import OperatorLike

__all__ = ["gmres"]

# An item is given up when a cycle reduces its residual by less than this factor.
_STANDSTILL = 0.9999


def gmres(
    A: OperatorLike,
    b: Tensor,
    *,
    M: LinearOperator | Callable[[Tensor], Tensor] | None = None,
    restart: int | None = None,
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
    r"""Solve ``A x = b`` with any square A, every batch item on its own.

    Only the residual decides about convergence: ``||b - A x|| <= max(rtol ||b||, atol)``. The basis takes
    ``restart + 1`` vectors like x, and as many again with a preconditioner.

    Args:
        A: a LinearOperator with ``in_shape == out_shape``; or a dense tensor, a sparse tensor, a scipy LinearOperator.
        b: right-hand side ``(*batch, *out_shape)``.
        M: inverse preconditioner, :math:`M \approx A^{-1}`: a LinearOperator, or a function of ``(*batch, *in_shape)``
            that may act differently at each call (an iteration of its own). It need not be Hermitian, nor positive.
        restart: iterations before the basis is given up; None: 30, or n up to 200 unknowns.
        rtol: relative tolerance; None: ``10 eps^0.75`` of the dtype.
        atol: absolute tolerance on the residual norm, in the units of b.
        max_iter: iteration limit per item (of single, not of restart, iterations); None: ``4 n``, at least 500 and at
            most 10000.
        x0: where to start, ``(*batch, *in_shape)``.
        callback: called with an :class:`IterationState` every ``check_every`` iterations; returning True stops.
        progress: show a progress bar (needs tqdm).
        check_every: how often the host looks at the device; None: 1 on the CPU, 10 on a GPU. It does not change the
            answer.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in b and x0; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`; an item whose residual a whole cycle no longer reduces ends with
        :attr:`Status.STAGNATION`. ``gradient_norm`` is NaN for an operator without an adjoint.

    Raises:
        LsconvError: for arguments that do not fit (ShapeError, DtypeError, DeviceError, ArgumentError, ...).
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Saad and Schultz, SIAM J. Sci. Stat. Comput. 7 (1986); Saad, SIAM J. Sci. Comput. 14 (1993).

    Example:
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> lsconv.gmres(A, torch.tensor([2.0, 3.0])).x
        tensor([-3.,  2.])
    """
    function = M.apply if isinstance(M, LinearOperator) else M
    operator = M if isinstance(M, LinearOperator) else None
    problem = prepare(A, b, M=operator, x0=x0, check_finite=check_finite, square=True)
    unknowns = math.prod(problem.A.in_shape)
    if restart is None:
        restart = unknowns if unknowns <= 200 else 30
    if restart < 1:
        raise ArgumentError(f"restart: expected a number >= 1, got {restart}")
    restart = min(int(restart), unknowns)
    options = Options.of(problem, rtol=rtol, atol=atol, max_iter=max_iter, check_every=check_every, callback=callback,
                         progress=progress, raise_on_failure=raise_on_failure)  # fmt: skip
    start = lambda x, running: _GMRES(problem, x, running, function, restart)
    return iterate(problem, options, start, square=True, name="gmres")


class _GMRES(Method):
    """Restarted cycles of GMRES; the basis is ``(items, restart + 1, n)``, so that projections are matrix products.

    An item that has stopped gets basis vectors of zeros, identity rotations and unit columns in R, which leave its
    coefficients as they were.
    """

    def __init__(
        self,
        problem: Problem,
        x: Tensor | None,
        running: Tensor,
        precondition: Callable[[Tensor], Tensor] | None,
        restart: int,
    ) -> None:
        self.problem, self.A, self.precondition, self.restart = problem, problem.A, precondition, restart
        A = problem.A
        self.n, self.items = math.prod(A.in_shape), math.prod(problem.batch)
        self.space = problem.domain
        self.flat = ItemSpace((self.n,), A.dtype, A.device)
        self.x = problem.start(x)
        self.unit = binary_unit(self.space.safe_norm(problem.y))
        self.V = torch.empty(self.items, restart + 1, self.n, dtype=A.dtype, device=A.device)
        self.Z = self.V if precondition is None else torch.empty_like(self.V[:, :restart])
        small_dtype = double(A.dtype)
        self.small_dtype = small_dtype if self.space.scalar == torch.float64 else A.dtype
        self.G = torch.zeros(self.items, restart + 1, restart + 1, dtype=self.small_dtype, device=A.device)
        self.R = torch.zeros(self.items, restart, restart, dtype=self.small_dtype, device=A.device)
        self.failure: Tensor = torch.zeros_like(running, dtype=torch.int64)
        self.operator_norm = torch.zeros_like(self.unit)
        self._start_cycle(x is not None, running)

    # ------------------------------------------------------------------ cycles

    def _start_cycle(self, started: bool, running: Tensor) -> None:
        """Begin a cycle with the residual of the current x as the first basis vector."""
        active = running.to(self.space.scalar)
        r = self.problem.residual(self.x if started else None, running)
        first = self.V[:, 0]
        first.copy_(r.mul_(self.space.broadcast(1 / self.unit)).reshape(self.items, self.n))
        self.beta = self.flat.norm(first)
        first.mul_(self.flat.broadcast(divide(active.reshape(-1), self.beta)))
        self.G.zero_().diagonal(dim1=-2, dim2=-1).fill_(1)
        self.j = 0
        self.residual = (self.beta.reshape(self.problem.batch)) * self.unit

    def _end_cycle(self, running: Tensor) -> None:
        """End a cycle: update x, and give up the items whose residual it has hardly reduced."""
        before = self.beta
        self.x = self.solution()
        self._start_cycle(True, running)
        idle = (self.beta > _STANDSTILL * before).reshape(self.problem.batch)
        self.failure = self.failure | idle * Cause.STUCK

    def solution(self) -> Tensor:
        """``x + Z y`` with y the least-squares coefficients of this cycle."""
        if self.j == 0:
            return self.x.clone()
        k = self.j
        g = self.beta.reshape(-1, 1, 1).to(self.small_dtype) * self.G[:, :k, :1]
        y = torch.linalg.solve_triangular(self.R[:, :k, :k], g, upper=True)
        y = (y * self.unit.reshape(-1, 1, 1)).to(self.V.dtype)
        move = torch.bmm(y.mT, self.Z[:, :k])
        return self.x + move.reshape(self.x.shape)

    # ------------------------------------------------------------------ one step of Arnoldi and of the QR factors

    def step(self, running: Tensor) -> None:
        """Append a basis vector (Arnoldi) and a column of ``H = G^H R``; first restart where the basis is full."""
        if self.j == self.restart:
            self._end_cycle(running)
        j, active = self.j, running.reshape(-1).to(self.space.scalar)
        z = self.V[:, j].reshape(self.x.shape)
        if self.precondition is not None:
            z = self.precondition(z)
            self.Z[:, j].copy_(z.reshape(self.items, self.n))
        w = self.V[:, j + 1 : j + 2]
        w.copy_(self.A.apply(z).reshape(self.items, 1, self.n))
        h = self._orthogonalise(w, self.V[:, : j + 1])
        norm = self.flat.norm(w[:, 0])
        total = torch.hypot(torch.linalg.vector_norm(h, dim=-1), norm)
        if self.precondition is None:
            self.operator_norm = torch.maximum(self.operator_norm, total.reshape(self.problem.batch))
        # A remainder below the rounding of the projection has no direction, because the subspace is invariant.
        norm = norm * (norm > 10 * torch.finfo(self.V.dtype).eps * total)
        w.mul_(self.flat.broadcast(divide(active, norm)).unsqueeze(1))
        self._rotate(j, h, norm, active)
        self.j = j + 1
        self.residual = (self.beta * self.G[:, j + 1, 0].abs()).reshape(self.problem.batch) * self.unit

    def _orthogonalise(self, w: Tensor, basis: Tensor) -> Tensor:
        """Orthogonalise w in place by classical Gram-Schmidt, twice; return the coefficients."""
        h = torch.bmm(w, basis.mH)
        w.baddbmm_(h, basis, alpha=-1)
        again = torch.bmm(w, basis.mH)
        w.baddbmm_(again, basis, alpha=-1)
        return (h.to(self.small_dtype) + again.to(self.small_dtype))[:, 0]

    def _rotate(self, j: int, h: Tensor, norm: Tensor, active: Tensor) -> None:
        """Append a column to ``H = G^H R``: apply all previous rotations, then a new one of rows j and j+1."""
        column = torch.bmm(self.G[:, : j + 1, : j + 1], h.unsqueeze(-1))[..., 0]
        pivot = column[:, j]
        r = torch.hypot(pivot.abs(), norm)
        moving = (active > 0) & (r > 0)
        self.failure = self.failure | ((active > 0) & (r == 0)).reshape(self.problem.batch) * Cause.STUCK
        c = torch.where(moving, divide(pivot, r), 0)
        s = torch.where(moving, divide(norm, r), 1)
        self.R[:, :j, j] = torch.where(moving.unsqueeze(-1), column[:, :j], 0)
        self.R[:, j, j] = torch.where(moving, r, 1).to(self.small_dtype)
        upper, lower = self.G[:, j].clone(), self.G[:, j + 1].clone()
        c, s = c.unsqueeze(-1), s.unsqueeze(-1)
        self.G[:, j] = c.conj() * upper + s * lower
        self.G[:, j + 1] = -s * upper + c * lower
