r"""The derivative rules of an answer, as autograd functions that share one solve.

The answers are functions of the data y, the operator A, the damping, the penalty L and the prior p. With
:math:`H = A^H A + \mu L^H L`, :math:`\mu = \mathrm{damp}^2`, a damped answer satisfies
:math:`H x = A^H y + \mu L^H L p`. Differentiating both sides, with the residual :math:`r = y - A x`,

.. math:: H\,dx = A^H dy + dA^H r - A^H dA\,x - d(\mu L^H L)(x - p) + \mu L^H L\,dp .

For a cotangent g let :math:`v = H^{-1} g`. Then :math:`\mathrm{Re}\langle g, dx\rangle` gives

.. math:: \bar y = A v, \quad \bar A = r v^H - (A v) x^H, \quad
          \overline{\mathrm{damp}} = -2\,\mathrm{damp}\,\mathrm{Re}\langle L v, L (x - p)\rangle, \quad
          \bar p = \mu L^H L v, \quad \bar L = -\mu\,(L v (x - p)^H + L (x - p) v^H).

Without damping :math:`x = A^+ y`, and for perturbations that keep the rank of A (Golub and Pereyra)

.. math:: dA^+ = -A^+ dA\,A^+ + A^+ A^{+H} dA^H (I - A A^+) + (I - A^+ A) dA^H A^{+H} A^+ ,

so that with :math:`u = A^{+H} g`, :math:`q = A^+ u`, :math:`w = g - A^H u` and :math:`z = A^{+H} x`

.. math:: \bar y = u, \qquad \bar A = -u x^H + r q^H + z w^H .

The second term vanishes with the residual (full row rank), the third with w (full column rank), and the solve for it is
then left out. Where the rank does change (a zero of the symbol), :math:`A^+` is not even continuous: use damp > 0.

Parameters never meet these matrices: :math:`\bar A = \sum_k c_k d_k^H` is the derivative of
:math:`\sum_k \mathrm{Re}\langle c_k, A d_k\rangle` with c and d held fixed: one application of A under autograd.
Every backward is made of differentiable pieces, so it has derivatives of its own.

Golub and Pereyra, "The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate", SIAM J. Numer. Anal. 10 (1973), 413-432.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning, MethodError
from lsconv.krylov.backward import Inverse, report_failure
from lsconv.krylov.batch import binary_unit, scalar_dtype
from lsconv.krylov.problem import check_damp
from lsconv.krylov.solution import Solution
from lsconv.krylov.stopping import Tolerances
from lsconv.operators.base import LinearOperator

__all__ = ["NormalSolve", "PseudoSolve", "Solve", "System", "any_followed", "no_autocast", "parameters_of"]


class System:
    """What the functions below share about one solve; none of it is followed by autograd."""

    def __init__(self, run: Any, A: LinearOperator, L: LinearOperator | None, damp: Any, square: bool) -> None:
        self.run, self.A, self.L, self.square = run, A, L, square
        self.damp_given = damp
        self.count = len(parameters_of(A))
        self.inverse: Inverse | None = None
        self.solution: Solution | None = None
        self.item = {False: A.in_shape, True: A.out_shape}

    def operators(self, params: Sequence[Tensor]) -> tuple[LinearOperator, LinearOperator | None]:
        """A and L made of the tensors given."""
        A = _with(self.A, params[: self.count])
        return A, None if self.L is None else _with(self.L, params[self.count :])

    def solve(self, y: Tensor, damp: Tensor | None, x_prior: Tensor | None, params: Sequence[Tensor]) -> Any:
        """Run, keep what the backward needs, and return the tensors of the solution."""
        A, L = self.operators([p.detach() for p in params])
        prior = None if x_prior is None else x_prior.detach()
        given = self.damp_given if damp is None else damp.detach()
        with torch.no_grad(), no_autocast(A):
            answer, self.inverse = self.run(A, y.detach(), given, L, prior)
        self.look_at(answer.damp if isinstance(answer, Solution) and damp is None else given)
        if isinstance(answer, Tensor):
            return (answer,)
        self.solution = answer
        return tuple(getattr(answer, name) for name in _TENSORS)

    def look_at(self, damp: Any) -> None:
        """Keep the damping, and whether all or some items have one."""
        self.damp = check_damp(damp, self.A)
        self.some_damped = not self.square and bool((self.damp > 0).any())
        self.all_damped = not self.square and bool((self.damp > 0).all())

    def result(self, outputs: tuple[Tensor, ...]) -> Any:
        """The outputs of :class:`Solve` as a :class:`Solution`, or bare."""
        if self.solution is None:
            return outputs[0]
        return Solution(
            **dict(zip(_TENSORS, outputs, strict=True)),
            history=self.solution.history,
            selection=self.solution.selection,
        )

    def only(self, g: Tensor, damped: bool) -> Tensor:
        """``g`` with zeros for the items that are not damped, or for those that are."""
        if self.all_damped == damped and (self.all_damped or not self.some_damped):
            return g
        mask = (self.damp > 0) == damped
        return torch.where(mask.reshape(*mask.shape, *(1 for _ in self.A.in_shape)), g, 0)

    def call(self, name: str, g: Tensor, item_ndim: int, result_ndim: int) -> Tensor:
        """``inverse.name(g)``: scaled, so that a cotangent of 1e-30 keeps its digits; NaN stays in its item."""
        with torch.no_grad(), no_autocast(self.A):
            g = g.detach()
            flat = g.flatten(g.ndim - item_ndim) if item_ndim else g.unsqueeze(-1)
            finite = torch.isfinite(flat).all(-1)
            size = torch.where(finite, flat.abs().amax(-1), 0).to(scalar_dtype(g.device))
            unit = binary_unit(size).to(g.real.dtype)
            scaled = torch.where(spread_over(finite, item_ndim), g / spread_over(unit, item_ndim), 0)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answer: Tensor = getattr(self.inverse, name)(scaled)
            if bool((size == 0).all()):
                answer = torch.zeros_like(answer)
            answer = answer * spread_over(unit, result_ndim)
            answer = torch.where(spread_over(finite, result_ndim), answer, torch.nan)
        for warning in caught:
            if not issubclass(warning.category, ConvergenceWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            else:
                report_failure(warning.message)
        return answer

    def negligible(self, part: Tensor, whole: Tensor, item_ndim: int) -> bool:
        """Whether ``part`` is what the tolerance leaves of ``whole``, in every item."""
        dims = tuple(range(-item_ndim, 0))
        size, scale = (torch.linalg.vector_norm(t.detach(), dim=dims) for t in (part, whole))
        return bool((size <= 10 * Tolerances.of(self.A.dtype, None, 0.0).rtol * scale).all())

    def pseudo_backward(
        self, transposed: bool, y: Tensor, x: Tensor, g: Tensor, params: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Cotangents of y and of A's parameters in ``x = A^+ y`` (of ``A^H`` when ``transposed``)."""
        own, needed = params[: self.count], needed[: self.count]
        u = PseudoSolve.apply(self, not transposed, g, *own)
        if not any(needed):
            return u, [None] * self.count
        A = _with(self.A, own)
        B = A.H if transposed else A
        directions, cotangents = [x], [-u]
        if not self.square:
            r, w = y - B.apply(x), g - B.adjoint(u)
            batch = torch.Size(torch.broadcast_shapes(r.shape[: r.ndim - len(B.out_shape)]))
            probing = _transforming()  # under a transform values cannot be looked at
            if probing or not self.negligible(r, y, len(B.out_shape)):
                directions.append(PseudoSolve.apply(self, transposed, u, *own))
                cotangents.append(r.expand(*batch, *B.out_shape))
            if probing or not self.negligible(w, g, len(B.in_shape)):
                directions.append(w)
                cotangents.append(PseudoSolve.apply(self, not transposed, x, *own))
        return u, _pull(self.A, transposed, own, needed, directions, cotangents)


