r"""The choice of damp: generalised cross-validation, discrepancy principle, UPRE, L-curve, marginal likelihood.

With r the residual, :math:`\mu = damp^2`, H the influence matrix of :mod:`lsconv.inverse.damp_path` and m data:

=================  ==================================================================================================
rule               damp
=================  ==================================================================================================
``"gcv"``          minimises :math:`m \|r\|^2 / (m - \operatorname{tr} H)^2`
``"discrepancy"``  solves :math:`\|r\|^2 = m\, \mathrm{noise\_std}^2`
``"upre"``         minimises :math:`\|r\|^2 + 2\, \mathrm{noise\_std}^2 \operatorname{tr} H`
``"lcurve"``       maximises the curvature of :math:`(\log\|r\|, \log\|Lx\|)`, which is computed from derivatives in
                   closed form
``"evidence"``     maximises the marginal likelihood of y under white noise and the Gaussian prior of precision
                   :math:`L^HL`, both scales estimated: minimises :math:`m \log(\|r\|^2 + \mu \|Lx\|^2) +
                   \log\det(I + AA^H/\mu)`, which is stationary where :math:`m \mu \|Lx\|^2 / (\|r\|^2 + \mu \|Lx\|^2)
                   = \operatorname{tr} H`
=================  ==================================================================================================

Every rule is searched on a logarithmic grid over all damps that the arithmetic resolves, then refined around its best
point. Large convolutions are searched on windows: any window of data that reads no padding is data of the same model,
with a smaller unknown, so the same noise and the same prior ask for the same damp. The whole data then refine the
choice.

Golub, Heath, Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter" (1979); Vogel,
"Computational Methods for Inverse Problems" (2002), chapter 7; Hansen, "Discrete Inverse Problems" (2010), chapter 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, MethodError, PlanMemoryError, ShapeError
from lsconv.fourier.circulant import real_dtype
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.trace import ExactInfluence
from lsconv.inverse.damp_path import BorderPath, DampPath, Evaluation, ExactPath, FilterPath, SolverPath
from lsconv.inverse.damp_search import Search
from lsconv.inverse.windows import as_windows
from lsconv.krylov.batch import ItemSpace
from lsconv.krylov.problem import as_operator, prepare
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution

__all__ = ["RULES", "Selection", "choose_damp"]

RULES = ("gcv", "discrepancy", "upre", "lcurve", "evidence")
_WITH_NOISE = ("discrepancy", "upre")
_WITH_TRACE = ("gcv", "upre", "evidence")
# The range searched, in units of the norm of A over that of L. Below it m - tr H, which falls like damp**2, is lost in
# the rounding of the border's factors, which grows like eps / damp**2.
_LOW, _HIGH = 1e-5, 10.0
_PER_DECADE = 2
_CURVATURE_PER_DECADE = 5  # corners are sharp, and cost no trace
# The share of the data's degrees of freedom below which m - tr H is rounding.
_LEAST_FREEDOM = 1e-8
# Border unknowns per block up to which the search is exact: about 20 dense factors, a second or two of one core.
# trace="exact" goes on to lsconv.fourier.trace.EXACT_UNKNOWNS.
_EXACT_UNKNOWNS = 1024


@dataclass(frozen=True, eq=False)
class Selection:
    """How a damp was chosen.

    Attributes:
        rule: the rule.
        damp: the damp chosen, ``batch``.
        damps: the damps looked at, ascending, ``(points, *batch)``.
        values: what the rule looked at there: the function minimised ("gcv", "upre", "evidence"), the residual norm
            squared ("discrepancy"), or the curvature maximised ("lcurve"); ``(points, *batch)``.
        trace_error: standard error of the influence trace, 0 where it is exact and NaN where the rule needs none;
            ``(points, *batch)``.
        message: what was done, and which items met an end of the range.
    """

    rule: str
    damp: Tensor
    damps: Tensor
    values: Tensor
    trace_error: Tensor
    message: str

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve of every batch item with the damp chosen; needs matplotlib.

        Args:
            ax: the axes to draw on; None: new ones.

        Returns:
            The axes.
        """
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(5, 3.5), layout="constrained").add_subplot()
        points = self.damps.shape[0]
        damps, values = (t.reshape(points, -1).T.tolist() for t in (self.damps, self.values))
        for curve, value, chosen in zip(damps, values, self.damp.reshape(-1).tolist(), strict=True):
            (line,) = ax.plot(curve, value, marker=".", linewidth=1)
            ax.axvline(chosen, color=line.get_color(), linestyle="--", linewidth=1)
        ax.set_xscale("log")
        if self.rule in ("gcv", "discrepancy", "upre") and bool((self.values > 0).all()):
            ax.set_yscale("log")
        ax.set_xlabel("damp")
        ax.set_ylabel(_LABELS[self.rule])
        return ax


