"""The evidence on an operator beside the norms of an answer: bounds of ||A||, the rank, the null-space part."""

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
        lower: a lower bound where one is known; it is raised by what A and its adjoint do to the vectors met.
        upper: an upper bound, for the rounding; None takes the lower one.
        sharper: finds a better lower bound, called only where that may decide; None: the power method.
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
        length_limit: an x longer than ``||y|| / (length_limit ||A||)`` makes the rounding no larger either, though
            nothing counts as zero: :data:`~lsconv.krylov.loop.stopping.EXCUSED`, where a longer one shows small
            singular values.
        truncated: without damping these singular values are cut off: they may leave ``rcond ||A|| ||r||`` of a
            gradient.
    """

    rcond: float = 0.0
    length_limit: float = 0.0
    truncated: bool = False


@dataclass(frozen=True, eq=False)
class NullSpaceBound:
    """The part in the null space of A that x may have.

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
