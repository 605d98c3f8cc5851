r"""ADMM: convex terms of linear images of x, split off one by one.

.. math:: \min_x \sum_j g_j(K_j x) \quad\text{as}\quad \min_{x, z} \sum_j g_j(z_j), \quad z_j = K_j x

With the scaled multipliers u and :math:`s = z + u` an iteration is

.. math::
    x   &= \arg\min_x \textstyle\sum_j \rho_j \|K_j x - (2 z_j - s_j)\|^2 && \text{the quadratic step} \\
    s_j &\leftarrow s_j + \alpha (K_j x - z_j)                             && \text{over-relaxed} \\
    z_j &= \arg\min_z g_j(z) + \tfrac{\rho_j}{2}\|z - s_j\|^2              && \text{the proximal step}

and :math:`p_j = \rho_j (s_j - z_j)` are dual variables. The quadratic step is a division per frequency on an extended
periodic grid (:mod:`lsconv.inverse.admm.fourier_step`), or one of :mod:`lsconv.inverse.admm.operator_step`. A
certificate that is recomputed from x and p decides when to stop; the residuals of the iteration only balance the
penalties.

Boyd, Parikh, Chu, Peleato, Eckstein, "Distributed optimization and statistical learning via the alternating direction
method of multipliers" (2011), sections 3.3 (residuals) and 3.4 (over-relaxation, residual balancing); Eckstein and
Bertsekas (1992) for the form in s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.inverse.admm.history import ConvexCertificate, SplittingHistory, SplittingResult
from lsconv.inverse.admm.proximal import Term
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.operators.batch_layout import over_items, select

__all__ = ["Image", "QuadraticStep", "admm"]

# A penalty parameter stays within this factor of the first one, because residuals cannot be balanced where one
# vanishes.
_BALANCE_RANGE = 100.0
# The dual residual is balanced with this many times the primal one; 1 takes more iterations with reflecting boundaries.
_PRIMAL_WEIGHT = 4.0


class Image(Protocol):
    """The interface of one split image ``K_j x``, in the layout of the quadratic step."""

    def proximal(self, term: Term, s: Tensor, rho: Tensor, out: Tensor) -> None:
        """The proximal step of ``s`` into ``out``."""
        ...

    def item(self, z: Tensor) -> Tensor:
        """The part of ``z`` that belongs to ``K_j x``, ``(*batch, *K.out_shape)``."""
        ...


class QuadraticStep(Protocol):
    """The interface of a quadratic step: its terms, their split images, and the minimiser."""

    terms: list[Term]
    one_penalty: bool
    """True if all terms must have the same penalty parameter."""

    @property
    def images(self) -> Sequence[Image]:
        """The split images, one for every term."""
        ...

    @property
    def x(self) -> Tensor:
        """The last minimiser, ``(*batch, *in_shape)``."""
        ...

    def set_penalties(self, rho: Sequence[Tensor]) -> None:
        """Set new penalty parameters, one per term and batch item."""
        ...

    def step(self, reflected: Sequence[Tensor], relaxation: float) -> list[Tensor]:
        """Return the images of the minimiser, given ``(2 z_j - s_j) / 2``, which may be overwritten."""
        ...


@torch.no_grad()
def admm(
    step: QuadraticStep,
    images: Sequence[Tensor],
    *,
    rho: Sequence[Tensor],
    batch: tuple[int, ...],
    judge: Callable[[Tensor, list[Tensor]], ConvexCertificate],
    answer: Callable[[Tensor, list[Tensor]], Tensor],
    rtol: float,
    max_iter: int,
    relaxation: float = 1.8,
    check_every: int = 10,
    balance: bool = True,
    callback: Callable[[int, Tensor], bool | None] | None = None,
) -> SplittingResult:
    """Run ADMM until the certificate of every batch item meets ``rtol``.

    Args:
        step: the quadratic step.
        images: the split images of the first x.
        rho: the first penalty parameters, one per term and batch item.
        batch: the batch dimensions.
        judge: a function of (answer, dual variables) that returns the certificate.
        answer: a function of (minimiser, split images z) that returns the x to be certified.
        rtol: relative tolerance.
        max_iter: limit on the iterations.
        relaxation: the over-relaxation, in (0, 2).
        check_every: iterations between two certificates, at least; without a callback more while the last one is far
            from the tolerance.
        balance: balance the penalties after ``check_every`` iterations and whenever their number has doubled, so that
            they change less and less, and the iteration converges; with a denoiser they are part of the model.
        callback: called with the iteration and x at every certificate; returning True stops.
    """
    if max_iter < 1:
        raise ArgumentError(f"max_iter: expected an integer >= 1, got {max_iter}")
    terms, count = step.terms, len(step.terms)
    rho = [value.expand(batch).clone() for value in rho]
    first = [value.clone() for value in rho]
    step.set_penalties(rho)
    s = [image.clone() for image in images]
    z, old = [torch.empty_like(v) for v in s], [torch.empty_like(v) for v in s]
    reflected = [torch.empty_like(v) for v in s]  # (2 z - s) / 2, which takes one pass over the data less than 2 z - s

    def proximal() -> None:
        for j in range(count):
            step.images[j].proximal(terms[j], s[j], _broadcast(rho[j], s[j]), z[j])

    proximal()
    active = torch.ones(batch, dtype=torch.bool, device=s[0].device)
    met = torch.zeros_like(active)
    iterations = torch.zeros(batch, dtype=torch.int64, device=s[0].device)
    rows: list[_Row] = []
    best: tuple[Tensor, list[Tensor]] | None = None
    stopped, next_certificate, next_balance = False, check_every, check_every
    for k in range(1, max_iter + 1):
        for j in range(count):
            torch.sub(z[j], s[j], alpha=0.5, out=reflected[j])
        images = step.step(reflected, relaxation)
        for j in range(count):
            s[j].add_(images[j], alpha=relaxation).sub_(z[j], alpha=relaxation)
        z, old = old, z
        proximal()
        iterations += active
        if k not in (next_certificate, max_iter):
            continue
        split = [step.images[j].item(z[j]) for j in range(count)]
        duals = [step.images[j].item(s[j]).sub(split[j]).mul_(_broadcast(rho[j], split[j])) for j in range(count)]
        x = answer(step.x, split)
        certificate = judge(x, duals)
        changes = [now - step.images[j].item(old[j]) for j, now in enumerate(split)]
        primal, dual = _residuals(terms, [step.images[j].item(images[j]) for j in range(count)], split, changes,
                                  duals, rho)  # fmt: skip
        now_met = certificate.met(rtol)
        rows.append(
            _Row(
                iteration=k,
                primal=torch.stack(primal).amax(0),
                dual=dual[-1],
                stationarity=certificate.stationarity,
                complementarity=certificate.complementarity,
                objective=certificate.objective,
                rho=_recorded_penalty(terms, rho),
            )
        )
        best = _update_active(best, (x, duals), active)
        met = met | (now_met & active)
        active = active & ~now_met & torch.isfinite(certificate.stationarity)
        if callback is not None and callback(k, best[0]):
            stopped = bool(active.any())
            break
        if not bool(active.any()):
            break
        if balance and k == next_balance:
            next_balance *= 2
            _balance(terms, rho, first, primal, dual, active, s, z, step.one_penalty)
            step.set_penalties(rho)
        next_certificate = k + check_every
        if callback is None:
            next_certificate = min(_forecast(rows, active, rtol, check_every), max(next_balance, next_certificate))
    assert best is not None
    columns = list(zip(*rows, strict=True))
    history = SplittingHistory(torch.tensor(columns[0]), *(torch.stack(column) for column in columns[1:]))
    return SplittingResult(*best, iterations, met, stopped, history)


class _Row(NamedTuple):
    """One row of the history: an iteration and its residuals, certificate, objective and penalty, per item."""

    iteration: int
    primal: Tensor
    dual: Tensor
    stationarity: Tensor
    complementarity: Tensor
    objective: Tensor
    rho: Tensor


def _forecast(rows: Sequence[_Row], active: Tensor, rtol: float, step: int) -> int:
    """Forecast the iteration for the next certificate from the decrease of the last two.

    A certificate costs a few iterations, so the next one is taken at 0.7 of the way to ``rtol``, and after at most as
    many iterations as there were.
    """
    k = rows[-1].iteration
    worst = [float(torch.maximum(row.stationarity, row.complementarity).where(active, 0).amax()) for row in rows[-2:]]
    before, now = worst[0], worst[-1]
    if rtol == 0 or not rtol < now < before:
        return k + step
    ahead = 0.7 * math.log(now / rtol) / math.log(before / now) * (k - rows[-2].iteration)
    return k + max(step, int(min(ahead, k)) // step * step)


def _balance(
    terms: Sequence[Term],
    rho: list[Tensor],
    first: Sequence[Tensor],
    primal: Sequence[Tensor],
    dual: Sequence[Tensor],
    active: Tensor,
    s: Sequence[Tensor],
    z: Sequence[Tensor],
    one_penalty: bool,
) -> None:
    """Adapt the penalty parameters to balance primal and dual residuals; ``rho`` and ``s = z + u`` change in place.

    Args:
        terms: the terms; each ``balanced`` one gets a factor of its own, and those that ``follow`` the factor common to
            the balanced ones.
        rho: the penalty parameters.
        first: the first penalty parameters.
        primal, dual: relative residuals, per term.
        active: the items that iterate.
        s, z: the state; the multipliers ``rho (s - z)`` do not change.
        one_penalty: all terms have the same penalty parameter.
    """
    common = torch.ones_like(rho[0])

    def scale(j: int, change: Tensor) -> None:
        rho[j] = rho[j] * change
        s[j].sub_(z[j]).div_(_broadcast(change, s[j])).add_(z[j])

    for j, term in enumerate(terms):
        if term.balanced:
            ratio = (_PRIMAL_WEIGHT * primal[j] / dual[j].clamp_min(1e-30)).clamp(1e-2, 1e2)
            bounded = (rho[j] * ratio.sqrt()).clamp(first[j] / _BALANCE_RANGE, first[j] * _BALANCE_RANGE) / rho[j]
            change = torch.where(active, bounded, 1.0)
            common = rho[j] * change / first[j]
            if not one_penalty:  # the penalty of constraints is not lowered
                common = common.clamp_min(1)
            scale(j, change)
    for j, term in enumerate(terms):
        if term.follows:
            scale(j, torch.where(active, common * first[j] / rho[j], 1.0))


def _broadcast(values: Tensor, tensor: Tensor) -> Tensor:
    """Shape one value per batch item to multiply a tensor."""
    dtype = tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype
    return over_items(values.to(dtype), tensor.ndim - values.ndim)


def _recorded_penalty(terms: Sequence[Term], rho: Sequence[Tensor]) -> Tensor:
    """The penalty parameter that the history records: that of the first balanced term."""
    return next((value for term, value in zip(terms, rho, strict=True) if term.balanced), rho[-1]).clone()


def _update_active(
    kept: tuple[Tensor, list[Tensor]] | None, found: tuple[Tensor, list[Tensor]], active: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Replace the x and the duals of active items; finished items keep theirs."""
    if kept is None or bool(active.all()):
        return found[0].clone(), found[1]
    return select(active, found[0], kept[0]), [
        select(active, new, before) for new, before in zip(found[1], kept[1], strict=True)
    ]