_LABELS = {
    "gcv": "generalised cross-validation",
    "discrepancy": "squared residual norm",
    "upre": "unbiased predictive risk",
    "lcurve": "curvature of the L-curve",
    "evidence": "-2 log marginal likelihood",
}


@torch.no_grad()
def choose_damp(
    A: Any,
    y: Tensor,
    rule: str = "gcv",
    *,
    L: Any = None,
    x_prior: Tensor | None = None,
    noise_std: float | Tensor | None = None,
    trace: str = "auto",
    windows: bool = True,
) -> Selection:
    r"""The damp of :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|L(x - x_{prior})\|^2` by a rule, per batch item.

    See :mod:`lsconv.inverse.parameter` for the rules. Scaling y, or A, or both, scales the choice with them.
    "lcurve" is a heuristic: it can fail on smooth solutions, and its damp does not converge to the best one with less
    noise.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: data ``(*batch, *out_shape)``; items that are not finite are treated as zero.
        rule: "gcv", "discrepancy", "upre", "lcurve" or "evidence".
        L: the penalty, an operator on ``A.in_shape``; None: the identity. For "evidence" its null space is taken to be
            the constants of every channel or nothing, whichever its action on a constant shows.
        x_prior: what the penalty pulls to, ``(*batch, *in_shape)``.
        noise_std: standard deviation of the noise in every entry of y (of the whole complex number), a number or one
            per batch item; for "discrepancy" and "upre".
        trace: "auto", "exact" or "stochastic". "auto" takes exact traces when they are cheap: circular convolutions,
            and borders of up to 1024 unknowns per block.
        windows: search large convolutions on windows first, then refine on the whole.

    Returns:
        A :class:`Selection`.

    Raises:
        ArgumentError: an unknown rule or trace; ``noise_std`` missing, not positive, or given to a rule without it.
        MethodError, PlanMemoryError: exact traces are asked for where there are none.
        LsconvError: for tensors that do not fit.

    Source:
        The books and papers named in the module; Hutchinson (1990) for stochastic traces.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, in_size=(36, 36))
        >>> x = torch.randn(1, 36, 36)
        >>> y = A(x) + 0.01 * torch.randn(A.out_shape)
        >>> from lsconv.inverse.parameter import choose_damp
        >>> selection = choose_damp(A, y, "evidence")
        >>> bool(0.005 < selection.damp < 0.02)  # the noise level over that of x
        True
    """
    if rule not in RULES:
        raise ArgumentError(f"damp: expected a number or one of the rules {', '.join(map(repr, RULES))}, got {rule!r}")
    if trace not in ("auto", "exact", "stochastic"):
        raise ArgumentError(f'trace: expected "auto", "exact" or "stochastic", got {trace!r}')
    A = as_operator(A, y)
    problem = prepare(A, y, check_finite=False, name="y")
    data, batch = problem.y, tuple(problem.batch)
    L = None if L is None else as_operator(L)
    if L is not None and L.in_shape != A.in_shape:
        raise ShapeError(f"L: maps {L.in_shape}, expected A's in_shape {A.in_shape}")
    if x_prior is not None:
        A.check_input(x_prior, "x_prior")
        data = data - A.apply(x_prior.detach())
        batch = tuple(data.shape[: data.ndim - len(A.out_shape)])
    space = ItemSpace(A.out_shape, A.dtype, A.device)
    norm = space.safe_norm(data).double()
    noise = _noise(rule, noise_std, batch, A)
    unit = torch.where(norm > 0, norm, 1)
    data = data / space.spread(unit)
    criterion = _Criterion(rule, None if noise is None else noise / unit, _nullity(L) if rule == "evidence" else 0)
    path, coarse = _paths(A, data, L, trace, windows)
    search = Search(
        path if coarse is None else coarse, criterion, needs_trace=rule in _WITH_TRACE, slope=rule == "lcurve"
    )
    low, high = (math.log(end) + search.path.scale.double().log() for end in (_LOW, _HIGH))
    density = _CURVATURE_PER_DECADE if rule == "lcurve" else _PER_DECADE
    search.scan(low, high, points=1 + round(math.log10(_HIGH / _LOW) * density))
    search.refine(6 if coarse is None else 2)
    if coarse is not None:
        search = Search(path, criterion, needs_trace=rule in _WITH_TRACE, slope=rule == "lcurve", around=search)
        search.settle()
    t, evaluations = search.sorted()
    values, _ = criterion(evaluations, t, path.count)
    chosen = torch.where(norm > 0, search.best(), high.expand(batch)).exp()
    if rule == "lcurve":
        values = -values
    elif rule != "evidence":
        values = values * unit.square()
    else:  # dimensions of y^2 under the logarithm
        values = values + (path.count - criterion.nullity) * 2 * unit.log()
    return Selection(
        rule,
        chosen.to(real_dtype(A.dtype)),
        t.exp(),
        values,
        evaluations.trace_error,
        _message(rule, path, coarse, search, norm, low, high),
    )


