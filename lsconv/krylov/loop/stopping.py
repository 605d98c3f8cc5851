r"""When to stop, and the certificate: the tests shared by all methods, all of them relative.

With :math:`r = y - Ax`, :math:`g = A^H r - \mathrm{damp}^2 x` and :math:`\bar r = (r, \mathrm{damp}\, x)` an item has
converged when

.. math:: \|\bar r\| \le \max(\mathrm{rtol}\,\|y\|, \mathrm{atol})
          \quad\text{or}\quad \|g\| \le \|A\| \max(\mathrm{rtol}\,\|\bar r\|, \mathrm{atol})
          \ \text{and}\ \|\bar r\| \le \|y\|,

where :math:`\|A\|` is a lower bound, so that the second test is never laxer than it says. A minimiser is no worse than
x = 0, whose :math:`\|\bar r\|` is :math:`\|y\|`: the last condition refuses an x whose small gradient only says that it
lies along small singular values. Multiplying A, y or both by a number changes no test (``atol`` is in the units of y).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.batched_scalars import (
    ItemSpace,
    OneItem,
    Scalar,
    any_item,
    at_least,
    binary_unit,
    divide,
    hypot,
    maximum,
    minimum,
    quotient,
    scalar_dtype,
    unbounded,
    where,
)
from lsconv.krylov.loop.solution import History, Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = [
    "EXCUSED",
    "SQUARE_SHARE",
    "Certificate",
    "Tolerances",
    "certified",
    "certify",
    "default_rtol",
    "norm_from_below",
    "strays",
]

# The rounding of the gradient excuses an x up to ||y|| / (EXCUSED ||A||) long. A longer one shows small singular
# values, and an error along these hides in that rounding.
EXCUSED = 0.03
# The part of x in the null space of A, in units of rtol, that a damped answer may have.
_NULL_SHARE = 10.0
# The same where A has at least as many outputs as inputs, relative to x.
SQUARE_SHARE = 0.1


def _most_condition(eps: float) -> float:
    """The condition number up to which a problem is solved: the direct methods take smaller values for zero too."""
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
        conlim = _most_condition(eps) if conlim is None else float(conlim)
        for name, value in (("rtol", rtol), ("atol", float(atol)), ("conlim", conlim)):
            if not value >= 0:
                raise ArgumentError(f"{name}: expected a number >= 0, got {value}")
        return cls(rtol, float(atol), conlim, eps)

    @property
    def rounding(self) -> float:
        """The rounding that excuses an iteration: a quarter of eps; none to who asks for more than the dtype holds."""
        return 0.25 * self.eps if self.rtol >= 10 * self.eps else 0.0

    @property
    def null_share(self) -> float:
        """The part in the null space of A that x may have, relative to x."""
        return _NULL_SHARE * max(self.rtol, self.eps)

    def residual_bound(self, y_norm: Scalar) -> Scalar:
        """The bound that the residual norm has to reach."""
        return at_least(self.rtol * y_norm, self.atol)

    def gradient_bound(self, operator_norm: Scalar, residual: Scalar) -> Scalar:
        """The bound that the gradient norm has to reach."""
        return operator_norm * at_least(self.rtol * residual, self.atol)


@dataclass(frozen=True, eq=False)
class Certificate:
    """The evidence of one application of A and one of its adjoint to a finished x; one scalar per item each.

    Attributes:
        residual_norm: ``||y - Ax||``.
        gradient_norm: ``||A^H (y - Ax) - damp^2 x||``.
        residual_ok: the residual meets the tolerance.
        gradient_ok: the gradient meets the tolerance, and the objective is no worse than at x = 0.
        no_worse: the objective is no worse than at x = 0.
        excused: no test is met but by the rounding that hides the gradient, which hides errors along small singular
            values too.
        objective: ``sqrt(||y - Ax||^2 + damp^2 ||x||^2)``.
        null_part: a bound of the part of x in the null space of A, which stands in the gradient times ``damp^2``,
            relative to ``||x|| + rtol ||y|| / ||A||``; infinity without damping.
        null_reach: the same of a rounding by one unit of ``A^H z``, z = (y - Ax) / damp^2, where x is computed so.
        merit: the smaller of the two norms in units of its bound; at most 1 where converged.
    """

    residual_norm: Scalar
    gradient_norm: Scalar
    residual_ok: Scalar
    gradient_ok: Scalar
    no_worse: Scalar
    excused: Scalar
    objective: Scalar
    null_part: Scalar
    null_reach: Scalar
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
    rcond: float = 0.0,
    truncated: bool = False,
    prior_norm: Tensor | None = None,
    single: bool = False,
    sharpen: bool = True,
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
        rounding: epsilon of the arithmetic that found x: a gradient below
            ``8 rounding ||A|| (||A|| ||x|| + ||y||)`` is zero to that arithmetic.
        norm_bound: an upper bound of ``||A||`` for that, per item; None takes the lower bound.
        rcond: singular values up to ``rcond ||A||`` count as zero, so that no solution is longer than
            ``||y|| / (rcond ||A||)``, and no longer x makes the rounding larger.
        truncated: these singular values are cut off: they may leave ``rcond ||A|| ||r||`` of a gradient.
        prior_norm: norm of the prior, where x and y are what a prior leaves of them: they carry its rounding.
        single: there is one item, and scalars are Python numbers, here and in the certificate.
        sharpen: find a better bound of ``||A||`` where that may decide.

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
    # a gradient that underflows would be certified as zero
    faint = bound * r_norm < torch.finfo(A.dtype).tiny ** 0.75
    unit = where(faint, binary_unit(r_norm), 1.0)
    g = _adjoint(A, codomain.scale(residual, 1 / unit), square)
    if g is None:
        g_norm = math.nan * r_norm
    else:
        bound = maximum(bound, divide(spread_out(domain.safe_norm(g)) * unit, r_norm))
        if any_item(damp > 0):
            g = domain.add(g, -damp * damp / unit, x)
        g_norm = spread_out(domain.safe_norm(g)) * unit
    norm_a = hypot(bound, damp)
    if operator_norm is not None:
        norm_a = maximum(norm_a, operator_norm)
    total = hypot(r_norm, damp * x_norm)
    r_bound, g_bound = tolerances.residual_bound(y_norm), tolerances.gradient_bound(norm_a, total)
    # the bound of a gradient that is near it may only be low because that of ||A|| is
    close = (g_norm > g_bound) & (g_norm <= 1e4 * g_bound) & (total > r_bound)
    if sharpen and not square and type(y) is Tensor and any_item(close):
        norm_a = maximum(norm_a, hypot(spread_out(norm_from_below(A, single=single)), damp))
        g_bound = tolerances.gradient_bound(norm_a, total)
    upper = norm_a if norm_bound is None else norm_bound
    least = at_least(maximum(rcond * norm_a, 2 * damp), torch.finfo(scalar_dtype(A.device)).tiny)
    # of an x that is too long for the tolerance y - A x is rounding, and small by chance
    known = torch.finfo(A.dtype).eps * norm_a * x_norm <= 30 * r_bound
    # where the equations are met, damp alone decides, and x is only as good as its rounding
    solved = (r_norm <= r_bound) & known
    longest = where(solved, x_norm, minimum(x_norm, y_norm / least))
    left = 8 * rounding * (upper * longest + y_norm)
    highest = (1 + math.sqrt(tolerances.eps)) * y_norm
    if prior_norm is not None:
        left = left + 16 * tolerances.eps * upper * prior_norm
        r_bound, highest = maximum(r_bound, left), highest + left
    met, g_bound = g_norm <= g_bound, maximum(g_bound, upper * left)
    if truncated:
        g_bound = maximum(g_bound, rcond * upper * r_norm)
    finite = unbounded(x_norm) == 0
    no_worse = (total <= highest) & finite
    residual_ok = (total <= r_bound) & finite & known
    # a longer x has been led along singular values that count as zero
    reach = max(tolerances.conlim, _most_condition(tolerances.eps), 1 / rcond if rcond > 0 else 0.0)
    kept = (damp > 0) | (norm_a * x_norm <= reach * y_norm)
    gradient_ok = (g_norm <= g_bound) & no_worse & kept & (not square)
    excused = gradient_ok & (residual_ok == 0) & (met == 0) & (solved == 0)
    smallest = torch.finfo(scalar_dtype(A.device)).tiny
    merit = total / at_least(r_bound, smallest)
    if not square:
        merit = minimum(merit, maximum(g_norm / at_least(g_bound, smallest), total / at_least(highest, smallest)))
    # y is known to rtol at best, and moves x by rtol ||y|| / ||A|| at least
    unit = damp * damp * (x_norm + tolerances.rtol * divide(y_norm, norm_a))
    null_part, null_reach = quotient(g_norm, unit), quotient(norm_a * r_norm, unit)
    return Certificate(r_norm, g_norm, residual_ok, gradient_ok, no_worse, excused, total, null_part, null_reach, merit)


def norm_from_below(A: LinearOperator, steps: int = 6, *, single: bool = False) -> Scalar:
    """A lower bound of ``||A||``, per item, by a few steps of the power method from random numbers.

    Args:
        A: the operator.
        steps: how many.
        single: there is one item, and the bound is a Python number.
    """
    space = OneItem if single else ItemSpace
    domain, codomain = space(A.in_shape, A.dtype, A.device), space(A.out_shape, A.dtype, A.device)
    generator = torch.Generator(device=A.device).manual_seed(0)
    v = torch.randn(*A.batch_shape, *A.in_shape, dtype=A.dtype, device=A.device, generator=generator)
    for _ in range(steps):
        image = A.apply(v * domain.spread(divide(1.0, domain.safe_norm(v))))
        v = A.adjoint(image)
    return codomain.safe_norm(image)


def _adjoint(A: LinearOperator, residual: Tensor, square: bool) -> Tensor | None:
    """``A^H residual``; a square system's operator may come without an adjoint."""
    try:
        return A.adjoint(residual)
    except NotImplementedError:
        if square:
            return None
        raise


