r"""The Lanczos process for Hermitian operators: quadrature of functions of them, solutions, and Ritz vectors.

k steps from a vector v give an orthonormal Q and a tridiagonal T with :math:`Q^H N Q = T`, and with
:math:`T = Y \Theta Y^H`

.. math:: v^H f(N) v \approx \|v\|^2 \sum_j |Y_{1j}|^2 f(\theta_j),

a Gauss quadrature, exact for polynomials of degree 2k - 1. Q is not kept: combinations :math:`Q c` of it, such as
:math:`\|v\| Q T^{-1} e_1 \approx N^{-1} v`, come from the same recurrence run a second time.

Golub and Meurant, "Matrices, Moments and Quadrature with Applications" (2010), chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.operators.batch_layout import over_items

__all__ = ["Lanczos"]


class Lanczos:
    """The Lanczos process, from many starts at once, for Q and T with ``Q^H N Q = T``.

    Args:
        apply: applies the Hermitian operator N.
        start: the vectors v to start from, ``(*starts, *item)``; not zero.
        item_ndim: the number of dimensions of an item.
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor, item_ndim: int) -> None:
        self._apply, self._start, self._ndim = apply, start, item_ndim
        self.norm = self._inner(start, start).sqrt()
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        self._last = torch.zeros_like(start)
        self._next = start / self._broadcast(self.norm)

    def _inner(self, u: Tensor, v: Tensor) -> Tensor:
        return (u.conj() * v).real.flatten(u.ndim - self._ndim).sum(-1)

    def _broadcast(self, values: Tensor) -> Tensor:
        return over_items(values, self._ndim)

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return len(self._alphas)

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Take ``steps`` more steps."""
        for _ in range(steps):
            q = self._next
            w = self._apply(q)
            if self._betas:
                w = w - self._broadcast(self._betas[-1]) * self._last
            alpha = self._inner(q, w)
            w = w - self._broadcast(alpha) * q
            beta = self._inner(w, w).sqrt()
            # After an invariant subspace T continues with a decoupled block, which has no weight in the quadrature.
            alive = self._inner(q, q) > 0.5
            scale = alpha.abs() + (self._betas[-1] if self._betas else 0)
            beta = torch.where(alive & (beta > 8 * torch.finfo(beta.dtype).eps * scale), beta, 0)
            self._alphas.append(torch.where(alive, alpha, 1))
            self._betas.append(beta)
            self._last = q
            self._next = torch.where(self._broadcast(beta) > 0, w / self._broadcast(torch.where(beta > 0, beta, 1)), 0)

    @property
    def remainder(self) -> Tensor:
        """The newest off-diagonal entry beta of T; beta times a Ritz vector's last coordinate is its residual norm."""
        return self._betas[-1]

    def tridiagonal(self) -> Tensor:
        """T, of shape ``(*starts, steps, steps)``."""
        T = torch.diag_embed(torch.stack(self._alphas, -1))
        if self.steps > 1:
            off_diagonal = torch.stack(self._betas[:-1], -1)
            T = T + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
        return T

    def quadrature(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Approximate ``v^H f(N) v`` for every start v."""
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        weights = vectors[..., 0, :].square()
        return self.norm.square() * torch.where(weights > 0, weights * function(values), 0).sum(-1)

    @torch.no_grad()
    def combination(self, coordinates: Tensor) -> Tensor:
        """Compute ``Q c`` for coordinates c, ``(*starts, steps)``, by running the recurrence again."""
        total, last, q = torch.zeros_like(self._start), self._start, self._start / self._broadcast(self.norm)
        for k in range(self.steps):
            total = total + self._broadcast(coordinates[..., k]) * q
            if k == self.steps - 1:
                break
            w = self._apply(q) - self._broadcast(self._alphas[k]) * q
            if k:
                w = w - self._broadcast(self._betas[k - 1]) * last
            beta = self._betas[k]
            last, q = q, torch.where(self._broadcast(beta) > 0, w / self._broadcast(torch.where(beta > 0, beta, 1)), 0)
        return total

    def solution(self) -> Tensor:
        """Approximate ``N^-1 v`` for every start v, as conjugate gradients do in as many steps."""
        first = torch.zeros_like(self.tridiagonal()[..., 0])
        first[..., 0] = 1
        return self.combination(self.norm.unsqueeze(-1) * torch.linalg.solve(self.tridiagonal(), first))
