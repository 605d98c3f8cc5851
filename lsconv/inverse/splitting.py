r"""ADMM: quadratic data or none, and convex terms of linear images of x.

.. math:: \min_x \tfrac12 \|Ax - y\|^2 + \sum_j g_j(K_j x)

is split into :math:`z_j = K_j x` and solved by the alternating direction method of multipliers. Its quadratic step

.. math:: (A^HA + \rho \sum_j K_j^H K_j)\, x = A^Hy + \rho \sum_j K_j^H (z_j - u_j)

is the border solve of :mod:`lsconv.fourier.stacked` where A and the K are convolutions, with factors kept from step to
step and border unknowns that start where the last step left them; conjugate gradients otherwise. The small mu that
the factors need is compensated by a proximal term :math:`\tfrac{\mu}{2}\|x - x_k\|^2`, so that the limit is exact.

Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via the alternating direction
method of multipliers" (2011), sections 3.3 (stopping) and 3.4 (over-relaxation, residual balancing).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning, MethodError
from lsconv.fourier.stacked import StackedPlan
from lsconv.krylov.batch import ItemSpace
from lsconv.krylov.cg import cg
from lsconv.operators.algebra import VStack
from lsconv.operators.base import LinearOperator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SplittingHistory", "SplittingResult", "Term", "admm"]

_RELAXATION = 1.6
_CHECK_EVERY = 5
_BALANCE_EVERY = 10
_BALANCE_RATIO = 4.0
_REFACTORISATIONS = 6
_BALANCES = 30  # where another rho needs no other factors
# Relative residual of the border system in every quadratic step.
_STEP_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


@dataclass(frozen=True)
class Term:
    """One term ``g(K x)``.

    Attributes:
        operator: K.
        prox: ``prox(v, rho)``, the minimiser of ``g(z) + rho/2 ||z - v||^2``; rho is shaped to multiply v.
        value: ``g`` of every item; None where it is an indicator or has no value.
    """

    operator: LinearOperator
    prox: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class SplittingHistory:
    """What ADMM saw, a row for every ``check_every`` iterations.

    Attributes:
        iterations: the iteration of every row.
        primal: ``||K x - z||`` relative to the larger of the two norms, ``(rows, *batch)``.
        dual: ``rho ||K^H (z - z_old)||`` relative to the forces ``||K_j^H rho u_j||``, ``(rows, *batch)``.
        objective: the objective at x, ``(rows, *batch)``.
        rho: the penalty parameter, ``(rows, *batch)``.
    """

    iterations: Tensor
    primal: Tensor
    dual: Tensor
    objective: Tensor
    rho: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the relative primal and dual residuals against the iteration.

        Args:
            ax: matplotlib axes to draw into; new ones by default.
        """
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        for label, values, style in (("primal", self.primal, "-"), ("dual", self.dual, "--")):
            for item, curve in enumerate(values.reshape(values.shape[0], -1).cpu().T):
                text = label if values[0].numel() == 1 else f"{label} [{item}]"
                ax.plot(self.iterations.cpu().numpy(), curve.numpy(), style, label=text)
        ax.set_yscale("log")
        ax.set_xlabel("iteration")
        ax.set_ylabel("relative residual")
        if self.primal[0].numel() <= 8:
            ax.legend()
        return ax


@dataclass(frozen=True, eq=False)
class SplittingResult:
    """The end of :func:`admm`: x, the split variables, the multipliers ``rho u``, and how it went."""

    x: Tensor
    z: list[Tensor]
    multipliers: list[Tensor]
    iterations: Tensor
    converged: Tensor
    history: SplittingHistory


