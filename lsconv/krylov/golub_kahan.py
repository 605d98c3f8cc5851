r"""The Golub-Kahan process that lsqr, lsmr, craig and hybrid share.

.. math:: \beta_{k+1} u_{k+1} = A v_k - \alpha_k u_k, \qquad \alpha_{k+1} v_{k+1} = A^H u_{k+1} - \beta_{k+1} v_k.

With preconditioners the ``u`` are orthonormal in the inner product of M and the ``v`` in that of N: with
:math:`u = M \tilde u`, :math:`v = N \tilde v`,

.. math:: \beta \tilde u_{k+1} = A v_k - \alpha \tilde u_k, \quad \|\tilde u\|_M = 1, \qquad
          \alpha \tilde v_{k+1} = A^H u_{k+1} - \beta \tilde v_k, \quad \|\tilde v\|_N = 1.

Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", SIAM J. Numer. Anal. B 2 (1965); the
preconditioned form as in Arioli and Orban, "Iterative Solution of Symmetric Quasi-Definite Linear
Systems", SIAM (2017); the norm of the bidiagonal matrix as in Bischof, "Incremental condition estimation", SIAM J.
Matrix Anal. Appl. 11 (1990).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace, Scalar, divide, hypot, maximum, root, rotation
from lsconv.krylov.loop.method import Cause
from lsconv.krylov.loop.problem import Problem
from lsconv.operators.base import LinearOperator

__all__ = ["GolubKahan", "normalise"]


class GolubKahan:
    """One Golub-Kahan process per batch item, which stores the vectors u and v (and their images under M and N).

    Items that are not running have ``u = v = 0``, so that their iterates neither change nor overflow.

    Attributes:
        alpha, beta: the newest entries of the bidiagonal, ``batch``.
        u, v: the vectors to which A^H and A are applied.
        raw_u, raw_v: u and v before preconditioning (the same tensors without one).
        v_norm, u_norm: Euclidean norms of raw_v and raw_u; 1 without a preconditioner.
        operator_norm: a lower bound of ``||A||``.
        weighted_norm: a lower bound of the norm of A between the inner products of M and N.
        av: with ``keep_av``, a copy of the newest ``A v``.
        failure: items where M or N showed itself not to be positive definite.
    """

    def __init__(self, problem: Problem, x: Tensor | None, running: Scalar, *, keep_av: bool = False) -> None:
        self.A, self.M, self.N = problem.A, problem.M, problem.N
        self.domain, self.codomain = problem.domain, problem.codomain
        self.unpreconditioned = self.M is None and self.N is None
        self.keep_av = keep_av
        self.av: Tensor | None = None
        active = self.domain.active(running)
        r = problem.residual(x, running)
        self.r_norm: Scalar = self.codomain.safe_norm(r)
        # r is normalised before M is applied, because the squares in r^H M r could overflow in float32.
        self.raw_u = self.codomain.scale(r, divide(active, self.r_norm))
        self.u = self.raw_u
        self.failure: Scalar | None = None if self.unpreconditioned else (self.r_norm < 0) * Cause.NOT_DEFINITE
        self.u_norm = self.v_norm = self.one = active * 0 + 1
        scale, self.u, self.u_norm = self._normalise(self.raw_u, self.one, active, self.M, self.codomain)
        self.beta = self.r_norm * scale
        ahu = self.A.adjoint(self.u)
        self.raw_v = torch.empty_like(ahu, memory_format=torch.contiguous_format).copy_(ahu)
        norm: Scalar = self.domain.safe_norm(self.raw_v)
        self.operator_norm = norm if self.unpreconditioned else divide(norm, self.codomain.norm(self.u))
        self.domain.scale(self.raw_v, divide(active, norm))
        scale, self.v, self.v_norm = self._normalise(self.raw_v, self.one, active, self.N, self.domain)
        self.alpha = norm * scale
        self.weighted_norm, self.bidiagonal = self.alpha, _BidiagonalNorm(self.alpha, self.one)

    def step(self, active: Scalar) -> None:
        """Compute the next ``beta, u, alpha, v``; items with ``active = 0`` become and stay zero."""
        alpha = self.alpha
        av = self.A.apply(self.v)
        if self.keep_av:
            self.av = av.clone()
        self.codomain.add(av, -alpha, self.raw_u, out=self.raw_u)
        del av  # freed before A^H allocates its result
        self.beta, self.u, self.u_norm = self._normalise(self.raw_u, None, active, self.M, self.codomain)
        ahu = self.A.adjoint(self.u)
        # (alpha, beta) is a column of the bidiagonal matrix, whose norm is at most ||A|| without preconditioners.
        self.weighted_norm = maximum(self.weighted_norm, hypot(alpha, self.beta))
        if not self.unpreconditioned:
            bound = divide(self.domain.norm(ahu), self.codomain.norm(self.u))
            self.operator_norm = maximum(self.operator_norm, bound)
        self.domain.add(ahu, -self.beta, self.raw_v, out=self.raw_v)
        del ahu
        self.alpha, self.v, self.v_norm = self._normalise(self.raw_v, None, active, self.N, self.domain)
        self.weighted_norm = maximum(self.weighted_norm, self.bidiagonal.extended(self.beta, self.alpha))
        if self.unpreconditioned:
            self.operator_norm = self.weighted_norm

    def _normalise(
        self, raw: Tensor, norm: Scalar | None, active: Scalar, P: LinearOperator | None, space: ItemSpace
    ) -> tuple[Scalar, Tensor, Scalar]:
        length, image, norm, failure = normalise(raw, norm, active, P, space)
        if failure is not None:
            self.failure = self.failure | failure
        return length, image, self.one if norm is None else norm


class _BidiagonalNorm:
    """A lower bound of the norm of a growing upper bidiagonal matrix B, by incremental condition estimation.

    The bound is ``||B^H w||`` for a unit vector w near the leading left singular vector. w is not stored: the next
    column of B meets only its last component.

    Args:
        alpha: the only entry of the first matrix.
        one: 1 per item.
    """

    def __init__(self, alpha: Scalar, one: Scalar) -> None:
        self.bound, self.last = alpha, one

    def extended(self, beta: Scalar, alpha: Scalar) -> Scalar:
        """The bound for one more column, beta above alpha: the norm of ``[[bound, last beta], [0, alpha]]``."""
        above = self.last * beta
        norm = 0.5 * (hypot(self.bound + alpha, above) + hypot(self.bound - alpha, above))
        first, above, alpha = (divide(entry, norm) for entry in (self.bound, above, alpha))
        # the squared components of the left singular vector of this matrix, divided by its norm, have the ratio
        # (1 - alpha^2) : (1 - first^2 - above^2)
        _, self.last, _ = rotation(root(1 - alpha * alpha), root(1 - first * first - above * above))
        self.bound = norm
        return norm


def normalise(
    raw: Tensor, norm: Scalar | None, active: Scalar, P: LinearOperator | None, space: ItemSpace
) -> tuple[Scalar, Tensor, Scalar | None, Scalar | None]:
    """Scale ``raw`` in place to length 1 in the inner product of P.

    Args:
        raw: the vector.
        norm: its Euclidean norm; None: it is computed if needed.
        active: 0 for items whose vector is to become zero, 1 for the others.
        P: the preconditioner; None for the identity.
        space: the arithmetic of the vector.

    Returns:
        The length that it had; P applied to the scaled vector; the scaled vector's Euclidean norm, None for 1; and
        :attr:`Cause.NOT_DEFINITE` for the items that show P not to be positive definite, None without P.
    """
    if P is None:
        if norm is None:
            norm = space.norm(raw)
            space.scale(raw, divide(active, norm))
        return norm, raw, None, None
    norm = space.norm(raw)
    image = P.apply(raw)
    square = space.inner(raw, image)
    length = root(square)
    # A nonzero vector of length zero or less, up to rounding, shows that P is not positive definite.
    small = torch.finfo(space.dtype).eps * norm * space.norm(image)
    failure = ((square <= small) & (norm > 0) & (active > 0)) * Cause.NOT_DEFINITE
    scale = divide(active, length)
    image = image * space.broadcast(scale)  # before raw is scaled in place, because P may have returned its argument
    space.scale(raw, scale)
    return length, image, norm * scale, failure
