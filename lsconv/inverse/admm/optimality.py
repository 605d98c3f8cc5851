r"""The certificate of a convex reconstruction, computed from x and dual variables of any method.

For :math:`\min_{lo \le x \le hi} \sum_j g_j(K_j x)` and dual variables :math:`p_j` in the domains of the conjugates,

.. math::
    s &= \textstyle\sum_j K_j^H p_j                             && \text{stationarity} \\
    c &= \textstyle\sum_j g_j(K_j x) + g_j^*(p_j) - \langle p_j, K_j x\rangle \ge 0 && \text{complementarity}

both vanish exactly at a minimiser (Karush, Kuhn and Tucker), and for any feasible x' the objective F obeys

.. math:: F(x) - F(x') \le c + \langle s, x - x'\rangle,

which bounds the primal-dual gap. With bounds, components of s that point out of them do not count: s is replaced by the
natural residual :math:`(x - \Pi(x - t s))/t`, Π projecting onto the bounds, with t the norm of x over the largest norm
of the forces :math:`K_j^H p_j`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.inverse.admm.proximal import Bounds, Term
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide

__all__ = ["Optimality", "natural_residual", "optimality"]


@dataclass(frozen=True, eq=False)
class Optimality:
    """The distance of x from an optimum, an entry per batch item.

    Attributes:
        stationarity: norm of the sum of all forces, relative to the largest of them, ``||K_j^H p_j||``.
        complementarity: the Fenchel-Young gaps, relative to the objective.
        gradient_norm: the norm of the sum of all forces.
        objective: the objective at x (of the Poisson likelihood: the divergence).
        forces: the largest ``||K_j^H p_j||``.
    """

    stationarity: Tensor
    complementarity: Tensor
    gradient_norm: Tensor
    objective: Tensor
    forces: Tensor

    def met(self, rtol: float) -> Tensor:
        """Tell whether stationarity and complementarity are at most ``rtol``."""
        return (self.stationarity <= rtol) & (self.complementarity <= rtol)


def optimality(
    terms: Sequence[Term],
    duals: Sequence[Tensor],
    x: Tensor,
    *,
    bounds: Bounds | None = None,
    norms: Sequence[float],
    rounding: float,
) -> Optimality:
    """Compute the certificate of x, in the dtype of the terms' operators.

    Args:
        terms: all terms but the bounds.
        duals: a dual variable for every term, ``(*batch, *K.out_shape)``; ``term.dual`` projects it onto the domain.
        x: the x, inside the bounds.
        bounds: lowest and highest value.
        norms: the norm of every K, up to a small factor.
        rounding: the relative rounding error of x; the part of both residuals that it explains is subtracted.
    """
    first = terms[0].operator
    inputs = ItemSpace(first.in_shape, first.dtype, first.device)
    size = inputs.norm(x)
    total = torch.zeros_like(x)
    objective, gap = torch.zeros_like(size), torch.zeros_like(size)
    forces, allowed_gap, allowed_force = torch.zeros_like(size), torch.zeros_like(size), torch.zeros_like(size)
    for term, p, norm in zip(terms, duals, norms, strict=True):
        K = term.operator
        outputs = ItemSpace(K.out_shape, K.dtype, K.device)
        v = K.apply(x)
        p = term.dual(p, v)
        force = K.adjoint(p)
        total = total + force
        objective, gap = objective + term.value(v), gap + term.gap(v, p)
        forces = torch.maximum(forces, inputs.norm(force))
        # In a flat image p and the value are rounding, so a bound of p is used: all entries at their largest.
        p_norm = outputs.norm(p) if term.weight is None else term.weight.double() * math.sqrt(term.entries)
        allowed_gap = allowed_gap + rounding * norm * size * p_norm
        image_change = norm * size if term.stiffness is None else norm * size * term.stiffness
        allowed_force = allowed_force + rounding * norm * (p_norm if term.balanced else image_change)
    if bounds is not None:
        total = natural_residual(x, total, forces, bounds, inputs)
    residual = inputs.norm(total)
    tiny = torch.finfo(torch.float64).tiny
    return Optimality(
        stationarity=(residual - allowed_force).clamp_min(0) / forces.clamp_min(tiny),
        complementarity=(gap - allowed_gap).clamp_min(0) / objective.clamp_min(tiny),
        gradient_norm=residual,
        objective=objective,
        forces=forces,
    )


def natural_residual(x: Tensor, g: Tensor, forces: Tensor, bounds: Bounds, space: ItemSpace) -> Tensor:
    """``(x - P(x - t g)) / t``, zero where the bounds hold x against the gradient g; P projects onto them.

    Args:
        x: the x, inside the bounds, ``(*batch, *in_shape)``.
        g: the gradient there.
        forces: the size of its largest term, per item; t is the norm of x over it, or 1 where that is zero.
        bounds: lowest and highest value.
        space: arithmetic on tensors shaped like x.
    """
    length = divide(space.norm(x), forces)
    t = space.broadcast(torch.where(length > 0, length, 1.0)).to(x.dtype)
    return (x - (x - t * g).clamp(*bounds)) / t
