r"""The border method for a convolution with a convolutional penalty: the stacked system and its plan.

.. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|Lx\|^2
          = \min_x \left\| \begin{pmatrix} A \\ \mathrm{damp}\, L \end{pmatrix} x
                         - \begin{pmatrix} y \\ 0 \end{pmatrix} \right\|^2

The stack is a truncated block-circulant operator too (:mod:`lsconv.border.penalty`), with more rows than columns per
frequency, so :class:`~lsconv.border.normal_inverse.NormalInverse` inverts :math:`A^HA + \mathrm{damp}^2 L^HL` through
its border, and the same outer iteration as for A alone, whose residuals A and L themselves compute, makes the answer
exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import Limits, plan_bytes, spared
from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request, least_shift, needs_double, scaled_to_unit
from lsconv.border.outer_iteration import (
    NormalEquations,
    converged_without_excuse,
    iterate_or_drop_factors,
    solve_again_if_excused,
)
from lsconv.border.penalty import Filter, Penalty, common_grid_filters
from lsconv.errors import ArgumentError
from lsconv.fourier.batched_linalg import frobenius
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.certificate import NormBounds, Tolerances
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import PenalisedPlan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import WORK_BYTES, broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.memory import allowed_bytes, check_fits

__all__ = ["StackedPlan"]


class StackedPlan(PenalisedPlan):
    """Setup for one convolution, penalty and damp > 0; :meth:`solve` answers right-hand sides.

    Args:
        A: a convolution with stride 1, zero padding or circular.
        L: the penalty: Gradient, Laplacian, Identity, stride-1 convolutions, scaled and stacked ones of these.
        damp: the damping, positive, a number or one per batch item.
        memory_limit: bytes that the plan may use; None: 60 % of what is free on A's device.
        limits: by which means a border is solved; None: those of the cost model.

    Attributes:
        work_bytes: of the stacked vectors of items that are solved for together on a CPU.

    Raises:
        MethodError: A and L are not crops of block-circulant operators on one grid.
        ArgumentError: damp is not positive.
        PlanMemoryError: the plan would need more than ``memory_limit``.

    Example:
        >>> from lsconv.border.stacked_plan import StackedPlan
        >>> A = lsconv.Conv2d(torch.rand(1, 1, 5, 5), in_size=(32, 32))
        >>> plan = StackedPlan(A, lsconv.Gradient((1, 32, 32)), damp=0.1)
        >>> bool(plan.solve(torch.randn(*A.out_shape)).converged)
        True
    """

    reason = "A and L are convolutions of one grid: the border of both is solved for"
    work_bytes = WORK_BYTES

    @torch.no_grad()
    def __init__(
        self,
        A: LinearOperator,
        L: LinearOperator,
        damp: Tensor | float,
        *,
        memory_limit: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        terms = common_grid_filters(A, L)
        assert isinstance(A, Convolution)
        self.A, self.L = A, L
        self.damp = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        if not bool((self.damp > 0).all()):
            raise ArgumentError(f"damp: a penalty L needs damp > 0 in every item, got {damp}")
        self.unit, scaled = scaled_to_unit(A)
        self._memory_limit, self._limits = memory_limit, limits
        self.factor_dtype, self.inverse = self._factor(scaled, terms)
        precise_L = L.to(dtype=double(A.dtype))
        self.problem = Penalised(A.with_parameters([A.weight.detach()]).to(dtype=double(A.dtype)), self.damp, precise_L)
        self.precise = self.problem.stack
        of_unit = Penalised(scaled.to(dtype=double(A.dtype)), self.damp / self.unit, precise_L)
        self.scaled, self.scaled_damp = of_unit.stack, of_unit.identity_damp
        self.x_in_range_of_adjoint = self.inverse.side == "residual"
        self.observed_inputs: Tensor | None = None  # all, as L reads every input

    def _factor(self, scaled: Convolution, terms: Sequence[Filter]) -> tuple[torch.dtype, NormalInverse]:
        """Invert the normal operator of the stack; in double precision where single would lose too much."""
        real, damp = scaled.weight.real.dtype, self.damp / self.unit
        allowed = allowed_bytes(self._memory_limit, self.A.device)
        penalty = Penalty(scaled, terms, damp)
        needed = plan_bytes(scaled, penalty=penalty)
        check_fits(needed, allowed, f"{self.A!r} with {self.L!r}")
        limits = spared(self._limits, self._memory_limit, needed)
        floor = {dtype: least_shift(dtype, damped=True) for dtype in (real, double(real))}
        if double(real) == real:
            return real, normal_inverse(Request.of(scaled, damp, terms, floor=floor[real], limits=limits))
        precise = scaled.to(dtype=double(scaled.dtype))
        needed = plan_bytes(precise, penalty=Penalty(precise, terms, damp))
        too_much = needed > allowed
        coarse = torch.finfo(real).eps
        if any(penalty.constrained):  # the saddle form cannot do without a floor
            if too_much or not needs_double(scaled, damp):
                return real, normal_inverse(Request.of(scaled, damp, terms, floor=floor[real], limits=limits))
        elif too_much or not needs_double(scaled, damp, coarse**0.5):
            inverse = normal_inverse(Request.of(scaled, damp, terms, floor=0.0, limits=limits))
            condition = frobenius(inverse.inverse.matrices).amax() * inverse.norm_squared_bound.amax()
            if too_much or bool(condition * coarse < 1e-2):  # which leaves two digits to float32
                return real, inverse
        real, limits = double(real), spared(self._limits, self._memory_limit, needed)
        return real, normal_inverse(Request.of(precise, damp, terms, floor=floor[real], limits=limits))

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
        """The certified solution for ``y`` of shape ``(*batch, *out_shape)``.

        Args:
            y: right-hand sides, finite.
            x_prior: what the penalty pulls to, ``(*batch, *in_shape)``.
            rtol: relative tolerance of residual or gradient; None: 1e-6 in float32, 1e-10 in float64.
            atol: absolute tolerance, in the units of y.
            max_iter: limit on the border iterations, all together.
        """
        batch = broadcast_shapes(
            y.shape[: y.ndim - len(self.A.out_shape)],
            () if x_prior is None else x_prior.shape[: x_prior.ndim - len(self.A.in_shape)],
            self.inverse.embedding.batch_shape,
        )
        if self._solves_one_by_one(batch):
            data = y.expand(*batch, *self.A.out_shape)
            priors = [None] * batch[0] if x_prior is None else list(x_prior.expand(*batch, *self.A.in_shape))
            return _stacked([
                self.solve(item, x_prior=prior, rtol=rtol, atol=atol, max_iter=max_iter)
                for item, prior in zip(data, priors, strict=True)
            ])  # fmt: skip
        tolerances = self.tolerances(rtol, atol)
        factors = self.inverse.factorise_if_cheaper(tuple(batch))
        if factors is not None:
            data_alone = self.problem.data_without_prior(y, x_prior)
            x = factors.solution(data_alone) / over_items(self.unit, len(self.A.in_shape))
            solution = self._certified(y, x, x_prior, tolerances)
            if converged_without_excuse(solution):
                return solution

        def solve(beyond_rounding: bool) -> Solution:
            outer = iterate_or_drop_factors(
                lambda: NormalEquations(
                    self,
                    y=self.problem.data(y, x_prior),
                    tolerances=tolerances,
                    max_iter=max_iter,
                    beyond_rounding=beyond_rounding,
                )
            )
            x, norm, iterations = outer.x, outer.norm_a * self.unit, outer.iterations
            del outer  # frees its vectors before the certificate
            return self._certified(y, x, x_prior, tolerances, norm, iterations)

        return solve_again_if_excused(solve, ItemSpace(self.A.in_shape, self.A.dtype, self.A.device))

    def _certified(
        self,
        y: Tensor,
        x: Tensor,
        x_prior: Tensor | None,
        tolerances: Tolerances,
        norm: Tensor | None = None,
        iterations: Tensor | int = 0,
    ) -> Solution:
        judge = self.problem.judge(tolerances, self.A.dtype, norm=NormBounds(norm, self.inverse.norm_bound * self.unit))
        return self.problem.solution(judge, x, y, x_prior=x_prior, iterations=iterations)

    def _solves_one_by_one(self, batch: Sequence[int]) -> bool:
        """Tell whether the items of the first dimension, which share their factors, are solved for one by one."""
        if len(batch) <= len(self.inverse.embedding.batch_shape) or batch[0] < 2 or self.A.device.type != "cpu":
            return False
        size = self.precise.out_numel * math.prod(batch[1:]) * torch.finfo(self.precise.dtype).bits // 8
        return size > self.work_bytes

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, without the certificate."""
        batch = broadcast_shapes(y.shape[: y.ndim - len(self.A.out_shape)], self.inverse.embedding.batch_shape)
        factors = self.inverse.factorise_if_cheaper(tuple(batch))
        if factors is None:
            x = iterate_or_drop_factors(
                lambda: NormalEquations(self, y=self.problem.data(y), tolerances=self.tolerances(rtol))
            ).x
        else:
            x = factors.solution(y.detach().to(self.precise.dtype)) / over_items(self.unit, len(self.A.in_shape))
        return x.to(self.A.dtype)

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2 L^H L)^{-1} g`` for ``g`` of shape ``(*batch, *in_shape)``.

        Args:
            g: right-hand sides, finite.
            rtol: relative tolerance of what is left of g; None: as in :meth:`solve`. Where ten times that is not
                reached, a :class:`ConvergenceWarning` says so.
        """
        g64 = g.detach().to(self.precise.dtype)
        outer = iterate_or_drop_factors(lambda: NormalEquations(self, v=g64, tolerances=self.tolerances(rtol)))
        outer.warn(self)
        return (outer.x / over_items(self.unit, len(self.A.in_shape))).to(self.A.dtype)

    def __repr__(self) -> str:
        shapes = f"{self.A.in_shape} -> {self.A.out_shape}"
        return f"StackedPlan({shapes}, L={type(self.L).__name__}, {self.inverse.describe()})"


def _stacked(parts: Sequence[Solution]) -> Solution:
    """Solutions of a direct method as one, along a new first dimension."""
    names = ("x", "codes", "converged", "iterations", "residual_norm", "gradient_norm", "damp")
    fields: dict[str, Any] = {name: torch.stack([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **fields)
