"""Stochastic traces and determinants, with their standard errors and derivatives.

For a Hermitian N and probes v of random signs the mean of ``v^H f(N) v`` is ``tr f(N)`` (Hutchinson). Lanczos
quadrature evaluates it, for ``log det N`` with ``f(t) = log |t|`` and for ``tr N^-1`` with ``f(t) = 1 / t``. Their
derivatives, ``tr N^-1 dN`` and ``-tr N^-1 dN N^-1``, are estimated with the same probes and the solutions ``N^-1 v``.
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
    """A value, per batch item, with its standard error; the value has derivatives, the error has none."""

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True)
class Probes:
    """Probes: vectors of random signs.

    Attributes:
        count: number of probes.
        generator: the source of the signs; None: a fixed seed.
    """

    count: int
    generator: torch.Generator | None = None

    def draw(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw ``(count, *shape)`` signs, in the type and on the device of ``like``."""
        generator = torch.Generator().manual_seed(0) if self.generator is None else self.generator
        signs = torch.randint(0, 2, (self.count, *shape), generator=generator, device=generator.device) * 2 - 1
        return signs.to(like.device, like.dtype)


def log_determinant(apply: Callable[[Tensor], Tensor], start: Tensor, item_ndim: int, *, derivatives: bool) -> Estimate:
    """``log |det N|`` of a Hermitian N, applied by a function with derivatives, from probes ``(count, *batch, *item)``.

    Args:
        apply: applies N to ``(count, *batch, *item)``.
        start: the probes.
        item_ndim: the number of dimensions of an item.
        derivatives: the value needs derivatives, which take one more solution per probe.
    """
    lanczos, values = _lanczos_quadrature(apply, start, item_ndim, lambda t: t.abs().log())
    if not derivatives:
        return _estimate(values)
    w = _constant(lanczos.solution())
    return _estimate(values, _inner(w, apply(start), item_ndim))


def trace_of_inverse(
    apply: Callable[[Tensor], Tensor], start: Tensor, item_ndim: int, *, derivatives: bool
) -> Estimate:
    """``tr N^-1`` of a Hermitian positive definite N; arguments as for :func:`log_determinant`."""
    lanczos, values = _lanczos_quadrature(apply, start, item_ndim, torch.reciprocal)
    if not derivatives:
        return _estimate(values)
    w = _constant(lanczos.solution())
    return _estimate(values, -_inner(w, apply(w), item_ndim))


def _lanczos_quadrature(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    item_ndim: int,
    function: Callable[[Tensor], Tensor],
    limit: int = 500,
) -> tuple[Lanczos, Tensor]:
    """Run Lanczos from ``start`` until the quadratures of ``function`` no longer change, and return it with them."""
    lanczos = Lanczos(apply, start, item_ndim)
    max_steps = min(limit, math.prod(start.shape[start.ndim - item_ndim :]))
    previous = torch.full_like(lanczos.norm, math.nan)
    while lanczos.steps < max_steps:
        lanczos.advance(min(10, max_steps - lanczos.steps))
        values = lanczos.quadrature(function)
        change, error = (values - previous).mean(0).abs(), values.std(0) / math.sqrt(len(values))
        # The error of the quadrature need only be small beside the standard error of the probes.
        converged = change <= torch.maximum(0.05 * error, 1e-10 * values.mean(0).abs())
        if bool(converged.all()):
            return lanczos, values
        previous = values
    if max_steps == limit:
        warn(
            f"the quadrature still changed by {float(change.max()):.1e} after {max_steps} steps of Lanczos, beside a "
            f"standard error of {float(error.max()):.1e}; a larger damp converges sooner",
            ConvergenceWarning,
        )
    return lanczos, values


def _estimate(values: Tensor, derivative_of: Tensor | None = None) -> Estimate:
    """The mean over the probes, with its standard error, and with the derivatives of the mean of ``derivative_of``."""
    value, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    if derivative_of is not None:
        value, error = _ValueWithDerivativesOf.apply(value, derivative_of.mean(0)), _constant(error)
    return Estimate(value, error)


class _ValueWithDerivativesOf(torch.autograd.Function):
    """The first argument, with the derivatives of the second.

    ``detach`` would not do: in forward mode it keeps the tangent of the first.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, derivative_of: Tensor) -> Tensor:
        """Return the value of the first argument."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save nothing: both derivatives are the identity."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        """Pass the cotangent to the second argument."""
        return None, g

    @staticmethod
    def jvp(ctx: Any, _: Tensor | None, tangent: Tensor) -> Tensor:
        """Take the tangent of the second argument."""
        return tangent.clone()


def _constant(value: Tensor) -> Tensor:
    """The value as a constant: without derivatives in either mode."""
    constant: Tensor = _ValueWithDerivativesOf.apply(value, torch.zeros_like(value))
    return constant


def _inner(u: Tensor, v: Tensor, item_ndim: int) -> Tensor:
    """The real part of ``u^H v``, item by item."""
    return (u.conj() * v).real.flatten(v.ndim - item_ndim).sum(-1)
