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

from lsconv.border.normal_inverse import NormalInverse
from lsconv.errors import ConvergenceWarning
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit
from lsconv.krylov.loop.certificate import LENGTH_LIMIT, Tolerances
from lsconv.krylov.loop.flexible_direction import FlexibleDirection
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items

__all__ = [
    "NormalEquations",
    "OuterPlan",
    "OuterSolution",
    "converged_without_excuse",
    "iterate_or_drop_factors",
    "outer_iteration",
    "solve_again_if_excused",
]

# An item is stopped after this many steps without halving its residual; the fallback answers it.
_PATIENCE = 5
# The residual that a step aims at, relative to the target: below one, because its prediction is rough.
_MARGIN = 0.3


class OuterPlan(Protocol):
    """The part of a plan that the outer iteration needs.

    Attributes:
        scaled_damp: the damping of the scaled operator.
        unit: a power of two per item, by which A is divided.
        inverse: an approximate inverse of the normal operator.
        factor_dtype: the real dtype of its factors.
        observed_inputs: the inputs that some output reads; None: all.
    """

    scaled_damp: Tensor
    unit: Tensor
    inverse: NormalInverse
    factor_dtype: torch.dtype
    observed_inputs: Tensor | None

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
    """An iterate of the normal equations.

    Attributes:
        u: the unknowns, ``(*batch, *space)``.
        image: that of u, ``(*batch, *image_space)``.
        g: the residual, of the shape of u.
        ratio: the norm of g relative to its target, ``(*batch)``.
    """

    u: Tensor
    image: Tensor
    g: Tensor
    ratio: Tensor