def _residuals(
    terms: Sequence[Term],
    images: Sequence[Tensor],
    split: Sequence[Tensor],
    changes: Sequence[Tensor],
    duals: Sequence[Tensor],
    rho: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The relative primal and dual residuals of every term; the last dual one is that of the sum of all terms."""
    primal, dual = [], []
    total: Tensor | None = None
    largest: Tensor | None = None
    domain = ItemSpace(terms[0].operator.in_shape, terms[0].operator.dtype, terms[0].operator.device)
    for term, image, z, change, p, value in zip(terms, images, split, changes, duals, rho, strict=True):
        K = term.operator
        space = ItemSpace(K.out_shape, K.dtype, K.device)
        tiny = torch.finfo(torch.float64).tiny
        size = torch.maximum(space.norm(image), space.norm(z))
        primal.append(space.norm(image - z) / size.clamp_min(tiny))
        force, back = domain.norm(K.adjoint(p)), K.adjoint(_broadcast(value, change) * change)
        dual.append(domain.norm(back) / force.clamp_min(tiny))
        total = back if total is None else total + back
        largest = force if largest is None else torch.maximum(largest, force)
    assert total is not None
    assert largest is not None
    dual.append(domain.norm(total) / largest.clamp_min(torch.finfo(torch.float64).tiny))
    return primal, dual
