r"""The judge: an answer is right when it is the exact answer, for some rank, of a problem next to the one posed.

The dense float64 decomposition A = U s V^H gives the minimum-norm solution x_k = V_k S_k^{-1} U_k^H y for every rank k.
With perturbations of A, by tol ||A|| at most, and of y, by tol ||y||, that solution moves, to first order, by

    along v_i, kept:   tol (||y|| + s_1 ||x_k||) / s_i + tol s_1 ||r_k|| / s_i^2
    along all others:  tol s_1 ||z_k||,    z_k = A_k^{+H} x_k,

and storing x moves it by tol ||x_k||. The *merit* of an answer for the rank k is the larger of the two parts of x - x_k,
each in units of these. It is the least over all ranks that are plausible: those that cut the spectrum anywhere between
``LEAST_CUT`` and the ``most_cut`` of the precision, relative to s_1. For that rank two things are asked for besides: the
objective at x is not above the objective at x = 0 (beyond rounding of x_k), and x is at most ten times as long as the
longest plausible solution. An answer is *right* when its merit is at most ``SLACK``.

With damping the same holds of the stacked matrix [A; damp I], where s_i becomes h_i = sqrt(s_i^2 + damp^2) and r the
stacked residual; x lies in the range of A^H, so the part outside is held to the same tol s_1 ||z||.

tol is the larger of the method's rtol and eps of the dtype. A problem is *well-posed* when no rank is plausible but one,
the condition number of what is kept is below ``0.01 / sqrt(eps)``, and ||y|| is not almost all noise (the part of y that
A can reach is at least sqrt(eps) ||y||).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_CUT", "SLACK", "Dense", "Judgement"]

SLACK = 30.0
LEAST_CUT = 1e-14
_EPS = float(np.finfo(np.float64).eps)
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
        error: the distance from the nearest plausible solution, relative to its norm.
        rank: the rank of that solution.
        why: the failing part in words.
    """

    merit: NDArray[np.float64]
    right: NDArray[np.bool_]
    well_posed: NDArray[np.bool_]
    error: NDArray[np.float64]
    rank: NDArray[np.int64]
    why: list[str]


def _norms(v: Array) -> NDArray[np.float64]:
    scale = np.abs(v).max(-1, initial=0)
    safe = np.where((scale > 0) & np.isfinite(scale), scale, 1.0)
    return np.asarray(np.linalg.norm(v / safe[..., None], axis=-1) * safe)


