"""The interface between a Krylov method and the loop: one step, the iterate, and estimates of the norms."""

from __future__ import annotations

from enum import IntEnum
from typing import TypeAlias

from torch import Tensor

from lsconv.krylov.loop.batched_scalars import Scalar
from lsconv.krylov.loop.certificate import Certificate
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.problem import Problem

__all__ = ["Cause", "Converged", "Method"]

# The items that have converged by their residual, and those that have by their gradient.
Converged: TypeAlias = "tuple[Scalar, Scalar]"


class Cause(IntEnum):
    """The causes for which an item stops, as bits of its code.

    CLAIMED: the estimates meet the tolerance. CONDITION: the condition number passed its limit. OVERFLOW: an estimate
    is not finite. LIMIT: no iteration is left. Of a method itself: CURVATURE, A is not definite; NOT_DEFINITE, a
    preconditioner is not; STUCK, going on would not improve x.
    """

    CLAIMED = 1
    CONDITION = 2
    OVERFLOW = 4
    LIMIT = 8
    CURVATURE = 16
    NOT_DEFINITE = 32
    STUCK = 64


class Method:
    """The iteration of one method on a batch of items; all scalars are of the problem's kind, one per item.

    Attributes:
        residual: estimate of the (damped) residual norm.
        gradient: estimate of the gradient norm, or None where the method has none.
        operator_norm: a lower bound of ``||A||``.
        condition: an estimate of the condition number from below, or None.
        self_converged: None, or items that the method declares finished by a test of its own, which the certificate
            then confirms or not.
        failure: None, or bits of :class:`Cause` for items that cannot go on.
        leaves_range: rounding may give its iterates a part in the null space of A where damping is augmented columns.
    """

    leaves_range: bool = False

    residual: Scalar
    gradient: Scalar | None = None
    operator_norm: Scalar
    condition: Scalar | None = None
    self_converged: Scalar | None = None
    failure: Scalar | None = None

    def step(self, running: Scalar) -> None:
        """Do one iteration of the items where ``running`` is true; the others do not change, whatever they contain."""
        raise NotImplementedError

    def solution(self) -> Tensor:
        """The iterate."""
        raise NotImplementedError

    def multipliers(self) -> Tensor | None:
        """Return z with ``x - x_0 = A^H z``, of the iterate x and the start x_0; None: the method does not know it."""
        return None

    def converged(self, problem: Problem, x: Tensor, certificate: Certificate, judge: Judge) -> Converged:
        """Return the items that converged by their residual, and by their gradient; a method may refuse some.

        Args:
            problem: as the user posed it.
            x: the answer.
            certificate: that of x.
            judge: that gave it.
        """
        return certificate.residual_ok, certificate.gradient_ok
