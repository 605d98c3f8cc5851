r"""The convex terms that :func:`~lsconv.inverse.admm.iteration.admm` splits off, with values, duals and gaps.

A term is a convex function g of a linear image v = K x. It has a proximal operator, its value and, for a dual variable
p in the domain of the conjugate g*, the Fenchel-Young gap

.. math:: g(v) + g^*(p) - \langle p, v\rangle \;\ge\; 0,

which is zero exactly where :math:`p \in \partial g(v)` (Rockafellar, "Convex Analysis", theorem 23.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items

__all__ = ["Bounds", "Term", "box_term", "gaussian_term", "poisson_term", "sparsity_term"]

# The lowest and the highest value; None: no bound.
Bounds = tuple[float | None, float | None]


@dataclass(frozen=True)
class Term:
    """One term ``g(K x)``; the functions take tensors ``(*batch, *K.out_shape)``.

    Attributes:
        operator: K.
        prox: ``prox(v, rho, out)`` writes the minimiser of ``g(z) + rho/2 ||z - v||^2``; rho is shaped to multiply v.
        value: g of every item, in float64.
        dual: ``dual(p, v)``: a dual variable near p in the domain of g*, with which v is certified.
        gap: the Fenchel-Young gap of ``(v, p)`` of every item, in float64.
        balanced: the penalty parameter of this term is adapted during the iteration.
        follows: its penalty parameter rises by the same factor as that of the balanced terms.
        entries: the number of magnitudes in the sum over an item, for sparsifying terms.
        weight: the factor of that sum, per batch item; None: the term is no such sum.
        stiffness: the derivative of the dual variable by ``K x``, about, per batch item; None: 1.
        quadratic: the term is ``1/2 ||K x - y||^2``.
    """

    operator: LinearOperator
    prox: Callable[[Tensor, Tensor, Tensor], object]
    value: Callable[[Tensor], Tensor]
    dual: Callable[[Tensor, Tensor], Tensor]
    gap: Callable[[Tensor, Tensor], Tensor]
    balanced: bool = False
    follows: bool = False
    entries: int = 1
    weight: Tensor | None = None
    stiffness: Tensor | None = None
    quadratic: bool = False


def gaussian_term(A: LinearOperator, y: Tensor, scale: Tensor | None = None, at_least: Tensor | None = None) -> Term:
    r"""``1/2 ||S Ax - y||^2``; its dual variable is the residual itself, so there is no gap.

    Args:
        A: the operator.
        y: the data; zero in rows where the scale is zero.
        scale: the diagonal of S, which broadcasts with y, real; a row of zero is not measured. None: ones.
        at_least: marks rows whose y is a lower bound, which count only where ``S Ax`` is below it; needs a scale.
    """
    space = ItemSpace(A.out_shape, A.dtype, A.device)

    def scaled(v: Tensor) -> Tensor:
        return v if scale is None else v * scale.to(v.real.dtype if v.is_complex() else v.dtype)

    def residual(v: Tensor) -> Tensor:
        r = scaled(v) - y.to(v.dtype)
        return r if at_least is None else torch.where(at_least, r.clamp_max(0), r)

    def prox(v: Tensor, rho: Tensor, out: Tensor) -> None:
        if scale is not None:
            nearest = (rho * v + scale * y) / (rho + scale.square())
            out.copy_(nearest if at_least is None else torch.where(at_least & (scaled(v) >= y), v, nearest))
            return
        torch.mul(v, rho / (1 + rho), out=out)
        torch.addcmul(out, y, 1 / (1 + rho), out=out)

    return Term(
        A,
        prox,
        value=lambda v: 0.5 * space.norm(residual(v)) ** 2,
        dual=lambda p, v: scaled(residual(v)),
        gap=lambda v, p: torch.zeros(v.shape[: v.ndim - len(A.out_shape)], dtype=torch.float64, device=v.device),
        quadratic=scale is None,
    )


def poisson_term(A: LinearOperator, y: Tensor, background: float | Tensor, scale: Tensor | None = None) -> Term:
    r"""The Kullback-Leibler divergence ``sum_i KL(y_i | t_i)`` of ``t = S Ax + background``.

    It differs from the negative log-likelihood ``t - y log t`` by a constant. With ``p = S q``, ``q < 1``, the
    Fenchel-Young gap of an entry is ``KL(y | t (1 - q))``.

    Args:
        A: the operator.
        y: counts.
        background: expected counts without x, a number or a tensor that broadcasts with y.
        scale: the diagonal of S, >= 0, which broadcasts with y; a row of zero is not measured. None: ones.
    """
    ndim = len(A.out_shape)

    def expected(v: Tensor) -> Tensor:
        return (v if scale is None else v * scale.to(v.dtype)) + _as_dtype_of(v, background)

    def prox(v: Tensor, rho: Tensor, out: Tensor) -> None:
        if scale is not None:
            rho = rho / scale.square().clamp_min(torch.finfo(v.dtype).tiny)
        c = expected(v) - 1 / rho
        root = torch.sqrt(c**2 + 4 * y / rho)
        # the positive root, without cancelling where c < 0
        t = torch.where(c >= 0, (c + root) / 2, 2 * y / rho / (root - c).clamp_min(torch.finfo(v.dtype).tiny))
        torch.sub(t, _as_dtype_of(v, background), out=out)
        if scale is not None:
            out.copy_(torch.where(scale > 0, out / scale, v))

    def divergence(t: Tensor) -> Tensor:
        counts = y.double().expand(t.shape)
        if scale is not None:  # a row that is not measured costs nothing
            t = torch.where(scale > 0, t, counts)
        # where t < 0 no count is likely at all; without a count the expected number is what it costs
        safe = torch.where(t > 0, t, torch.where(counts > 0, 0.0, 1.0))
        ratio = torch.where(counts > 0, counts / safe, 1.0)
        return (t.abs() - counts + torch.xlogy(counts, ratio)).flatten(t.ndim - ndim).sum(-1)

    def slope(p: Tensor) -> Tensor:
        return p if scale is None else torch.where(scale > 0, p / scale.to(p.dtype), 0)

    def dual(p: Tensor, v: Tensor) -> Tensor:
        bounded = slope(p).clamp_max(1 - torch.finfo(p.dtype).eps)
        return bounded if scale is None else bounded * scale.to(p.dtype)

    # the second derivative y / t^2, at the mean of the counts
    square = 1.0 if scale is None else scale.double().square().mean()
    photons = y.double().flatten(y.ndim - ndim).mean(-1)
    return Term(
        A,
        prox,
        stiffness=square / torch.where(photons > 0, photons, 1.0),
        value=lambda v: divergence(expected(v.double())),
        dual=dual,
        gap=lambda v, p: divergence(expected(v.double()) * (1 - slope(p.double()))),
    )


def _as_dtype_of(v: Tensor, value: float | Tensor) -> float | Tensor:
    return value.to(v.dtype) if isinstance(value, Tensor) else value


def sparsity_term(L: LinearOperator, weight: Tensor, groups: tuple[int, ...] = (), huber: float = 0.0) -> Term:
    """``weight ||L x||_{2,1}``, or its Huber function: quadratic below the magnitude ``huber``.

    Args:
        L: the operator.
        weight: one per batch item.
        groups: the dimensions of ``L x`` over which the Euclidean norm is taken; empty: every entry by itself.
        huber: the magnitude in units of ``L x`` below which the function is quadratic; 0: nowhere.
    """
    ndim = len(L.out_shape)
    dims = tuple(group - ndim for group in groups)

    def weight_like(v: Tensor) -> Tensor:
        return over_items(weight, ndim).to(v.real.dtype if v.is_complex() else v.dtype)

    def magnitude(v: Tensor) -> Tensor:
        if not dims:
            return v.abs()
        # The few entries are added one by one, because torch's sum over a short leading dimension is slow.
        parts = (v.real, v.imag) if v.is_complex() else (v,)
        first, *others = [entry for part in parts for entry in part.unbind(dims[0])]
        size = first.square()
        for entry in others:
            size.addcmul_(entry, entry)
        size = size.unsqueeze(dims[0])
        return (size.sum(dims[1:], keepdim=True) if dims[1:] else size).sqrt_()

    def total(values: Tensor) -> Tensor:
        return values.flatten(values.ndim - ndim).sum(-1, dtype=torch.float64)

    def prox(v: Tensor, rho: Tensor, out: Tensor) -> None:
        size, threshold = magnitude(v), weight_like(v) / rho
        small = size <= huber + threshold if huber > 0 else None
        tiny = torch.finfo(size.dtype).tiny
        size = torch.maximum(size, threshold.clamp_min(tiny), out=size)
        shrink = torch.div(-threshold, size, out=size).add_(1)
        if small is not None:  # quadratic where the minimiser stays below huber
            shrink = torch.where(small, huber / (huber + threshold), shrink)
        torch.mul(v, shrink, out=out)

    def value(v: Tensor) -> Tensor:
        size = magnitude(v)
        if huber > 0:
            size = torch.where(size <= huber, size**2 / (2 * huber), size - huber / 2)
        return weight.double() * total(size)

    def dual(p: Tensor, v: Tensor) -> Tensor:
        bound = weight_like(p)
        size = magnitude(p).clamp_min(torch.finfo(bound.dtype).tiny)
        return p * (bound / size).clamp_max(1)

    def gap(v: Tensor, p: Tensor) -> Tensor:
        inner = (v.conj() * p).real
        inner = inner.sum(dims, keepdim=True) if dims else inner
        size = magnitude(v)
        if huber == 0:
            return total(weight_like(v) * size - inner)
        # weight h(v) + huber/(2 weight) |p|^2 - <p, v>
        h = torch.where(size <= huber, size**2 / (2 * huber), size - huber / 2)
        tiny = torch.finfo(size.dtype).tiny
        return total(weight_like(v) * h + huber / (2 * weight_like(v).clamp_min(tiny)) * magnitude(p) ** 2 - inner)

    together = math.prod(L.out_shape[group] for group in groups)
    return Term(L, prox, value, dual, gap, balanced=True, entries=math.prod(L.out_shape) // together,
                weight=weight)  # fmt: skip


def box_term(identity: LinearOperator, bounds: Bounds) -> Term:
    """``lowest <= x <= highest``. The certificate of the bounds is in the stationarity, so value and gap are zero."""
    ndim = len(identity.out_shape)

    def nothing(v: Tensor) -> Tensor:
        return torch.zeros(v.shape[: v.ndim - ndim], dtype=torch.float64, device=v.device)

    return Term(
        identity,
        lambda v, rho, out: torch.clamp(v, *bounds, out=out),
        value=nothing,
        dual=lambda p, v: torch.zeros_like(p),
        gap=lambda v, p: nothing(v),
        follows=True,
    )
