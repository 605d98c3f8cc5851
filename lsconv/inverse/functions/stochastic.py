"""Stochastic traces and determinants, with their standard errors and derivatives.

With random signs v (Hutchinson), the mean of ``v^H f(N) v`` is ``tr f(N)``; the quadrature of Lanczos evaluates it for
f = log | | and f = 1 / . The derivatives of the estimates are estimates of the derivatives with the same v,
``tr N^-1 dN`` and ``-tr N^-1 dN N^-1``, which need one solution ``N^-1 v`` more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning, warn
from lsconv.krylov.lanczos import Lanczos

__all__ = ["Estimate", "Probes", "log_determinant", "trace_of_inverse"]


@dataclass(frozen=True)
class Estimate:
    """A number known up to its standard error, per batch item; the value has derivatives."""

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Probes:
    """Random vectors of signs.

    Attributes:
        count: how many.
        generator: source of the signs; None: always the same ones.
    """

    count: int
    generator: torch.Generator | None = None

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """``(count, *shape)``."""
        generator = torch.Generator().manual_seed(0) if self.generator is None else self.generator
        signs = torch.randint(0, 2, (self.count, *shape), generator=generator, device=generator.device) * 2 - 1
        return signs.to(like.device, like.dtype)


def log_determinant(apply: Callable[[Tensor], Tensor], start: Tensor, item_ndim: int, *, derivatives: bool) -> Estimate:
    """``log |det N|`` of a Hermitian N, applied by a function with derivatives, from probes ``(count, *batch, *item)``.

    Args:
        apply: N.
        start: the probes.
        item_ndim: the number of dimensions of an item.
        derivatives: whether something follows the value.
    """
    lanczos, values = _converged(apply, start, item_ndim, lambda t: t.abs().log())
    if not derivatives:
        return _estimate(values)
    w = _held(lanczos.solution())
    return _estimate(values, _inner(w, apply(start), item_ndim))


def trace_of_inverse(
    apply: Callable[[Tensor], Tensor], start: Tensor, item_ndim: int, *, derivatives: bool
) -> Estimate:
    """``tr N^-1`` of a Hermitian positive definite N; arguments as for :func:`log_determinant`."""
    lanczos, values = _converged(apply, start, item_ndim, torch.reciprocal)
    if not derivatives:
        return _estimate(values)
    w = _held(lanczos.solution())
    return _estimate(values, -_inner(w, apply(w), item_ndim))


def _converged(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    item_ndim: int,
    function: Callable[[Tensor], Tensor],
    limit: int = 500,
) -> tuple[Lanczos, Tensor]:
    """Run Lanczos from ``start`` until the quadratures of ``function`` no longer change, and return it with them."""
    lanczos = Lanczos(apply, start, item_ndim)
    most = min(limit, math.prod(start.shape[start.ndim - item_ndim :]))
    last = torch.full_like(lanczos.norm, math.nan)
    while lanczos.steps < most:
        lanczos.advance(min(10, most - lanczos.steps))
        values = lanczos.quadrature(function)
        change, error = (values - last).mean(0).abs(), values.std(0) / math.sqrt(len(values))
        # what is left of the iteration is to be small beside the error of the probes
        settled = change <= torch.maximum(0.05 * error, 1e-10 * values.mean(0).abs())
        if bool(settled.all()):
            return lanczos, values
        last = values
    if most == limit:
        warn(
            f"the quadrature still moved by {float(change.max()):.1e} after {most} steps of Lanczos, beside a standard "
            f"error of {float(error.max()):.1e}; a larger damp converges sooner",
            ConvergenceWarning,
        )
    return lanczos, values


def _estimate(values: Tensor, moving: Tensor | None = None) -> Estimate:
    """The mean of the values, with the derivatives of another mean."""
    value, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    if moving is not None:
        value, error = _ValueWithDerivativesOf.apply(value, moving.mean(0)), _held(error)
    return Estimate(value, error)


class _ValueWithDerivativesOf(torch.autograd.Function):
    """The first argument, with the derivatives of the second; detach and no_grad would keep its own tangents."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, moving: Tensor) -> Tensor:
        """The value."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        """The cotangent of the other."""
        return None, g

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, tangent: Tensor) -> Tensor:
        """The tangent of the other."""
        return tangent.clone()


def _held(value: Tensor) -> Tensor:
    """The value without derivatives."""
    held: Tensor = _ValueWithDerivativesOf.apply(value, torch.zeros_like(value))
    return held


def _inner(u: Tensor, v: Tensor, item_ndim: int) -> Tensor:
    return (u.conj() * v).real.flatten(v.ndim - item_ndim).sum(-1)
