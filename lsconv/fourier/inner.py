r"""The two iterations on the border: conjugate gradients where its system is definite, GMRES where it is not.

They solve to a loose tolerance inside an outer iteration that computes its own residuals, so they carry no certificate,
no history and no restarts after an audit (the Krylov floor has these): on a small image these would cost as much as
the iteration itself. Every (rest, block) pair is an independent system with its own step lengths.

Either may be interrupted, once: after a number of iterations the caller is told how many more are to be expected, by
how fast the residual has fallen so far, and may have the iteration end there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.fourier.recycling import Recycling, deflate

__all__ = ["Pause", "conjugate_gradients", "gmres"]

_Map = Callable[[Tensor], Tensor]


@dataclass
class Pause:
    """When the caller is asked whether to end the iteration.

    Args:
        after: so many iterations; then after twice as many, and so on.
        end: whether to, given how many iterations have been done, how many more are to be expected, and by which the
            logarithm of the residual of the system that needs most of them has fallen in one.

    Attributes:
        ended: whether it was ended.
    """

    after: int
    end: Callable[[int, float, float], bool]
    ended: bool = False

    def __call__(self, done: int, since: int, start: Tensor, now: Tensor, bound: Tensor) -> bool:
        """Whether to end after ``done`` iterations, the last ``since`` of which took residuals ``start`` to ``now``."""
        if done < self.after or since == 0:
            return False
        self.after *= 2
        rate = torch.log(start / now).clamp_min(0) / since
        expected = torch.where(now > bound, torch.log(now / bound) / rate, 0).flatten()
        expected = torch.where(expected.isnan(), math.inf, expected)
        most = expected.argmax()
        self.ended = self.end(done, float(expected[most]), float(rate.flatten()[most]))
        return self.ended


def conjugate_gradients(
    apply: _Map,
    precondition: _Map,
    b: Tensor,
    tolerance: Tensor | float,
    max_iter: int,
    check_every: int,
    pause: Pause | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``Q u = b`` for Hermitian positive definite Q; vectors are ``(rest, blocks, size)``.

    Args:
        apply: Q.
        precondition: M^-1, Hermitian positive definite.
        b: right-hand sides.
        tolerance: relative residual at which a system is left as it is.
        max_iter: limit on the iterations.
        check_every: the host looks every so many iterations.
        pause: when to ask whether to go on.

    Returns:
        The solutions, and the iterations of every system, ``(rest, blocks)``.
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
        if pause is not None and pause(k, k, start, norm, bound):
            break
        z = precondition(r)
        rho_new = _inner(r, z)
        p = z if p is None else z.addcmul_(p, _ratio(rho_new, rho))
        q = apply(p)
        alpha = _ratio(rho_new, _inner(p, q)) * active
        u.addcmul_(p, alpha)
        r.addcmul_(q, -alpha)
        rho = rho_new
        iterations += active[..., 0]
    return u, iterations


def gmres(
    apply: _Map,
    precondition: _Map,
    b: Tensor,
    tolerance: Tensor | float,
    max_iter: int,
    check_every: int,
    restart: int = 100,
    pause: Pause | None = None,
    recycling: Recycling | None = None,
) -> tuple[Tensor, Tensor]:
    """Solve ``Q u = b`` for any square Q by flexible GMRES (Saad 1993): what rounding does to M^-1 is in the basis.

    Arguments and result as in :func:`conjugate_gradients`; ``restart`` is the number of basis vectors kept, twice, and
    ``recycling`` what earlier systems with the same Q have left.
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
        correction, count = _cycle(apply, precondition, r, bound, size, check_every, pause, done, recycling)
        u = u + correction
        iterations += count
        done += int(count.max())
        if int(count.max()) < size:  # by its recursion, which the outer iteration verifies
            break
        r = b - apply(u)
        if not bool((_norm(r) < 0.5 * beta).any()):  # what a whole cycle does not halve is out of reach
            break
    return u, iterations