_TENSORS = tuple(field.name for field in fields(Solution) if field.name not in ("history", "selection"))


class Solve(torch.autograd.Function):
    """The answer, and the tensors of its certificate, as a function of y, damp, x_prior and the parameters."""

    @staticmethod
    def forward(system: System, y: Tensor, damp: Tensor | None, x_prior: Tensor | None, *params: Tensor) -> Any:
        """Solve."""
        return system.solve(y, damp, x_prior, params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward needs."""
        ctx.system, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> Any:
        """The cotangents of the inputs."""
        system: System = ctx.system
        x, y, damp, prior, *params = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        A, L = system.operators(params)
        y_bar: Any = 0
        damp_bar = prior_bar = None
        bars: list[Tensor | None] = [None] * len(params)
        if system.some_damped:
            v = NormalSolve.apply(system, system.only(g, True), damp, *params)
            av = A.apply(v)
            y_bar = av
            if any(needed[: system.count]):
                cotangents = [(y - A.apply(x)).expand_as(av), -av]
                bars[: system.count] = _pull(
                    A, False, params[: system.count], needed[: system.count], [v, x], cotangents
                )
            damping = system.damp if damp is None else damp
            offset = x if prior is None else x - prior
            lv, lo = (v, offset) if L is None else (L.apply(v), L.apply(offset))
            damp_bar, mu = _damp_bar(damping, lv, lo, A if L is None else L)
            if L is not None and any(needed[system.count :]):
                rest, ndim = params[system.count :], len(L.out_shape)
                cotangents = [-spread_over(mu, ndim) * lo, -spread_over(mu, ndim) * lv]
                bars[system.count :] = _pull(L, False, rest, needed[system.count :], [v, offset], cotangents)
            if prior is not None:
                prior_bar = spread_over(mu, len(A.in_shape)) * (lv if L is None else L.adjoint(lv))
        if not system.all_damped:
            # undamped: x is the prior plus the pseudo-inverse of what the prior leaves, y - A prior
            gu = system.only(g, False)
            left, part = (y, x) if prior is None else (y - A.apply(prior), x - prior)
            u, more = system.pseudo_backward(False, left, part, gu, params, needed)
            y_bar = y_bar + u
            bars[: system.count] = _plus(bars[: system.count], more)
            if prior is not None:
                down = gu - A.adjoint(u)
                prior_bar = down if prior_bar is None else prior_bar + down
                if any(needed[: system.count]):
                    own = _pull(A, False, params[: system.count], needed[: system.count], [prior.expand_as(x)], [-u])
                    bars[: system.count] = _plus(bars[: system.count], own)
        return (None, _fit(y_bar, y), _fit(damp_bar, damp), _fit(prior_bar, prior), *bars)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], system: System, y: Tensor, damp: Any, prior: Any, *params: Any
    ) -> Any:
        """The mapped dimension becomes a batch dimension."""
        _no_batched(in_dims[2], *in_dims[4:])
        y = _front(y, in_dims[1], info.batch_size, len(system.A.out_shape), system)
        if prior is not None:
            prior = _front(prior, in_dims[3], info.batch_size, len(system.A.in_shape), system)
        outputs = Solve.apply(system, y, damp, prior, *params)
        return outputs, (0,) * len(outputs)


class NormalSolve(torch.autograd.Function):
    r"""``v = H^{-1} g``: for a cotangent h, with ``w = H^{-1} h``, :math:`\bar H = -w v^H`."""

    @staticmethod
    def forward(system: System, g: Tensor, damp: Tensor | None, *params: Tensor) -> Tensor:
        """Solve."""
        ndim = len(system.A.in_shape)
        return system.call("normal_solve", g, ndim, ndim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward needs."""
        ctx.system, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> Any:
        """The cotangents of the inputs."""
        system: System = ctx.system
        v, damp, *params = ctx.saved_tensors
        needed, count = ctx.needs_input_grad[3:], system.count
        A, L = system.operators(params)
        w = NormalSolve.apply(system, system.only(h, True), damp, *params)
        bars: list[Tensor | None] = [None] * len(params)
        if any(needed[:count]):
            bars[:count] = _pull(A, False, params[:count], needed[:count], [v, w], [-A.apply(w), -A.apply(v)])
        lv, lw = (v, w) if L is None else (L.apply(v), L.apply(w))
        damp_bar, mu = _damp_bar(system.damp if damp is None else damp, lw, lv, A if L is None else L)
        if L is not None and any(needed[count:]):
            scale = -spread_over(mu, len(L.out_shape))
            bars[count:] = _pull(L, False, params[count:], needed[count:], [v, w], [scale * lw, scale * lv])
        return (None, w, _fit(damp_bar, damp), *bars)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], system: System, g: Tensor, damp: Any, *params: Any) -> Any:
        """The mapped dimension becomes a batch dimension."""
        _no_batched(*in_dims[2:])
        g = _front(g, in_dims[1], info.batch_size, len(system.A.in_shape), system)
        return NormalSolve.apply(system, g, damp, *params), 0


