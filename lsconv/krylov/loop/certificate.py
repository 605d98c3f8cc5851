"""The certificate of an x, and the terms of it: tolerances, norms, and facts on the operator.

:class:`~lsconv.krylov.loop.judge.Judge` makes a :class:`Certificate` of :class:`Norms` by :class:`Tolerances`, the
:class:`NormBounds`, the :class:`RankThreshold` and the :class:`NullSpaceBound` of A. Scalars are one per batch item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import ItemSpace, OneItem, Scalar, at_least, divide, where
from lsconv.operators.base import LinearOperator

__all__ = [
    "LENGTH_LIMIT",
    "TALL_NULL_SHARE",
    "Certificate",
    "NormBounds",
    "Norms",
    "NullSpaceBound",
    "RankThreshold",
    "Tolerances",
    "default_rtol",
    "most_condition",
    "norm_from_below",
]

# A gradient within its rounding passes the test if ||x|| is at most ||y|| / (LENGTH_LIMIT ||A||): a longer x has parts
# along small singular values, and an error there could hide in that rounding.
LENGTH_LIMIT = 0.03
# The null-space part that x may have, relative to x, where A has no fewer outputs than inputs; with more of it an
# answer is checked again.
TALL_NULL_SHARE = 0.1


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


def norm_from_below(A: LinearOperator, steps: int = 6, *, host_scalars: bool = False) -> Scalar:
    """A lower bound of ``||A||``, per item, by a few steps of the power method from random numbers.

    Args:
        A: the operator.
        steps: the number of applications of A.
        host_scalars: there is one item, and the bound is a Python number.
    """
    space = OneItem if host_scalars else ItemSpace
    domain, codomain = space(A.in_shape, A.dtype, A.device), space(A.out_shape, A.dtype, A.device)
    generator = torch.Generator(device=A.device).manual_seed(0)
    v = torch.randn(*A.batch_shape, *A.in_shape, dtype=A.dtype, device=A.device, generator=generator)
    for _ in range(steps):
        image = A.apply(v * domain.broadcast(divide(1.0, domain.safe_norm(v))))
        v = A.adjoint(image)
    return codomain.safe_norm(image)


@dataclass(frozen=True, eq=False)
class RankThreshold:
    """The singular values of A that count as zero.

    Attributes:
        rcond: singular values up to ``rcond ||A||`` count as zero. A solution is then at most ``||y|| / (rcond ||A||)``
            long, and the rounding allowed does not grow beyond that length.
        length_limit: the rounding allowed grows with ``||x||`` only up to ``||y|| / (length_limit ||A||)``; 0: without
            a limit. It decides no rank. It is :data:`LENGTH_LIMIT` where a longer x shows small singular values.
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


@dataclass(frozen=True, eq=False)
class Norms:
    """The norms that an x is judged by, however they were measured; one scalar per item each.

    Attributes:
        y: ``||y||``.
        x: ``||x||``.
        residual: ``||y - Ax||``.
        gradient: ``||A^H (y - Ax) - damp^2 L^H L x||``.
        penalty: ``||Lx||``, of the identity that of x.
        operator: a lower bound of ``||A||`` from the vectors met.
        prior: norm of the prior that was subtracted from x, and its image from y; None: there was none.
    """

    y: Scalar
    x: Scalar
    residual: Scalar
    gradient: Scalar
    penalty: Scalar
    operator: Scalar
    prior: Scalar | None = None


@dataclass(frozen=True, eq=False)
class Certificate:
    """The evidence of one application of A and one of its adjoint to a finished x; one scalar per item each.

    Attributes:
        data_norm: ``||y||``.
        residual_norm: ``||y - Ax||``.
        gradient_norm: ``||A^H (y - Ax) - damp^2 x||``.
        residual_ok: the residual meets the tolerance.
        gradient_ok: the gradient meets the tolerance, and the objective is no worse than at x = 0.
        no_worse: the objective is no worse than at x = 0.
        excused: only rounding makes the gradient pass: it exceeds the tolerance but not its rounding error, and no
            other test is met. An error along small singular values may hide there.
        objective: ``sqrt(||y - Ax||^2 + damp^2 ||x||^2)``.
        null_part: a bound of the part of x in the null space of A, which stands in the gradient times ``damp^2``,
            relative to ``||x|| + rtol ||y|| / ||A||``; infinity without damping.
        null_rounding: ``||A|| ||z||``, z = (y - Ax) / damp^2, relative to the same: times epsilon it bounds what the
            rounding of ``x = A^H z`` leaves in the null space.
        tolerance_ratio: the smaller of the two norms in units of its bound; at most 1 where converged.
        gradient_bound: the bound that the gradient has to reach.
    """

    data_norm: Scalar
    residual_norm: Scalar
    gradient_norm: Scalar
    residual_ok: Scalar
    gradient_ok: Scalar
    no_worse: Scalar
    excused: Scalar
    objective: Scalar
    null_part: Scalar
    null_rounding: Scalar
    tolerance_ratio: Scalar
    gradient_bound: Scalar

    def select(self, items: Scalar, other: Certificate) -> Certificate:
        """Return this certificate for these items, and the other for the rest."""
        names = (field.name for field in fields(self))
        return Certificate(**{name: where(items, getattr(self, name), getattr(other, name)) for name in names})

    @property
    def converged(self) -> Scalar:
        """True where either test is met."""
        return self.residual_ok | self.gradient_ok
