r"""Restoration of counts: a quadratic penalty beside the Poisson likelihood, and the strength that fits the counts.

.. math:: \min_{lo \le x \le hi}\; \sum_i (S A x + b)_i - y_i \log (S A x + b)_i
          + \tfrac12 \mathrm{damp}^2 \|L(x - m)\|^2

Without the penalty this is the problem that Richardson and Lucy iterate on. The discrepancy rule takes the strength at
which the divergence of the data is what it is on average for Poisson variables of the restored means t,

.. math:: \sum_i KL(y_i | t_i) = \sum_i \xi(t_i), \qquad \xi(t) = E[KL(Y | t)],\ Y \sim \mathrm{Poisson}(t),

which is 1/2 per pixel for many counts, and less for few.

Zanella, Boccacci, Zanni and Bertero, "Efficient gradient projection methods for edge-preserving removal of Poisson
noise" (2009), and Bertero, Boccacci, Talenti, Zanella and Zanni, "A discrepancy principle for Poisson data" (2010).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.errors import unreported
from lsconv.inverse.admm.optimality import natural_residual
from lsconv.inverse.admm.proximal import Bounds
from lsconv.inverse.bounded import RTOL, bounded_least_squares
from lsconv.inverse.convex_arguments import reported
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.problem import prepare
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Diagonal

__all__ = ["by_discrepancy", "expected_divergence", "penalised_poisson"]


@torch.no_grad()
def penalised_poisson(
    A: LinearOperator,
    y: Tensor,
    damp: Tensor,
    *,
    L: LinearOperator | None,
    x_prior: Tensor,
    background: float | Tensor,
    bounds: Bounds | None,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int = 50,
    raise_on_failure: bool = False,
) -> Solution:
    """The restoration of counts under a quadratic penalty, by Newton's method within bounds.

    Every step is a weighted least-squares problem within the bounds (:mod:`lsconv.inverse.bounded`), whose weights are
    those of the second derivative, y / t^2, and at least a tenth of its mean, 1 / t; it is halved until the objective
    falls. The certificate is the natural residual of the whole objective, recomputed in double precision.

    Args:
        A: the operator to photons.
        y: counts, ``(*batch, *out_shape)``.
        damp: one per batch item.
        L: the penalty; None: the identity.
        x_prior: what the penalty pulls to, ``(*batch, *in_shape)``.
        background: photons without x.
        bounds: of x.
        x0: where to start.
        rtol: tolerance of the certificate; None: that of bounded least squares.
        max_iter: limit on the Newton steps.
        raise_on_failure: raise instead of warning.
    """
    problem = prepare(A, y, name="image")
    batch = tuple(problem.batch)
    rtol = RTOL[A.dtype.to_real()] if rtol is None else rtol
    box = (-torch.inf, None) if bounds is None else bounds
    strength = damp.to(torch.float64).expand(batch)
    f = _Likelihood(A, problem.y, strength, L, x_prior, background)
    f64 = torch.float64
    precise = _Likelihood(A.to(dtype=f64), problem.y.to(f64), strength, None if L is None else L.to(dtype=f64),
                          x_prior.to(f64), background)  # fmt: skip
    x = (x_prior if x0 is None else x0).expand(*batch, *A.in_shape).clamp(*box)
    value = f.value(x)
    accuracy, finest = 1e-2, 1e-3 * rtol
    iterations = torch.zeros(batch, dtype=torch.int64, device=A.device)
    for k in range(max_iter + 1):
        gradient_norm, forces = precise.certificate(x.double(), box)
        active = (gradient_norm > rtol * forces) & torch.isfinite(gradient_norm)
        if k == max_iter or not bool(active.any()):
            break
        iterations += active
        ratio = float((gradient_norm / forces)[active].max())
        inner = max(accuracy * min(ratio, 1.0), finest)
        weights, target = f.weights(x)
        with unreported():
            proposed = bounded_least_squares(
                "deconvolve", Diagonal(weights, len(batch)) @ A, weights * target, box, strength, L=L, x_prior=x_prior,
                x0=x, rtol=inner,
            ).x  # fmt: skip
        step, length, before = proposed - x, active.double(), value
        # a step near the minimum changes the objective by less than its rounding, which is allowed for
        before = before + 4 * torch.finfo(A.dtype).eps * (before.abs() + math.sqrt(A.out_numel) * f.mean)
        for _ in range(30):
            trial = x + f.space.broadcast(length) * step
            value = f.value(trial)
            worse = ~(value <= before) & (length > 0)
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        better = f.space.broadcast((value <= before).double()).bool()
        moved = better & f.space.broadcast(active.double()).bool()
        still = not bool((moved & (trial != x)).any())
        x = torch.where(moved, trial, x).clamp(*box)
        value = f.value(x)
        if still and inner == finest:
            break
        accuracy = 0.01 * accuracy if still else accuracy
    gradient_norm, forces = precise.certificate(x.double(), box)
    rounding = 4 * torch.finfo(A.dtype).eps * precise.rounding_force(x.double())
    met = (gradient_norm <= rtol * forces) | (gradient_norm <= rounding)
    codes = torch.where(met, Status.OPTIMALITY.code, Status.ITERATION_LIMIT.code)
    solution = Solution(
        x=x,
        codes=torch.where(torch.isfinite(gradient_norm), codes, Status.NON_FINITE.code),
        converged=met,
        iterations=iterations,
        residual_norm=ItemSpace(A.out_shape, f64, A.device).safe_norm(precise.y - precise.means(x.double())),
        gradient_norm=gradient_norm,
        damp=strength,
    )
    return reported(solution, problem.nonfinite.expand(batch), "deconvolve", raise_on_failure)


class _Likelihood:
    """The objective, its derivatives and its certificate."""

    def __init__(
        self, A: LinearOperator, y: Tensor, damp: Tensor, L: LinearOperator | None, x_prior: Tensor,
        background: float | Tensor,
    ) -> None:  # fmt: skip
        self.A, self.y, self.damp, self.L, self.x_prior = A, y, damp, L, x_prior
        self.background = background.to(A.dtype) if isinstance(background, Tensor) else background
        self.space = ItemSpace(A.in_shape, A.dtype, A.device)
        self.mean = float(y.double().mean().clamp_min(1e-300))

    def means(self, x: Tensor) -> Tensor:
        """The expected counts ``A x + background``, ``(*batch, *out_shape)``."""
        return self.A.apply(x) + self.background

    def value(self, x: Tensor) -> Tensor:
        """The divergence plus the penalty, in float64, per item; infinite where an expected count is negative."""
        t, y = self.means(x).double(), self.y.double()
        safe = torch.where(t > 0, t, torch.where(y > 0, 0.0, 1.0))
        entries = torch.xlogy(y, torch.where(y > 0, y / safe, 1.0)) - y + t
        entries = torch.where(t < -1e-6 * self.mean, torch.inf, entries)  # smaller negative counts are rounding
        d = x - self.x_prior
        penalty = (d if self.L is None else self.L.apply(d)).double()
        penalty = penalty.square().flatten(len(self.damp.shape)).sum(-1)
        return entries.flatten(len(self.damp.shape)).sum(-1) + 0.5 * self.damp.square() * penalty

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The roots of the second derivatives, and the data that make the quadratic model a least-squares problem."""
        t = self.means(x).clamp_min(1e-3 * self.mean)
        curvature = torch.maximum(self.y, 0.1 * t) / t.square()
        return curvature.sqrt(), self.A.apply(x) - (1 - self.y / t) / curvature

    def forces(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the divergence and of the penalty, each ``(*batch, *in_shape)``."""
        t = self.means(x)
        slope = 1 - torch.where(self.y > 0, self.y / t.clamp_min(torch.finfo(t.dtype).tiny), 0.0)
        d = x - self.x_prior
        pull = self.space.broadcast(self.damp.square()) * (d if self.L is None else self.L.adjoint(self.L.apply(d)))
        return self.A.adjoint(slope), pull

    def certificate(self, x: Tensor, box: Bounds) -> tuple[Tensor, Tensor]:
        """The norms of the natural residual, and of the larger of the two gradients of :meth:`forces`, per item."""
        data, pull = self.forces(x)
        # where the data agree with the prior both gradients vanish, and the noise of the counts gives their scale
        forces = torch.maximum(self.space.norm(data), self.space.norm(pull))
        forces = torch.maximum(forces, 1e-3 * self.space.norm(self.A.adjoint(torch.sqrt(self.y) / self.mean)))
        return self.space.norm(natural_residual(x, data + pull, forces, box, self.space)), forces

    def rounding_force(self, x: Tensor) -> Tensor:
        """The norm of ``A^H W |A x|``, W the second derivatives: times the unit roundoff, the gradient's rounding."""
        weights, _ = self.weights(x)
        return self.space.norm(self.A.adjoint(weights.square() * self.A.apply(x).abs()))


def expected_divergence(t: Tensor) -> Tensor:
    r"""The mean of KL(Y | t) over Poisson variables Y of mean t, entry by entry, in float64.

    Example:
        >>> from lsconv.inverse.poisson import expected_divergence
        >>> expected_divergence(torch.tensor([0.0, 1e3]))
        tensor([0.0000, 0.5001], dtype=torch.float64)
    """
    t = t.double()
    knots = torch.logspace(-4, 2, 241, dtype=torch.float64, device=t.device)
    k = torch.arange(400, dtype=torch.float64, device=t.device)
    probability = torch.exp(torch.xlogy(k, knots[:, None]) - knots[:, None] - torch.lgamma(k + 1))
    table = (probability * (torch.xlogy(k, k / knots[:, None]) - k + knots[:, None])).sum(-1)
    place = (t.clamp(1e-4, 100).log10() + 4) * 40
    below = place.floor().clamp_max(239).long()
    part = place - below
    inner = table[below] * (1 - part) + table[below + 1] * part
    inner = torch.where(t < 1e-4, inner * t.clamp_min(0) / 1e-4, inner)
    return torch.where(t > 100, 0.5 + 1 / (12 * t.clamp_min(1)), inner)


def by_discrepancy(
    solve: Callable[[Tensor, Tensor | None], Solution],
    start: Tensor,
    A: LinearOperator,
    y: Tensor,
    background: float | Tensor,
    measured: Tensor | None,
    *,
    within: float = 0.02,
    solves: int = 12,
) -> Solution:
    """The solution at the strength that the discrepancy rule takes, one for all batch items that ``start`` has.

    Bisection in logarithms after the rule is bracketed: the divergence rises with the strength. Every solve begins at
    the answer of the last.

    Args:
        solve: the solution at a strength, begun at an x.
        start: strengths to begin with.
        A: the operator to photons.
        y: counts.
        background: photons without x.
        measured: pixels that count, which broadcasts with y; None: all.
        within: relative deviation of the divergence that ends the search.
        solves: limit on the search.
    """
    axes = tuple(range(-len(A.out_shape), 0))

    def excess(solution: Solution) -> Tensor:
        t = (A.apply(solution.x) + background).double().clamp_min(1e-12)
        counts = y.double()
        entries = torch.xlogy(counts, counts / t) - counts + t - expected_divergence(t)
        scale = expected_divergence(t)
        if measured is not None:
            entries, scale = torch.where(measured, entries, 0), torch.where(measured, scale, 0)
        return entries.sum(axes) / scale.sum(axes).clamp_min(1e-300)

    strength = start.double()
    low, high = torch.zeros_like(strength), torch.full_like(strength, torch.inf)
    start_at: Tensor | None = None
    for _ in range(solves):
        with unreported():
            solution = solve(strength, start_at)
        start_at = solution.x
        over = excess(solution)
        if bool((over.abs() < within).all()):
            break
        high, low = torch.where(over > 0, strength, high), torch.where(over > 0, low, strength)
        centre = (low * high).sqrt()
        bracketed = (low > 0) & torch.isfinite(high)
        next_strength = torch.where(bracketed, centre, torch.where(over > 0, strength / 2, strength * 2))
        strength = torch.where(over.abs() < within, strength, next_strength)
    return solve(strength, start_at)
