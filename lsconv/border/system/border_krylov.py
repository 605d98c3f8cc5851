r"""The two iterations on the border: GMRES, and conjugate gradients for definite systems whose factors are regularised.

They solve to a loose tolerance inside an outer iteration that computes its own residuals, so they need no certificate,
history or restarts such as those of :mod:`lsconv.krylov.loop`, which would cost as much as the iteration for a small
image. Every (rhs, block) pair is an independent system with its own step lengths.

GMRES recycles a subspace. A cycle stores vectors :math:`U` whose images :math:`C = QU` are orthonormal. The part of a
later residual in the span of C is solved for at once, by :math:`U C^H r`, and the iteration continues in the
complement. The preconditioned border systems of reflect and replicate padding, for which no factors are made, have a
few dozen outlying singular values. A cycle spends most of its iterations on these, and so would every later step of the
outer iteration and every later solve without the recycling. Where the singular values have no outliers nothing is
gained, and the vectors are discarded at the next cycle.

Parks, de Sturler, Mackey, Johnson and Maiti, "Recycling Krylov subspaces for sequences of linear systems", SIAM J. Sci.
Comput. 28 (2006); de Sturler, "Nested Krylov methods based on GCR", J. Comput. Appl. Math. 67 (1996).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RESTART", "Allowance", "Pair", "Recycling", "border_cg", "border_gmres", "deflate"]

Pair = tuple[Tensor, Tensor]  # vectors and their images, (blocks, vectors, size) each

_Map = Callable[[Tensor], Tensor]
# The basis vectors of a cycle of GMRES.
RESTART = 100


@dataclass
class Allowance:
    """The iterations that a border may still take before its factors are made.

    Attributes:
        iterations: the number of iterations.
        exceeded: they have been taken, or more than that would follow at the rate of convergence so far.
    """

    iterations: int
    exceeded: bool = False

    def update(self, cycle: int, before: int, start: Tensor, residual: Tensor, bound: Tensor) -> bool:
        """Update and return :attr:`exceeded`; the rate is extrapolated after a fourth of the iterations, or a cycle.

        Args:
            cycle: the iterations of this cycle.
            before: the iterations of all earlier cycles.
            start: the norms of the residuals at the beginning of this cycle.
            residual: the norms of the present residuals.
            bound: the norms to be reached.
        """
        if cycle >= min(self.iterations / 4, RESTART):
            rate = (residual / start).log() / cycle
            further = torch.where(residual > bound, (bound / residual).log() / rate, 0)
            # NaN, or a negative number for a residual that grows, is no forecast of convergence
            self.exceeded = not bool(((further >= 0) & (further <= self.iterations)).all())
        self.exceeded = self.exceeded or cycle + before >= self.iterations
        return self.exceeded


def border_cg(
    apply: _Map,
    precondition: _Map,
    b: Tensor,
    tolerance: Tensor | float,
    max_iter: int,
    check_every: int,
    allowance: Allowance | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``Q u = b`` for Hermitian positive definite Q; vectors are ``(rhs, blocks, size)``.

    Args:
        apply: Q.
        precondition: M^-1, Hermitian positive definite.
        b: right-hand sides.
        tolerance: relative residual at which a system is finished.
        max_iter: limit on the iterations.
        check_every: iterations between two tests on the host.
        allowance: to end where it is exceeded; None: there is none.

    Returns:
        The solutions, and the iterations of every system, ``(rhs, blocks)``.
    """
    u, r, start = torch.zeros_like(b), b.clone(), _norm(b)
    bound = tolerance * start
    iterations = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    p: Tensor | None = None
    rho = torch.ones_like(bound)
    for k in range(max_iter):
        norm = _norm(r)
        active = norm > bound
        if k % check_every == 0 and not bool(active.any()):
            break
        if allowance is not None and k % check_every == 0 and k and allowance.update(k, 0, start, norm, bound):
            break
        z = precondition(r)
        rho_new = _inner(r, z)
        # not in place, because z may be a buffer of the preconditioner
        p = z.clone() if p is None else torch.addcmul(z, p, _ratio(rho_new, rho))
        q = apply(p)
        alpha = _ratio(rho_new, _inner(p, q)) * active
        u.addcmul_(p, alpha)
        r.addcmul_(q, -alpha)
        rho = rho_new
        iterations += active[..., 0]
    return u, iterations


