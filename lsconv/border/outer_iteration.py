r"""The outer iteration of the border method: flexible conjugate gradients on the normal equations of A.

The border inverse, at the precision and the regularisation of its factors, preconditions them; A itself, in float64,
says what they leave. For float32 data most steps need not ask A that precisely: conjugate gradients carry their
remainder along by a recursion, for which float32 products do, and only where the recursion
claims a target is the remainder computed, in float64 and from the solution itself. Where the two disagree the
iteration goes on from the computed one; where that stops helping every step is taken in float64.

Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22 (2000).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.normal_inverse import NormalInverse
from lsconv.errors import ConvergenceWarning
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit
from lsconv.krylov.loop.flexible_direction import FlexibleDirection
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import EXCUSED, Tolerances
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items

__all__ = ["Outer", "OuterPlan", "confirmed", "iterated", "needs_no_iteration"]

# Steps of all items together.
_OUTER_LIMIT = 40
# Steps without halving after which an item ends, and after which a float32 recursion is replaced by the remainder.
_PATIENCE = 5
# What a step is to leave, in units of the target. A fixed border residual, or one that ignores what the steps before
# have left, takes up to twice the iterations.
_MARGIN = 0.3
# The border residual of a step that the floor of the factors limits anyway, by less in float64.
_FLOORED_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
# The gain before the first step, in units of damp / sigma_max.
_FIRST_GUESS = 0.1


class OuterPlan(Protocol):
    """The part of a plan that the outer iteration needs.

    Attributes:
        scaled_damp: the damping of ``scaled``.
        unit: a power of two per item, by which A is divided.
        inverse: of the normal operator, nearly.
        factor_dtype: the real dtype of its factors.
        read: the inputs that some output reads; None: all.
    """

    scaled_damp: Tensor
    unit: Tensor
    inverse: NormalInverse
    factor_dtype: torch.dtype
    read: Tensor | None

    @property
    def A(self) -> LinearOperator:  # noqa: N802 - the operator
        """The operator, in the dtype of the data."""
        ...

    @property
    def scaled(self) -> LinearOperator:
        """The operator inverted, in float64, divided by ``unit``."""
        ...


class _Arithmetic(NamedTuple):
    """The operator and the spaces of unknowns and images, in one dtype."""

    A: LinearOperator
    space: ItemSpace
    image_space: ItemSpace

    def to(self, dtype: torch.dtype) -> _Arithmetic:
        A = self.A.to(dtype=dtype)
        return _Arithmetic(A, *(ItemSpace(s.item_shape, dtype, A.device) for s in self[1:]))


@dataclass(frozen=True)
class _Iterate:
    """An iterate: u, its image, what the normal equations leave, and that in units of its target."""

    u: Tensor
    image: Tensor
    g: Tensor
    ratio: Tensor


class Outer:
    r"""Flexible conjugate gradients on the normal equations of A, preconditioned by the border inverse.

    Residual side: :math:`(AA^H + \mu) u = y` (or ``A v``), ``x = A^H u``. Solution side:
    :math:`(A^HA + \mu) u = A^H y` (or ``v``), ``x = u``. ``image`` is ``A^H u`` or ``A u`` respectively; ``g`` is what
    the normal equations leave.

    Attributes:
        u: the best iterate.
        image: that of u, where it is x.
        tolerance_ratio: that of the best iterate, in units of its target.
        steps: taken.
        iterations: on the border, per item.
    """

    image: Tensor | None
    tolerance_ratio: Tensor
    _narrow: bool  # steps are taken in narrower arithmetic than the remainder is computed in

    def __init__(
        self,
        plan: OuterPlan,
        *,
        tolerances: Tolerances,
        y: Tensor | None = None,
        v: Tensor | None = None,
        max_iter: int | None = None,
        share: float | None = None,
        deep: bool = False,
    ) -> None:
        self.deep = deep  # beyond what rounding excuses, as far as the steps lead
        # the largest part of x that errors along small singular values may have; None: rtol alone decides
        self.share = share
        self.plan, self.A, self.tolerances = plan, plan.scaled, tolerances
        self.max_iter = max_iter  # border iterations in all
        self.residual_side = plan.inverse.side == "residual"
        A = self.A
        inputs, outputs = (ItemSpace(shape, A.dtype, A.device) for shape in (A.in_shape, A.out_shape))
        self.space, self.image_space = (outputs, inputs) if self.residual_side else (inputs, outputs)
        given, shape = (y, A.out_shape) if y is not None else (v, A.in_shape)
        assert given is not None
        factor_batch = plan.inverse.embedding.batch_shape
        self.batch = broadcast_shapes(given.shape[: given.ndim - len(shape)], factor_batch)
        given = given.expand(*self.batch, *shape)
        self.unit = binary_unit(ItemSpace(shape, A.dtype, A.device).norm(given))
        given = given / over_items(self.unit, len(shape))
        self.y = given if y is not None else None
        self.damp = plan.scaled_damp.expand(self.batch)
        self.mu = self.damp**2
        if y is not None:
            self.f = given if self.residual_side else A.adjoint(given)
            self.given_norm = outputs.norm(given)
        else:
            self.f = A.apply(given) if self.residual_side else given
            self.given_norm = inputs.norm(given)

    def run(self) -> None:
        """Iterate until every item meets its target or no longer improves; ``u`` is the best found."""
        self.norm_a = torch.zeros_like(self.given_norm)
        self.iterations = torch.zeros(self.batch, dtype=torch.int64, device=self.A.device)
        self.steps = 0
        self._choose_arithmetic()
        direction, at = FlexibleDirection(self.mu), self._origin()
        self.u, self.image = at.u, at.image if self.residual_side else None
        self.tolerance_ratio = torch.full_like(at.ratio, torch.inf)
        gain = 0.0  # what a step leaves of the remainder, in units of its border tolerance
        waited = torch.zeros_like(self.iterations)  # rounds without halving
        while self.steps < _OUTER_LIMIT:
            waited = torch.where(at.ratio < 0.5 * self.tolerance_ratio, 0, waited + 1)
            self._keep(at)
            active = (self.tolerance_ratio > 1) & (waited < _PATIENCE)
            if not bool(active.any()) or self.exhausted:
                break
            if self._narrow and bool((waited > 0).logical_and(active).any()):
                self._arithmetic, self._narrow = self._wide, False
            at, gain = self._round(direction, at, active, gain)

    def _choose_arithmetic(self) -> None:
        """Take steps in the dtype of the factors where that is narrower, and where no digits are lost by it.

        Not for undamped x, where the factors amplify rounding in the null space of A and no residual shows it; and not
        with exact factors, whose steps are deeper than float32 products are accurate.
        """
        narrow = self.plan.inverse.convolution.dtype
        self._wide = _Arithmetic(self.A, self.space, self.image_space)
        self._narrow = (
            narrow != self.A.dtype and not self.plan.inverse.exact and (self.residual_side or bool((self.mu > 0).all()))
        )
        self._arithmetic = self._wide.to(narrow) if self._narrow else self._wide

    def _origin(self) -> _Iterate:
        u, g = torch.zeros_like(self.f), self.f
        image = g.new_zeros(()).expand(*self.batch, *self.image_space.item_shape)
        return _Iterate(u, image, g, self._tolerance_ratio(u, image, g))

    def _keep(self, at: _Iterate) -> None:
        """Keep the iterate for the items where it is the best so far."""
        better = at.ratio < self.tolerance_ratio
        if bool(better.all()):  # which copies nothing
            self.u, self.tolerance_ratio = at.u, at.ratio
            self.image = at.image if self.residual_side else None
            return
        self.u = torch.where(self._mask(better, self.space), at.u, self.u)
        if self.image is not None:
            self.image = torch.where(self._mask(better, self.image_space), at.image, self.image)
        self.tolerance_ratio = torch.where(better, at.ratio, self.tolerance_ratio)

    def _round(self, direction: FlexibleDirection, at: _Iterate, active: Tensor, gain: float) -> tuple[_Iterate, float]:
        """Take one step, or in narrow arithmetic several whose remainder a recursion carries; then compute it.

        Returns the iterate and the gain that the last step has shown.
        """
        start, count = at.ratio, 0
        while True:
            tolerance, before = self._border_tolerance(at.ratio, active, gain), at.ratio
            at = self._step(direction, at, active, tolerance)
            if not self._narrow:
                break
            count += 1
            # half of the digits below its start the recursion has lost its own
            going = at.ratio > torch.clamp(torch.finfo(torch.float32).eps ** 0.5 * start, min=1.0)
            active = active & (at.ratio > 1)
            last = count == _PATIENCE or self.steps == _OUTER_LIMIT or self.exhausted
            if last or not bool((active & going).any()):
                at = replace(at, image=self._image(self.A, at.u))
                break
        g = self._remainder(at.image) - self.space.spread(self.mu) * at.u
        at = replace(at, g=g, ratio=self._tolerance_ratio(at.u, at.image, g))
        seen = float((at.ratio / (before * tolerance)).where(active & (before > 0), 0).amax())
        return at, max(gain, seen, 1.0)

    def _step(self, direction: FlexibleDirection, at: _Iterate, active: Tensor, tolerance: float) -> _Iterate:
        """Go one step along the next direction; in narrow arithmetic the remainder is that of the recursion."""
        A, space, image_space = self._arithmetic
        g = at.g.to(space.dtype)
        limit = () if self.max_iter is None else (self.max_iter - int(self.iterations.max()),)
        z, count = self.plan.inverse(g.to(self.plan.inverse.convolution.dtype), tolerance, *limit)
        self.steps += 1
        self.iterations += count * active
        p, image, alpha = direction.step(z.to(space.dtype), g, space, image_space, lambda p: self._image(A, p))
        self.norm_a, alpha = direction.norm, alpha * active
        u = self.space.add(at.u, alpha, p)
        if not self._narrow:
            return replace(at, u=u, image=self.image_space.add(at.image, alpha, image, out=image))
        total = self.image_space.add(at.image, alpha, image)
        back = A.apply(image) if self.residual_side else A.adjoint(image)
        g = g - space.spread(alpha) * (back + space.spread(self.mu) * p)
        return _Iterate(u, total, g, self._tolerance_ratio(u, total, g.to(self.A.dtype)))

    @property
    def exhausted(self) -> bool:
        """Tell whether the limit on the border iterations has been reached."""
        return self.max_iter is not None and int(self.iterations.max()) >= self.max_iter

    def _border_tolerance(self, tolerance_ratio: Tensor, active: Tensor, gain: float) -> float:
        """The relative residual of the border system that this step needs.

        Where the factors are those of the wanted operator: what takes the worst item to its target, a step leaving
        ``gain`` times as much as its border system. Where they are not, a step that the difference limits anyway has
        the plan's.
        """
        if not self.plan.inverse.exact:
            return _FLOORED_TOLERANCE[self.plan.factor_dtype]
        if gain == 0 and self.plan.inverse.damped:
            gain = _FIRST_GUESS / self.plan.inverse.relative_damp
        needed = _MARGIN / (max(gain, 1.0) * float(torch.where(active, tolerance_ratio, 0).amax()))
        least = (
            torch.finfo(self.plan.factor_dtype).eps ** 0.7
        )  # of the digits of the factors, these are left to the border
        return min(max(needed, least), _MARGIN)

    def _image(self, A: LinearOperator, u: Tensor) -> Tensor:
        return A.adjoint(u) if self.residual_side else A.apply(u)

    def _remainder(self, image: Tensor) -> Tensor:
        """``f - A A^H u`` or ``f - A^H A u``; for data y as ``A^H (y - A u)``, which cancels nothing."""
        if self.residual_side:
            return self.f - self.A.apply(image)
        if self.y is not None:
            return self.A.adjoint(self.y - image)
        return self.f - self.A.adjoint(image)

    def _tolerance_ratio(self, u: Tensor, image: Tensor, g: Tensor) -> Tensor:
        """The remainder in units of its target; at most 1 where the certificate will hold."""
        g_norm, rtol = self.space.norm(g), self.tolerances.rtol
        if self.y is None:
            scale = self.given_norm * (torch.ones_like(g_norm) if not self.residual_side else self.norm_a)
            return torch.where(g_norm == 0, 0, g_norm / (rtol * scale))
        unit = torch.finfo(g_norm.dtype).tiny
        u_norm, image_norm = self.space.norm(u), self.image_space.norm(image)
        x_norm = image_norm if self.residual_side else u_norm
        misfit = self.space.norm(g + self.space.spread(self.mu) * u) if self.residual_side else (
            self.image_space.norm(self.y - image)
        )  # fmt: skip
        total = torch.hypot(misfit, self.damp * x_norm)
        bound = torch.maximum(rtol * self.given_norm, self.tolerances.atol / self.unit)
        by_residual = total / bound.clamp_min(unit)
        norm = self.plan.inverse.norm_bound
        rounding = 4 * torch.finfo(self.A.dtype).eps * (norm * x_norm + self.given_norm)
        if self.A.dtype != self.plan.A.dtype:  # x is stored in float32: where it is short, 5 % of that rounding will do
            stored = 0.05 * self.tolerances.eps * (norm * x_norm + self.given_norm)
            rounding = torch.where(EXCUSED * norm * x_norm <= self.given_norm, stored, rounding)
        if self.deep:
            rounding = torch.zeros_like(rounding)
        # the certificate judges the gradient: g, or A^H g on the residual side, where norm bounds what A^H does to it
        target = torch.maximum(rtol * total * self.norm_a, rounding * norm)
        if self.residual_side:
            target = torch.where(self.mu == 0, bound, target / norm)
        elif self.share is not None:
            least = torch.maximum(self.share * self.mu * x_norm, rounding * norm)
            target = torch.where(self.mu > 0, torch.minimum(target, least), target)
        downhill = total / ((1 + self.tolerances.eps**0.5) * self.given_norm).clamp_min(unit)  # from x = 0
        tolerance_ratio = torch.minimum(by_residual, torch.maximum(g_norm / target.clamp_min(unit), downhill))
        return torch.where(g_norm == 0, 0, tolerance_ratio)

    def warn(self, plan: object) -> None:
        """Warn of items that have missed their target by far, for want of a certificate that would tell."""
        failed = self.tolerance_ratio > 10
        if bool(failed.any()):
            text = f"{int(failed.sum())} of {failed.numel()} item(s) did not converge ({plan!r})"
            warnings.warn(text, ConvergenceWarning, stacklevel=4)

    @staticmethod
    def _mask(items: Tensor, space: ItemSpace) -> Tensor:
        return over_items(items, len(space.item_shape))

    def _scaled_back(self, tensor: Tensor, space: ItemSpace) -> Tensor:
        return tensor * space.spread(self.unit / self.plan.unit)

    @property
    def x(self) -> Tensor:
        """The solution, in the units of y."""
        if self.residual_side:
            assert self.image is not None
            return self._scaled_back(self.image, self.image_space)
        x = self._scaled_back(self.u, self.space)
        return x if self.y is None or self.plan.read is None else x * self.plan.read

    def dual(self) -> Tensor:
        """``u`` on the residual side, ``A u`` on the solution side: what the adjoint of the inverse gives."""
        if self.residual_side:
            return self._scaled_back(self.u, self.space)
        return self._scaled_back(self._image(self.A, self.u), self.image_space)


def iterated(plan: OuterPlan, **options: Any) -> Outer:
    """The outer iteration, run; once more without factors of the border that have lost too many digits for it."""
    outer = Outer(plan, **options)
    del options  # with data that it has scaled
    outer.run()
    if (
        isinstance(plan.inverse.direct, DirectInverse)
        and bool((outer.tolerance_ratio > 1).any())
        and not outer.exhausted
    ):
        plan.inverse.give_up_factors()
        outer.run()
    return outer


def needs_no_iteration(solution: Solution) -> bool:
    """Tell whether all items have converged, and none by the rounding of its gradient alone."""
    return solution.all_converged and (solution.excused is None or not bool(solution.excused.any()))


def confirmed(first: Solution, again: Callable[[], Solution], space: ItemSpace) -> Solution:
    """The first solution where a second, iterated on beyond the rounding that excuses a gradient, says the same.

    Rounding as large as the gradient hides errors along small singular values. Where the two differ by more than a
    tenth, the second counts if it needs no excuse, and otherwise neither does.

    Args:
        first: a solution with :attr:`Solution.excused`.
        again: makes the second; asked where an item is excused.
        space: of x.
    """
    if first.excused is None or not bool(first.excused.any()):
        return first
    second = again()
    assert second.excused is not None
    agree = space.safe_norm(second.x - first.x) <= 0.1 * space.safe_norm(first.x)
    better = first.excused & second.converged & (second.gradient_norm < first.gradient_norm) & (agree | ~second.excused)
    lost = first.excused & ~agree & ~better
    answer = first.replaced(better, second)
    return replace(
        answer,
        codes=torch.where(lost, Status.STAGNATION.code, answer.codes),
        converged=first.converged & ~lost,
        iterations=torch.where(first.excused, torch.maximum(first.iterations, second.iterations), first.iterations),
    )
