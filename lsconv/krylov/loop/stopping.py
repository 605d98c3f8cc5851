"""Tolerances: how small a residual or a gradient has to be, and how large a null-space part may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import Scalar, at_least

__all__ = ["EXCUSED", "SQUARE_SHARE", "Tolerances", "default_rtol", "most_condition"]

# A gradient within its rounding passes the test if ||x|| is at most ||y|| / (EXCUSED ||A||): a longer x has parts along
# small singular values, and an error there could hide in that rounding.
EXCUSED = 0.03
# The null-space part of x, relative to x, above which an answer of a square or tall A is checked again.
SQUARE_SHARE = 0.1


def most_condition(eps: float) -> float:
    """The largest condition number that is resolved; the direct methods also treat smaller singular values as zero."""
    return min(0.1 / eps, 1e12)


def default_rtol(dtype: torch.dtype) -> float:
    """``10 eps^0.75``: 6e-5 in float32, 2e-11 in float64."""
    return float(10.0 * torch.finfo(dtype).eps ** 0.75)


@dataclass(frozen=True)
class Tolerances:
    """Relative and absolute tolerance of one solve, and the limit of the condition estimate.

    Args:
        rtol: relative tolerance; None takes :func:`default_rtol` of the dtype.
        atol: absolute tolerance on the residual, in the units of y.
        conlim: limit of the condition number; None takes ``0.1 / eps`` of the dtype, at most 1e12: the
            direct methods take smaller singular values for zero too.
    """

    rtol: float
    atol: float
    conlim: float
    eps: float

    @classmethod
    def of(cls, dtype: torch.dtype, rtol: float | None, atol: float, conlim: float | None = None) -> Tolerances:
        """Fill in the defaults of ``dtype`` and check the values.

        Raises:
            ArgumentError: for a negative or NaN tolerance.
        """
        eps = float(torch.finfo(dtype).eps)
        rtol = default_rtol(dtype) if rtol is None else float(rtol)
        conlim = most_condition(eps) if conlim is None else float(conlim)
        for name, value in (("rtol", rtol), ("atol", float(atol)), ("conlim", conlim)):
            if not value >= 0:
                raise ArgumentError(f"{name}: expected a number >= 0, got {value}")
        return cls(rtol, float(atol), conlim, eps)

    @property
    def rounding(self) -> float:
        """The rounding allowed to an iteration: a quarter of eps; 0 where ``rtol`` is below the dtype's precision."""
        return 0.25 * self.eps if self.rtol >= 10 * self.eps else 0.0

    @property
    def null_share(self) -> float:
        """The part in the null space of A that a damped x may have, relative to x: ten times the relative tolerance."""
        return 10 * max(self.rtol, self.eps)

    def residual_bound(self, y_norm: Scalar) -> Scalar:
        """The bound that the residual norm has to reach."""
        return at_least(self.rtol * y_norm, self.atol)

    def gradient_bound(self, operator_norm: Scalar, residual: Scalar) -> Scalar:
        """The bound that the gradient norm has to reach."""
        return operator_norm * at_least(self.rtol * residual, self.atol)
