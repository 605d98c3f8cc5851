r"""The exact solve of a truncated convolution through its border: a plan, made once, for many right-hand sides.

.. math:: \min_x \|Ax - y\|^2 + \mu \|x\|^2 \qquad (\mu = 0:\ \text{the minimum-norm least-squares solution})

:class:`~lsconv.border.normal_inverse.NormalInverse` inverts :math:`AA^H + \mu'` or :math:`A^HA + \mu'` to the accuracy
of its factors, with :math:`\mu' > \mu` where the symbol is nearly singular for the precision of the factors. An outer
flexible conjugate gradient iteration, with residuals from products with A in float64, makes the answer that of
:math:`\mu`: the shift of the factors affects the number of outer steps only. On the residual side
the iteration runs in the data space, ``x = A^H z``, so that x is orthogonal to the null space of A by construction.

Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22 (2000), for the outer iteration.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.border.cost_model import Limits, plan_bytes, spared
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.normal_inverse import normal_inverse
from lsconv.border.normal_problem import Request, least_shift, needs_double, scaled_to_unit
from lsconv.border.outer_iteration import (
    NormalEquations,
    OuterSolution,
    converged_without_excuse,
    iterate_or_drop_factors,
    solve_again_if_excused,
)
from lsconv.border.reflected_padding import CopiedPadding
from lsconv.errors import ConvergenceWarning, DtypeError, MethodError
from lsconv.fourier.embedding import Embedding
from lsconv.krylov.gradients.backward_solves import normal_by_apply
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit, divide
from lsconv.krylov.loop.certificate import TALL_NULL_SHARE, NormBounds, NullSpaceBound, RankThreshold, Tolerances
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.null_space import misses_null_part, verify_null_space
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.plan import FALLBACK_AFTER, Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import default_rcond, direct_rtol, double
from lsconv.operators.memory import allowed_bytes, check_fits

__all__ = ["BorderPlan"]

# Below this damp / ||A|| the tolerance of the iteration does not show a part of x in the null space of A.
_TINY_DAMP = 1e-4
# Below this damp / ||A|| the rounding of a gradient in float64 hides such a part.
_INVISIBLE_DAMP = 5e-6


class BorderPlan(Plan):
    """Setup of the border method for one convolution and damp; :meth:`solve` answers right-hand sides.

    Args:
        A: a zero-padded convolution, or a circular one whose outputs are cropped; any stride, dilation and groups. With
            damp > 0 also one of stride 1 with reflect or replicate padding (:mod:`lsconv.border.reflected_padding`).
        damp: the damping, a number or one per batch item.
        rcond: singular values up to ``rcond ||A||`` count as zero where ``damp = 0``; None: :func:`default_rcond`.
        memory_limit: bytes that the plan may use; None: 60 % of what is free on A's device.
        limits: the limits for solving a border by factors; None: the default of the cost model.

    Attributes:
        unit: a power of two per kernel; everything is computed for A / unit.
        scaled: A / unit, in float64.
        precise: A in float64, for the certificate.
        observed_inputs: True for the inputs that some output reads, ``(*spatial_in)``; None: all of them.

    Raises:
        MethodError: A is no such convolution.
        PlanMemoryError: the plan would need more than ``memory_limit``.

    Example:
        >>> A = lsconv.Conv2d(torch.randn(2, 3, 3, 3), in_size=(16, 16))
        >>> plan = BorderPlan(A)
        >>> bool(plan.solve(torch.randn(5, *A.out_shape)).converged.all())
        True
    """

    A: Convolution
    reason = "a convolution is a circulant but for its border: the border is solved for"
    falls_back_on_lsmr = True

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float = 0.0,
        *,
        rcond: float | None = None,
        memory_limit: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not (isinstance(A, Convolution) and (Embedding.serves(A) or CopiedPadding.serves(A))):
            raise MethodError(
                f'method="border" needs a convolution with zero padding (or circular padding whose stride divides the '
                f'sizes, or reflect or replicate padding of stride 1), got {A!r}; use method="lsmr"'
            )
        dtype = A.weight.real.dtype
        if dtype not in (torch.float32, torch.float64):
            raise DtypeError(f"A: {A.dtype} can be applied, not inverted; convert with A.to(dtype=torch.float32)")
        self.A = A
        self.rcond = default_rcond(A.dtype) if rcond is None else rcond
        self.damp = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        self._damped = bool((self.damp > 0).all())
        self._copies_padding = CopiedPadding.serves(A)
        if self._copies_padding and not self._damped:
            raise MethodError(f'method="border" with padding_mode={A.padding_mode!r} needs damp > 0; use method="lsmr"')
        with torch.no_grad():
            # The plan works with A / unit, so that no Gram matrix overflows in float32.
            self.unit, self._scaled_in_dtype = scaled_to_unit(A)
            self.scaled_damp = self.damp / self.unit
            self.scaled = self._scaled_in_dtype.to(dtype=double(A.dtype))
            self.precise = A.with_parameters([A.weight.detach()]).to(dtype=double(A.dtype))
        self._inputs = ItemSpace(A.in_shape, self.precise.dtype, A.device)
        self._memory_limit, self._limits = memory_limit, limits
        self._factor(self._factor_dtype(dtype))
        self._probed_factors: DirectInverse | None = None
        self._probe_converged = False
        if not self._damped:
            self._refuse_deficient()
        self.x_in_range_of_adjoint = self.inverse.side == "residual"
        # the border of a volume has no factors, so that the fallback may be faster than more iterations
        self.fallback_after = FALLBACK_AFTER if self._damped and self.inverse.form == "valid" and A.ndim == 3 else None

    @torch.no_grad()
    def _factor(self, dtype: torch.dtype) -> None:
        """Make the border inverse with factors of this real dtype."""
        self.factor_dtype = dtype
        floor = least_shift(dtype, damped=self._damped)
        scaled = self._scaled_in_dtype if dtype == self.A.weight.real.dtype else self.scaled
        allowed = self._memory_limit
        limits = self._limits if allowed is None else spared(self._limits, allowed, self._needed(dtype))
        self.inverse = normal_inverse(Request.of(scaled, self.scaled_damp, floor=floor, limits=limits))
        self._norm = self.inverse.norm_bound * self.unit  # an upper bound of ||A||, per item
        observed = None if self._copies_padding else self.inverse.embedding.observed_inputs()
        self.observed_inputs = None if observed is None else observed.to(self.A.device)

    def _refuse_deficient(self) -> None:
        """Refuse operators whose null space (or that of the adjoint) the border system would have to resolve."""
        if reason := self.inverse.null_space_reason():
            raise MethodError(
                f'method="border" with damp=0: {reason}, so a solution found through the border need not be the one of '
                f'minimum norm; use method="lsmr", or damp > 0 ({self.A!r})'
            )

    # ------------------------------------------------------------------ answers

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The solution, with a certificate computed in float64; ``max_iter`` limits the border iterations in all."""
        tolerances = self.tolerances(rtol, atol)
        y = y.detach().to(self.precise.dtype)
        factors = self._exact_factors(y, self.A.out_shape)
        if factors is not None:
            x = self._with_newton_step(self._unscale_(factors.solution(y)), y, tolerances)
            solution = self._certified(y, x, tolerances)
            if converged_without_excuse(solution):
                return solution
        # Errors along singular values below damp enter the gradient with the factor damp^2 only.
        error_share = None if self.inverse.side == "residual" else TALL_NULL_SHARE

        make = functools.partial(
            NormalEquations, self, y=y, tolerances=tolerances, max_iter=max_iter, error_share=error_share
        )

        def solve(beyond_rounding: bool) -> Solution:
            outer = self._iterate_raising_precision(lambda: make(beyond_rounding=beyond_rounding))
            return self._certified(y, self._with_newton_step(outer.x, y, tolerances), tolerances, outer)

        return solve_again_if_excused(solve, ItemSpace(self.A.in_shape, self.A.dtype, self.A.device))

    def _certified(self, y: Tensor, x: Tensor, tolerances: Tolerances, outer: OuterSolution | None = None) -> Solution:
        """Certify x by products with A in float64, with the plan's bounds of the norm and of the null space."""
        arithmetic = self.factor_dtype if outer is None else self.precise.dtype
        judge = Judge(
            self.precise,
            tolerances,
            self.damp,
            self.A.dtype,
            judges_unrounded=not self._damped,
            norm=NormBounds(self._norm_from_below, self._norm),
            rank=RankThreshold(self.rcond),
            null_space=NullSpaceBound(
                self._null_share(tolerances),
                torch.finfo(arithmetic).eps if self.inverse.side == "residual" else None,
                lambda: self._loses_null_part,
            ),
        )
        if outer is None:
            return judge.solution(x, y)
        from_below = torch.maximum(outer.norm_a * self.unit, self._norm_from_below)
        judge = replace(judge, norm=NormBounds(from_below, self._norm))
        solution = judge.solution(x, y, iterations=outer.iterations)
        blind = replace(judge, null_space=NullSpaceBound())  # does not judge the part of x in the null space
        certify = functools.partial(blind.solution, y=y, iterations=outer.iterations)
        return verify_null_space(solution, x, y, self.precise, tolerances, self._shortest, certify)

    def _shortest(self, y: Tensor, rtol: float) -> Tensor:
        """The least-norm solution for consistent data, by an iteration that stays in the range of ``A^H``."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return lsqr(self.precise, y, rtol=rtol, max_iter=500).x

    def _exact_factors(self, given: Tensor, item_shape: tuple[int, ...]) -> DirectInverse | None:
        """The factors that solve for ``given``, ``(*batch, *item_shape)``; None where the border is iterated on."""
        factors = self.inverse.factorise_if_cheaper(tuple(given.shape[: given.ndim - len(item_shape)]))
        return factors if factors is not None and factors.exact else None

    def _certified_factors(self, given: Tensor, item_shape: tuple[int, ...]) -> DirectInverse | None:
        """The factors, if their answer for noise-like data was certified; every set of factors is tested once."""
        factors = self._exact_factors(given, item_shape)
        if factors is None or not self._damped:
            return None
        if self._probed_factors is not factors:
            shape = (*self.inverse.embedding.batch_shape, *self.A.out_shape)
            numbers = torch.arange(math.prod(shape), dtype=torch.float64, device=self.A.device)
            y = torch.sin(numbers * numbers).reshape(shape).to(self.precise.dtype)  # vmap refuses random numbers
            tolerances = self.tolerances(None)
            probe = self._certified(y, self._unscale_(factors.solution(y)), tolerances)
            self._probed_factors, self._probe_converged = factors, bool(probe.converged.all())
        return factors if self._probe_converged else None

    def _with_newton_step(self, x: Tensor, y: Tensor, tolerances: Tolerances) -> Tensor:
        """Take one Newton step from x, where rounding of the gradient could hide a part in the null space."""
        if not self._hides_null_space(tolerances):
            return x
        space = self._inputs
        gradient = self.precise.adjoint(y - self.precise.apply(x)) - space.broadcast(self.damp.square()) * x
        unit = binary_unit(space.safe_norm(gradient))
        step = self.inverse((gradient / space.broadcast(unit)).to(self.inverse.convolution.dtype), 1e-3)[0]
        return x + step.to(x.dtype) * space.broadcast(unit / self.unit.square())

    def _hides_null_space(self, tolerances: Tolerances) -> bool:
        """Tell whether an answer may have a part in the null space of A that the rounding of its gradient hides."""
        if self.inverse.side == "residual":
            return False
        rounding = torch.finfo(self.precise.dtype).eps
        faint = (self.damp > 0) & (self.damp.square() * tolerances.null_share < rounding * self._norm.square())
        return bool(faint.any()) and bool(self._loses_null_part.any())

    def _unscale_(self, scaled: Tensor) -> Tensor:
        """Convert, in place, an answer for A / unit to one for A."""
        return scaled.div_(over_items(self.unit, len(self.A.in_shape)))

    def _null_share(self, tolerances: Tolerances) -> Tensor:
        """The bound of the part of x in the null space of A; 0 if undamped, where :attr:`_loses_null_part` decides."""
        null_share, damped = tolerances.null_share, self.damp > 0
        if self.inverse.side == "residual":
            return torch.where(damped, null_share, torch.inf)
        # The share is strict where A has fewer outputs than inputs, hence a null space, and where one outer step leaves
        # a part of x in it: where the shift of the factors exceeds damp^2 (they are not exact), or damp is tiny.
        strict = self.A.out_numel < self.A.in_numel or not self.inverse.exact
        shares = torch.where(strict | (self.damp < _INVISIBLE_DAMP * self._norm), null_share, TALL_NULL_SHARE)
        return torch.where(damped, shares, 0.0)

    @functools.cached_property
    def _loses_null_part(self) -> Tensor:
        """Mark the items where the solution for A w is not the random w, which shows that A is rank-deficient."""
        batch = torch.Size(self.inverse.embedding.batch_shape)
        return misses_null_part(self.precise, batch, lambda y: self._iterate(y=y, rtol=direct_rtol(torch.float64)).x)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + mu)^+ A^H y`` for ``y`` of shape ``(*batch, *out_shape)``, without the certificate."""
        return self._apply_double(y.detach().to(self.precise.dtype), rtol).to(self.A.dtype)

    def _apply_double(self, y: Tensor, rtol: float | None) -> Tensor:
        """Compute :meth:`apply` in double precision."""
        factors = self._certified_factors(y, self.A.out_shape)
        x = self._iterate(y=y, rtol=rtol).x if factors is None else self._unscale_(factors.solution(y))
        return self._with_newton_step(x, y, self.tolerances(rtol))

    @torch.no_grad()
    def residual(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """``y - A x = mu (A A^H + mu)^{-1} y``, ``(*batch, *out_shape)``; one solve where there are factors."""
        y64 = y.detach().to(self.precise.dtype)
        factors = self._certified_factors(y64, self.A.out_shape)
        if factors is None or self.inverse.side == "solution":
            return (y64 - self.precise.apply(self._apply_double(y64, rtol))).to(self.A.dtype)
        mu = over_items(self.scaled_damp.square(), len(self.A.out_shape))
        return (factors.normal(y64) * mu).to(self.A.dtype)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`: ``A (A^H A + mu)^+ v`` for ``v`` of shape ``(*batch, *in_shape)``."""
        v64 = v.detach().to(self.precise.dtype)
        factors = self._certified_factors(v64, self.A.in_shape)
        if factors is not None:
            return self._unscale_(factors.dual(v64)).to(self.A.dtype)
        outer = self._iterate(v=v, rtol=rtol)
        outer.warn(self)
        return outer.dual().to(self.A.dtype)

    @torch.no_grad()
    def attempt_apply(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`apply` of ``y``, and mark the items that missed the tolerance."""
        if self.inverse.side == "solution" and bool((self.damp < _TINY_DAMP * self._norm).any()):
            solution = self.solve(y)  # because the tolerance ratio does not show the null space
            return solution.x, ~solution.converged
        if self._certified_factors(y, self.A.out_shape) is not None:
            return self.apply(y), torch.zeros((), dtype=torch.bool, device=y.device)
        outer = self._iterate(y=y)
        return outer.x.to(self.A.dtype), outer.tolerance_ratio > 1

    @torch.no_grad()
    def attempt_adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compute :meth:`adjoint` of ``v``, and mark the items that missed the tolerance."""
        if self._certified_factors(v, self.A.in_shape) is not None:
            return self.adjoint(v), torch.zeros((), dtype=torch.bool, device=v.device)
        outer = self._iterate(v=v)
        return outer.dual().to(self.A.dtype), outer.tolerance_ratio > 1

    @functools.cached_property
    def _norm_from_below(self) -> Tensor:
        """A lower bound of ``||A||``, per item: from the plane wave of the symbol's largest singular value."""
        if self._copies_padding:
            return torch.zeros((), dtype=torch.float64, device=self.A.device)
        outputs = ItemSpace(self.A.out_shape, self.precise.dtype, self.A.device)
        wave = self.inverse.leading_wave().to(self.precise.dtype)
        return divide(outputs.norm(self.precise.apply(wave)), self._inputs.norm(wave))

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + mu)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``, where ``damp > 0``."""
        g64 = g.detach().to(self.precise.dtype)
        # inputs that no output reads are missing on the grid
        if self.inverse.side == "residual" or self.inverse.embedding.drops_phases:
            rtol = direct_rtol(self.A.dtype, rtol)
            # a gradient by damp uses the part of v in the row space of A, which may be (damp / ||A||)^2 of all of v
            v = normal_by_apply(self.precise, self.damp, self._apply_double, g64, rtol=rtol, extra_digits=1.0)
            return v.to(self.A.dtype)
        factors = self._certified_factors(g64, self.A.in_shape)
        if factors is not None:
            return self._unscale_(self._unscale_(factors.normal(g64))).to(self.A.dtype)
        return self._iterate_normal(g, rtol)

    @torch.no_grad()
    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)`` where the plan works on inputs, else None."""
        if self.inverse.side == "residual":
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the caller checks, and has another method
            return self._iterate_normal(g, rtol)

    def _iterate_normal(self, g: Tensor, rtol: float | None) -> Tensor:
        """Solve the normal equations on inputs by the outer iteration."""
        outer = self._iterate(v=g, rtol=rtol)
        outer.warn(self)
        return (outer.x * self._inputs.broadcast(1 / self.unit)).to(self.A.dtype)

    def _iterate(self, y: Tensor | None = None, v: Tensor | None = None, rtol: float | None = None) -> OuterSolution:
        """Run the outer iteration for data ``y``, or for a right-hand side ``v`` on inputs."""
        tolerances = self.tolerances(rtol)
        y, v = (t if t is None else t.detach().to(self.precise.dtype) for t in (y, v))
        return self._iterate_raising_precision(lambda: NormalEquations(self, y=y, v=v, tolerances=tolerances))

    def _iterate_raising_precision(self, make: Callable[[], NormalEquations]) -> OuterSolution:
        """Run the outer iteration; if float32 factors fail, replace them by float64 ones for good and repeat it."""
        outer = iterate_or_drop_factors(make)
        precise = double(self.factor_dtype)
        out_of_reach = bool((outer.tolerance_ratio > 1).any()) and not outer.exhausted
        if self.factor_dtype != precise and out_of_reach and self._needed(precise) <= self._allowed():
            self._factor(precise)
            outer = iterate_or_drop_factors(make)
        return outer

    # ------------------------------------------------------------------ memory

    def _factor_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Choose the real dtype of the factors, such that the plan fits into the allowed memory."""
        allowed, precise = self._allowed(), double(dtype)
        if precise != dtype and needs_double(self.A, self.damp) and self._needed(precise) <= allowed:
            return precise
        check_fits(self._needed(dtype), allowed, self.A)
        return dtype

    def _needed(self, dtype: torch.dtype) -> int:
        A = self.A if dtype == self.A.weight.real.dtype else self.precise
        return plan_bytes(A, tuple(self.damp.shape))

    def _allowed(self) -> int:
        return allowed_bytes(self._memory_limit, self.A.device)

    def __repr__(self) -> str:
        return f"BorderPlan({self.A.in_shape} -> {self.A.out_shape}, {self.inverse.describe()})"