class NormalEquations:
    r"""The normal equations of A for one right-hand side, and how nearly an iterate solves them.

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
    """

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
        self.batch = broadcast_shapes(data.shape[: data.ndim - len(shape)], plan.inverse.embedding.batch_shape)
        data = data.expand(*self.batch, *shape)
        self.unit = binary_unit(ItemSpace(shape, A.dtype, A.device).norm(data))
        data = data / over_items(self.unit, len(shape))
        self.damp = plan.scaled_damp.expand(self.batch)
        self.mu = self.damp**2
        self.given_norm = (inputs if y is None else outputs).norm(data)
        self.has_data = y is not None
        # the right-hand side; not needed with data on the solution side, where the image contains them
        self.f: Tensor | None = None
        if self.has_data and not self.residual_side:
            image = data.neg()
            g = A.adjoint(image).neg_()
        else:
            self.f = g = A.apply(data) if self.residual_side and not self.has_data else data
            image = g.new_zeros(*self.batch, *self.image_space.item_shape)
        u = torch.zeros_like(g)
        ratio = self._tolerance_ratio(u, image, g, torch.zeros_like(self.given_norm))
        self._origin: _Iterate | None = _Iterate(u, image, g, ratio)

    def start(self) -> _Iterate:
        """Return the iterate u = 0, once, so that nobody holds its vectors."""
        assert self._origin is not None
        origin, self._origin = self._origin, None
        return origin

    def step(self, iterate: _Iterate, direction: FlexibleDirection, z: Tensor, active: Tensor) -> _Iterate:
        """Go one step along the direction that z, the preconditioned residual, leads to; other items stay."""
        p, image, alpha = direction.step(z, iterate.g, self.space, self.image_space, self.image)
        alpha = alpha * active
        u = self.space.add(iterate.u, alpha, p)
        # the image before is x on the residual side, and may be the best; on the other side it is of no more use
        image = self.image_space.add(iterate.image, alpha, image, out=image if self.residual_side else iterate.image)
        # f - (A A^H + mu) u or f - (A^H A + mu) u; for data y -A^H (A u - y) - mu u, which cancels nothing
        normal = self.A.apply(image) if self.residual_side else self.A.adjoint(image)
        g = (-normal if self.f is None else self.f - normal) - self.space.broadcast(self.mu) * u
        return _Iterate(u, image, g, self._tolerance_ratio(u, image, g, direction.norm))

    def image(self, u: Tensor) -> Tensor:
        """``A^H u`` on the residual side, ``A u`` on the solution side."""
        return self.A.adjoint(u) if self.residual_side else self.A.apply(u)

    def _tolerance_ratio(self, u: Tensor, image: Tensor, g: Tensor, norm_a: Tensor) -> Tensor:
        """The norm of the residual g in units of its target; at most 1 where the certificate will hold."""
        g_norm, rtol = self.space.norm(g), self.tolerances.rtol
        if not self.has_data:
            scale = self.given_norm * (torch.ones_like(g_norm) if not self.residual_side else norm_a)
            return torch.where(g_norm == 0, 0, g_norm / (rtol * scale))
        smallest = torch.finfo(g_norm.dtype).tiny
        image_norm = self.image_space.norm(image)
        if self.residual_side:
            x_norm, misfit = image_norm, self.space.norm(g + self.space.broadcast(self.mu) * u)
        else:
            x_norm, misfit = self.space.norm(u), image_norm
        total = torch.hypot(misfit, self.damp * x_norm)
        bound = torch.maximum(rtol * self.given_norm, self.tolerances.atol / self.unit)
        by_residual = total / bound.clamp_min(smallest)
        norm = self.plan.inverse.norm_bound
        rounding = 4 * torch.finfo(self.A.dtype).eps * (norm * x_norm + self.given_norm)
        # x is rounded to float32 in the end. Where it is short, so that no small singular value has lengthened it, the
        # residual need not be smaller than 5 % of that rounding.
        if self.A.dtype != self.plan.A.dtype:
            stored = 0.05 * self.tolerances.eps * (norm * x_norm + self.given_norm)
            rounding = torch.where(LENGTH_LIMIT * norm * x_norm <= self.given_norm, stored, rounding)
        if self.beyond_rounding:
            rounding = torch.zeros_like(rounding)
        # the certificate judges the gradient: g, or A^H g on the residual side, where norm bounds what A^H does to it
        target = torch.maximum(rtol * total * norm_a, rounding * norm)
        if self.residual_side:
            target = torch.where(self.mu == 0, bound, target / norm)
        elif self.error_share is not None:
            finest = torch.maximum(self.error_share * self.mu * x_norm, rounding * norm)
            target = torch.where(self.mu > 0, torch.minimum(target, finest), target)
        # Relative to the objective at x = 0.
        downhill = total / ((1 + self.tolerances.eps**0.5) * self.given_norm).clamp_min(smallest)
        tolerance_ratio = torch.minimum(by_residual, torch.maximum(g_norm / target.clamp_min(smallest), downhill))
        return torch.where(g_norm == 0, 0, tolerance_ratio)

    def in_data_units(self, tensor: Tensor, space: ItemSpace) -> Tensor:
        """Convert to the units of the data."""
        return tensor * space.broadcast(self.unit / self.plan.unit)


@dataclass(frozen=True)
class OuterSolution:
    """The best iterate of an outer iteration.

    Attributes:
        equations: what it solves.
        u: the iterate.
        image: that of u, where it is x.
        tolerance_ratio: the norm of its g in units of its target; at most 1 where the certificate will hold.
        norm_a: the largest ``||A p|| / ||p||`` of a step, a lower bound of the norm of the scaled A.
        steps: the steps taken.
        iterations: the iterations on the border, per item.
        exhausted: whether these have reached their limit.
    """

    equations: NormalEquations
    u: Tensor
    image: Tensor | None
    tolerance_ratio: Tensor
    norm_a: Tensor
    steps: int
    iterations: Tensor
    exhausted: bool

    @property
    def x(self) -> Tensor:
        """The solution, in the units of y."""
        equations = self.equations
        if equations.residual_side:
            assert self.image is not None
            return equations.in_data_units(self.image, equations.image_space)
        x, observed = equations.in_data_units(self.u, equations.space), equations.plan.observed_inputs
        return x if not equations.has_data or observed is None else x * observed

    def dual(self) -> Tensor:
        """``u`` on the residual side, ``A u`` on the solution side: what the adjoint of the inverse gives."""
        equations = self.equations
        if equations.residual_side:
            return equations.in_data_units(self.u, equations.space)
        return equations.in_data_units(equations.image(self.u), equations.image_space)

    def warn(self, plan: object) -> None:
        """Warn of items far from their target, for calls that return no certificate."""
        failed = self.tolerance_ratio > 10
        if bool(failed.any()):
            text = f"{int(failed.sum())} of {failed.numel()} item(s) did not converge ({plan!r})"
            warnings.warn(text, ConvergenceWarning, stacklevel=4)


