r"""When to stop, and the certificate: the tests shared by all methods, all of them relative.

With :math:`r = y - Ax`, :math:`g = A^H r - \mathrm{damp}^2 x` and :math:`\bar r = (r, \mathrm{damp}\, x)` an item has
converged when

.. math:: \|\bar r\| \le \max(\mathrm{rtol}\,\|y\|, \mathrm{atol})
          \quad\text{or}\quad \|g\| \le \|A\| \max(\mathrm{rtol}\,\|\bar r\|, \mathrm{atol}),

where :math:`\|A\|` is a lower bound, so that the second test is never laxer than it says. Multiplying A, y or both by a
number changes neither test (``atol`` is in the units of y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.batch import (
    ItemSpace,
    OneItem,
    Scalar,
    any_item,
    at_least,
    divide,
    hypot,
    maximum,
    minimum,
    scalar_dtype,
    unbounded,
)
from lsconv.krylov.solution import History, Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["Certificate", "Tolerances", "certified", "certify", "default_rtol"]


def default_rtol(dtype: torch.dtype) -> float:
    """``10 eps^0.75``: 6e-5 in float32, 2e-11 in float64."""
    return float(10.0 * torch.finfo(dtype).eps ** 0.75)


@dataclass(frozen=True)
class Tolerances:
    """Relative and absolute tolerance of one solve, and the limit of the condition estimate.

    Args:
        rtol: relative tolerance; None takes :func:`default_rtol` of the dtype.
        atol: absolute tolerance on the residual, in the units of y.
        conlim: limit of the condition number; None takes ``0.1 / eps`` of the dtype.
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
        conlim = 0.1 / eps if conlim is None else float(conlim)
        for name, value in (("rtol", rtol), ("atol", float(atol)), ("conlim", conlim)):
            if not value >= 0:
                raise ArgumentError(f"{name}: expected a number >= 0, got {value}")
        return cls(rtol, float(atol), conlim, eps)

    def residual_bound(self, y_norm: Scalar) -> Scalar:
        """What the residual norm has to reach."""
        return at_least(self.rtol * y_norm, self.atol)

    def gradient_bound(self, operator_norm: Scalar, residual: Scalar) -> Scalar:
        """What the gradient norm has to reach."""
        return operator_norm * at_least(self.rtol * residual, self.atol)


@dataclass(frozen=True, eq=False)
class Certificate:
    """What applying A once and its adjoint once to a finished x says about it; one scalar per item each.

    Attributes:
        residual_norm: ``||y - Ax||``.
        gradient_norm: ``||A^H (y - Ax) - damp^2 x||``.
        residual_ok: the residual meets the tolerance.
        gradient_ok: the gradient meets the tolerance.
        merit: the smaller of the two norms in units of its bound; at most 1 where converged.
    """

    residual_norm: Scalar
    gradient_norm: Scalar
    residual_ok: Scalar
    gradient_ok: Scalar
    merit: Scalar

    @property
    def converged(self) -> Scalar:
        """True where either test is met."""
        return self.residual_ok | self.gradient_ok


