r"""Flexible conjugate gradients on the normal equations, preconditioned by the inverse of similar ones.

.. math:: (A^HA + \mathrm{damp}^2 L^HL)\, x = A^H y

The operator itself computes their residual in every step, in double precision: a preconditioner changes the number of
steps and nothing else. Every item of a batch has step lengths of its own.

The border's own outer iteration (:mod:`lsconv.border.outer_iteration`) takes the same steps, but few: it gives up where
five do not halve the residual, and solves the border more precisely from step to step. Here a preconditioner of another
operator takes dozens to hundreds of steps, whose residual may stand still for long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request, least_shift
from lsconv.border.penalty import common_grid_filters
from lsconv.errors import MethodError
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit
from lsconv.krylov.loop.certificate import TALL_NULL_SHARE, NormBounds, NullSpaceBound
from lsconv.krylov.loop.flexible_direction import FlexibleDirection
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import PenalisedPlan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import direct_rtol, double
from lsconv.operators.observed import MeasuredRows
from lsconv.operators.varying_convolution import VaryingConvolution
from lsconv.tiled.schwarz import SchwarzInverse

__all__ = ["NormalIteration", "VaryingPlan", "WeightedPlan"]


class NormalIteration(PenalisedPlan):
    """Conjugate gradients on the normal equations, for plans that bring a preconditioner.

    Args:
        A: the operator.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.

    Attributes:
        factor_batch: the batch dimensions of the preconditioner.
        has_null_space: A has, or may have, fewer outputs than inputs, so that x may have a part in its null space.
    """

    iterates = True
    falls_back_on_lsmr = True
    factor_batch: tuple[int, ...] = ()
    has_null_space: bool = True

    def __init__(self, A: LinearOperator, damp: Tensor | float, L: LinearOperator | None = None) -> None:
        self.A, self.L = A, L
        self.damp = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        self.precise = A.to(dtype=double(A.dtype))
        self.problem = Penalised(self.precise, self.damp, None if L is None else L.to(dtype=self.precise.dtype))
        self.stack, self.mu = self.problem.stack, self.problem.identity_damp.square()
        self.space, self.images = (
            ItemSpace(shape, self.precise.dtype, A.device) for shape in (A.in_shape, self.stack.out_shape)
        )

    def precondition(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the preconditioner to a residual of the normal equations, to a relative tolerance."""
        raise NotImplementedError

    @torch.no_grad()
    def solve(
        self,
        y: Tensor,
        *,
        x_prior: Tensor | None = None,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
    ) -> Solution:
        """The solution for ``y`` of shape ``(*batch, *A.out_shape)``, with a certificate computed in float64.

        Args:
            y: right-hand sides, finite.
            x_prior: what the penalty pulls to, where there is one.
            rtol: relative tolerance of residual or gradient; None: 1e-6 in float32, 1e-10 in float64.
            atol: absolute tolerance, in the units of y.
            max_iter: limit on the iterations.
        """
        tolerances = self.tolerances(rtol, atol)
        data = self.problem.data(y, x_prior)
        null_share = tolerances.null_share if self.has_null_space else TALL_NULL_SHARE
        x, iterations, norm = self._least_squares(data, tolerances.rtol, atol, max_iter, null_share=null_share)
        judge = self.problem.judge(
            tolerances,
            self.A.dtype,
            norm=NormBounds(norm),
            null_space=NullSpaceBound(null_share, exists=lambda: self._null_suspects(x, data, null_share)),
        )
        return self.problem.solution(judge, x, y, x_prior=x_prior, iterations=iterations)

    def _null_suspects(self, x: Tensor, data: Tensor, null_share: float) -> Tensor:
        """Mark the items whose x may have more than ``null_share`` of its length in the null space of A; here all."""
        return torch.ones((), dtype=torch.bool, device=x.device)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, ``(*batch, *out_shape)``, without a certificate."""
        rtol = direct_rtol(self.A.dtype, rtol)
        return self._least_squares(self.problem.data(y), rtol, 0.0, None)[0].to(self.A.dtype)

    @torch.no_grad()
    def approximate(self, y: Tensor, tolerance: float) -> Tensor:
        """The solution for ``y`` up to an error of ``tolerance`` times the root of its objective.

        The error is in the norm of the normal equations, ``||[A; damp L] e||``.
        """
        data = self.problem.data(y)
        return self._least_squares(data, 0.0, 0.0, None, tolerance=tolerance)[0].to(self.A.dtype)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.precise.apply(self._normal(v, rtol)).to(self.A.dtype)

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g``."""
        return self._normal(g, rtol).to(self.A.dtype)

    def _least_squares(
        self,
        data: Tensor,
        rtol: float,
        atol: float,
        max_iter: int | None,
        *,
        tolerance: float = 0.0,
        null_share: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The x for data of the stack ``[A; damp L]``, the iterations, and a lower bound of its norm, per item."""
        images, batch = self.images, self._batch(data, self.stack.out_shape)
        data = data.expand(*batch, *self.stack.out_shape)
        unit = binary_unit(images.safe_norm(data))
        data = data * images.broadcast(1 / unit)
        size = images.norm(data)
        smallest_total = torch.maximum(rtol * size, atol / unit)

        def residual(x: Tensor, image: Tensor) -> Tensor:
            return self.stack.adjoint(data - image) - self.space.broadcast(self.mu) * x

        def bound(x: Tensor, image: Tensor, norm: Tensor) -> Tensor:
            x_norm = self.space.norm(x)
            total = torch.hypot(images.norm(data - image), self.mu.sqrt() * x_norm)
            rounding = torch.finfo(data.dtype).eps * (norm * x_norm + size)
            # along small singular values the gradient is damp^2 times the error of x
            visible = null_share / 2 * self.mu * x_norm if self.L is None else torch.full_like(norm, torch.inf)
            return torch.maximum(
                torch.minimum(norm * rtol * torch.maximum(total, smallest_total) / 2, visible), norm * rounding
            )

        def error_bound(x: Tensor, image: Tensor) -> Tensor:
            objective = images.norm(data - image).square() + self.mu * self.space.norm(x).square()
            return tolerance**2 * objective

        x, iterations, norm = self._iterate(batch, residual, bound, max_iter, error_bound if tolerance else None)
        return x * self.space.broadcast(unit), iterations, norm

    def _normal(self, g: Tensor, rtol: float | None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` to a relative residual of ``rtol``."""
        rtol = direct_rtol(self.A.dtype, rtol)
        batch = self._batch(g, self.A.in_shape)
        unit = binary_unit(self.space.safe_norm(g.detach().to(self.precise.dtype)))
        g = g.detach().to(self.precise.dtype) * self.space.broadcast(1 / unit)
        g = g.expand(*batch, *self.A.in_shape)
        goal = 0.1 * rtol * self.space.norm(g)

        def residual(x: Tensor, image: Tensor) -> Tensor:
            return g - self.stack.adjoint(image) - self.space.broadcast(self.mu) * x

        x, _, _ = self._iterate(batch, residual, lambda x, image, norm: goal, None)
        return x * self.space.broadcast(unit)

    def _batch(self, tensor: Tensor, item: tuple[int, ...]) -> torch.Size:
        batch = tensor.shape[: tensor.ndim - len(item)]
        return broadcast_shapes(batch, self.damp.shape, self.A.batch_shape, self.factor_batch)

    def _iterate(
        self,
        batch: torch.Size,
        residual: Callable[[Tensor, Tensor], Tensor],
        bound: Callable[[Tensor, Tensor, Tensor], Tensor],
        max_iter: int | None,
        error_bound: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The iteration: x, its length per item, and the largest ``||stack p|| / ||p||`` met.

        Args:
            batch: the batch dimensions.
            residual: that of the normal equations, of x and its image.
            bound: the norm that it has to fall to, of x, its image and the norm of the stack.
            max_iter: limit on the iterations.
            error_bound: the squared error in the norm of the preconditioner that suffices, of x and its image; None: go
                on to ``bound``.
        """
        space = self.space
        x = torch.zeros(*batch, *self.A.in_shape, dtype=self.precise.dtype, device=self.A.device)
        image = x.new_zeros(*batch, *self.stack.out_shape)
        g = residual(x, image)
        direction = FlexibleDirection(self.mu.expand(batch))
        iterations = torch.zeros(batch, dtype=torch.int64, device=x.device)
        stalled, best = torch.zeros_like(iterations), torch.full_like(direction.norm, torch.inf)
        for _ in range(1000 if max_iter is None else max_iter):
            size = space.norm(g)
            stalled = torch.where(size < 0.9 * best, 0, stalled + 1)
            best = torch.minimum(best, size)
            active = (size > bound(x, image, direction.norm)) & (stalled < 100 + iterations // 2)
            if not bool(active.any()):
                break
            z = self.precondition(g, 1e-3)
            if error_bound is not None:
                active = active & (space.inner(z, g) > error_bound(x, image))
                if not bool(active.any()):
                    break
            p, p_image, alpha = direction.step(z, g, space, self.images, self.stack.apply)
            alpha = alpha * active
            x = x + space.broadcast(alpha) * p
            image = image + self.images.broadcast(alpha) * p_image
            g = residual(x, image)
            iterations = iterations + active
        return x, iterations, direction.norm


class WeightedPlan(NormalIteration):
    r"""Setup for a convolution with weights, or a mask, before it; :meth:`solve` answers right-hand sides.

    .. math:: \min_x \sum_i w_i |(Ax)_i - y_i|^2 + \mathrm{damp}^2 \|Lx\|^2

    The preconditioner is :math:`(\bar w A^HA + \mathrm{damp}^2 L^HL)^{-1}`, with the mean weight :math:`\bar w`, exact
    through the border of A. The number of steps grows with the deviation of the weights, averaged by the blur, from
    their mean.

    Args:
        A: the operator, weights included.
        rows: A as a convolution and the weights of its outputs.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.

    Raises:
        MethodError: the convolution, or L, is not served by the border.
    """

    reason = "weights, or masks of items, vary: an iteration, preconditioned by the border of their mean"
    inverse: NormalInverse

    @torch.no_grad()
    def __init__(
        self, A: LinearOperator, rows: MeasuredRows, damp: Tensor | float, L: LinearOperator | None = None
    ) -> None:
        super().__init__(A, damp, L)
        core = rows.core.to(dtype=double(A.dtype))
        if not isinstance(core, Convolution):
            raise MethodError(f"A: expected weights before a convolution, got {A!r}")
        core = core.with_parameters([core.weight.detach()])
        weights = rows.weights.double().flatten(rows.scale.ndim - len(core.out_shape))
        mean = weights.mean(-1)
        mean = torch.where(mean > 0, mean, 1)
        self.mean, self._positive = mean, bool((weights > 0).all())
        self.ratio = torch.where(weights > 0, weights, torch.inf).amin(-1).reciprocal() * weights.amax(-1)
        floor = least_shift(core.weight.real.dtype, damped=True)
        terms = common_grid_filters(core, L)
        self.inverse = normal_inverse(Request.of(core, self.damp / mean.sqrt(), terms, floor=floor, side="solution"))
        self.factor_batch = tuple(self.inverse.embedding.batch_shape)
        self.inverse.factorise_if_cheaper(self.factor_batch, 10)

    def precondition(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the inverse of the normal operator of the mean weight."""
        return self.inverse(g, tolerance)[0]

    def _null_suspects(self, x: Tensor, data: Tensor, null_share: float) -> Tensor:
        """Mark the items whose x may have a larger part in the null space of A than its share.

        With positive weights, the weighted A has the null space of A, on which the preconditioner M divides by its
        shift alone. The length of ``M^-1 g``, computed to a thousandth, bounds that of the part of x there, unless the
        shift of M is not that of the damping.
        """
        if not (self._positive and self.inverse.exact):
            return super()._null_suspects(x, data, null_share)
        space = self.space
        g = self.stack.adjoint(data - self.stack.apply(x)) - space.broadcast(self.mu) * x
        unit = binary_unit(space.safe_norm(g))
        part = space.norm(self.precondition(g * space.broadcast(1 / unit), 1e-3)) * unit / self.mean
        part = part + 1e-3 * space.safe_norm(g) / self.mu
        return ~(part <= null_share * space.norm(x))

    def __repr__(self) -> str:
        return (
            f"WeightedPlan(weights up to {float(self.ratio.max()):.3g} times the least, preconditioner of the mean: "
            f"{self.inverse.describe()})"
        )


class VaryingPlan(NormalIteration):
    """Setup for a convolution whose kernel varies; :meth:`solve` answers right-hand sides.

    The preconditioner is made of tiles with the kernel of their place (:mod:`lsconv.tiled.schwarz`).

    Args:
        A: the operator, with a mask or weights before it where there are some.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.
        refuse_if_slower: refuse where LSMR should take less time.

    Raises:
        MethodError: the tiles do not serve A or L, or would not pay.
    """

    reason = "the kernel varies: an iteration, preconditioned by tiles with the kernel of their place"
    inverse: SchwarzInverse

    @torch.no_grad()
    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        L: LinearOperator | None = None,
        *,
        refuse_if_slower: bool = False,
    ) -> None:
        rows, core = _rows_and_core(A)
        if not isinstance(core, VaryingConvolution):
            raise MethodError(f"A: expected a VaryingConvolution, with weights before it or not, got {A!r}")
        super().__init__(A, damp, L)
        core = core.with_parameters([tensor.detach() for tensor in core.parameters()]).to(dtype=double(A.dtype))
        weights = None if rows is None else rows.weights
        penalty = None if L is None else L.to(dtype=core.dtype)
        self.inverse = SchwarzInverse(core, self.damp, penalty, weights, refuse_if_slower=refuse_if_slower)
        self.factor_batch = tuple(self.damp.shape)
        self.has_null_space = rows is not None or A.out_numel < A.in_numel

    def precondition(self, g: Tensor, tolerance: float) -> Tensor:
        """Apply the Schwarz preconditioner."""
        return self.inverse(g, tolerance)

    @staticmethod
    def serves(A: LinearOperator) -> bool:
        """Tell whether A is a convolution whose kernel varies, with a mask or weights before it or not."""
        return isinstance(_rows_and_core(A)[1], VaryingConvolution)

    def __repr__(self) -> str:
        return f"VaryingPlan({self.A.in_shape} -> {self.A.out_shape}, {self.inverse.describe()})"


def _rows_and_core(A: LinearOperator) -> tuple[MeasuredRows | None, LinearOperator]:
    """Split A into a mask or weights on its outputs, None where there are none, and the operator that they act on."""
    rows = MeasuredRows.of(A)
    return rows, A if rows is None else rows.core