class PseudoSolve(torch.autograd.Function):
    """``A^+ y``, or ``A^{+H} y`` when ``transposed``, for the items without damping."""

    @staticmethod
    def forward(system: System, transposed: bool, y: Tensor, *params: Tensor) -> Tensor:
        """Solve."""
        given, found = len(system.A.out_shape), len(system.A.in_shape)
        if transposed:
            given, found = found, given
        return system.call("adjoint" if transposed else "apply", y, given, found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward needs."""
        ctx.system, ctx.transposed, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The cotangents of the inputs."""
        x, y, *params = ctx.saved_tensors
        y_bar, bars = ctx.system.pseudo_backward(ctx.transposed, y, x, g, params, ctx.needs_input_grad[3:])
        return (None, None, _fit(y_bar, y), *bars)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], system: System, transposed: bool, y: Tensor, *params: Any) -> Any:
        """The mapped dimension becomes a batch dimension."""
        _no_batched(*in_dims[3:])
        ndim = len(system.A.in_shape if transposed else system.A.out_shape)
        y = _front(y, in_dims[2], info.batch_size, ndim, system)
        return PseudoSolve.apply(system, transposed, y, *params), 0


def parameters_of(A: LinearOperator) -> tuple[Tensor, ...]:
    """The tensors A is made of; none where it cannot be rebuilt from others."""
    with suppress(MethodError):  # a pseudo-inverse as an operator cannot be rebuilt from other tensors
        return A.parameters()
    return ()