def border_gmres(
    apply: _Map,
    precondition: _Map,
    b: Tensor,
    tolerance: Tensor | float,
    max_iter: int,
    check_every: int,
    restart: int = RESTART,
    recycling: Recycling | None = None,
    allowance: Allowance | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``Q u = b`` for any square Q by flexible GMRES (Saad 1993), which also tolerates rounding of M^-1.

    Arguments and result are as in :func:`border_cg`; ``restart`` is the number of basis vectors, of which two
    sets are stored, and ``recycling`` the subspace of earlier systems with the same Q.
    """
    u = torch.zeros_like(b)
    bound = tolerance * _norm(b)
    iterations = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    r, done = b, 0
    while done < max_iter:
        beta = _norm(r)
        if not bool((beta > bound).any()):
            break
        size = min(restart, max_iter - done)
        correction, count = _cycle(apply, precondition, r, bound, size, check_every, recycling, allowance, done)
        u = u + correction
        iterations += count
        done += int(count.max())
        if int(count.max()) < size:  # converged by the recursive residual; the outer iteration computes the true one
            break
        r = b - apply(u)
        norm = _norm(r)
        if allowance is not None and allowance.update(size, done - size, beta, norm, bound):
            break
        if not bool((norm < 0.5 * beta).any()):  # a residual that a whole cycle does not halve will not converge
            break
    return u, iterations


def _cycle(
    apply: _Map,
    precondition: _Map,
    r: Tensor,
    bound: Tensor,
    size: int,
    check_every: int,
    recycling: Recycling | None,
    allowance: Allowance | None,
    before: int,
) -> tuple[Tensor, Tensor]:
    """One cycle of GMRES from the residual ``r``: the correction, and the iterations each system needed."""
    recycled = None if recycling is None else recycling.pair
    full_norm = _norm(r)
    count = torch.zeros(r.shape[:2], dtype=torch.int64, device=r.device)
    if recycled is not None:
        u, r = deflate(recycled, r)
        if not bool((_norm(r) > bound).any()):
            return u, count
    space = _Arnoldi(r, size, None if recycled is None else recycled[1])
    residual = space.beta
    active = residual > bound
    for done in range(1, size + 1):
        going = space.extend(apply, precondition)
        count += active[..., 0]
        residual = space.residual
        active = active & (residual > bound) & going
        checks = done % check_every == 0
        if checks and not bool(active.any()):
            break
        if allowance is not None and checks and allowance.update(done, before, space.beta, residual, bound):
            break
    Q, R = space.qr()
    y = _coefficients(R, Q[..., 0, :].conj() * space.beta, count)
    correction = (y.unsqueeze(-2) @ space.preconditioned).squeeze(-2)
    if recycled is not None:
        parts = (space.recycled_coefficients @ y.unsqueeze(-1)).squeeze(-1)  # rhs, blocks, vectors
        correction = u + correction - (recycled[0].mT @ parts.movedim(0, -1)).movedim(-1, 0)
    if recycling is not None:
        # the subspace is learned from the first right-hand side, and serves all
        residuals = torch.cat([full_norm, space.residuals[..., 1:]], dim=-1) / full_norm
        recycling.learn(
            recycled, space.recycled_coefficients[0], space.preconditioned[0], space.basis[0], Q[0], R[0], residuals[0]
        )
    return correction, count


class _Arnoldi:
    r"""The Arnoldi process ``Q Z = C D + V H``: V orthonormal, C the recycled images, Z any preconditioned vectors.

    The residual of :math:`\min_y \|\beta e_1 - Hy\|` needs no factors of H. Its rows but the first are an upper
    triangle, so that :math:`t^HH = 0` and :math:`t_0 = 1` determine t, one entry a column,

    .. math:: t_{k+1} = -\frac{\sum_{i \le k} \bar h_{ik} t_i}{h_{k+1,k}},

    and the norm of the residual, the part of :math:`\beta e_1` along t, is :math:`\beta / \|t\|`. Givens rotations
    would need many more calls of torch per column.

    Args:
        r: the first vector before normalisation, ``(rhs, blocks, n)``.
        size: the most columns.
        images: C, ``(blocks, vectors, n)``.
    """

    def __init__(self, r: Tensor, size: int, images: Tensor | None) -> None:
        self.lead, self.k = r.shape[:2], 0
        self.m = 0 if images is None else images.shape[1]
        systems, n = self.lead.numel(), r.shape[-1]
        # memory is only taken for the columns that are written
        self._basis = r.new_empty(systems, self.m + size + 1, n)
        self._preconditioned = r.new_empty(systems, size, n)
        self._coefficients = r.new_zeros(systems, self.m + size + 1, size)
        self._t = r.new_zeros(systems, size + 1)
        self._t[:, 0] = 1
        if images is not None:
            self._basis.unflatten(0, self.lead)[:, :, : self.m] = images
        self.beta = _norm(r)
        self._basis[:, self.m] = (r / _divisor(self.beta)).flatten(0, 1)

    def extend(self, apply: _Map, precondition: _Map) -> Tensor:
        """Add a column; return whether its image is linearly independent, ``(rhs, blocks, 1)``."""
        k, last = self.k, self.m + self.k
        z = precondition(self._basis[:, last].unflatten(0, self.lead))
        self._preconditioned[:, k] = z.flatten(0, 1)
        w = apply(z).flatten(0, 1).unsqueeze(1)  # as a row, because batched products with columns are slow
        basis = self._basis[:, : last + 1]
        # classical Gram-Schmidt twice is as good as modified, and batched
        h = torch.bmm(w.conj(), basis.mT).conj()
        w = torch.baddbmm(w, h, basis, alpha=-1)
        more = torch.bmm(w.conj(), basis.mT).conj()
        w = torch.baddbmm(w, more, basis, alpha=-1)
        length = torch.linalg.vector_norm(w, dim=2)
        divisor = _divisor(length)
        self._basis[:, last + 1] = w.squeeze(1) / divisor
        column = self._coefficients[..., k]
        column[:, : last + 1] = (h + more).squeeze(1)
        column[:, last + 1] = length.squeeze(-1)
        dot = torch.linalg.vecdot(column[:, self.m : last + 1], self._t[:, : k + 1]).unsqueeze(-1)
        self._t[:, k + 1 : k + 2] = -dot / length
        self.k = k + 1
        return divisor.isfinite().unflatten(0, self.lead)

    @property
    def residual(self) -> Tensor:
        """The norm of the residual, ``(rhs, blocks, 1)``; zero after a column of norm zero."""
        return (self.beta / _norm(self._t[:, : self.k + 1].unflatten(0, self.lead))).nan_to_num(nan=0.0)

    @property
    def residuals(self) -> Tensor:
        """These norms before every column and after the last one, ``(rhs, blocks, columns + 1)``."""
        t = self._t[:, : self.k + 1].unflatten(0, self.lead)
        return (self.beta / t.abs().square().cumsum(-1).sqrt()).nan_to_num(nan=0.0)

    @property
    def basis(self) -> Tensor:
        """V, its vectors in rows."""
        return self._basis[:, self.m : self.m + self.k + 1].unflatten(0, self.lead)

    @property
    def preconditioned(self) -> Tensor:
        """Z, its vectors in rows."""
        return self._preconditioned[:, : self.k].unflatten(0, self.lead)

    @property
    def recycled_coefficients(self) -> Tensor:
        """The coefficients D on the kept images."""
        return self._coefficients[:, : self.m, : self.k].unflatten(0, self.lead)

    def qr(self) -> tuple[Tensor, Tensor]:
        """Decompose H as Q R, with as many columns as it."""
        Q, R = torch.linalg.qr(self._coefficients[:, self.m : self.m + self.k + 1, : self.k])
        return Q.unflatten(0, self.lead), R.unflatten(0, self.lead)


def _coefficients(triangle: Tensor, rhs: Tensor, count: Tensor) -> Tensor:
    """The coefficients of the basis vectors; a system that finished early has the columns it had then."""
    keep = torch.arange(rhs.shape[-1], device=rhs.device) < count[..., None]
    triangle = torch.where(keep[..., None, :] & keep[..., :, None], triangle, 0)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal == 0, 1, diagonal))
    y = torch.linalg.solve_triangular(triangle, (rhs * keep).unsqueeze(-1), upper=True).squeeze(-1)
    return torch.where(keep, y, 0)


def _divisor(length: Tensor) -> Tensor:
    """The divisor that normalises a vector of that norm; infinity where squares in the norm have underflowed."""
    return torch.where(length > math.sqrt(torch.finfo(length.dtype).tiny), length, math.inf)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def _inner(u: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(u, v, dim=-1).real.unsqueeze(-1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0, numerator / denominator)


class Recycling:
    """The recycled subspace: vectors and their orthonormal images under Q, one set for every block.

    Args:
        max_vectors: the most vectors that are stored.

    Attributes:
        pair: the vectors and their images; None: there are none.
    """

    def __init__(self, max_vectors: int) -> None:
        self.max_vectors = max_vectors
        self.pair: Pair | None = None
        self._history: Tensor | None = None  # the relative residuals of the first cycle

    def learn(
        self,
        recycled: Pair | None,
        recycled_coefficients: Tensor,
        preconditioned: Tensor,
        basis: Tensor,
        unitary: Tensor,
        triangle: Tensor,
        residuals: Tensor,
    ) -> None:
        """Add directions of a cycle of GMRES, or discard all where the recycled ones have saved hardly any iterations.

        Args:
            recycled: the vectors and images that the cycle was deflated by; None for none.
            recycled_coefficients: the coefficients of ``Q Z`` on these images, ``(blocks, vectors, k)``.
            preconditioned: ``Z``, ``(blocks, k, size)``.
            basis: ``V`` with ``Q Z = V H``, up to these images, ``(blocks, k + 1, size)``.
            unitary: ``G`` of ``H = G R``, ``(blocks, k + 1, k)``.
            triangle: ``R``, ``(blocks, k, k)``.
            residuals: relative residual norms before the cycle and after each of its columns, ``(blocks, k + 1)``.
        """
        k = triangle.shape[-1]
        if recycled is not None and self._history is not None:
            undeflated = int((self._history > residuals[:, -1:]).sum(-1).amax())
            if 4 * k > 3 * undeflated:  # it saves hardly any iterations
                self.pair, self.max_vectors = None, 0
                return
        if recycled_coefficients.shape[-2] + k > self.max_vectors or not bool(triangle.isfinite().all()):
            return
        values = torch.linalg.svdvals(triangle)
        # At a worse condition rounding would make C differ from Q U.
        if not bool((values[..., -1] > math.sqrt(torch.finfo(values.dtype).eps) * values[..., 0]).all()):
            return
        if recycled is not None:
            preconditioned = preconditioned - recycled_coefficients.mT @ recycled[0]
        vectors = torch.linalg.solve_triangular(triangle.mT, preconditioned, upper=False)
        images = unitary.mT @ basis
        if recycled is not None:
            vectors, images = (torch.cat(both, dim=1) for both in zip(recycled, (vectors, images), strict=True))
        else:
            self._history = residuals.clone()
        if self.pair is recycled:  # no other thread has changed it meanwhile
            self.pair = (vectors, images)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return 0 if self.pair is None else sum(t.nbytes for t in self.pair)


def deflate(pair: Pair, r: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the part of ``r`` in the span of the images; return it and the remaining r, ``(rhs, blocks, size)``."""
    vectors, images = pair
    residual = r.movedim(0, -1)
    parts = images.conj() @ residual
    residual = residual - images.mT @ parts
    correction = images.conj() @ residual
    residual = residual - images.mT @ correction
    return (vectors.mT @ (parts + correction)).movedim(-1, 0), residual.movedim(-1, 0).contiguous()
