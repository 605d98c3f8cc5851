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
from lsconv.krylov.gradients.solve_record import System
from lsconv.krylov.gradients.vmap import batch_vmapped_axis, under_old_vmap
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items

__all__ = ["NormalSolve", "Solve"]


class Solve(torch.autograd.Function):
    """The answer, the tensors of its certificate and its multipliers, of y, damp, x_prior and the parameters."""

    @staticmethod
    def forward(system: System, y: Tensor, damp: Tensor | None, x_prior: Tensor | None, *params: Tensor) -> Any:
        """Solve."""
        return system.solve(y, damp, x_prior, params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the tensors that :meth:`backward` and :meth:`jvp` read."""
        ctx.system, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        z = output[-1] if ctx.system.has_multipliers else None
        ctx.save_for_backward(output[0], z, *tensors)
        ctx.save_for_forward(output[0], z, *tensors)
        ctx.outputs = len(output)

    @staticmethod
    @under_old_vmap
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        """Return the cotangents of the inputs."""
        system: System = ctx.system
        x, z, y, damp, prior, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        if system.L is None and not any(ctx.needs_input_grad[2:]) and not any_requires_grad(damp, prior, *params):
            # x is linear in y, damped or not, and plans have its adjoint
            return (
                None,
                unbroadcast(PseudoSolve.apply(system, True, None, g, *params), y),
                *(None for _ in range(2 + len(params))),
            )
        A, L = system.operators(params)
        y_bar: Any = 0
        damp_bar = prior_bar = None
        bars: list[Tensor | None] = [None] * len(params)
        if system.some_damped:
            v = NormalSolve.apply(system, system.mask_items(g, True), damp, *params)
            av = A.apply(v)
            y_bar = av
            if any(needed[: system.count]):
                cotangents = [(y - A.apply(x)).expand_as(av), -av]
                bars[: system.count] = parameter_vjp(
                    A, False, params[: system.count], needed[: system.count], [v, x], cotangents
                )
            damping = system.damp if damp is None else damp
            offset = x if prior is None else x - prior
            lv, lo = (v, offset) if L is None else (L.apply(v), L.apply(offset))
            damp_bar, mu = _damp_bar(damping, lv, lo, A if L is None else L)
            if L is not None and any(needed[system.count :]):
                L_params, ndim = params[system.count :], len(L.out_shape)
                cotangents = [-over_items(mu, ndim) * lo, -over_items(mu, ndim) * lv]
                bars[system.count :] = parameter_vjp(
                    L, False, L_params, needed[system.count :], [v, offset], cotangents
                )
            if prior is not None:
                prior_bar = over_items(mu, len(A.in_shape)) * (lv if L is None else L.adjoint(lv))
        if not system.all_damped:
            # undamped: x = prior + A^+ (y - A prior)
            gu = system.mask_items(g, False)
            data, part = (y, x) if prior is None else (y - A.apply(prior), x - prior)
            u, more = pseudo_backward(system, False, data, part, gu, params, needed, z)
            y_bar = y_bar + u
            bars[: system.count] = add_optional(bars[: system.count], more)
            if prior is not None:
                down = gu - A.adjoint(u)
                prior_bar = down if prior_bar is None else prior_bar + down
                if any(needed[: system.count]):
                    A_bars = parameter_vjp(
                        A, False, params[: system.count], needed[: system.count], [prior.expand_as(x)], [-u]
                    )
                    bars[: system.count] = add_optional(bars[: system.count], A_bars)
        if damp is not None and damp_bar is None:
            damp_bar = torch.zeros_like(damp)  # at damp = 0, because x depends on damp^2
        return (None, unbroadcast(y_bar, y), unbroadcast(damp_bar, damp), unbroadcast(prior_bar, prior), *bars)

    @staticmethod
    @under_old_vmap
    def jvp(
        ctx: Any, _: None, dy: Tensor | None, ddamp: Tensor | None, dprior: Tensor | None, *dparams: Tensor | None
    ) -> Any:
        """The tangent of x; the certificate has none."""
        system: System = ctx.system
        x, z, y, damp, prior, *params = ctx.saved_tensors
        dx: Any = 0
        if system.some_damped:

            def right_hand_side(y: Tensor, damp: Tensor, prior: Tensor, *params: Tensor) -> Tensor:
                A, L = system.operators(params)
                offset = x - prior
                pulled = offset if L is None else L.adjoint(L.apply(offset))
                return A.adjoint(y - A.apply(x)) - over_items((damp**2).to(x.real.dtype), len(A.in_shape)) * pulled

            damping: Tensor = system.damp if damp is None else damp
            p = torch.zeros_like(x) if prior is None else prior
            rhs = parameter_jvp(right_hand_side, [y, damping, p, *params], [dy, ddamp, dprior, *dparams])
            dx = 0 if rhs is None else NormalSolve.apply(system, system.mask_items(rhs, True), damp, *params)
        if not system.all_damped:
            A = system.operators(params)[0]
            outputs = len(A.out_shape)
            # x = prior + A^+ (y - A prior)
            data, part = (y, x) if prior is None else (y - A.apply(prior), x - prior)
            moved = torch.zeros_like(data) if dy is None else dy.expand_as(data)
            if prior is not None:
                ddata = parameter_jvp(
                    lambda p, *values: -rebuild(system.A, values).apply(p),
                    [prior, *params[: system.count]],
                    [dprior, *dparams[: system.count]],
                )
                moved = moved if ddata is None else moved + ddata
                dx = dx if dprior is None else dx + system.mask_items(dprior.expand_as(x), False)
            dx = dx + pseudo_tangent(
                system,
                False,
                system.mask_items(data, False, outputs),
                system.mask_items(part, False),
                system.mask_items(moved, False, outputs),
                params,
                dparams,
                z,
            )
        return (dx if isinstance(dx, Tensor) else torch.zeros_like(x), *(None for _ in range(ctx.outputs - 1)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], system: System, y: Tensor, damp: Any, prior: Any, *params: Any
    ) -> Any:
        """Make the mapped dimension a batch dimension."""
        ndims = [len(system.A.out_shape), 0, len(system.A.in_shape)]
        moved, moved_params = batch_vmapped_axis(system, info.batch_size, (y, damp, prior), ndims, params, in_dims[1:])
        outputs = Solve.apply(system, *moved, *moved_params)
        if in_dims[2] is not None and system.some_damped and not system.all_damped:
            raise MethodError("vmap: mapped over, damp has to be positive in every item or zero in every item; without "
                              "vmap a batch takes one damp per item")  # fmt: skip
        return outputs, (0,) * len(outputs)


class NormalSolve(torch.autograd.Function):
    r"""``v = H^{-1} g``: for a cotangent h, with ``w = H^{-1} h``, :math:`\bar H = -w v^H`."""

    @staticmethod
    def forward(system: System, g: Tensor, damp: Tensor | None, *params: Tensor) -> Tensor:
        """Solve."""
        ndim = len(system.A.in_shape)
        v = system.scaled_solve("normal_solve", g, ndim, ndim)
        assert v is not None
        return v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the tensors that :meth:`backward` and :meth:`jvp` read."""
        ctx.system, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)

    @staticmethod
    @under_old_vmap
    def backward(ctx: Any, h: Tensor) -> Any:
        """Return the cotangents of the inputs."""
        system: System = ctx.system
        v, damp, *params = ctx.saved_tensors
        needed, count = ctx.needs_input_grad[3:], system.count
        A, L = system.operators(params)
        w = NormalSolve.apply(system, system.mask_items(h, True), damp, *params)
        bars: list[Tensor | None] = [None] * len(params)
        if any(needed[:count]):
            bars[:count] = parameter_vjp(A, False, params[:count], needed[:count], [v, w], [-A.apply(w), -A.apply(v)])
        lv, lw = (v, w) if L is None else (L.apply(v), L.apply(w))
        damp_bar, mu = _damp_bar(system.damp if damp is None else damp, lw, lv, A if L is None else L)
        if L is not None and any(needed[count:]):
            scale = -over_items(mu, len(L.out_shape))
            bars[count:] = parameter_vjp(L, False, params[count:], needed[count:], [v, w], [scale * lw, scale * lv])
        return (None, w, unbroadcast(damp_bar, damp), *bars)

    @staticmethod
    @under_old_vmap
    def jvp(ctx: Any, _: None, dg: Tensor | None, ddamp: Tensor | None, *dparams: Tensor | None) -> Tensor:
        """``H^{-1} (dg - dH v)``."""
        system: System = ctx.system
        v, damp, *params = ctx.saved_tensors

        def image(damp: Tensor, *params: Tensor) -> Tensor:
            A, L = system.operators(params)
            pulled = v if L is None else L.adjoint(L.apply(v))
            return A.adjoint(A.apply(v)) + over_items((damp**2).to(v.real.dtype), len(A.in_shape)) * pulled

        moved = parameter_jvp(image, [system.damp if damp is None else damp, *params], [ddamp, *dparams])
        right = torch.zeros_like(v) if dg is None else dg
        right = right if moved is None else right - system.mask_items(moved, True)
        dv: Tensor = NormalSolve.apply(system, right, damp, *params)
        return dv

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], system: System, g: Tensor, damp: Any, *params: Any) -> Any:
        """Make the mapped dimension a batch dimension."""
        ndims = [len(system.A.in_shape), 0]
        moved, moved_params = batch_vmapped_axis(system, info.batch_size, (g, damp), ndims, params, in_dims[1:])
        return NormalSolve.apply(system, *moved, *moved_params), 0


# ------------------------------------------------------------------------------------------------- pieces


def _damp_bar(damp: Tensor, lv: Tensor, lo: Tensor, L: LinearOperator) -> tuple[Tensor, Tensor]:
    """``-2 damp Re<L v, L (x - p)>`` per item, and mu in the real dtype of A."""
    ndim = len(L.out_shape) if lv.shape[lv.ndim - len(L.out_shape) :] == L.out_shape else len(L.in_shape)
    product = (lv.conj() * lo).real.to(scalar_dtype(lv.device))
    inner = product.flatten(product.ndim - ndim).sum(-1) if ndim else product
    return -2 * damp * inner, (damp**2).to(lv.real.dtype)