def _cycle(
    apply: _Map,
    precondition: _Map,
    r: Tensor,
    bound: Tensor,
    size: int,
    check_every: int,
    pause: Pause | None,
    before: int,
    recycling: Recycling | None,
) -> tuple[Tensor, Tensor]:
    """One cycle of GMRES from the residual ``r``: the correction, and the iterations each system needed.

    ``before`` iterations were done in the cycles before.
    """
    lead = r.shape[:2]
    known = None if recycling is None else recycling.pair
    m = 0
    whole = _norm(r)
    if known is not None:
        m = known[1].shape[1]
        u, r = deflate(known, r)
        if not bool((_norm(r) > bound).any()):
            return u, torch.zeros(lead, dtype=torch.int64, device=r.device)
    # as much of it as iterations are taken is touched; first the images that were kept
    basis = r.new_empty(*lead, m + size + 1, r.shape[-1])
    preconditioned = r.new_empty(*lead, size, r.shape[-1])
    hessenberg = r.new_zeros(*lead, size + 1, size)
    rotated = r.new_zeros(*lead, size, size)  # the triangular factor of the Hessenberg matrix
    rotations = torch.eye(size + 1, dtype=r.dtype, device=r.device).repeat(*lead, 1, 1)
    if known is not None:
        basis[..., :m, :] = known[1]
    deflated = r.new_zeros(*lead, m, size)
    beta = _norm(r)
    basis[..., m, :] = r * _ratio(torch.ones_like(beta), beta)
    rhs = r.new_zeros(*lead, size + 1)
    rhs[..., 0] = beta[..., 0]
    count = torch.zeros(lead, dtype=torch.int64, device=r.device)
    active = beta > bound
    columns = 0
    for j in range(size):
        z = precondition(basis[..., m + j, :])
        preconditioned[..., j, :] = z
        w = apply(z)
        v = basis[..., : m + j + 1, :]
        h = (v.conj() @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (h.unsqueeze(-2) @ v).squeeze(-2)
        # classical Gram-Schmidt twice is as good as modified, and batched
        again = (v.conj() @ w.unsqueeze(-1)).squeeze(-1)
        w = w - (again.unsqueeze(-2) @ v).squeeze(-2)
        norm = _norm(w)
        basis[..., m + j + 1, :] = w * _ratio(torch.ones_like(norm), norm)
        h = h + again
        deflated[..., j] = h[..., :m]
        hessenberg[..., : j + 1, j] = h[..., m:]
        hessenberg[..., j + 1, j] = norm[..., 0]
        column = (rotations[..., : j + 2, : j + 2] @ hessenberg[..., : j + 2, j, None]).squeeze(-1)
        _rotate(rotations, rhs, column, j)
        rotated[..., : j + 1, j] = column[..., : j + 1]
        count += active[..., 0]
        columns = j + 1
        active = active & (rhs[..., j + 1 : j + 2].abs() > bound) & (norm > 0)
        if columns % check_every == 0 and not bool(active.any()):
            break
        if pause is not None and pause(before + columns, columns, beta, rhs[..., j + 1 : j + 2].abs(), bound):
            break
    y = _coefficients(rotated[..., :columns, :columns], rhs[..., :columns], count)
    correction = (y.unsqueeze(-2) @ preconditioned[..., :columns, :]).squeeze(-2)
    if known is not None:
        parts = (deflated[..., :columns] @ y.unsqueeze(-1)).squeeze(-1)  # rest, blocks, m
        correction = u + correction - (known[0].mT @ parts.movedim(0, -1)).movedim(-1, 0)
    if recycling is not None and not (pause is not None and pause.ended):
        # a rotation splits the residual into what stays in rhs and what the next one has
        residuals = rhs[0, :, : columns + 1].abs().square().flip(-1).cumsum(-1).flip(-1).sqrt()
        recycling.learn(
            known,
            deflated[0, :, :, :columns],
            preconditioned[0, :, :columns],
            basis[0, :, m : m + columns + 1],
            rotated[0, :, :columns, :columns],
            rotations[0, :, : columns + 1, : columns + 1],
            torch.cat([whole[0], residuals[:, 1:]], dim=-1) / whole[0],
        )
    return correction, count


def _coefficients(rotated: Tensor, rhs: Tensor, count: Tensor) -> Tensor:
    """Of the basis vectors; a system that finished earlier than its neighbours has the columns it had then."""
    keep = torch.arange(rhs.shape[-1], device=rhs.device) < count[..., None]
    triangle = torch.where(keep[..., None, :] & keep[..., :, None], rotated, 0)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal == 0, 1, diagonal))
    y = torch.linalg.solve_triangular(triangle, (rhs * keep).unsqueeze(-1), upper=True).squeeze(-1)
    return torch.where(keep, y, 0)


def _rotate(rotations: Tensor, rhs: Tensor, column: Tensor, j: int) -> None:
    """Zero the subdiagonal of the newest column by a Givens rotation, and apply it to everything kept."""
    a, b = column[..., j].clone(), column[..., j + 1].clone()
    length = torch.hypot(a.abs(), b.abs())
    safe = torch.where(length == 0, 1, length)
    c, s = torch.where(length == 0, 1, a / safe), torch.where(length == 0, 0, b / safe)
    upper, lower = rotations[..., j, :].clone(), rotations[..., j + 1, :].clone()
    rotations[..., j, :] = c.conj()[..., None] * upper + s.conj()[..., None] * lower
    rotations[..., j + 1, :] = c[..., None] * lower - s[..., None] * upper
    first, second = rhs[..., j].clone(), rhs[..., j + 1].clone()
    rhs[..., j] = c.conj() * first + s.conj() * second
    rhs[..., j + 1] = c * second - s * first
    column[..., j] = length
    column[..., j + 1] = 0


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def _inner(u: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(u, v, dim=-1).real.unsqueeze(-1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator == 0, 0, numerator / denominator)
