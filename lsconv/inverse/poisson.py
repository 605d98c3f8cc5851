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

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.errors import ConvergenceWarning
from lsconv.inverse.admm.proximal import Bounds, Term, quadratic_term
from lsconv.inverse.total_variation import RTOL, reported, sparse_solution
from lsconv.krylov.loop.problem import prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Identity

__all__ = ["by_discrepancy", "expected_divergence", "penalised_poisson"]


def penalised_poisson(
    A: LinearOperator,
    y: Tensor,
    damp: Tensor,
    *,
    L: LinearOperator | None,
    middle: Tensor,
    background: float | Tensor,
    bounds: Bounds | None,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int = 1000,
    callback: Callable[[int, Tensor], bool | None] | None = None,
    raise_on_failure: bool = False,
) -> Solution:
    """The restoration of counts under a quadratic penalty.

    Args:
        A: the operator to photons.
        y: counts, ``(*batch, *out_shape)``.
        damp: one per batch item.
        L: the penalty; None: the identity.
        middle: m, ``(*batch, *in_shape)``.
        background: photons without x.
        bounds: of x.
        x0, rtol, max_iter, callback, raise_on_failure: see :func:`lsconv.total_variation`.
    """
    problem = prepare(A, y, name="image")
    batch = problem.batch
    strength = damp.to(torch.float64).expand(batch)
    target = (middle if L is None else L.apply(middle)).expand(*batch, *(A.in_shape if L is None else L.out_shape))

    def penalties(B: LinearOperator) -> list[Term]:
        K = Identity(B.in_shape, dtype=B.dtype, device=B.device) if L is None else L.to(dtype=B.dtype)
        return [quadratic_term(K, strength, target)]

    solution = sparse_solution(
        A, problem.y, penalties, bounds=bounds, background=background, x0=x0, centred=False, strength=strength,
        rtol=RTOL[A.dtype.to_real()] if rtol is None else rtol, max_iter=max_iter, callback=callback,
    )  # fmt: skip
    return reported(solution, problem.broken.expand(batch), "deconvolve", raise_on_failure)


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
    solve: Callable[[Tensor], Solution],
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

    Bisection in logarithms after the rule is bracketed: the divergence rises with the strength.

    Args:
        solve: the solution at a strength.
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
    for _ in range(solves):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = solve(strength)
        over = excess(solution)
        if bool((over.abs() < within).all()):
            break
        high, low = torch.where(over > 0, strength, high), torch.where(over > 0, low, strength)
        middle = (low * high).sqrt()
        bracketed = (low > 0) & torch.isfinite(high)
        following = torch.where(bracketed, middle, torch.where(over > 0, strength / 2, strength * 2))
        strength = torch.where(over.abs() < within, strength, following)
    return solve(strength)
