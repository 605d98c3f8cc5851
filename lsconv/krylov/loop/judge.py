r"""The judge of an answer, who gives its certificate: the tests shared by all methods, all of them relative.

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
    quotient,
    scalar_dtype,
    unbounded,
    where,
)
from lsconv.krylov.loop.certificate import Certificate, Norms
from lsconv.krylov.loop.evidence import NormBounds, NullSpaceBound, RankThreshold
from lsconv.krylov.loop.solution import History, Solution, Status
from lsconv.krylov.loop.stopping import EXCUSED, Tolerances, most_condition
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["Judge", "norm_from_below"]


@dataclass(frozen=True, eq=False)
class Judge:
    r"""The judge of what is found for one operator and damping: it measures by A itself, and judges by norms alone.

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
        prior_norm: Tensor | None = None,
        single: bool = False,
        sharpen: bool = True,
    ) -> Certificate:
        """Recompute residual and gradient of ``x``, and judge them.

        Args:
            x: ``(*batch, *in_shape)``; not finite, it converges nowhere.
            y: ``(*batch, *out_shape)``.
            prior_norm: norm of the prior, where x and y are what a prior leaves of them: they carry its rounding.
            single: there is one item, and scalars are Python numbers, here and in the certificate.
            sharpen: find a better bound of ``||A||`` where that may decide.
        """
        norms = self._measured(x, y, prior_norm, single)
        return self.judged(norms, self._sharpening(y, single) if sharpen else None)

    def _sharpening(self, y: Tensor, single: bool) -> Callable[[], Scalar] | None:
        """The way to a better bound of ``||A||``; None where none is wanted."""
        if self.square or type(y) is not Tensor:
            return None
        found = self.norm.sharper
        if found is None:
            return lambda: norm_from_below(self.A, single=single)
        return lambda: _number(found()) if single else found()

    def _measured(self, x: Tensor, y: Tensor, prior_norm: Tensor | None, single: bool) -> Norms:
        space, A = OneItem if single else ItemSpace, self.A
        domain, codomain = space(A.in_shape, A.dtype, A.device), space(A.out_shape, A.dtype, A.device)
        batch = broadcast_shapes(
            x.shape[: x.ndim - len(A.in_shape)], y.shape[: y.ndim - len(A.out_shape)], A.batch_shape
        )

        def spread_out(scalar: Scalar) -> Scalar:
            return scalar if single else scalar.expand(batch)

        damp = self._damp(batch, single)
        y_norm, x_norm = spread_out(codomain.safe_norm(y)), spread_out(domain.safe_norm(x))
        ax = A.apply(x)
        bound = divide(spread_out(codomain.safe_norm(ax)), x_norm)
        residual = y - ax
        del ax
        r_norm = spread_out(codomain.safe_norm(residual))
        # a gradient that underflows would be certified as zero
        faint = bound * r_norm < torch.finfo(A.dtype).tiny ** 0.75
        unit = where(faint, binary_unit(r_norm), 1.0)
        g = self._adjoint(codomain.scale(residual, 1 / unit) if any_item(faint) else residual)
        if g is None:
            g_norm = math.nan * r_norm
        else:
            bound = maximum(bound, divide(spread_out(domain.safe_norm(g)) * unit, r_norm))
            if any_item(damp > 0):
                g = domain.add(g, -damp * damp / unit, x)
            g_norm = spread_out(domain.safe_norm(g)) * unit
        return Norms(y_norm, x_norm, r_norm, g_norm, x_norm, bound, prior_norm)

    def _damp(self, batch: tuple[int, ...], single: bool) -> Scalar:
        if single:
            return self.damp
        return torch.as_tensor(self.damp, dtype=scalar_dtype(self.A.device), device=self.A.device).expand(batch)

    def judged(self, norms: Norms, sharpen: Callable[[], Scalar] | None = None) -> Certificate:
        """Judge an x by its norms alone.

        Args:
            norms: tensors of the batch shape, or Python numbers for one item.
            sharpen: finds a better bound of ``||A||``, where that may decide; None: there is none.
        """
        A, tolerances, rank, rcond = self.A, self.tolerances, self.rank, self.rank.rcond
        single, y_norm, x_norm = not isinstance(norms.y, Tensor), norms.y, norms.x
        r_norm, g_norm = norms.residual, norms.gradient
        damp = self._damp(() if single else tuple(y_norm.shape), single)
        norm_a = hypot(norms.operator, damp)
        if self.norm.lower is not None:
            norm_a = maximum(norm_a, self.norm.lower)
        total = hypot(r_norm, damp * norms.penalty)
        r_bound, g_bound = tolerances.residual_bound(y_norm), tolerances.gradient_bound(norm_a, total)
        # the bound of a gradient that is near it may only be low because that of ||A|| is
        close = (g_norm > g_bound) & (g_norm <= 1e4 * g_bound) & (total > r_bound)
        if sharpen is not None and any_item(close):
            sharper = sharpen()
            norm_a = maximum(norm_a, hypot(sharper if single else sharper.expand(y_norm.shape), damp))
            g_bound = tolerances.gradient_bound(norm_a, total)
        upper = norm_a if self.norm.upper is None else self.norm.upper
        least = at_least(
            maximum(max(rcond, rank.length_limit) * norm_a, 2 * damp), torch.finfo(scalar_dtype(A.device)).tiny
        )
        # where eps ||A|| ||x|| exceeds the tolerance the residual is rounding, and proves nothing
        known = torch.finfo(A.dtype).eps * norm_a * x_norm <= 30 * r_bound
        # with the residual at its bound the whole length of x enters the rounding
        solved = (r_norm <= r_bound) & known
        longest = where(solved, x_norm, minimum(x_norm, y_norm / least))
        rounding = torch.finfo(A.dtype).eps if self.rounding is None else self.rounding
        rounding_level = 8 * rounding * (upper * longest + y_norm)
        highest = (1 + math.sqrt(tolerances.eps)) * y_norm
        if norms.prior is not None:
            rounding_level = rounding_level + 16 * tolerances.eps * upper * norms.prior
            r_bound, highest = maximum(r_bound, rounding_level), highest + rounding_level
        met, g_bound = g_norm <= g_bound, maximum(g_bound, upper * rounding_level)
        if rank.truncated:
            g_bound = maximum(g_bound, where(damp > 0, 0.0, rcond * upper * r_norm))
        finite = unbounded(x_norm) == 0
        no_worse = (total <= highest) & finite
        residual_ok = (total <= r_bound) & finite & known
        # a longer x has been led along singular values that count as zero
        reach = max(tolerances.conlim, most_condition(tolerances.eps), 1 / rcond if rcond > 0 else 0.0)
        not_cut_off = (damp > 0) | (norm_a * x_norm <= reach * y_norm)
        gradient_ok = (g_norm <= g_bound) & no_worse & not_cut_off & (not self.square)
        excused = gradient_ok & (residual_ok == 0) & (met == 0) & (solved == 0)
        smallest = torch.finfo(scalar_dtype(A.device)).tiny
        tolerance_ratio = total / at_least(r_bound, smallest)
        if not self.square:
            tolerance_ratio = minimum(
                tolerance_ratio, maximum(g_norm / at_least(g_bound, smallest), total / at_least(highest, smallest))
            )
        # y is known to rtol at best, and moves x by rtol ||y|| / ||A|| at least
        unit = damp * damp * (x_norm + tolerances.rtol * divide(y_norm, norm_a))
        null_part, null_reach = quotient(g_norm, unit), quotient(norm_a * r_norm, unit)
        return Certificate(
            y_norm,
            r_norm,
            g_norm,
            residual_ok,
            gradient_ok,
            no_worse,
            excused,
            total,
            null_part,
            null_reach,
            tolerance_ratio,
            g_bound,
        )

    def _adjoint(self, residual: Tensor) -> Tensor | None:
        """``A^H residual``; a square system's operator may come without an adjoint."""
        try:
            return self.A.adjoint(residual)
        except NotImplementedError:
            if self.square:
                return None
            raise

    def null_suspects(self, certificate: Certificate, *, stored: bool = False) -> Scalar:
        """The items whose x may have a larger part in the null space of A than it may have.

        Args:
            certificate: that of x.
            stored: x is rounded to its dtype, and no longer ``A^H z``, whose null part its residual and length bound.
        """
        null_space, part = self.null_space, certificate.null_part
        share = math.inf if null_space.share is None else null_space.share
        if null_space.range_eps is not None and not stored:
            part = minimum(part, null_space.range_eps * certificate.null_reach)
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
        stored = answer.to(x.dtype) if prior is None else answer.to(x.dtype) - prior
        # numbers for a single item, which wait for nothing and are cheaper
        single = batch.numel() == 1 and type(x) is type(y) is Tensor and A.device.type == "cpu"
        code = otherwise.code if isinstance(otherwise, Status) else otherwise
        if single:
            norm, bound = self.norm, self.null_space
            norm = NormBounds(_number(norm.lower), _number(norm.upper), norm.sharper)
            null_space = NullSpaceBound(_number(bound.share), bound.range_eps, bound.exists)
            judge = replace(self, damp=_number(damp), norm=norm, null_space=null_space)
            code = _number(code)
        else:
            judge = replace(self, damp=damp)
        space = OneItem if single else ItemSpace
        prior_norm = None if prior is None else space(A.in_shape, A.dtype, A.device).safe_norm(prior)
        narrowed = answer.dtype != x.dtype
        storing = judge
        if narrowed:  # storing an x that is not long rounds its gradient, and excuses that
            limit = max(self.rank.rcond, self.rank.length_limit, EXCUSED)
            storing = replace(judge, rounding=self.tolerances.eps, rank=RankThreshold(length_limit=limit))
        norms = storing._measured(stored, y, prior_norm, single)
        certificate = storing.judged(norms, None if narrowed else judge._sharpening(y, single))
        converged, unrounded = certificate.converged, certificate
        rounded = doubtful = converged != converged  # no item
        if narrowed:
            doubts = self.judges_unrounded and any_item(certificate.excused)
            if self.null_space.share is not None and not doubts:
                # residual and length are nearly those of the x before rounding
                strays = judge.null_suspects(certificate, stored=True)
                doubts = any_item(strays & (judge.null_suspects(certificate) | certificate.excused))
            if doubts or any_item(converged == 0):
                if not (single and torch.equal(stored, x)):
                    norms = judge._measured(x, y, prior_norm, single)
                unrounded = judge.judged(norms, judge._sharpening(y, single))
                rounded = unrounded.converged & certificate.no_worse & (converged == 0)
                if self.judges_unrounded:
                    converged = converged & (unrounded.converged | (certificate.excused == 0))
        zero = certificate.data_norm == 0
        if self.null_space.share is not None:
            doubtful = (converged | rounded) & (zero == 0) & judge.null_suspects(unrounded)
            if self.null_space.exists is not None and any_item(doubtful):
                seen = self.null_space.exists()
                doubtful = doubtful & (bool(seen) if single else seen)
        codes = where(rounded, Status.ROUNDED.code, code)
        codes = where(certificate.gradient_ok & converged, Status.GRADIENT.code, codes)
        codes = where(certificate.residual_ok, Status.RESIDUAL.code, codes)
        codes = where(doubtful, Status.RANK_DEFICIENT.code, codes)
        codes = where(zero & converged, Status.ZERO.code, codes)
        codes = where(unbounded(certificate.residual_norm), Status.NON_FINITE.code, codes)
        excused = None
        if unrounded is not certificate or not narrowed:
            excused = unrounded.excused & (converged | rounded)

        def per_item(values: Scalar, dtype: torch.dtype | None = None) -> Tensor:
            if single and not isinstance(values, Tensor):
                return torch.full(batch, values, dtype=dtype)
            return torch.as_tensor(values, dtype=dtype, device=A.device).expand(batch)

        return Solution(
            x=answer,
            codes=per_item(codes),
            converged=per_item((converged | rounded) & (doubtful == 0)),
            iterations=per_item(iterations),
            residual_norm=per_item(certificate.residual_norm, damp.dtype),
            gradient_norm=per_item(certificate.gradient_norm, damp.dtype),
            damp=damp,
            history=history,
            excused=None if excused is None else per_item(excused),
        )


def _number(value: Scalar) -> Scalar:
    """The number that a tensor holds, and what is no tensor as it is."""
    return value.item() if isinstance(value, Tensor) else value


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