def _over(a: Array, b: Array) -> NDArray[np.float64]:
    """``a / b``, where 0 / 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.asarray(a) == 0, 0.0, np.asarray(a) / np.asarray(b))


class Dense:
    """A dense matrix with its singular value decomposition, which judges any number of answers."""

    def __init__(self, matrix: Array, parts: tuple[Array, Array, Array] | None = None) -> None:
        self.matrix = matrix
        if parts is None:
            U, s, Vh = np.linalg.svd(matrix, full_matrices=False)
            parts = U, s, Vh.conj().T
        self.U, self.s, self.V = parts
        self.norm = float(self.s[0]) if self.s.size else 0.0

    def normal(self) -> Dense:
        """A^H A, whose singular vectors are those of A."""
        return Dense(self.matrix.conj().T @ self.matrix, (self.V, self.s**2, self.V))

    def cuts(self, bits: int) -> list[int]:
        """The plausible ranks, the largest first."""
        least = int((self.s > LEAST_CUT * self.norm).sum())
        most = int((self.s > _MOST_CUT[bits] * self.norm).sum())
        return list(range(least, most - 1, -1)) if self.norm > 0 else [0]

    def judge(
        self,
        x: Array,
        y: Array,
        *,
        tol: float,
        bits: int,
        damp: Array | float = 0.0,
        data_norm: Array | float = 0.0,
        stored: Array | float = 0.0,
        minimum_norm: bool = True,
    ) -> Judgement:
        """Judge the answers ``x`` (items in rows) for the data ``y``.

        Args:
            x, y: ``(items, n)`` and ``(items, m)``, in double precision.
            tol: relative tolerance of the method.
            bits: 32 or 64, the precision in which x is stored.
            damp: the damping, per item.
            data_norm, stored: norms of data and solution as stored, where a prior has been taken off both.
            minimum_norm: x has to be the shortest of the solutions.
        """
        eps = 2.0**-23 if bits == 32 else _EPS
        tol = max(tol, eps)
        damp = np.broadcast_to(np.asarray(damp, float), (len(x),))
        c, p = y @ self.U.conj(), x @ self.V.conj()
        outside_y, outside_x = _norms(y - c @ self.U.T), _norms(x - p @ self.V.T)
        yn = np.maximum(_norms(y), eps / tol * 8 * np.asarray(data_norm))
        xn = _norms(x)
        objective = np.hypot(_norms(y - x @ self.matrix.T), damp * xn)
        ranks = self.cuts(bits)
        results = []
        for rank in ranks:
            results.append(self._for_rank(rank, c, p, outside_y, outside_x, yn, xn, objective, damp, tol, eps, stored))
        row, null, excess, error, length = (np.stack([r[i] for r in results]) for i in range(5))
        merit = np.maximum(row, null) if minimum_norm else row
        merit = np.where(excess, np.inf, merit)
        too_long = xn > 10 * np.maximum(length.max(0), np.asarray(stored))
        too_long &= _norms(y) > 0 if minimum_norm else False
        merit = np.where(too_long & (xn > 0) & (merit > SLACK / 10), np.inf, merit)
        merit = np.where(np.isfinite(xn), merit, np.inf)
        best = np.argmin(merit, 0)
        items = np.arange(len(x))
        why = [
            "too long" if too_long[i] else "objective above that of x = 0" if excess[best[i], i]
            else "a part outside the row space" if minimum_norm and null[best[i], i] > row[best[i], i]
            else "error in the row space" for i in items
        ]  # fmt: skip
        smallest = self.s[ranks[0] - 1] if ranks[0] else 0.0
        full = ranks[0] == self.matrix.shape[1]
        h = np.hypot(smallest, damp) if full else np.where(damp > 0, damp, smallest)
        clear = (damp > 0) | (len(ranks) == 1)
        reached = _norms(c[:, : ranks[0]])
        well_posed = clear & (np.hypot(self.norm, damp) < 0.01 / np.sqrt(eps) * h) & (reached > np.sqrt(eps) * yn)
        return Judgement(
            merit[best, items], merit[best, items] <= SLACK, well_posed, error[best, items], np.array(ranks)[best], why
        )

    def _for_rank(
        self, rank: int, c: Array, p: Array, outside_y: Array, outside_x: Array, yn: Array, xn: Array,
        objective: Array, damp: Array, tol: float, eps: float, stored: Array | float,
    ) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
        """Merit in the row space and outside of it, whether the objective is too large, relative error, and ||x_k||."""
        s, s1 = self.s[:rank], self.norm
        h = np.hypot(s, damp[:, None])
        exact = c[:, :rank] * (s / h) / h
        length = _norms(exact)
        z = _norms(c[:, :rank] / h / h)
        # the residual of x_k: what is cut, what is outside, and what the damping leaves
        rest = np.hypot(_norms(c[:, rank:]), outside_y)
        rest = np.hypot(rest, _norms(c[:, :rank] * (damp[:, None] / h)))
        h1 = np.hypot(s1, damp)
        size = length + eps / tol * np.asarray(stored)
        allowed = (yn + h1 * size)[:, None] / h + (h1 * rest)[:, None] / h / h + size[:, None]
        row = _norms(_over(np.abs(p[:, :rank] - exact), tol * allowed))
        cut = np.hypot(_norms(p[:, rank:]), outside_x)
        # the decomposition itself is known to eps of float64 only, which a small damp magnifies
        own = np.where(damp > 0, 100 * _EPS * _over(s1 * rest, damp * damp), 10 * eps * _over(yn, np.full_like(yn, s1)))
        null = _over(cut, tol * (size + s1 * z) + own)
        excess = objective > yn * (1 + 10 * tol) + 10 * eps * s1 * (size)
        error = _over(np.hypot(_norms(p[:, :rank] - exact), cut), length)
        return row, null, excess, error, length
