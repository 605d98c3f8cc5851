r"""The outer iteration of the border method: flexible conjugate gradients on the normal equations of A.

The preconditioner is the border inverse, in the precision and with the shift of its factors. The residual is computed
in every step by products with A in float64, so that the factors affect the number of steps only.

Notay, "Flexible conjugate gradients", SIAM J. Sci. Comput. 22 (2000).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

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

# The limit on the steps of a solve; items that converge more slowly are left to the fallback.
_OUTER_LIMIT = 40
# An item is stopped after this many steps without halving its residual.
_PATIENCE = 5
# The residual that a step aims at, relative to the target: below one, because its prediction is rough.
_MARGIN = 0.3
# The border tolerance of a step that the floor of the factors limits; that of float64 factors is lower.
_FLOORED_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
# The growth before the first step, in units of sigma_max / damp: without it a first step may stop short of the share
# of x in the null space of A that the certificate allows.
_FIRST_GUESS = 0.1


class OuterPlan(Protocol):
    """The part of a plan that the outer iteration needs.

    Attributes:
        scaled_damp: the damping of the scaled operator.
        unit: a power of two per item, by which A is divided.
        inverse: an approximate inverse of the normal operator.
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


@dataclass(frozen=True)
class _Iterate:
    """An iterate: u, its image, the residual g of the normal equations, and the norm of g relative to its target."""

    u: Tensor
    image: Tensor
    g: Tensor
    ratio: Tensor


