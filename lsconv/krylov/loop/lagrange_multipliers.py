r"""The multipliers of a least-norm answer, found along with it: ``z = A^{+H} x``, in the range of A; ``x = A^H z``.

They are the Lagrange multipliers of :math:`\min \|x\|^2` such that :math:`Ax = AA^+ y`, and the derivative of
:math:`A^+ y` by A needs them (:mod:`lsconv.krylov.gradients.pseudo_inverse_rule`). A solve for them costs as much as
that for x. But x is a combination of the :math:`v_k`, each of which is :math:`A^H` of a combination of the :math:`u_k`:
the same recurrences run once more, in vectors of y's size and without an application of A.

With the rotations c, s and the diagonal :math:`\rho` of LSQR, :math:`A^H u_{k+1} = \alpha_{k+1} v_{k+1} +
\beta_{k+1} v_k` makes of :math:`e_k`, the residual scaled to length 1, a multiple of the next v:

.. math:: e_0 = u_1, \quad e_k = s_k e_{k-1} - c_k u_{k+1}, \qquad A^H e_k = \bar\rho_{k+1} v_{k+1} .

Dividing by :math:`\bar\rho`, which vanishes with the gradient, is not necessary. Where the directions of x are
:math:`w_{k+1} = v_{k+1} - (s_k \alpha_{k+1} / \rho_k) w_k`, those of z, kept as
:math:`A^H \tau_k = \bar\rho_k w_k`, follow from :math:`\bar\rho_{k+1} = -c_k \alpha_{k+1}`,
:math:`c_k = \bar\rho_k / \rho_k`:

.. math:: \tau_1 = e_0, \quad \tau_{k+1} = e_k + (s_k \alpha_{k+1}^2 / \rho_k^2)\, \tau_k, \qquad
          z_k = z_{k-1} + (\bar\phi_k / \rho_k^2)\, \tau_k \quad\text{as}\quad x_k = x_{k-1} + (\phi_k / \rho_k)\, w_k .

LSMR's h is this w. The directions of its x are :math:`\bar h_k = h_k + b_k \bar h_{k-1}`, hence
:math:`\bar\tau_k = \tau_k + b_k (\alpha_k / \rho_{k-1})\, \bar\tau_{k-1}` has
:math:`A^H \bar\tau_k = \bar\alpha_k \bar h_k`, and with :math:`\psi_k = \bar\zeta_k / \bar\alpha_k`, which is
:math:`\beta_1` first and :math:`-(\beta_{k+1} / \bar\rho_k)\, \psi_k` next,
:math:`z_k = z_{k-1} + (\bar c_k \psi_k / \rho_k \bar\rho_k)\, \bar\tau_k`. No :math:`\rho` is smaller than the smallest
positive singular value of A, so z is as accurate as x.

For CGLS and CRAIG it is simpler: the directions of CGLS are made of gradients :math:`A^H r`, those of z of the same r;
in CRAIG's :math:`x_k = x_{k-1} + \zeta_k v_k` each :math:`v_k` is :math:`A^H p_k` with
:math:`\alpha_k p_k = u_k - \beta_k p_{k-1}`.

The part of y outside the range of A would enter z, and grow there. So no z is handed over for an answer with a
residual, nor one whose :math:`A^H z` is not x, which :func:`record_multipliers` finds out by one application of
:math:`A^H`; a solve finds z then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace, Scalar
from lsconv.operators.base import LinearOperator

__all__ = [
    "CGLSMultipliers",
    "CRAIGMultipliers",
    "Collected",
    "LSMRMultipliers",
    "LSQRMultipliers",
    "collect_multipliers",
    "multipliers_wanted",
    "pass_multipliers",
    "record_multipliers",
]


@dataclass
class Collected:
    """The last answer found without damping from zero, and its multipliers; None where there are none."""

    x: Tensor | None = None
    z: Tensor | None = None

    def of(self, x: Tensor) -> Tensor | None:
        """The multipliers of this answer; None where they belong to another tensor, or were not found."""
        return self.z if x is self.x else None


_collector: ContextVar[Collected | None] = ContextVar("_collector", default=None)


@contextmanager
def collect_multipliers(wanted: bool) -> Iterator[Collected]:
    """Collect the last multipliers of the methods that can find them, where ``wanted``."""
    collected = Collected()
    token = _collector.set(collected if wanted else None)
    try:
        yield collected
    finally:
        _collector.reset(token)


def multipliers_wanted(A: LinearOperator) -> bool:
    """Tell whether multipliers are collected; an A with full column rank needs none for its derivatives."""
    return _collector.get() is not None and math.prod(A.out_shape) < math.prod(A.in_shape)


def record_multipliers(A: LinearOperator, x: Tensor, z: Tensor, rtol: float) -> None:
    """Store z in the collection, for the answer x of a consistent system, if ``A^H z`` equals x to the tolerance."""
    collected = _collector.get()
    if collected is None:
        return
    collected.x = collected.z = None
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    error, size = space.safe_norm(x - A.adjoint(z)), space.safe_norm(x)
    rounding = torch.finfo(A.dtype).eps * max(A.in_numel, A.out_numel)  # of sums of so many; rtol may be below it
    good = error <= max(rtol, rounding) * size
    if bool((good | ~torch.isfinite(size)).all()):
        pass_multipliers(x, z)


def pass_multipliers(x: Tensor, z: Tensor) -> None:
    """Store z in the collection as the multipliers of the answer x."""
    collected = _collector.get()
    if collected is not None:
        collected.x, collected.z = x, z


class _Multipliers:
    """The z that belongs to x, by the rotations of LSQR, item by item; see the head of this file.

    Args:
        u: the first u.
        space: the arithmetic of u.
    """

    def __init__(self, u: Tensor, space: ItemSpace) -> None:
        self.space = space
        self.e = u.clone()
        self.tau = self.e.clone()
        self.z = torch.zeros_like(self.e)

    def update_direction(self, c: Scalar, s: Scalar, ratio: Scalar, u: Tensor) -> None:
        """Update ``e_k`` and ``tau_{k+1}``, given the newest u and ``ratio``, the newest alpha over rho."""
        space = self.space
        space.add(space.scale(self.e, s), -c, u, out=self.e)
        space.add(self.e, s * ratio * ratio, self.tau, out=self.tau)


class LSQRMultipliers(_Multipliers):
    """The multipliers of LSQR."""

    def step(self, phibar: Scalar, inverse: Scalar) -> None:
        """Update z to ``z_k``, given ``phibar`` before the rotation and ``1 / rho`` (0 for a stopped item)."""
        self.space.add(self.z, phibar * inverse * inverse, self.tau, out=self.z)


class LSMRMultipliers(_Multipliers):
    """The multipliers of LSMR, whose rotations have the other sign."""

    def __init__(self, u: Tensor, space: ItemSpace, beta: Scalar) -> None:
        super().__init__(u, space)
        self.psi, self.ratio = beta, 0 * beta
        self.taubar = torch.zeros_like(self.e)

    def step(self, back: Scalar, forward: Scalar, growth: Scalar) -> None:
        """Update z to ``z_k``.

        Args:
            back: the factor of ``hbar_{k-1}`` in ``hbar_k``.
            forward: ``cbar / (rho rhobar)``, 0 for an item that has stopped.
            growth: ``beta / rhobar``.
        """
        space = self.space
        space.add(self.tau, back * self.ratio, self.taubar, out=self.taubar)
        space.add(self.z, forward * self.psi, self.taubar, out=self.z)
        self.psi = -growth * self.psi

    def update_direction(self, c: Scalar, s: Scalar, ratio: Scalar, u: Tensor) -> None:
        """Rotate the direction, as for LSQR."""
        super().update_direction(-c, -s, ratio, u)
        self.ratio = ratio


class CGLSMultipliers:
    """The multipliers of CGLS: z goes along t with ``A^H t = p``."""

    def __init__(self, r: Tensor, space: ItemSpace) -> None:
        self.space, self.t, self.z = space, torch.zeros_like(r), torch.zeros_like(r)

    def step(self, step: Scalar) -> None:
        """Update z along t."""
        self.space.add(self.z, step, self.t, out=self.z)

    def update_direction(self, ratio: Scalar, scale: Scalar, r: Tensor) -> None:
        """Update t to ``ratio t + scale r``, as p becomes ``ratio p + scale A^H r``."""
        self.space.add(self.space.scale(self.t, ratio), scale, r, out=self.t)


class CRAIGMultipliers:
    """The multipliers of CRAIG: z goes along p with ``A^H p = v``."""

    def __init__(self, u: Tensor, space: ItemSpace) -> None:
        self.space, self.p, self.z = space, torch.zeros_like(u), torch.zeros_like(u)

    def step(self, zeta: Scalar, beta: Scalar, inverse: Scalar, u: Tensor) -> None:
        """Update ``p_k`` and ``z_k``, given ``1 / alpha`` (0 for a stopped item)."""
        space = self.space
        space.add(space.scale(self.p, -beta * inverse), inverse, u, out=self.p)
        space.add(self.z, zeta, self.p, out=self.z)
