r"""The judge: an answer is right when it is the exact answer, for some rank, of a problem next to the one posed.

The dense float64 decomposition A = U s V^H gives the minimum-norm solution x_k = V_k S_k^{-1} U_k^H y for every rank k.
With perturbations of A, by tol ||A|| at most, and of y, by tol ||y||, that solution moves, to first order, by

    along v_i, kept:   tol (||y|| + s_1 ||x_k||) / s_i + tol s_1 ||r_k|| / s_i^2
    along all others:  tol s_1 ||z_k||,    z_k = A_k^{+H} x_k,

and storing x moves it by tol ||x_k||, or by eps ||x||. To second order, which counts where x_k is next to nothing,
z_k is that of the answer's own part along the v_i. The *merit* of an answer for the rank k is the larger of the two
parts of x - x_k, each in units of these. It is the least over all ranks that are plausible: those that cut the
spectrum anywhere between ``LEAST_CUT`` and the ``_MOST_CUT`` of the precision, relative to s_1; where the threshold
``rcond`` is promised, the rank alone that cuts there, or both beside a singular value that stands on it up to
``ON_THE_CUT``. For that rank two things are asked for besides: the objective at x is not above the objective at x = 0
(beyond rounding of x_k), and x is at most ten times as long as the longest plausible solution. An answer is *right*
when its merit is at most ``SLACK``.

With damping the same holds of the stacked matrix [A; damp I], where s_i becomes h_i = sqrt(s_i^2 + damp^2) and r the
stacked residual; x lies in the range of A^H, so the part outside is held to the same tol s_1 ||z||, and to what eps of
the dtype leaves of A^H r in the null space, 10 eps s_1 ||r|| / damp^2.

tol is the larger of the method's rtol and eps of the dtype. A problem is *well-posed* when no rank is plausible but
one, the condition number of what is kept is below ``0.01 / sqrt(eps)``, and ||y|| is not almost all noise (the part of
y that A can reach is at least sqrt(eps) ||y||).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["LEAST_CUT", "ON_THE_CUT", "SLACK", "Dense", "Judgement"]

SLACK = 30.0
LEAST_CUT = 1e-14
_EPS = float(np.finfo(np.float64).eps)
ON_THE_CUT = 200 * _EPS
# no rank decision of any method is above these; Fourier's in float32 is some 1e-5
_MOST_CUT = {32: 1e-4, 64: 1e-9}

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Judgement:
    """The judge's words on several items: one entry per item in every field.

    Attributes:
        merit: the error in units of what a perturbation by tol explains; infinity where x is no solution at any rank.
        right: the merit is at most :data:`SLACK`.
        well_posed: the problem has one plausible rank, and is well enough conditioned for its dtype.
        condition: the condition number of what is kept.
        inconsistent: what of y is out of reach at that rank, relative to y.
        error: the distance from the nearest plausible solution, relative to its norm.
        rank: the rank of that solution.
        ranks: the largest and the smallest plausible rank, in two rows.
        why: the failing part in words.
    """

    merit: NDArray[np.float64]
    right: NDArray[np.bool_]
    well_posed: NDArray[np.bool_]
    condition: NDArray[np.float64]
    inconsistent: NDArray[np.float64]
    error: NDArray[np.float64]
    rank: NDArray[np.int64]
    ranks: NDArray[np.int64]
    why: list[str]


def _norms(v: Array) -> NDArray[np.float64]:
    scale = np.abs(v).max(-1, initial=0)
    safe = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    return np.asarray(np.linalg.norm(v / safe[..., None], axis=-1) * safe)


def _over(a: Array, b: Array) -> NDArray[np.float64]:
    """``a / b``, where 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(a) == 0, 0.0, np.asarray(a) / np.asarray(b))


def _times(v: Array, matrices: Array) -> Array:
    """Each row of v times its own matrix, or all times the only one."""
    return v @ matrices[0] if len(matrices) == 1 else (v[:, None] @ matrices)[:, 0]