class _QuadraticStep:
    """``(A^H A + rho K^H K)^{-1}``, or without A ``(K^H K)^{-1}`` (then rho cancels and nothing is refactored)."""

    def __init__(self, A: LinearOperator | None, operators: Sequence[LinearOperator], rho: Tensor) -> None:
        self.A, self.operators = A, list(operators)
        self.start: Tensor | None = None
        self.set_penalty(rho)

    def set_penalty(self, rho: Tensor) -> None:
        """Factors for another rho."""
        if self.A is None:
            first, rest, damp = self.operators[0], self.operators[1:], torch.ones_like(rho)
        else:
            first, rest, damp = self.A, self.operators, rho.sqrt()
        L = rest[0] if len(rest) == 1 else VStack(rest)
        self.plan: StackedPlan | None = None
        self.stack = VStack([first, L * damp.to(first.dtype)])
        try:
            self.plan = StackedPlan(first, L, damp)
        except MethodError:
            self.normal = self.stack.H @ self.stack
            return
        self.tolerance = _STEP_TOLERANCE[self.stack.operators[0].dtype.to_real()]
        square = self.plan.unit.double() ** 2
        self.square = square.to(self.plan.damp.dtype)
        # mu of the factors in the units of A, one per batch item
        inverse = self.plan.inverse
        groups = inverse.embedding.groups
        mu = inverse.mu.expand(inverse.embedding.blocks).reshape(*inverse.embedding.batch_shape, groups)
        self.mu = mu  # per group, in scaled units

    def solve(self, g: Tensor, x: Tensor) -> Tensor:
        """The step for the right-hand side ``g`` from the last ``x``."""
        if self.plan is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                return cg(self.normal, g, x0=x, max_iter=50).x
        g = g / self.square.reshape(*self.square.shape, *(1,) * len(self.stack.in_shape)).to(g.dtype)
        g = g + self._per_channel(self.mu, x) * x
        z, _, self.start = self.plan.inverse.continued(g, self.tolerance, 200, self.start)
        return z

    def _per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """``(*batch, groups)`` shaped to multiply x."""
        channels = self.stack.in_shape[0]
        spread = values.repeat_interleave(channels // values.shape[-1], dim=-1).to(x.dtype)
        return spread.reshape(*spread.shape, *(1,) * (len(self.stack.in_shape) - 1))


@torch.no_grad()
def admm(
    A: LinearOperator | None,
    y: Tensor | None,
    terms: Sequence[Term],
    *,
    rho: Tensor,
    batch: tuple[int, ...],
    x0: Tensor,
    rtol: float,
    max_iter: int,
    objective: Callable[[Tensor, list[Tensor]], Tensor],
    convex: bool = True,
    callback: Callable[[int, Tensor], bool | None] | None = None,
) -> SplittingResult:
    """Run ADMM until the relative primal and dual residuals are below ``rtol`` in every batch item.

    Args:
        A: operator of the quadratic data term; None: there is none, and the first term's operator is a convolution.
        y: its data.
        terms: the other terms.
        rho: the penalty to begin with, one per batch item.
        batch: the batch dimensions.
        x0: where to start, ``(*batch, *in_shape)``.
        rtol: relative tolerance.
        max_iter: limit on the iterations.
        objective: of ``x`` and the list of ``K x``.
        convex: balance the penalty; with a denoiser as the prior it is part of the model and stays.
        callback: called with the iteration and x every few iterations; returning True stops.
    """
    operators = [term.operator for term in terms]
    spaces = [ItemSpace(K.out_shape, K.dtype, K.device) for K in operators]
    domain = ItemSpace(operators[0].in_shape, x0.dtype, x0.device)
    rho = rho.expand(batch).clone()
    step = _QuadraticStep(A, operators, rho)
    h = None if A is None or y is None else A.adjoint(y)
    x = x0.expand(*batch, *x0.shape[x0.ndim - len(domain.item_shape) :]).clone()
    z = [K.apply(x) for K in operators]
    u = [torch.zeros_like(v) for v in z]
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    converged = torch.zeros_like(active)
    iterations = torch.zeros(batch, dtype=torch.int64, device=x.device)
    rows: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    refactored = 0
    for k in range(1, max_iter + 1):
        g = _sum([K.adjoint(v - w) for K, v, w in zip(operators, z, u, strict=True)])
        if h is not None:
            g = h + domain.spread(rho) * g
        new_x = step.solve(g, x)
        mask = domain.spread(active).bool()
        x = torch.where(mask, new_x, x)
        images = [K.apply(x) for K in operators]
        old, z, u = z, *_split_step(terms, spaces, images, z, u, rho, active)
        iterations += active
        if k % _CHECK_EVERY and k != max_iter:
            continue
        primal, dual = _residuals(operators, spaces, domain, images, z, old, u)
        met = (primal <= rtol) & (dual <= rtol)
        rows.append((k, primal, dual, objective(x, images), rho.clone()))
        converged = converged | (met & active)
        active = active & ~met & torch.isfinite(primal)
        if not bool(active.any()) or (callback is not None and callback(k, x)):
            break
        if convex and k % _BALANCE_EVERY == 0 and refactored < (_REFACTORISATIONS if A is not None else _BALANCES):
            ratio = (primal / dual.clamp_min(1e-30)).clamp(1e-2, 1e2)
            change = torch.where(active & ((ratio > _BALANCE_RATIO) | (ratio < 1 / _BALANCE_RATIO)), ratio.sqrt(), 1.0)
            if bool((change != 1).any()):
                rho = rho * change
                u = [v / space.spread(change) for v, space in zip(u, spaces, strict=True)]
                refactored += 1
                if A is not None:
                    step.set_penalty(rho)
    count, primals, duals, objectives, rhos = zip(*rows, strict=True)
    history = SplittingHistory(
        torch.tensor(count), torch.stack(primals), torch.stack(duals), torch.stack(objectives), torch.stack(rhos)
    )
    multipliers = [space.spread(rho) * v for v, space in zip(u, spaces, strict=True)]
    return SplittingResult(x, z, multipliers, iterations, converged, history)


def _split_step(
    terms: Sequence[Term],
    spaces: Sequence[ItemSpace],
    images: list[Tensor],
    z: list[Tensor],
    u: list[Tensor],
    rho: Tensor,
    active: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The over-relaxed step of the split variables and multipliers; finished items stay."""
    new_z, new_u = [], []
    for term, space, image, before, multiplier in zip(terms, spaces, images, z, u, strict=True):
        relaxed = _RELAXATION * image + (1 - _RELAXATION) * before
        v = relaxed + multiplier
        after = term.prox(v, space.spread(rho).real)
        mask = space.spread(active).bool()
        new_z.append(torch.where(mask, after, before))
        new_u.append(torch.where(mask, v - after, multiplier))
    return new_z, new_u


def _residuals(
    operators: Sequence[LinearOperator],
    spaces: Sequence[ItemSpace],
    domain: ItemSpace,
    images: list[Tensor],
    z: list[Tensor],
    old: list[Tensor],
    u: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Relative primal and dual residuals; rho cancels in the latter."""

    def norm(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([space.norm(part) for space, part in zip(spaces, parts, strict=True)]).square().sum(0).sqrt()

    primal = norm([a - b for a, b in zip(images, z, strict=True)])
    size = torch.maximum(norm(images), norm(z))
    change = domain.norm(_sum([K.adjoint(a - b) for K, a, b in zip(operators, z, old, strict=True)]))
    # the forces one by one: without a quadratic term they balance each other at the optimum
    force = torch.stack([domain.norm(K.adjoint(v)) for K, v in zip(operators, u, strict=True)]).square().sum(0).sqrt()
    tiny = torch.finfo(primal.dtype).tiny
    # without any force (the terms are flat at the optimum) the change counts against the images themselves
    return primal / size.clamp_min(tiny), change / torch.maximum(force, 1e-3 * domain.norm(_sum(
        [K.adjoint(v) for K, v in zip(operators, images, strict=True)]
    ))).clamp_min(tiny)  # fmt: skip


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