def certify(
    A: LinearOperator,
    x: Tensor,
    y: Tensor,
    damp: Scalar = 0.0,
    *,
    tolerances: Tolerances,
    operator_norm: Scalar | None = None,
    square: bool = False,
    rounding: float = 0.0,
    norm_bound: Tensor | None = None,
    stored: tuple[Tensor, Tensor] | None = None,
    single: bool = False,
) -> Certificate:
    r"""Recompute residual and gradient of ``x`` by A itself and judge them.

    Args:
        A: the operator.
        x: ``(*batch, *in_shape)``.
        y: ``(*batch, *out_shape)``.
        damp: the damping, a number or one per batch item.
        tolerances: from :meth:`Tolerances.of`.
        operator_norm: a lower bound of ``||A||`` per item where one is known; it is raised by what A and its adjoint
            do to the vectors met here.
        square: for a square system that has a solution, only the residual decides.
        rounding: epsilon of the dtype that x is stored in: a gradient below
            ``8 rounding ||A|| (||A|| ||x|| + ||y||)`` is
            that of the nearest representable x.
        norm_bound: an upper bound of ``||A||`` for that, per item; None takes the lower bound.
        stored: norms of solution and data as stored, where x and y are what a prior leaves of them; rounding is
            relative to these.
        single: there is one item, and scalars are Python numbers, here and in the certificate.

    Returns:
        A :class:`Certificate`. Non-finite x converges nowhere.
    """
    space = OneItem if single else ItemSpace
    domain, codomain = space(A.in_shape, A.dtype, A.device), space(A.out_shape, A.dtype, A.device)
    batch = broadcast_shapes(x.shape[: x.ndim - len(A.in_shape)], y.shape[: y.ndim - len(A.out_shape)], A.batch_shape)

    def spread_out(scalar: Scalar) -> Scalar:
        return scalar if single else scalar.expand(batch)

    if not single:
        damp = spread_out(torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device))
    y_norm, x_norm = spread_out(codomain.safe_norm(y)), spread_out(domain.safe_norm(x))
    ax = A.apply(x)
    bound = divide(spread_out(codomain.safe_norm(ax)), x_norm)
    residual = y - ax
    del ax
    r_norm = spread_out(codomain.safe_norm(residual))
    g = _adjoint(A, residual, square)
    if g is None:
        g_norm = math.nan * r_norm
    else:
        bound = maximum(bound, divide(spread_out(domain.safe_norm(g)), r_norm))
        if any_item(damp > 0):
            g = domain.add(g, -damp * damp, x)
        g_norm = spread_out(domain.safe_norm(g))
    norm_a = hypot(bound, damp)
    if operator_norm is not None:
        norm_a = maximum(norm_a, operator_norm)
    total = hypot(r_norm, damp * x_norm)
    r_bound, g_bound = tolerances.residual_bound(y_norm), tolerances.gradient_bound(norm_a, total)
    upper = norm_a if norm_bound is None else norm_bound
    if stored is None:
        g_bound = maximum(g_bound, 8 * rounding * upper * (upper * x_norm + y_norm))
    else:
        least = 8 * rounding * (upper * stored[0] + stored[1])
        r_bound, g_bound = maximum(r_bound, least), maximum(g_bound, upper * least)
    finite = unbounded(x_norm) == 0
    residual_ok = (total <= r_bound) & finite
    gradient_ok = (g_norm <= g_bound) & finite & (not square)
    smallest = torch.finfo(scalar_dtype(A.device)).tiny
    merit = total / at_least(r_bound, smallest)
    if not square:
        merit = minimum(merit, g_norm / at_least(g_bound, smallest))
    return Certificate(r_norm, g_norm, residual_ok, gradient_ok, merit)


def _adjoint(A: LinearOperator, residual: Tensor, square: bool) -> Tensor | None:
    """``A^H residual``; a square system's operator may come without an adjoint."""
    try:
        return A.adjoint(residual)
    except NotImplementedError:
        if square:
            return None
        raise


def certified(
    A: LinearOperator,
    x: Tensor,
    y: Tensor,
    damp: Tensor | float = 0.0,
    *,
    tolerances: Tolerances,
    operator_norm: Tensor | None = None,
    iterations: Tensor | int = 0,
    history: History | None = None,
    selection: object = None,
    otherwise: Status = Status.STAGNATION,
    rounding: float = 0.0,
    norm_bound: Tensor | None = None,
    stored: tuple[Tensor, Tensor] | None = None,
    square: bool = False,
) -> Solution:
    """A :class:`Solution` around an ``x`` found by any means (a direct method), with its certificate.

    Args:
        A: the operator.
        x: ``(*batch, *in_shape)``.
        y: ``(*batch, *out_shape)``.
        damp: the damping, a number or one per batch item.
        tolerances: from :meth:`Tolerances.of`.
        operator_norm: a lower bound of ``||A||`` per item where one is known.
        iterations: per item, when the direct method iterated inside.
        history: estimates per iteration, when there are some.
        selection: how the damping was chosen.
        otherwise: status of items that do not meet the tolerance.
        rounding, norm_bound, stored, square: as in :func:`certify`.
    """
    certificate = certify(
        A,
        x,
        y,
        damp,
        tolerances=tolerances,
        operator_norm=operator_norm,
        rounding=rounding,
        norm_bound=norm_bound,
        stored=stored,
        square=square,
    )
    batch = certificate.residual_norm.shape
    zero = ItemSpace(A.out_shape, A.dtype, A.device).safe_norm(y).expand(batch) == 0
    codes = torch.full(batch, otherwise.code, dtype=torch.int64, device=A.device)
    codes = torch.where(certificate.gradient_ok, Status.GRADIENT.code, codes)
    codes = torch.where(certificate.residual_ok, Status.RESIDUAL.code, codes)
    codes = torch.where(zero & certificate.converged, Status.ZERO.code, codes)
    codes = torch.where(torch.isfinite(certificate.residual_norm), codes, Status.NON_FINITE.code)
    return Solution(
        x=x,
        codes=codes,
        converged=certificate.converged,
        iterations=torch.as_tensor(iterations, device=A.device).expand(batch),
        residual_norm=certificate.residual_norm,
        gradient_norm=certificate.gradient_norm,
        damp=torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device).expand(batch),
        history=history,
        selection=selection,
    )
