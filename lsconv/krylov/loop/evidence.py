"""Facts on an operator that a certificate needs beside norms: bounds of ||A||, the rank, the null space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lsconv.krylov.loop.batched_scalars import Scalar

__all__ = ["NormBounds", "NullSpaceBound", "RankThreshold"]


@dataclass(frozen=True, eq=False)
class NormBounds:
    """Bounds of ``||A||``, per item.

    Attributes:
        lower: a lower bound, if one is known; products with A and its adjoint raise it.
        upper: an upper bound, for estimates of rounding; None: the lower one.
        sharper: finds a better lower bound, called only where a test depends on it; None: the power method.
    """

    lower: Scalar | None = None
    upper: Scalar | None = None
    sharper: Callable[[], Scalar] | None = None


@dataclass(frozen=True, eq=False)
class RankThreshold:
    """The singular values of A that count as zero.

    Attributes:
        rcond: those up to ``rcond ||A||`` do, so that no solution is longer than ``||y|| / (rcond ||A||)``, and no
            longer x makes the rounding larger.
        length_limit: the rounding allowed grows with ``||x||`` only up to ``||y|| / (length_limit ||A||)``; 0: without
            a limit. It decides no rank. It is :data:`~lsconv.krylov.loop.stopping.EXCUSED` where a longer x shows small
            singular values.
        truncated: without damping these singular values are cut off: they may leave ``rcond ||A|| ||r||`` of a
            gradient.
    """

    rcond: float = 0.0
    length_limit: float = 0.0
    truncated: bool = False


@dataclass(frozen=True, eq=False)
class NullSpaceBound:
    """A bound of the part in the null space of A that x may have.

    Attributes:
        share: the bound of :attr:`Certificate.null_part`; infinity for items whose method finds x in the range of
            ``A^H``; None: for all.
        range_eps: epsilon of the arithmetic that computes x as ``A^H z``, so that only its rounding leads into the null
            space; None: x is not of that form.
        exists: finds the items for which A may have a null space, called only where the share is exceeded.
    """

    share: Scalar | None = None
    range_eps: float | None = None
    exists: Callable[[], Tensor] | None = None
