r"""The judge of an answer, which gives its certificate: the tests of all methods, relative to the norms of A and y.

With :math:`r = y - Ax`, :math:`g = A^H r - \mathrm{damp}^2 x` and :math:`\bar r = (r, \mathrm{damp}\, x)` an item has
converged when

.. math:: \|\bar r\| \le \max(\mathrm{rtol}\,\|y\|, \mathrm{atol})
          \quad\text{or}\quad \|g\| \le \|A\| \max(\mathrm{rtol}\,\|\bar r\|, \mathrm{atol})
          \ \text{and}\ \|\bar r\| \le \|y\|,

where for :math:`\|A\|` a lower bound is used, which only makes the second test stricter. The last condition, that x is
no worse than zero, refuses an x of small gradient along small singular values. Multiplying A, y or both by a number
changes no test (``atol`` is in the units of y).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

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
    no_item,
    quotient,
    scalar_dtype,
    unbounded,
    where,
)
from lsconv.krylov.loop.certificate import (
    LENGTH_LIMIT,
    Certificate,
    NormBounds,
    Norms,
    NullSpaceBound,
    RankThreshold,
    Tolerances,
    most_condition,
    norm_from_below,
)
from lsconv.krylov.loop.solution import History, Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["Judge"]


@dataclass(frozen=True, eq=False)
class Judge:
    r"""The tests of answers for one operator and damping: norms are measured by products with A, then compared.

    Attributes:
        A: the operator, in the dtype to certify in.
        tolerances: from :meth:`Tolerances.of`.
        damp: the damping, a number or one per batch item.
        dtype: dtype that x is returned in; None: that in which it is found.
        rounding: epsilon of the arithmetic that finds x: a gradient below
            ``8 rounding ||A|| (||A|| ||x|| + ||y||)`` is zero to that arithmetic; None: that of A.
        square: for a square system that has a solution, only the residual decides.
        judges_unrounded: where storing x excuses its gradient, the x before rounding has to meet the tolerance.
        norm: bounds of ``||A||``.
        rank: the singular values that count as zero.
        null_space: the part in the null space of A that x may have.
    """

    A: LinearOperator
    tolerances: Tolerances
    damp: Scalar = 0.0
    dtype: torch.dtype | None = None
    rounding: float | None = None
    square: bool = False
    judges_unrounded: bool = False
    norm: NormBounds = field(default_factory=NormBounds)
    rank: RankThreshold = field(default_factory=RankThreshold)
    null_space: NullSpaceBound = field(default_factory=NullSpaceBound)

    def certify(
        self,
        x: Tensor,
        y: Tensor,
        *,
        prior_norm: Scalar | None = None,
        host_scalars: bool = False,
        sharpen: bool = True,
    ) -> Certificate:
        """Recompute residual and gradient of ``x``, and judge them.

        Args:
            x: ``(*batch, *in_shape)``; not finite, it converges nowhere.
            y: ``(*batch, *out_shape)``.
            prior_norm: norm of the prior that was subtracted from x, and its image from y: they carry its rounding.
            host_scalars: there is one item, and scalars are Python numbers, here and in the certificate.
            sharpen: find a better bound of ``||A||`` where a test depends on it.
        """
        norms = self._measure(x, y, prior_norm, host_scalars)
        return self.certificate_of(norms, self._sharper_norm(y, host_scalars) if sharpen else None)

    def _sharper_norm(self, y: Tensor, host_scalars: bool) -> Callable[[], Scalar] | None:
        """A function that finds a better lower bound of ``||A||``; None where the gradient is not tested."""
        if self.square or type(y) is not Tensor:
            return None
        sharper = self.norm.sharper
        if sharper is None:
            return lambda: norm_from_below(self.A, host_scalars=host_scalars)
        return lambda: _number(sharper()) if host_scalars else sharper()

    def _measure(self, x: Tensor, y: Tensor, prior_norm: Scalar | None, host_scalars: bool) -> Norms:
        """Apply A to x and its adjoint to the residual, and return the norms."""
        space, A = OneItem if host_scalars else ItemSpace, self.A
        domain, codomain = space(A.in_shape, A.dtype, A.device), space(A.out_shape, A.dtype, A.device)
        batch = broadcast_shapes(
            x.shape[: x.ndim - len(A.in_shape)], y.shape[: y.ndim - len(A.out_shape)], A.batch_shape
        )

        def norm(space: ItemSpace, v: Tensor) -> Scalar:
            length = space.safe_norm(v)
            return length if host_scalars else length.expand(batch)

        damp = self._damp(batch, host_scalars)
        y_norm, x_norm = norm(codomain, y), norm(domain, x)
        ax = A.apply(x)
        operator_norm = divide(norm(codomain, ax), x_norm)
        residual = y - ax
        del ax
        r_norm = norm(codomain, residual)
        # scaled, because a gradient that underflows would be certified as zero
        underflows = operator_norm * r_norm < torch.finfo(A.dtype).tiny ** 0.75
        scale = where(underflows, binary_unit(r_norm), 1.0)
        g = self._adjoint(codomain.scale(residual, 1 / scale) if any_item(underflows) else residual)
        if g is None:
            g_norm = math.nan * r_norm
        else:
            operator_norm = maximum(operator_norm, divide(norm(domain, g) * scale, r_norm))
            if any_item(damp > 0):
                g = domain.add(g, -damp * damp / scale, x)
            g_norm = norm(domain, g) * scale
        return Norms(
            y=y_norm,
            x=x_norm,
            residual=r_norm,
            gradient=g_norm,
            penalty=x_norm,
            operator=operator_norm,
            prior=prior_norm,
        )

    def _damp(self, batch: tuple[int, ...], host_scalars: bool) -> Scalar:
        """The damping as a scalar of the kind that the norms have."""
        if host_scalars:
            return self.damp
        return torch.as_tensor(self.damp, dtype=scalar_dtype(self.A.device), device=self.A.device).expand(batch)

    def certificate_of(self, norms: Norms, sharpen: Callable[[], Scalar] | None = None) -> Certificate:
        """Judge an x by its norms alone.

        Args:
            norms: tensors of the batch shape, or Python numbers for one item.
            sharpen: finds a better lower bound of ``||A||``, called where a test depends on it; None: there is none.
        """
        tolerances, rank = self.tolerances, self.rank
        smallest = torch.finfo(scalar_dtype(self.A.device)).tiny
        host_scalars, y_norm, x_norm = not isinstance(norms.y, Tensor), norms.y, norms.x
        r_norm, g_norm = norms.residual, norms.gradient
        damp = self._damp(() if host_scalars else tuple(y_norm.shape), host_scalars)
        operator_norm = hypot(norms.operator, damp)
        if self.norm.lower is not None:
            operator_norm = maximum(operator_norm, self.norm.lower)
        objective, objective_at_zero = hypot(r_norm, damp * norms.penalty), (1 + math.sqrt(tolerances.eps)) * y_norm
        residual_bound = tolerances.residual_bound(y_norm)
        gradient_bound = tolerances.gradient_bound(operator_norm, objective)
        # A gradient near its bound may exceed it only because the lower bound of ||A|| is too small.
        near = (g_norm > gradient_bound) & (g_norm <= 1e4 * gradient_bound) & (objective > residual_bound)
        if sharpen is not None and any_item(near):
            sharper = sharpen()
            operator_norm = maximum(
                operator_norm, hypot(sharper if host_scalars else sharper.expand(y_norm.shape), damp)
            )
            gradient_bound = tolerances.gradient_bound(operator_norm, objective)
        # Where eps ||A|| ||x|| exceeds the tolerance the residual is dominated by rounding, and proves nothing.
        resolved = torch.finfo(self.A.dtype).eps * operator_norm * x_norm <= 30 * residual_bound
        residual_met, gradient_met = (r_norm <= residual_bound) & resolved, g_norm <= gradient_bound
        upper_norm = operator_norm if self.norm.upper is None else self.norm.upper
        rounding = self._residual_rounding(norms, operator_norm, upper_norm, damp, residual_met)
        if norms.prior is not None:
            residual_bound = maximum(residual_bound, rounding)
            objective_at_zero = objective_at_zero + rounding
        gradient_bound = maximum(gradient_bound, upper_norm * rounding)
        if rank.truncated:
            gradient_bound = maximum(gradient_bound, where(damp > 0, 0.0, rank.rcond * upper_norm * r_norm))
        finite = unbounded(x_norm) == 0
        no_worse = (objective <= objective_at_zero) & finite
        residual_ok = (objective <= residual_bound) & finite & resolved
        gradient_ok = (g_norm <= gradient_bound) & no_worse & self._is_short(norms, operator_norm, damp)
        gradient_ok = gradient_ok & (not self.square)
        tolerance_ratio = objective / at_least(residual_bound, smallest)
        if not self.square:
            gradient_ratio = g_norm / at_least(gradient_bound, smallest)
            objective_ratio = objective / at_least(objective_at_zero, smallest)
            tolerance_ratio = minimum(tolerance_ratio, maximum(gradient_ratio, objective_ratio))
        # An error of rtol in y changes x by rtol ||y|| / ||A|| at least.
        x_scale = damp * damp * (x_norm + tolerances.rtol * divide(y_norm, operator_norm))
        return Certificate(
            data_norm=y_norm,
            residual_norm=r_norm,
            gradient_norm=g_norm,
            residual_ok=residual_ok,
            gradient_ok=gradient_ok,
            no_worse=no_worse,
            excused=gradient_ok & (residual_ok == 0) & (gradient_met == 0) & (residual_met == 0),
            objective=objective,
            null_part=quotient(g_norm, x_scale),
            null_rounding=quotient(operator_norm * r_norm, x_scale),
            tolerance_ratio=tolerance_ratio,
            gradient_bound=gradient_bound,
        )

    def _residual_rounding(
        self, norms: Norms, operator_norm: Scalar, upper_norm: Scalar, damp: Scalar, residual_met: Scalar
    ) -> Scalar:
        """The rounding allowed to ``y - A x``; times ``||A||`` it is that of the gradient.

        It is proportional to ``||x||``. All of it is allowed where the residual test is met, else that of an x no
        longer than a solution whose singular values are above the threshold.
        """
        eps, smallest = torch.finfo(self.A.dtype).eps, torch.finfo(scalar_dtype(self.A.device)).tiny
        limit = max(self.rank.rcond, self.rank.length_limit)
        threshold = at_least(maximum(limit * operator_norm, 2 * damp), smallest)
        length = where(residual_met, norms.x, minimum(norms.x, norms.y / threshold))
        level = 8 * (eps if self.rounding is None else self.rounding) * (upper_norm * length + norms.y)
        return level if norms.prior is None else level + 16 * self.tolerances.eps * upper_norm * norms.prior

    def _is_short(self, norms: Norms, operator_norm: Scalar, damp: Scalar) -> Scalar:
        """Tell whether x is short enough to have no components along singular values that count as zero."""
        rcond, tolerances = self.rank.rcond, self.tolerances
        condition = max(tolerances.conlim, most_condition(tolerances.eps), 1 / rcond if rcond > 0 else 0.0)
        return (damp > 0) | (operator_norm * norms.x <= condition * norms.y)

    def _adjoint(self, residual: Tensor) -> Tensor | None:
        """``A^H residual``; None for the operator of a square system that has no adjoint."""
        try:
            return self.A.adjoint(residual)
        except NotImplementedError:
            if self.square:
                return None
            raise

    def exceeds_null_share(self, certificate: Certificate, *, stored: bool = False) -> Scalar:
        """The items whose x may have a larger part in the null space of A than :attr:`null_space` allows.

        Args:
            certificate: that of x.
            stored: x is rounded to its dtype, and no longer ``A^H z``, whose null part its residual and length bound.
        """
        bound, part = self.null_space, certificate.null_part
        share = math.inf if bound.share is None else bound.share
        if bound.range_eps is not None and not stored:
            part = minimum(part, bound.range_eps * certificate.null_rounding)
        return (unbounded(share) == 0) & ((part <= share) == 0)

    def solution(
        self,
        x: Tensor,
        y: Tensor,
        *,
        prior: Tensor | None = None,
        iterations: Tensor | int = 0,
        history: History | None = None,
        otherwise: Status | Tensor = Status.STAGNATION,
    ) -> Solution:
        """Make a :class:`Solution` of an ``x`` found by any means, with its certificate.

        The certificate is that of x as it is returned. Where rounding x to ``dtype`` is all that keeps it from meeting
        the tolerance, the x before rounding meets it, and the objective stays no worse than at x = 0, the status is
        :attr:`Status.ROUNDED`.

        Args:
            x: ``(*batch, *in_shape)``, without the prior.
            y: ``(*batch, *out_shape)``, without the prior's part.
            prior: what is added to x, ``(*batch, *in_shape)``.
            iterations: per item, when the direct method iterated inside.
            history: estimates per iteration, when there are some.
            otherwise: status of items that do not meet the tolerance, one for all or a code per item.
        """
        A, damp = self.A, torch.as_tensor(self.damp, dtype=scalar_dtype(self.A.device), device=self.A.device)
        items = (x.shape[: x.ndim - len(A.in_shape)], y.shape[: y.ndim - len(A.out_shape)])
        batch = broadcast_shapes(*items, damp.shape, A.batch_shape)
        x, y, damp = x.expand(*batch, *A.in_shape), y.expand(*batch, *A.out_shape), damp.expand(batch)
        answer = x if prior is None else prior + x
        answer = answer if self.dtype is None else answer.to(self.dtype)
        x_rounded = answer.to(x.dtype) if prior is None else answer.to(x.dtype) - prior
        # a single item on the CPU has Python numbers for scalars
        host_scalars = batch.numel() == 1 and type(x) is type(y) is Tensor and A.device.type == "cpu"
        judge = replace(self, damp=damp)
        if host_scalars:
            norm, bound = self.norm, self.null_space
            norm = NormBounds(_number(norm.lower), _number(norm.upper), norm.sharper)
            bound = NullSpaceBound(_number(bound.share), bound.range_eps, bound.exists)
            judge = replace(self, damp=_number(damp), norm=norm, null_space=bound)
        space = OneItem if host_scalars else ItemSpace
        prior_norm = None if prior is None else space(A.in_shape, A.dtype, A.device).safe_norm(prior)
        if answer.dtype == x.dtype:
            certificate = before_rounding = judge.certify(x, y, prior_norm=prior_norm, host_scalars=host_scalars)
            converged = certificate.converged
            rounded = no_item(converged)
        else:
            certificate, before_rounding = judge._certify_rounded(x, x_rounded, y, prior_norm, host_scalars)
            converged = certificate.converged
            rounded = no_item(converged)
            if before_rounding is not certificate:
                rounded = before_rounding.converged & certificate.no_worse & (converged == 0)
                if self.judges_unrounded:
                    converged = converged & (before_rounding.converged | (certificate.excused == 0))
        zero = certificate.data_norm == 0
        doubtful = judge._null_space_suspects((converged | rounded) & (zero == 0), before_rounding, host_scalars)
        code = otherwise.code if isinstance(otherwise, Status) else otherwise
        codes: Scalar = _number(code) if host_scalars else code
        for items, status in (
            (rounded, Status.ROUNDED),
            (certificate.gradient_ok & converged, Status.GRADIENT),
            (certificate.residual_ok, Status.RESIDUAL),
            (doubtful, Status.RANK_DEFICIENT),
            (zero & converged, Status.ZERO),
            (unbounded(certificate.residual_norm), Status.NON_FINITE),
        ):
            codes = where(items, status.code, codes)

        def per_item(values: Scalar, dtype: torch.dtype | None = None) -> Tensor:
            if host_scalars and not isinstance(values, Tensor):
                return torch.full(batch, values, dtype=dtype)
            return torch.as_tensor(values, dtype=dtype, device=A.device).expand(batch)

        excused = None
        if answer.dtype == x.dtype or before_rounding is not certificate:
            excused = per_item(before_rounding.excused & (converged | rounded))
        return Solution(
            x=answer,
            codes=per_item(codes),
            converged=per_item((converged | rounded) & (doubtful == 0)),
            iterations=per_item(iterations),
            residual_norm=per_item(certificate.residual_norm, damp.dtype),
            gradient_norm=per_item(certificate.gradient_norm, damp.dtype),
            damp=damp,
            history=history,
            excused=excused,
        )

    def _null_space_suspects(self, items: Scalar, certificate: Certificate, host_scalars: bool) -> Scalar:
        """The items, of these, whose x may have too large a part in a null space that A may have."""
        if self.null_space.share is None:
            return no_item(items)
        suspects = items & self.exceeds_null_share(certificate)
        if self.null_space.exists is not None and any_item(suspects):
            exists = self.null_space.exists()
            suspects = suspects & (bool(exists) if host_scalars else exists)
        return suspects

    def _certify_rounded(
        self, x: Tensor, x_rounded: Tensor, y: Tensor, prior_norm: Scalar | None, host_scalars: bool
    ) -> tuple[Certificate, Certificate]:
        """Certify x rounded to its dtype, and, where that leaves a doubt, x before rounding.

        Returns:
            Both certificates; the same one twice where there is no doubt.
        """
        # Rounding x changes its gradient, which is allowed unless x is long.
        length_limit = max(self.rank.rcond, self.rank.length_limit, LENGTH_LIMIT)
        storing = replace(self, rounding=self.tolerances.eps, rank=RankThreshold(length_limit=length_limit))
        certificate = storing.certify(x_rounded, y, prior_norm=prior_norm, host_scalars=host_scalars, sharpen=False)
        doubtful = certificate.converged == 0
        if self.judges_unrounded:
            doubtful = doubtful | certificate.excused
        if self.null_space.share is not None and not any_item(doubtful):
            # Rounding hardly changes the norms of residual and x.
            doubtful = self.exceeds_null_share(certificate, stored=True) & (
                self.exceeds_null_share(certificate) | certificate.excused
            )
        if not any_item(doubtful):
            return certificate, certificate
        return certificate, self.certify(x, y, prior_norm=prior_norm, host_scalars=host_scalars)


def _number(value: Scalar) -> Scalar:
    """Convert a tensor of one entry to a number; anything else is returned unchanged."""
    return value.item() if isinstance(value, Tensor) else value