def outer_iteration(equations: NormalEquations) -> OuterSolution:
    """Iterate by flexible conjugate gradients until every item meets its target or no longer improves."""
    inverse, space, images = equations.plan.inverse, equations.space, equations.image_space
    direction, iterate = FlexibleDirection(equations.mu), equations.start()
    iterations = torch.zeros(equations.batch, dtype=torch.int64, device=equations.A.device)
    stalled = torch.zeros_like(iterations)  # steps without halving
    u, image, ratio = iterate.u, iterate.image, torch.full_like(iterate.ratio, torch.inf)  # the best so far
    steps, growth, left = 0, 0.0, equations.max_iter
    while True:
        stalled = torch.where(iterate.ratio < 0.5 * ratio, 0, stalled + 1)
        better = iterate.ratio < ratio
        if bool(better.all()):  # saves a copy
            u, image = iterate.u, iterate.image
        else:
            u = torch.where(over_items(better, len(space.item_shape)), iterate.u, u)
            if equations.residual_side:
                image = torch.where(over_items(better, len(images.item_shape)), iterate.image, image)
        ratio = torch.where(better, iterate.ratio, ratio)
        active = (ratio > 1) & (stalled < _PATIENCE)
        exhausted = left is not None and left <= 0
        if exhausted or not bool(active.any()):
            break
        tolerance = _border_tolerance(equations.plan, float(torch.where(active, iterate.ratio, 0).amax()), growth)
        z, count = inverse(iterate.g.to(inverse.convolution.dtype), tolerance, *(() if left is None else (left,)))
        steps, iterations = steps + 1, iterations + count * active
        left = None if equations.max_iter is None else equations.max_iter - int(iterations.max())
        before, iterate = iterate.ratio, equations.step(iterate, direction, z.to(equations.A.dtype), active)
        del z
        # the residual that a step has left, in units of its border tolerance
        observed = float((iterate.ratio / (before * tolerance)).where(active & (before > 0), 0).amax())
        growth = max(growth, observed, 1.0)
    best = image if equations.residual_side else None
    return OuterSolution(equations, u, best, ratio, direction.norm, steps, iterations, exhausted)


def _border_tolerance(plan: OuterPlan, ratio: float, growth: float) -> float:
    """The relative residual to which a step solves the border system: ``margin / (growth ratio)``.

    Args:
        plan: the operator and its inverse.
        ratio: the largest tolerance ratio of an item.
        growth: how often a step multiplies the residual of its border system, from the steps so far; 0: none yet. The
            first step assumes the largest possible, sigma_max / damp, which needs no margin. Factors with a floor reach
            no more than that, whatever the ratio is, and there the margin counts twice.
    """
    most = 1 / plan.inverse.relative_damp if plan.inverse.has_shift or not plan.inverse.exact else 1.0
    if not plan.inverse.exact:
        return _MARGIN**2 / most
    finest = torch.finfo(plan.factor_dtype).eps ** 0.7  # the border's residual has no more digits
    return min(max(_MARGIN / (max(growth or _MARGIN * most, 1.0) * ratio), finest), _MARGIN)


def iterate_or_drop_factors(make: Callable[[], NormalEquations]) -> OuterSolution:
    """Run the outer iteration; where factors keep it from its target, discard them for good and run it again.

    Args:
        make: prepares the equations; asked again where a run is repeated, so that none holds the data for that.
    """
    outer = outer_iteration(make())
    inverse = outer.equations.plan.inverse
    missed = bool((outer.tolerance_ratio > 1).any()) and not outer.exhausted
    if inverse.direct is not None and missed:
        inverse.give_up_factors()
        outer = outer_iteration(make())
    return outer


def converged_without_excuse(solution: Solution) -> bool:
    """Tell whether all items have converged, none of them only because its gradient is within rounding."""
    return solution.all_converged and (solution.excused is None or not bool(solution.excused.any()))


def solve_again_if_excused(solve: Callable[[bool], Solution], space: ItemSpace) -> Solution:
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