def _noise(rule: str, noise_std: float | Tensor | None, batch: tuple[int, ...], A: LinearOperator) -> Tensor | None:
    if noise_std is None:
        if rule in _WITH_NOISE:
            raise ArgumentError(f"noise_std: {rule!r} needs the standard deviation of the noise in y; 'gcv' does not")
        return None
    if rule not in _WITH_NOISE:
        raise ArgumentError(f"noise_std: {rule!r} estimates the noise itself; only 'discrepancy' and 'upre' use it")
    noise = torch.as_tensor(noise_std, dtype=torch.float64, device=A.device)
    if not bool((noise > 0).all()) or not bool(torch.isfinite(noise).all()):
        raise ArgumentError(f"noise_std: expected positive numbers, got {noise_std}")
    try:
        return noise.expand(batch)
    except RuntimeError:
        raise ShapeError(f"noise_std: shape {tuple(noise.shape)} does not broadcast to the batch {batch}") from None


def _nullity(L: LinearOperator | None) -> int:
    if L is None:
        return 0
    one = torch.ones(*L.batch_shape, *L.in_shape, dtype=L.dtype, device=L.device)
    probe = one.clone()
    probe[..., ::2] = -1
    size, constant = torch.linalg.vector_norm(L.apply(probe)), torch.linalg.vector_norm(L.apply(one))
    return L.in_shape[0] if bool(constant <= 1e-5 * size) else 0


def _paths(
    A: LinearOperator, y: Tensor, L: LinearOperator | None, trace: str, windows: bool
) -> tuple[DampPath, DampPath | None]:
    """The path of the whole data, and a cheaper one of some windows, or None where the whole is cheap."""
    embedded = isinstance(A, Convolution) and Embedding.exists(A)
    if trace != "stochastic" and L is None and embedded:
        try:
            most = {} if trace == "exact" else {"max_unknowns": _EXACT_UNKNOWNS}
            return ExactPath(ExactInfluence(A, **most), y), None
        except PlanMemoryError:
            if trace == "exact":
                raise
    if trace != "stochastic" and L is not None:
        penalty = FilterPath.penalty(A, L)
        if penalty is not None:
            assert isinstance(A, Convolution)
            return FilterPath(A, y, penalty), None
    if trace == "exact":
        raise MethodError(
            f'trace: "exact" needs a convolution with zero or circular padding, and with L both circular; got {A!r} '
            f'and L={L!r}; use trace="stochastic"'
        )
    small = as_windows(A, y, L) if windows and isinstance(A, Convolution) else None
    coarse = None if small is None else _stochastic(small.A, small.y, small.L)
    return _stochastic(A, y.unsqueeze(0), L, None if coarse is None else coarse.scale), coarse


def _stochastic(
    A: LinearOperator, y: Tensor, L: LinearOperator | None, scale: Tensor | None = None
) -> BorderPath | SolverPath:
    if scale is None:
        scale = _norm(A) if L is None else _norm(A) / _norm(L)
    if isinstance(A, Convolution) and BorderPath.serves(A, L):
        return BorderPath(A, y, scale, L)
    return SolverPath(A, y, L, scale)


