r"""The derivative rules of an answer, as autograd functions that share one solve.

The answers are functions of the data y, the operator A, the damping, the penalty L and the prior p. With
:math:`H = A^H A + \mu L^H L`, :math:`\mu = \mathrm{damp}^2`, a damped answer satisfies
:math:`H x = A^H y + \mu L^H L p`. Differentiating both sides, with the residual :math:`r = y - A x`,

.. math:: H\,dx = A^H dy + dA^H r - A^H dA\,x - d(\mu L^H L)(x - p) + \mu L^H L\,dp .

For a cotangent g let :math:`v = H^{-1} g`. Then :math:`\mathrm{Re}\langle g, dx\rangle` gives

.. math:: \bar y = A v, \quad \bar A = r v^H - (A v) x^H, \quad
          \overline{\mathrm{damp}} = -2\,\mathrm{damp}\,\mathrm{Re}\langle L v, L (x - p)\rangle, \quad
          \bar p = \mu L^H L v, \quad \bar L = -\mu\,(L v (x - p)^H + L (x - p) v^H).

Without damping the rule is that of Golub and Pereyra (:mod:`lsconv.krylov.gradients.pseudo_inverse_rule`).

In forward mode dx is the answer of the first equation for the tangents, or that of Golub and Pereyra applied to y.
Derivatives by the parameters of A need only applications of A (:mod:`lsconv.krylov.gradients.parameters`). Every rule
is composed of differentiable functions, so that higher derivatives exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.krylov.gradients.parameters import any_requires_grad, parameter_jvp, parameter_vjp, rebuild
from lsconv.krylov.gradients.pseudo_inverse_rule import (
    PseudoSolve,
    add_optional,
    pseudo_backward,
    pseudo_tangent,
    unbroadcast,
)
from lsconv.krylov.gradients.solve_record import SolveRecord
from lsconv.krylov.gradients.vmap import batch_vmapped_axis, under_old_vmap
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items

__all__ = ["NormalSolve", "Solve"]


class Solve(torch.autograd.Function):
    """The answer, the tensors of its certificate and its multipliers, of y, damp, x_prior and the parameters."""

    @staticmethod
    def forward(record: SolveRecord, y: Tensor, damp: Tensor | None, x_prior: Tensor | None, *params: Tensor) -> Any:
        """Solve."""
        return record.solve(y, damp, x_prior, params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the tensors that :meth:`backward` and :meth:`jvp` read."""
        ctx.record, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        z = output[-1] if ctx.record.has_multipliers else None
        ctx.save_for_backward(output[0], z, *tensors)
        ctx.save_for_forward(output[0], z, *tensors)
        ctx.outputs = len(output)

    @staticmethod
    @under_old_vmap
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        """Return the cotangents of the inputs."""
        record: SolveRecord = ctx.record
        A_count = record.A_param_count
        x, z, y, damp, prior, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if record.L is None and not any(ctx.needs_input_grad[2:]) and not any_requires_grad(damp, prior, *params):
            # x is linear in y, damped or not, and plans have its adjoint
            return (
                None,
                unbroadcast(PseudoSolve.apply(record, True, None, g, *params), y),
                *(None for _ in range(2 + len(params))),
            )
        A, L = record.operators(params)
        y_bar: Any = 0
        damp_bar = prior_bar = None
        bars: list[Tensor | None] = [None] * len(params)
        if record.some_damped:
            v = NormalSolve.apply(record, record.mask_items(g, True), damp, *params)
            av = A.apply(v)
            y_bar = av
            if any(needed[:A_count]):
                cotangents = [(y - A.apply(x)).expand_as(av), -av]
                bars[:A_count] = parameter_vjp(A, False, params[:A_count], needed[:A_count], [v, x], cotangents)
            damping = record.damp if damp is None else damp
            offset = x if prior is None else x - prior
            L_v, L_offset = (v, offset) if L is None else (L.apply(v), L.apply(offset))
            damp_bar, mu = _damp_bar(damping, L_v, L_offset, A if L is None else L)
            if L is not None and any(needed[A_count:]):
                L_params, ndim = params[A_count:], len(L.out_shape)
                cotangents = [-over_items(mu, ndim) * L_offset, -over_items(mu, ndim) * L_v]
                bars[A_count:] = parameter_vjp(L, False, L_params, needed[A_count:], [v, offset], cotangents)
            if prior is not None:
                prior_bar = over_items(mu, len(A.in_shape)) * (L_v if L is None else L.adjoint(L_v))
        if not record.all_damped:
            # undamped: x = prior + A^+ (y - A prior)
            g_undamped = record.mask_items(g, False)
            data, part = (y, x) if prior is None else (y - A.apply(prior), x - prior)
            u, bars_undamped = pseudo_backward(record, False, data, part, g_undamped, params, needed, z)
            y_bar = y_bar + u
            bars[:A_count] = add_optional(bars[:A_count], bars_undamped)
            if prior is not None:
                g_null = g_undamped - A.adjoint(u)
                prior_bar = g_null if prior_bar is None else prior_bar + g_null
                if any(needed[:A_count]):
                    A_bars = parameter_vjp(
                        A,
                        False,
                        params[:A_count],
                        needed[:A_count],
                        [prior.expand_as(x)],
                        [-u],
                    )
                    bars[:A_count] = add_optional(bars[:A_count], A_bars)
        if damp is not None and damp_bar is None:
            damp_bar = torch.zeros_like(damp)  # at damp = 0, because x depends on damp^2
        return (None, unbroadcast(y_bar, y), unbroadcast(damp_bar, damp), unbroadcast(prior_bar, prior), *bars)

    @staticmethod
    @under_old_vmap
    def jvp(
        ctx: Any, _: None, dy: Tensor | None, ddamp: Tensor | None, dprior: Tensor | None, *dparams: Tensor | None
    ) -> Any:
        """The tangent of x; the certificate has none."""
        record: SolveRecord = ctx.record
        A_count = record.A_param_count
        x, z, y, damp, prior, *params = ctx.saved_tensors
        dx: Any = 0
        if record.some_damped:

            def right_hand_side(y: Tensor, damp: Tensor, prior: Tensor, *params: Tensor) -> Tensor:
                A, L = record.operators(params)
                offset = x - prior
                pulled = offset if L is None else L.adjoint(L.apply(offset))
                return A.adjoint(y - A.apply(x)) - over_items((damp**2).to(x.real.dtype), len(A.in_shape)) * pulled

            damping: Tensor = record.damp if damp is None else damp
            p = torch.zeros_like(x) if prior is None else prior
            rhs = parameter_jvp(right_hand_side, [y, damping, p, *params], [dy, ddamp, dprior, *dparams])
            dx = 0 if rhs is None else NormalSolve.apply(record, record.mask_items(rhs, True), damp, *params)
        if not record.all_damped:
            A = record.operators(params)[0]
            outputs = len(A.out_shape)
            # x = prior + A^+ (y - A prior)
            data, part = (y, x) if prior is None else (y - A.apply(prior), x - prior)
            data_tangent = torch.zeros_like(data) if dy is None else dy.expand_as(data)
            if prior is not None:
                ddata = parameter_jvp(
                    lambda p, *values: -rebuild(record.A, values).apply(p),
                    [prior, *params[:A_count]],
                    [dprior, *dparams[:A_count]],
                )
                data_tangent = data_tangent if ddata is None else data_tangent + ddata
                dx = dx if dprior is None else dx + record.mask_items(dprior.expand_as(x), False)
            dx = dx + pseudo_tangent(
                record,
                False,
                record.mask_items(data, False, outputs),
                record.mask_items(part, False),
                record.mask_items(data_tangent, False, outputs),
                params,
                dparams,
                z,
            )
        return (dx if isinstance(dx, Tensor) else torch.zeros_like(x), *(None for _ in range(ctx.outputs - 1)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], record: SolveRecord, y: Tensor, damp: Any, prior: Any, *params: Any
    ) -> Any:
        """Make the mapped dimension a batch dimension."""
        ndims = [len(record.A.out_shape), 0, len(record.A.in_shape)]
        moved, moved_params = batch_vmapped_axis(record, info.batch_size, (y, damp, prior), ndims, params, in_dims[1:])
        outputs = Solve.apply(record, *moved, *moved_params)
        if in_dims[2] is not None and record.some_damped and not record.all_damped:
            raise MethodError("vmap: mapped over, damp has to be positive in every item or zero in every item; without "
                              "vmap a batch takes one damp per item")  # fmt: skip
        return outputs, (0,) * len(outputs)