def strays(certificate: Certificate, share: Scalar, *, formed: float | None = None) -> Scalar:
    """The items whose x may have a larger part in the null space of A.

    Args:
        certificate: that of x.
        share: the part that x may have, as :attr:`Certificate.null_part`, where the way it was found does not exclude
            one, and infinity elsewhere.
        formed: epsilon of the arithmetic that computed x as ``A^H z``, so that only its rounding leads into the null
            space; None: x is not of that form.
    """
    part = certificate.null_part
    if formed is not None:
        part = minimum(part, formed * certificate.null_reach)
    return (unbounded(share) == 0) & ((part <= share) == 0)


def certified(
    A: LinearOperator,
    x: Tensor,
    y: Tensor,
    damp: Tensor | float = 0.0,
    *,
    tolerances: Tolerances,
    dtype: torch.dtype | None = None,
    prior: Tensor | None = None,
    iterations: Tensor | int = 0,
    history: History | None = None,
    selection: object = None,
    otherwise: Status | Tensor = Status.STAGNATION,
    null_share: Tensor | None = None,
    formed: float | None = None,
    sees_null_space: Callable[[], Tensor] | None = None,
    thorough: bool = False,
    **options: Any,
) -> Solution:
    """Make a :class:`Solution` of an ``x`` found by any means, with its certificate.

    The certificate is that of x as it is returned. Where rounding x to ``dtype`` is all that keeps it from meeting the
    tolerance, the x before rounding meets it, and the objective stays no worse than at x = 0, the status is
    :attr:`Status.ROUNDED`.

    Args:
        A: the operator, in the dtype to certify in.
        x: ``(*batch, *in_shape)``, without the prior.
        y: ``(*batch, *out_shape)``, without the prior's part.
        damp: the damping, a number or one per batch item.
        tolerances: from :meth:`Tolerances.of`.
        dtype: dtype that the solution is returned in; None: that of x.
        prior: what is added to x, ``(*batch, *in_shape)``.
        iterations: per item, when the direct method iterated inside.
        history: estimates per iteration, when there are some.
        selection: how the damping was chosen.
        otherwise: status of items that do not meet the tolerance, one for all or a code per item.
        null_share, formed: as in :func:`strays`; None: no item may.
        sees_null_space: the items of which A may have a null space; asked where the share is exceeded.
        thorough: where storing x excuses its gradient, the x before rounding has to meet the tolerance.
        options: operator_norm, norm_bound, rcond, rounding and square, as in :func:`certify`.
    """
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    answer = x if prior is None else prior + x
    answer = answer if dtype is None else answer.to(dtype)
    stored = answer.to(x.dtype) if prior is None else answer.to(x.dtype) - prior
    if prior is not None:
        options["prior_norm"] = space.safe_norm(prior)
    how = options
    if answer.dtype != x.dtype:  # storing an x that is not long rounds its gradient, and excuses that
        rcond = max(options.get("rcond", 0.0), EXCUSED)
        how = {**options, "rounding": tolerances.eps, "rcond": rcond, "truncated": False, "sharpen": False}
    certificate = certify(A, stored, y, damp, tolerances=tolerances, **how)
    batch = certificate.residual_norm.shape
    converged, rounded = certificate.converged, torch.zeros(batch, dtype=torch.bool, device=A.device)
    unrounded = certificate
    if answer.dtype != x.dtype:
        doubts = null_share is not None and bool(strays(certificate, null_share).any())
        doubts = doubts or (thorough and bool(certificate.excused.any()))
        if doubts or not bool(converged.all()):
            unrounded = certify(A, x, y, damp, tolerances=tolerances, **options)
            rounded = unrounded.converged & certificate.no_worse & ~converged
            if thorough:
                converged = converged & (unrounded.converged | ~certificate.excused)
    damping = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device).expand(batch)
    zero = ItemSpace(A.out_shape, A.dtype, A.device).safe_norm(y).expand(batch) == 0
    doubtful = torch.zeros_like(converged)
    if null_share is not None:
        doubtful = (converged | rounded) & ~zero & strays(unrounded, null_share, formed=formed)
        if sees_null_space is not None and bool(doubtful.any()):
            doubtful = doubtful & sees_null_space()
    code = otherwise.code if isinstance(otherwise, Status) else otherwise
    codes = torch.as_tensor(code, dtype=torch.int64, device=A.device).expand(batch)
    codes = torch.where(rounded, Status.ROUNDED.code, codes)
    codes = torch.where(certificate.gradient_ok & converged, Status.GRADIENT.code, codes)
    codes = torch.where(certificate.residual_ok, Status.RESIDUAL.code, codes)
    codes = torch.where(doubtful, Status.RANK_DEFICIENT.code, codes)
    codes = torch.where(zero & converged, Status.ZERO.code, codes)
    codes = torch.where(torch.isfinite(certificate.residual_norm), codes, Status.NON_FINITE.code)
    return Solution(
        x=answer.expand(*batch, *A.in_shape),
        codes=codes,
        converged=(converged | rounded) & ~doubtful,
        iterations=torch.as_tensor(iterations, device=A.device).expand(batch),
        residual_norm=certificate.residual_norm,
        gradient_norm=certificate.gradient_norm,
        damp=damping,
        history=history,
        selection=selection,
        excused=unrounded.excused & (converged | rounded) if unrounded is not certificate or how is options else None,
    )
