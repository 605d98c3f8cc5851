"""A certificate: the norms that an x is judged by, and the tests that it meets; one scalar per item each."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lsconv.krylov.loop.batched_scalars import Scalar, where

__all__ = ["Certificate", "Norms"]


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
        prior: norm of the prior, where x and y are what a prior leaves of them; None: there is none.
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
        excused: the gradient misses the tolerance and is within its rounding, and no other test is met: an error
            along small singular values may hide there.
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