def _norm(A: LinearOperator) -> Tensor:
    """The norm of A from below, within a few per cent: a dozen steps of the power method on A^H A."""
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(*A.batch_shape, *A.in_shape, dtype=A.dtype, generator=generator).to(A.device)
    size = torch.ones(A.batch_shape, dtype=torch.float64, device=A.device)
    for _ in range(12):
        v = v / space.spread(space.safe_norm(v).clamp_min(torch.finfo(A.dtype).tiny))
        image = A.apply(v)
        size = ItemSpace(A.out_shape, A.dtype, A.device).safe_norm(image).double()
        v = A.adjoint(image)
    return torch.where(size > 0, size, 1)


class _Criterion:
    """What a rule looks at: the function to minimise, and for some a function to find the zero of.

    Args:
        rule: the rule.
        noise: standard deviation of the noise, ``batch``.
        nullity: dimension of the null space of L, for the evidence.
    """

    def __init__(self, rule: str, noise: Tensor | None, nullity: int) -> None:
        self.rule, self.noise, self.nullity = rule, noise, nullity
        self._function: Callable[..., tuple[Tensor, Tensor | None]] = getattr(self, f"_{rule}")

    def __call__(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """Values and, for the root-finding rules, a function that rises through zero; ``t`` is log damp, ascending."""
        return self._function(e, t, count)

    def _gcv(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, None]:
        free = count - e.trace
        # where A fits the data almost exactly the trace's rounding is all that is left of the difference
        free = torch.where(free > _LEAST_FREEDOM * count, free, torch.nan)
        return count * e.residual_norm_sq / free**2, None

    def _upre(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, None]:
        assert self.noise is not None
        return e.residual_norm_sq + 2 * self.noise**2 * e.trace, None

    def _discrepancy(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        assert self.noise is not None
        return e.residual_norm_sq, (e.residual_norm_sq / (count * self.noise**2)).clamp_min(1e-300).log()

    def _lcurve(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, None]:
        # With primes for d/dlog mu, X = log||r||, Y = log||Lx||: d||r||^2 = -mu d||Lx||^2, so X' = -q Y' with
        # q = mu ||Lx||^2 / ||r||^2, and the curvature (X'Y'' - X''Y') / (X'^2 + Y'^2)^(3/2) needs q' alone, not Y''.
        mu = (2 * t).exp()
        q = mu * e.penalty_norm_sq / e.residual_norm_sq
        slope = 0.5 * mu * e.penalty_slope / e.penalty_norm_sq
        return -q * (1 + 2 * slope * (1 + q)) / ((1 + q * q) ** 1.5 * slope.abs()), None

    def _evidence(self, e: Evaluation, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        dof = count - self.nullity
        penalty = (2 * t).exp() * e.penalty_norm_sq
        quadratic = e.residual_norm_sq + penalty
        gained = e.trace - self.nullity
        logdet = e.logdet
        if bool(torch.isnan(logdet).any()) and t.shape[0] > 1:  # its derivative in log mu is -gained
            steps = 0.5 * (gained[1:] + gained[:-1]) * 2 * (t[1:] - t[:-1])
            tail = steps.flip(0).cumsum(0).flip(0)
            logdet = torch.cat([tail, torch.zeros_like(tail[:1])])
        root = (dof * penalty / quadratic).clamp_min(1e-300).log() - gained.clamp_min(1e-300).log()
        return dof * (quadratic / dof).clamp_min(1e-300).log() + logdet, root


def _message(
    rule: str, path: DampPath, coarse: DampPath | None, search: Search, norm: Tensor, low: Tensor, high: Tensor
) -> str:
    how = "no traces needed" if rule not in _WITH_TRACE else "exact traces" if path.exact else "stochastic traces"
    parts = [f"{rule}: {search.count} damps, {how}" + (", searched on windows first" if coarse is not None else "")]
    t, zero = search.best(), norm == 0
    width = (high - low) * 1e-3
    at_low, at_high = (t <= torch.maximum(low, search.least()) + width) & ~zero, (t >= high - width) & ~zero
    if bool(at_low.any()):
        why = " (noise_std is below what A can leave of y)" if rule == "discrepancy" else " (no noise to be seen)"
        parts.append(f"{int(at_low.sum())} item(s) at the smallest damp searched{why}")
    if bool(at_high.any()):
        why = " (noise_std explains all of y)" if rule == "discrepancy" else " (no signal to be seen)"
        parts.append(f"{int(at_high.sum())} item(s) at the largest damp searched{why}")
    if bool(zero.any()):
        parts.append(f"{int(zero.sum())} item(s) are zero, where every damp gives the same answer")
    return "; ".join(parts)