class Outer:
    r"""Flexible conjugate gradients on the normal equations of A, preconditioned by the border inverse.

    Residual side: :math:`(AA^H + \mu) u = y` (or ``A v``), ``x = A^H u``. Solution side:
    :math:`(A^HA + \mu) u = A^H y` (or ``v``), ``x = u``. ``image`` is ``A^H u`` on the residual side and ``A u - y`` on
    the other, so that the data need not be stored. ``g`` is the residual of the normal equations.

    Args:
        plan: the operator, and the inverse that preconditions.
        tolerances: of the certificate.
        y: data of the least-squares problem; None where ``v`` is given.
        v: the right-hand side of the normal equations on inputs, instead of ``y``.
        max_iter: limit on the border iterations of all steps together.
        error_share: the part of x that errors along small singular values may have; None: rtol alone decides.
        beyond_rounding: go on where the gradient is within its rounding, as far as the steps lead.

    Attributes:
        u: the best iterate.
        image: that of u, where it is x.
        tolerance_ratio: the norm of its g in units of its target; at most 1 where the certificate will hold.
        norm_a: the largest ``||A p|| / ||p||`` of a step, a lower bound of the norm of the scaled A.
        steps: the steps taken.
        iterations: the iterations on the border, per item.
    """

    image: Tensor | None
    tolerance_ratio: Tensor

    def __init__(
        self,
        plan: OuterPlan,
        *,
        tolerances: Tolerances,
        y: Tensor | None = None,
        v: Tensor | None = None,
        max_iter: int | None = None,
        error_share: float | None = None,
        beyond_rounding: bool = False,
    ) -> None:
        self.plan, self.A, self.tolerances = plan, plan.scaled, tolerances
        self.max_iter, self.error_share, self.beyond_rounding = max_iter, error_share, beyond_rounding
        self.residual_side = plan.inverse.side == "residual"
        A = self.A
        inputs, outputs = (ItemSpace(shape, A.dtype, A.device) for shape in (A.in_shape, A.out_shape))
        self.space, self.image_space = (outputs, inputs) if self.residual_side else (inputs, outputs)
        data, shape = (y, A.out_shape) if y is not None else (v, A.in_shape)
        assert data is not None
        factor_batch = plan.inverse.embedding.batch_shape
        self.batch = broadcast_shapes(data.shape[: data.ndim - len(shape)], factor_batch)
        data = data.expand(*self.batch, *shape)
        self.unit = binary_unit(ItemSpace(shape, A.dtype, A.device).norm(data))
        data = data / over_items(self.unit, len(shape))
        self.damp = plan.scaled_damp.expand(self.batch)
        self.mu = self.damp**2
        self.given_norm = (inputs if y is None else outputs).norm(data)
        self.norm_a = torch.zeros_like(self.given_norm)
        self.iterations = torch.zeros(self.batch, dtype=torch.int64, device=A.device)
        self.steps = 0
        self.has_data = y is not None
        self.f: Tensor | None = (
            None  # the right-hand side; not needed with data on the solution side, where the image contains them
        )
        if self.has_data and not self.residual_side:
            image = data.neg()
            g = A.adjoint(image).neg_()
        else:
            self.f = g = A.apply(data) if self.residual_side and not self.has_data else data
            image = g.new_zeros(*self.batch, *self.image_space.item_shape)
        u = torch.zeros_like(g)
        self._origin: _Iterate | None = _Iterate(u, image, g, self._tolerance_ratio(u, image, g))

    def run(self) -> None:
        """Iterate, once, until every item meets its target or no longer improves; ``u`` is then the best iterate."""
        assert self._origin is not None
        direction, iterate, self._origin = FlexibleDirection(self.mu), self._origin, None
        self.u, self.image = iterate.u, iterate.image if self.residual_side else None
        self.tolerance_ratio = torch.full_like(iterate.ratio, torch.inf)
        growth = 0.0  # the residual after a step over its border tolerance
        stalled = torch.zeros_like(self.iterations)  # steps without halving
        while True:
            stalled = torch.where(iterate.ratio < 0.5 * self.tolerance_ratio, 0, stalled + 1)
            self._update_best(iterate)
            active = (self.tolerance_ratio > 1) & (stalled < _PATIENCE)
            if self.steps == _OUTER_LIMIT or self.exhausted or not bool(active.any()):
                break
            tolerance, before = self._border_tolerance(iterate.ratio, active, growth), iterate.ratio
            iterate = self._step(direction, iterate, active, tolerance)
            observed = float((iterate.ratio / (before * tolerance)).where(active & (before > 0), 0).amax())
            growth = max(growth, observed, 1.0)

    def _update_best(self, iterate: _Iterate) -> None:
        """Store the iterate for the items where it is the best so far."""
        better = iterate.ratio < self.tolerance_ratio
        if bool(better.all()):  # saves a copy
            self.u, self.tolerance_ratio = iterate.u, iterate.ratio
            self.image = iterate.image if self.residual_side else None
            return
        self.u = torch.where(self._mask(better, self.space), iterate.u, self.u)
        if self.image is not None:
            self.image = torch.where(self._mask(better, self.image_space), iterate.image, self.image)
        self.tolerance_ratio = torch.where(better, iterate.ratio, self.tolerance_ratio)

    def _step(self, direction: FlexibleDirection, iterate: _Iterate, active: Tensor, tolerance: float) -> _Iterate:
        """Take one step, with the border system solved to the relative residual ``tolerance``."""
        limit = () if self.max_iter is None else (self.max_iter - int(self.iterations.max()),)
        z, count = self.plan.inverse(iterate.g.to(self.plan.inverse.convolution.dtype), tolerance, *limit)
        self.steps += 1
        self.iterations += count * active
        z = z.to(self.A.dtype)
        p, image, alpha = direction.step(z, iterate.g, self.space, self.image_space, self._image)
        self.norm_a, alpha = direction.norm, alpha * active
        u = self.space.add(iterate.u, alpha, p)
        # the image before is x on the residual side, and may be the best; on the other side it is of no more use
        into = image if self.residual_side else iterate.image
        image = self.image_space.add(iterate.image, alpha, image, out=into)
        g = self._residual(image) - self.space.broadcast(self.mu) * u
        return _Iterate(u, image, g, self._tolerance_ratio(u, image, g))

    @property
    def exhausted(self) -> bool:
        """Tell whether the limit on the border iterations has been reached."""
        return self.max_iter is not None and int(self.iterations.max()) >= self.max_iter

    def _border_tolerance(self, tolerance_ratio: Tensor, active: Tensor, growth: float) -> float:
        """Choose the relative residual to which this step solves the border system.

        The residual after a step is about ``growth`` times that of its border system, so that the worst item needs one
        over ``growth`` times its tolerance ratio. Where the factors have a floor, that limits the step instead.
        """
        if not self.plan.inverse.exact:
            return _FLOORED_TOLERANCE[self.plan.factor_dtype]
        if growth == 0 and self.plan.inverse.damped:
            growth = _FIRST_GUESS / self.plan.inverse.relative_damp
        wanted = _MARGIN / (max(growth, 1.0) * float(torch.where(active, tolerance_ratio, 0).amax()))
        finest = torch.finfo(self.plan.factor_dtype).eps ** 0.7  # the accuracy of the border's residual
        return min(max(wanted, finest), _MARGIN)

    def _image(self, u: Tensor) -> Tensor:
        """``A^H u`` on the residual side, ``A u`` on the solution side."""
        return self.A.adjoint(u) if self.residual_side else self.A.apply(u)

    def _residual(self, image: Tensor) -> Tensor:
        """``f - A A^H u`` or ``f - A^H A u``; for data y as ``-A^H (A u - y)``, which avoids cancellation."""
        normal = self.A.apply(image) if self.residual_side else self.A.adjoint(image)
        return -normal if self.f is None else self.f - normal

    def _tolerance_ratio(self, u: Tensor, image: Tensor, g: Tensor) -> Tensor:
        """The norm of the residual g relative to its target; at most 1 where the certificate will be met."""
        g_norm, rtol = self.space.norm(g), self.tolerances.rtol
        if not self.has_data:
            scale = self.given_norm * (torch.ones_like(g_norm) if not self.residual_side else self.norm_a)
            return torch.where(g_norm == 0, 0, g_norm / (rtol * scale))
        unit = torch.finfo(g_norm.dtype).tiny
        image_norm = self.image_space.norm(image)
        if self.residual_side:
            x_norm, misfit = image_norm, self.space.norm(g + self.space.broadcast(self.mu) * u)
        else:
            x_norm, misfit = self.space.norm(u), image_norm
        total = torch.hypot(misfit, self.damp * x_norm)
        bound = torch.maximum(rtol * self.given_norm, self.tolerances.atol / self.unit)
        by_residual = total / bound.clamp_min(unit)
        norm = self.plan.inverse.norm_bound
        rounding = 4 * torch.finfo(self.A.dtype).eps * (norm * x_norm + self.given_norm)
        if self.A.dtype != self.plan.A.dtype:  # x is stored in float32: where it is short, 5 % of that rounding will do
            stored = 0.05 * self.tolerances.eps * (norm * x_norm + self.given_norm)
            rounding = torch.where(EXCUSED * norm * x_norm <= self.given_norm, stored, rounding)
        if self.beyond_rounding:
            rounding = torch.zeros_like(rounding)
        # the certificate judges the gradient: g, or A^H g on the residual side, where norm bounds what A^H does to it
        target = torch.maximum(rtol * total * self.norm_a, rounding * norm)
        if self.residual_side:
            target = torch.where(self.mu == 0, bound, target / norm)
        elif self.error_share is not None:
            finest = torch.maximum(self.error_share * self.mu * x_norm, rounding * norm)
            target = torch.where(self.mu > 0, torch.minimum(target, finest), target)
        # Relative to the objective at x = 0.
        downhill = total / ((1 + self.tolerances.eps**0.5) * self.given_norm).clamp_min(unit)
        tolerance_ratio = torch.minimum(by_residual, torch.maximum(g_norm / target.clamp_min(unit), downhill))
        return torch.where(g_norm == 0, 0, tolerance_ratio)

    def warn(self, plan: object) -> None:
        """Warn of items far from their target, for calls that return no certificate."""
        failed = self.tolerance_ratio > 10
        if bool(failed.any()):
            text = f"{int(failed.sum())} of {failed.numel()} item(s) did not converge ({plan!r})"
            warnings.warn(text, ConvergenceWarning, stacklevel=4)

    @staticmethod
    def _mask(items: Tensor, space: ItemSpace) -> Tensor:
        return over_items(items, len(space.item_shape))

    def _scaled_back(self, tensor: Tensor, space: ItemSpace) -> Tensor:
        return tensor * space.broadcast(self.unit / self.plan.unit)

    @property
    def x(self) -> Tensor:
        """The solution, in the units of y."""
        if self.residual_side:
            assert self.image is not None
            return self._scaled_back(self.image, self.image_space)
        x = self._scaled_back(self.u, self.space)
        return x if not self.has_data or self.plan.read is None else x * self.plan.read

    def dual(self) -> Tensor:
        """``u`` on the residual side, ``A u`` on the solution side: the result of the adjoint of the inverse."""
        if self.residual_side:
            return self._scaled_back(self.u, self.space)
        return self._scaled_back(self._image(self.u), self.image_space)