def _with(A: LinearOperator, params: Sequence[Tensor]) -> LinearOperator:
    return A.with_parameters(params) if params else A


def _transforming() -> bool:
    """Whether torch.func transforms are running, under which values are hidden and requires_grad says little."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active())


def any_followed(*tensors: Tensor | None) -> bool:
    """Whether autograd, or a torch.func transform, follows any of the tensors."""
    if _transforming():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def no_autocast(A: LinearOperator) -> Any:
    """A context in which A and the solves compute in their own dtype."""
    return torch.autocast(A.device.type, enabled=False)


def spread_over(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(*values.shape, *(1 for _ in range(ndim)))


def _damp_bar(damp: Tensor, lv: Tensor, lo: Tensor, L: LinearOperator) -> tuple[Tensor, Tensor]:
    """``-2 damp Re<L v, L (x - p)>`` per item, and mu in the real dtype of A."""
    ndim = len(L.out_shape) if lv.shape[lv.ndim - len(L.out_shape) :] == L.out_shape else len(L.in_shape)
    product = (lv.conj() * lo).real.to(scalar_dtype(lv.device))
    inner = product.flatten(product.ndim - ndim).sum(-1) if ndim else product
    return -2 * damp * inner, (damp**2).to(lv.real.dtype)


def _fit(bar: Any, tensor: Tensor | None) -> Tensor | None:
    """A cotangent summed over the dimensions that broadcasting made, in the dtype of its tensor."""
    if bar is None or tensor is None:
        return None
    return bar.sum_to_size(tensor.shape).to(tensor.dtype)


def _plus(left: list[Tensor | None], right: list[Tensor | None]) -> list[Tensor | None]:
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _pull(
    A: LinearOperator,
    transposed: bool,
    params: Sequence[Tensor],
    needed: Sequence[bool],
    directions: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    r"""Derivative of :math:`\sum_k \mathrm{Re}\langle c_k, A d_k\rangle` by the parameters, c and d held fixed."""
    places = [index for index, need in enumerate(needed) if need]
    d, c = torch.stack(list(directions)), torch.stack(list(cotangents))

    def image(*own: Tensor) -> Tensor:
        everything = list(params)
        for index, tensor in zip(places, own, strict=True):
            everything[index] = tensor
        B = A.with_parameters(everything)
        return B.adjoint(d) if transposed else B.apply(d)

    own = [params[index] for index in places]
    with no_autocast(A):
        if _transforming():
            bars = torch.func.vjp(image, *own)[1](c)
        else:
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                # aliases: d and c may depend on the parameters as well, and are to be held fixed
                alias = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in own]
                bars = torch.autograd.grad(image(*alias), alias, c, create_graph=again, allow_unused=True)
    result: list[Tensor | None] = [None] * len(params)
    for index, bar in zip(places, bars, strict=True):
        result[index] = bar
    return result


def _no_batched(*dims: Any) -> None:
    if any(dim is not None for dim in dims):
        raise MethodError("vmap: only y and x_prior can be mapped over; give the operator a kernel per batch item, and "
                          "damp one value per batch item, and pass the batch as such")  # fmt: skip


def _front(tensor: Tensor, dim: int | None, size: int, item_ndim: int, system: System) -> Tensor:
    """The mapped dimension in front of all batch dimensions, those of the operator and of damp included."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    damp = system.damp_given
    own = max(len(system.A.batch_shape), damp.ndim if isinstance(damp, Tensor) else 0)
    missing = max(0, own - (tensor.ndim - 1 - item_ndim))
    return tensor.reshape(size, *(1 for _ in range(missing)), *tensor.shape[1:])
