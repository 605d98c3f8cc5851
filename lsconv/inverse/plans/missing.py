r"""The plan of an operator some of whose outputs were not measured, through the plan of the operator itself.

.. math:: \min_x \sum_{i\ \text{measured}} |(Ax)_i - y_i|^2 + \mathrm{damp}^2 \|Lx\|^2

What stands in the data where nothing was measured is an unknown t, which solves the system of
:mod:`lsconv.border.missing_blocks`; x is then the answer of the plan of A. The matrix :math:`K = E^H (I - F) E` takes
one answer of that plan to apply. Conjugate gradients, preconditioned by the blocks of near outputs, lower the objective

.. math:: J(t) = (y + Et)^H (I - F) (y + Et)

with every step by :math:`\alpha_k \rho_k`. So the objective is known at every step, and the iteration stops where the
residual of K, whose image under :math:`A^H` is the gradient, is small beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.border.border_set import largest_block
from lsconv.border.missing_blocks import MissingBlocks
from lsconv.border.normal_inverse import normal_inverse
from lsconv.border.normal_problem import Request, least_shift
from lsconv.border.outer_iteration import NormalEquations, iterate_or_drop_factors
from lsconv.border.penalty import Penalty, common_grid_filters
from lsconv.errors import MethodError
from lsconv.fourier.embedding import Embedding
from lsconv.krylov.gradients.backward_solves import normal_by_apply
from lsconv.krylov.loop.batched_scalars import ItemSpace, binary_unit, divide
from lsconv.krylov.loop.certificate import NormBounds, NullSpaceBound, Tolerances
from lsconv.krylov.loop.penalised import Penalised
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import PenalisedPlan, Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import direct_rtol, double
from lsconv.operators.elementary import Mask
from lsconv.operators.observed import MeasuredRows

__all__ = ["MissingBorderPlan", "MissingPlan", "are_scattered"]


def are_scattered(missing: Tensor, ndim: int) -> bool:
    """Tell whether missing outputs are few, and their clusters small enough to be blocks of the preconditioner.

    Inputs that only outputs of a large gap read are determined by the damping alone.

    Args:
        missing: ``(*batch, channels, *size)``, bool.
        ndim: the number of axes of ``size``.
    """
    if missing.numel() == 0:
        return False
    planes = missing.double().reshape(-1, 1, *missing.shape[missing.ndim - ndim :])
    pool = (torch.nn.functional.avg_pool1d, torch.nn.functional.avg_pool2d, torch.nn.functional.avg_pool3d)[ndim - 1]
    padded = torch.nn.functional.pad(planes, (1, 1) * ndim)
    solid = int((pool(padded, 3, 1) > 1 - 1e-9).sum())  # the number of outputs whose neighbours are all missing
    return float(planes.mean()) < 0.4 and solid <= largest_block(int(planes.sum()), planes.numel())


class MissingPlan(PenalisedPlan):
    """Setup for a convolution some of whose outputs are masked; :meth:`solve` answers right-hand sides.

    Args:
        A: the masked operator.
        rows: A as a convolution and the outputs that are measured, with one weight for all outputs of a batch item.
        inner: the plan of that convolution, in double precision, for ``damp / sqrt(weight)``.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.
    """

    reason = "outputs are missing: the plan of the whole convolution, and an iteration on what is missing"
    falls_back_on_lsmr = True

    def __init__(
        self,
        A: LinearOperator,
        rows: MeasuredRows,
        inner: Plan | None,
        damp: Tensor | float,
        L: LinearOperator | None = None,
    ) -> None:
        self.A, self.rows, self.L = A, rows, L
        self.inner: Plan = inner  # type: ignore[assignment]  # None in subclasses, which do not use it
        self.damp = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
        weight = rows.uniform_weight()
        assert weight is not None
        self.core, self.precise = (B.to(dtype=double(A.dtype)) for B in (rows.core, A))
        self.measured = MeasuredRows(self.core, rows.scale.to(self.core.dtype), rows.rows.to(dtype=self.core.dtype))
        self.missing = rows.scale == 0
        self.problem = Penalised(self.precise, self.damp, None if L is None else L.to(dtype=self.precise.dtype))
        self._root_weight = weight.double().sqrt()
        assert isinstance(self.core, Convolution)
        self._norm_bound = norm_bound(self.core) * self._root_weight if L is None else None
        penalty = None
        if L is not None:
            penalty = Penalty(self.core, common_grid_filters(self.core, L), self.damp / self._root_weight)
        if inner is not None:
            common = rows.missing()  # items that miss the same outputs share their blocks
            missing = self.missing if common is None else common
            self.blocks = MissingBlocks(self.core, self.damp / self._root_weight, missing, penalty)
        self.space = ItemSpace(self.core.out_shape, self.core.dtype, self.core.device)

    # ------------------------------------------------------------------ answers

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
        """The solution for ``y`` of shape ``(*batch, *A.out_shape)``, certified by the masked operator in float64.

        Args:
            y: right-hand sides, finite.
            x_prior: what the penalty pulls to, where there is one.
            rtol: relative tolerance of residual or gradient; None: 1e-6 in float32, 1e-10 in float64.
            atol: absolute tolerance, in the units of y.
            max_iter: limit on the iterations on the missing outputs.
        """
        tolerances = self.tolerances(rtol, atol)
        data = self.problem.data_without_prior(y, x_prior)
        x, iterations, may_leave_range = self._filled_in(data, tolerances, max_iter)
        judge = self.problem.judge(
            tolerances,
            self.A.dtype,
            norm=NormBounds(upper=self._norm_bound),
            null_space=NullSpaceBound(torch.where(may_leave_range, tolerances.null_share, torch.inf)),
        )
        return self.problem.solution(judge, x, y, x_prior=x_prior, iterations=iterations)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, ``(*batch, *out_shape)``, without a certificate."""
        return self._filled_in(y.detach().to(self.precise.dtype), self.tolerances(rtol), None)[0].to(self.A.dtype)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.precise.apply(self._normal(v, rtol)).to(self.A.dtype)

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        r"""``(A^H A + damp^2 L^H L)^{-1} g``, by the identity of Woodbury.

        .. math:: v = v_0 + H^{-1} A^H E\, K^{-1} E^H A v_0, \qquad v_0 = H^{-1} g
        """
        return self._normal(g, rtol).to(self.A.dtype)

    def _normal(self, g: Tensor, rtol: float | None) -> Tensor:
        rtol = direct_rtol(self.A.dtype, rtol)
        v = self.inner.normal_solve(g.detach().to(self.core.dtype), rtol=0.1 * rtol)
        image = self.core.apply(v)
        bound = 0.1 * rtol * self.space.norm(image)
        t, _ = self._iterate(torch.where(self.missing, image, 0), lambda _: bound)
        v = v + self.inner.apply(t)
        return v / self._over_inputs(self._root_weight.square())

    # ------------------------------------------------------------------ the missing outputs

    def _filled_in(self, y: Tensor, tolerances: Tolerances, max_iter: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Solve for the missing outputs t, and for x with them filled in.

        x is ``A^H z`` of the whole convolution, ``damp^2 z = y + Et - Ax``. What z has at the missing outputs, the
        residual of the system of t, is outside of the range of the masked ``A^H``.

        Returns:
            x, the iterations per item, and the items whose x may have a part in the null space of A.
        """
        space, rtol = self.space, tolerances.rtol
        data = self.measured.data(y)
        batch = broadcast_shapes(data.shape[: data.ndim - len(self.core.out_shape)], self.damp.shape)
        unit = binary_unit(space.safe_norm(data))
        data = (data / space.broadcast(unit)).expand(*batch, *self.core.out_shape)
        inputs, mu = (
            ItemSpace(self.core.in_shape, self.core.dtype, self.core.device),
            (self.damp / self._root_weight).square(),
        )
        x = self.inner.apply(data)
        image = self.core.apply(x)
        residual, norm = torch.where(self.missing, image, 0), space.norm(data)
        filled, iterations = data, torch.zeros(batch, dtype=torch.int64, device=y.device)
        smallest_total = torch.maximum(rtol * norm, tolerances.atol / (unit * self._root_weight))
        rounding = torch.finfo(data.dtype).eps * norm
        for _ in range(3):  # each begins with the computed residual, from which rounding parts that of the recursion
            objective = space.inner(filled, filled - image)
            # the bound uses the newest x: the first one, for zeros as missing data, may be much longer than the answer
            gain = divide(inputs.norm(self.core.adjoint(residual)), space.norm(residual))
            range_bound = tolerances.null_share / 2 * mu * divide(inputs.norm(x), gain)

            def bound(decrease: Tensor, objective: Tensor = objective, range_bound: Tensor = range_bound) -> Tensor:
                total = torch.maximum((objective - decrease).clamp_min(0).sqrt(), smallest_total)
                # the inner plan has the other two thirds of the tolerance
                return torch.maximum(torch.minimum(rtol * total / 3, range_bound), rounding)

            size = space.norm(residual)
            if not bool((size > bound(torch.zeros_like(size))).any()):
                break
            remaining = 500 if max_iter is None else max_iter - int(iterations.max())
            if remaining <= 0:
                break
            t, count = self._iterate(residual, bound, remaining)
            iterations = iterations + count
            filled = filled + t
            x = self.inner.apply(filled)
            image = self.core.apply(x)
            residual = torch.where(self.missing, image - filled, 0)
            if not bool((space.norm(residual) < 0.5 * size).any()):
                break
        size = inputs.norm(x)
        part = inputs.norm(self.core.adjoint(residual)) + rounding * divide(space.norm(image), size)
        may_leave_range = part > tolerances.null_share * mu * size
        return (
            x * self._over_inputs(unit),
            iterations,
            may_leave_range | (not self.inner.innermost.x_in_range_of_adjoint),
        )

    def _iterate(self, b: Tensor, bound: Callable[[Tensor], Tensor], max_iter: int = 500) -> tuple[Tensor, Tensor]:
        """Solve ``K t = b`` by preconditioned conjugate gradients, and count the iterations per item.

        The recurrences are those of :mod:`lsconv.krylov.cg`; here the tolerance depends on the objective.

        Args:
            b: right-hand sides, zero where outputs were measured.
            bound: the norm that the residual has to fall to, as a function of the decrease of the objective so far.
            max_iter: limit on the iterations.
        """
        # the vectors hold only the outputs that some item misses, which are few
        item = len(self.core.out_shape)
        missing_index = self.missing.reshape(-1, self.core.out_numel).any(0).nonzero()[:, 0]
        space = ItemSpace((len(missing_index),), b.dtype, b.device)

        def gathered(v: Tensor) -> Tensor:
            return v.flatten(-item)[..., missing_index]

        def placed(v: Tensor) -> Tensor:
            full = v.new_zeros(*v.shape[:-1], self.core.out_numel)
            full[..., missing_index] = v
            return full.unflatten(-1, self.core.out_shape)

        missing = gathered(self.missing)
        r, z = gathered(b), gathered(self.blocks(b))
        t, p, rho = torch.zeros_like(r), z, space.inner(r, z)
        decrease = torch.zeros_like(rho)
        count = torch.zeros(rho.shape, dtype=torch.int64, device=b.device)
        for _ in range(max_iter):
            active = (space.norm(r) > bound(decrease)) & (rho > 0)
            if not bool(active.any()):
                break
            q = torch.where(missing, gathered(self.inner.residual(placed(p))), p)
            curvature = space.inner(p, q)
            active = active & (curvature > 0)
            alpha = divide(rho, curvature) * active
            t = t + space.broadcast(alpha) * p
            r = r - space.broadcast(alpha) * q
            decrease = decrease + alpha * rho
            count = count + active
            z = gathered(self.blocks(placed(r)))
            new = space.inner(r, z)
            p, rho = z + space.broadcast(divide(new, rho)) * p, torch.where(active, new, 0)
        return placed(t), count

    def _over_inputs(self, values: Tensor) -> Tensor:
        return over_items(values, len(self.core.in_shape))

    def __repr__(self) -> str:
        percentage = 100 * float(self.missing.double().mean())
        pieces = len(self.blocks.index)
        return (
            f"MissingPlan({percentage:.2g} % of the outputs missing, in {pieces} block(s) of up to "
            f"{self.blocks.index.shape[-1]}, by {self.inner!r})"
        )


class MissingBorderPlan(MissingPlan):
    """The plan with the missing outputs in the border: one iteration solves the systems of both.

    It is for an A whose border is iterated on in every solve: there it spares the setup and the nested iteration of
    :class:`MissingPlan`. The outer iteration is that of the masked operator.

    Args:
        A: the masked operator.
        rows: A as a convolution and the outputs that are measured, all with one weight.
        damp: the damping, > 0, a number or one per batch item.
        L: the penalty; None: the identity.

    Raises:
        MethodError: items, or groups, miss different outputs; or A, or L, has no border.
    """

    @torch.no_grad()
    def __init__(
        self, A: LinearOperator, rows: MeasuredRows, damp: Tensor | float, L: LinearOperator | None = None
    ) -> None:
        super().__init__(A, rows, None, damp, L)
        core = self.core
        assert isinstance(core, Convolution)
        lost = rows.missing(core.groups)
        if lost is None or not Embedding.serves(core) or self._root_weight.numel() > 1:
            raise MethodError("A: one border serves items and groups that miss the same outputs, behind zero padding")
        core = core.with_parameters([core.weight.detach() * self._root_weight.reshape(())])
        terms, L = common_grid_filters(core, L), None if L is None else L.to(dtype=core.dtype)
        self.masked_problem = Penalised(Mask(~lost, dtype=core.dtype) @ core, self.damp, L)
        self.scaled, self.scaled_damp = self.masked_problem.stack, self.masked_problem.identity_damp
        self.unit, self.observed_inputs, self.factor_dtype = torch.ones_like(self.damp), None, core.weight.real.dtype
        floor = least_shift(self.factor_dtype, damped=True)
        self.inverse = normal_inverse(Request.of(core, self.damp, terms, floor=floor, missing=lost))
        if L is None:
            self.observed_inputs = self.inverse.embedding.observed_inputs()

    def _filled_in(self, y: Tensor, tolerances: Tolerances, max_iter: int | None) -> tuple[Tensor, Tensor, Tensor]:
        tolerances = Tolerances.of(self.core.dtype, tolerances.rtol, tolerances.atol)
        data = self.masked_problem.data(self.measured.data(y) * self._root_weight.reshape(()))
        outer = iterate_or_drop_factors(lambda: NormalEquations(self, y=data, tolerances=tolerances, max_iter=max_iter))
        return outer.x, outer.iterations, torch.full_like(outer.tolerance_ratio > 1, self.inverse.side != "residual")

    def _normal(self, g: Tensor, rtol: float | None) -> Tensor:
        rtol = direct_rtol(self.A.dtype, rtol)
        g64 = g.detach().to(self.core.dtype)
        if self.inverse.side == "residual":
            apply = lambda data, rtol: self._filled_in(data, Tolerances.of(self.core.dtype, rtol, 0.0), None)[0]
            return normal_by_apply(self.precise, self.damp, apply, g64, rtol=rtol, extra_digits=1.0)
        tolerances = Tolerances.of(self.core.dtype, rtol, 0.0)
        return iterate_or_drop_factors(lambda: NormalEquations(self, v=g64, tolerances=tolerances)).x

    def __repr__(self) -> str:
        percentage = 100 * float(self.missing.double().mean())
        return f"MissingBorderPlan({percentage:.2g} % of the outputs missing, {self.inverse.describe()})"