def iterated(make: Callable[[], Outer]) -> Outer:
    """Run the outer iteration, and repeat it without factors if those of the border have lost too many digits.

    Args:
        make: makes the iteration; it is called again for the repetition, so that nothing has to be stored for that.
    """
    outer = make()
    outer.run()
    inverse = outer.plan.inverse
    missed = bool((outer.tolerance_ratio > 1).any()) and not outer.exhausted
    if isinstance(inverse.direct, DirectInverse) and missed:
        inverse.give_up_factors()
        outer = make()
        outer.run()
    return outer


def needs_no_iteration(solution: Solution) -> bool:
    """Tell whether all items have converged, none of them only because its gradient is within rounding."""
    return solution.all_converged and (solution.excused is None or not bool(solution.excused.any()))


def confirmed(solve: Callable[[bool], Solution], space: ItemSpace) -> Solution:
    """Solve, and check items that pass only because of the rounding of their gradient by a second, longer solve.

    Rounding of the size of the gradient can hide errors along small singular values. Where the two solutions differ by
    more than a tenth, the second is taken if it passes without rounding, and otherwise the item has not converged.

    Args:
        solve: makes a solution with :attr:`Solution.excused`; True: iterate on beyond the rounding of the gradient.
        space: the arithmetic of x.
    """
    first = solve(False)
    if first.excused is None or not bool(first.excused.any()):
        return first
    second = solve(True)
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