class NormalSolve(torch.autograd.Function):
    r"""``v = H^{-1} g``: for a cotangent h, with ``w = H^{-1} h``, :math:`\bar H = -w v^H`."""

    @staticmethod
    def forward(record: SolveRecord, g: Tensor, damp: Tensor | None, *params: Tensor) -> Tensor:
        """Solve."""
        ndim = len(record.A.in_shape)
        v = record.scaled_solve("normal_solve", g, ndim, ndim)
        assert v is not None
        return v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the tensors that :meth:`backward` and :meth:`jvp` read."""
        ctx.record, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    @under_old_vmap
    def backward(ctx: Any, h: Tensor) -> Any:
        """Return the cotangents of the inputs."""
        record: SolveRecord = ctx.record
        v, damp, *params = ctx.saved_tensors
        needed, A_count = ctx.needs_input_grad[3:], record.A_param_count
        A, L = record.operators(params)
        w = NormalSolve.apply(record, record.mask_items(h, True), damp, *params)
        bars: list[Tensor | None] = [None] * len(params)
        if any(needed[:A_count]):
            bars[:A_count] = parameter_vjp(
                A, False, params[:A_count], needed[:A_count], [v, w], [-A.apply(w), -A.apply(v)]
            )
        L_v, L_w = (v, w) if L is None else (L.apply(v), L.apply(w))
        damp_bar, mu = _damp_bar(record.damp if damp is None else damp, L_w, L_v, A if L is None else L)
        if L is not None and any(needed[A_count:]):
            scale = -over_items(mu, len(L.out_shape))
            bars[A_count:] = parameter_vjp(
                L, False, params[A_count:], needed[A_count:], [v, w], [scale * L_w, scale * L_v]
            )
        return (None, w, unbroadcast(damp_bar, damp), *bars)

    @staticmethod
    @under_old_vmap
    def jvp(ctx: Any, _: None, dg: Tensor | None, ddamp: Tensor | None, *dparams: Tensor | None) -> Tensor:
        """``H^{-1} (dg - dH v)``."""
        record: SolveRecord = ctx.record
        v, damp, *params = ctx.saved_tensors

        def image(damp: Tensor, *params: Tensor) -> Tensor:
            A, L = record.operators(params)
            pulled = v if L is None else L.adjoint(L.apply(v))
            return A.adjoint(A.apply(v)) + over_items((damp**2).to(v.real.dtype), len(A.in_shape)) * pulled

        dH_v = parameter_jvp(image, [record.damp if damp is None else damp, *params], [ddamp, *dparams])
        rhs = torch.zeros_like(v) if dg is None else dg
        rhs = rhs if dH_v is None else rhs - record.mask_items(dH_v, True)
        dv: Tensor = NormalSolve.apply(record, rhs, damp, *params)
        return dv

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], record: SolveRecord, g: Tensor, damp: Any, *params: Any) -> Any:
        """Make the mapped dimension a batch dimension."""
        ndims = [len(record.A.in_shape), 0]
        moved, moved_params = batch_vmapped_axis(record, info.batch_size, (g, damp), ndims, params, in_dims[1:])
        return NormalSolve.apply(record, *moved, *moved_params), 0


# ------------------------------------------------------------------------------------------------- pieces


def _damp_bar(damp: Tensor, L_v: Tensor, L_offset: Tensor, L: LinearOperator) -> tuple[Tensor, Tensor]:
    """``-2 damp Re<L v, L (x - p)>`` per item, and mu in the real dtype of A."""
    ndim = len(L.out_shape) if L_v.shape[L_v.ndim - len(L.out_shape) :] == L.out_shape else len(L.in_shape)
    product = (L_v.conj() * L_offset).real.to(scalar_dtype(L_v.device))
    inner = product.flatten(product.ndim - ndim).sum(-1) if ndim else product
    return -2 * damp * inner, (damp**2).to(L_v.real.dtype)