class Dense:
    """Dense matrices with their singular value decompositions, which judge any number of answers.

    Args:
        matrices: ``(m, n)``, of all items, or ``(items, m, n)``, one of each.
        parts: U, s and V of each, where they are known.
    """

    def __init__(self, matrices: Array, parts: tuple[Array, Array, Array] | None = None) -> None:
        self.matrices = matrices if matrices.ndim == 3 else matrices[None]
        if parts is None:
            try:
                U, s, Vh = np.linalg.svd(self.matrices, full_matrices=False)
            except np.linalg.LinAlgError:  # divide and conquer fails on a few finite matrices
                each = [scipy.linalg.svd(m, full_matrices=False, lapack_driver="gesvd") for m in self.matrices]
                U, s, Vh = (np.stack(part) for part in zip(*each, strict=True))
            parts = U, s, Vh.conj().swapaxes(1, 2)
        self.U, self.s, self.V = parts
        self.norm = self.s.max(-1, initial=0)
        self.least_cut = LEAST_CUT

    def __len__(self) -> int:
        return len(self.matrices)

    def normal(self) -> Dense:
        """A^H A, whose singular vectors are those of A."""
        normal = Dense(self.matrices.conj().swapaxes(1, 2) @ self.matrices, (self.V, self.s**2, self.V))
        normal.least_cut = _EPS / 4  # the rounding of two products with A is half of eps each, at most
        return normal

    def take(self, places: Array) -> Dense:
        """The matrices at these places, with their decompositions."""
        return Dense(self.matrices[places], (self.U[places], self.s[places], self.V[places]))

    def ranks(self, bits: int, rcond: float | None = None) -> NDArray[np.int64]:
        """The largest and the smallest plausible rank of each matrix, in two rows."""
        cuts = (self.least_cut, _MOST_CUT[bits]) if rcond is None else (rcond - ON_THE_CUT, rcond + ON_THE_CUT)
        return np.stack([(self.s > max(cut, 0.0) * self.norm[:, None]).sum(-1) for cut in cuts])

    @np.errstate(over="ignore")
    def judge(
        self,
        x: Array,
        y: Array,
        *,
        tol: float,
        bits: int,
        damp: Array | float = 0.0,
        rcond: float | None = None,
        data_norm: Array | float = 0.0,
        stored: Array | float = 0.0,
        minimum_norm: Array | bool = True,
    ) -> Judgement:
        """Judge the answers ``x`` (items in rows) for the data ``y``.

        Args:
            x, y: ``(items, n)`` and ``(items, m)``, in double precision.
            tol: relative tolerance of the method.
            bits: 32 or 64, the precision in which x is stored.
            damp: the damping, per item.
            rcond: the cut that the user has asked for, if any; it concerns the items that are not damped.
            data_norm, stored: norms of data and solution as stored, where a prior has been taken off both.
            minimum_norm: x has to be the shortest of the solutions, per item.
        """
        items = len(x)
        eps = 2.0**-23 if bits == 32 else _EPS
        tol = max(tol, eps)
        damp = np.broadcast_to(np.asarray(damp, float), (items,))
        shortest = np.broadcast_to(np.asarray(minimum_norm), (items,))
        s1 = np.broadcast_to(self.norm, (items,))
        c, p = _times(y, self.U.conj()), _times(x, self.V.conj())
        outside_y = _norms(y - _times(c, self.U.swapaxes(1, 2)))
        outside_x = _norms(x - _times(p, self.V.swapaxes(1, 2)))
        yn, xn = np.maximum(_norms(y), eps / tol * 8 * np.asarray(data_norm)), _norms(x)
        objective = np.hypot(_norms(y - _times(x, self.matrices.swapaxes(1, 2))), damp * xn)

        # one row per plausible rank, the largest first; an item that has fewer repeats its smallest
        bounds = np.where(damp > 0, self.ranks(bits), self.ranks(bits, rcond))
        steps = np.arange((bounds[0] - bounds[1]).max(initial=0) + 1)[:, None]
        ranks = np.maximum(bounds[0] - steps, bounds[1])
        kept = np.arange(self.s.shape[1]) < ranks[..., None]

        h = np.hypot(self.s, damp[:, None])
        h = np.where(h > 0, h, 1.0)
        exact = np.where(kept, c * (self.s / h) / h, 0)
        length, z = _norms(exact), _norms(np.where(kept, c / h / h, 0))
        # the residual of x_k: what is cut, what is outside, and what the damping leaves
        rest = np.hypot(_norms(np.where(kept, c * (damp[:, None] / h), c)), outside_y)
        h1 = np.hypot(s1, damp)
        size = length + eps / tol * np.asarray(stored)
        allowed = (yn + h1 * size)[..., None] / h + (h1 * rest)[..., None] / h / h + size[..., None]
        row = _norms(_over(np.where(kept, np.abs(p - exact), 0), tol * allowed + 10 * eps * xn[:, None]))
        cut = np.hypot(_norms(np.where(kept, 0, p)), outside_x)
        # A is known to eps of its dtype only, and the decomposition to that of float64: what that changes of A^H r lies
        # in the null space of A too, and is divided by damp^2
        rounding = max(100 * _EPS, 10 * eps)
        own = np.where(
            damp > 0, rounding * _over(s1 * rest, damp * damp), 10 * eps * np.where(s1 > 0, _over(yn, s1), 0)
        )
        z = np.maximum(z, _norms(np.where(kept, p / h, 0)))  # to second order
        null = np.where(shortest, _over(cut, tol * (size + s1 * z) + own), 0)
        excess = objective > yn * (1 + 10 * tol) + 10 * eps * s1 * size
        error = _over(np.hypot(_norms(np.where(kept, p - exact, 0)), cut), length)

        merit = np.where(excess, np.inf, np.maximum(row, null))
        too_long = shortest & (_norms(y) > 0) & (xn > 10 * np.maximum(length.max(0), np.asarray(stored)))
        merit = np.where(too_long & (merit > SLACK / 10), np.inf, merit)
        merit = np.where(np.isfinite(xn), merit, np.inf)
        best, every = np.argmin(merit, 0), np.arange(items)
        why = [
            "too long" if too_long[i] else "objective above that of x = 0" if excess[best[i], i]
            else "a part outside the row space" if null[best[i], i] > row[best[i], i] else "error in the row space"
            for i in every
        ]  # fmt: skip
        smallest = np.where(kept[0], self.s, np.inf).min(-1, initial=np.inf)
        smallest = np.where(np.isfinite(smallest), smallest, 0)
        full = bounds[0] == self.matrices.shape[2]
        h_least = np.where(full | (damp == 0), np.hypot(smallest, damp), damp)
        clear = (damp > 0) | (bounds[0] == bounds[1])
        reached = _norms(np.where(kept[0], c, 0))
        well_posed = clear & (h1 < 0.01 / np.sqrt(eps) * h_least) & (reached > np.sqrt(eps) * yn)
        least = merit[best, every]
        return Judgement(
            merit=least,
            right=least <= SLACK,
            well_posed=well_posed,
            condition=_over(h1, h_least),
            inconsistent=_over(np.hypot(_norms(np.where(kept[0], 0, c)), outside_y), yn),
            error=error[best, every],
            rank=ranks[best, every],
            ranks=bounds,
            why=why,
        )
