r"""The choice of damp: generalised cross-validation, discrepancy principle, UPRE, L-curve, marginal likelihood.

The rules are those of :mod:`lsconv.inverse.damping.rules`. The criterion of a rule is evaluated on a logarithmic grid
over all damps that the arithmetic resolves, and refined around the best point. For large convolutions this is done on a
cheap surrogate: the tapered data as a circular convolution (:mod:`lsconv.inverse.damping.surrogate`) or, where the
symbols are matrices, windows of the data, which have the same noise and prior and therefore nearly the same best damp
(:mod:`lsconv.inverse.damping.subimages`). The search continues with the whole data around the best damp of the
surrogate until the criterion can hardly be improved, which mostly takes one to three damps. Problems of few unknowns
are decomposed (:mod:`lsconv.inverse.damping.decomposed_path`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, InputWarning, ShapeError, warn
from lsconv.factored.batch_axes import Reduction
from lsconv.inverse.damping.decomposed_path import DecomposedPath
from lsconv.inverse.damping.measured import zero_rows
from lsconv.inverse.damping.path_choice import damp_paths
from lsconv.inverse.damping.paths import DampPath
from lsconv.inverse.damping.rules import RULES, WITH_NOISE, WITH_TRACE, Criterion
from lsconv.inverse.damping.search import PER_DECADE, LocalSearch, Search
from lsconv.inverse.damping.selection import Selection
from lsconv.inverse.damping.weighted_surrogate import constant_weight_in_kernel
from lsconv.inverse.images.identical_groups import EqualGroups
from lsconv.inverse.observation import Observation
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, accept_penalty, prepare
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import real_dtype
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["RULES", "Selection", "choose_damp", "null_dimension"]

# The range that is searched, in units of the norm of A over that of L. Below it m - tr H, which is proportional to
# damp**2, is smaller than its rounding error, which the border's factors make proportional to eps / damp**2.
_RANGE = (1e-5, 10.0)
# Points per decade for the L-curve, whose corners are sharp; they need no traces.
_CURVATURE_PER_DECADE = 5


@torch.no_grad()
@untraced
@checks_numbers
@serves_empty_batches()
def choose_damp(
    A: OperatorLike,
    y: Tensor,
    rule: str = "gcv",
    *,
    L: OperatorLike | None = None,
    x_prior: Tensor | None = None,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    noise_std: float | Tensor | None = None,
    trace: str = "auto",
    surrogate: bool = True,
) -> Selection:
    r"""The damp of :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|L(x - x_{prior})\|^2` by a rule, per batch item.

    See :mod:`lsconv.inverse.damping.rules` for the rules. :func:`lsconv.tikhonov` and :func:`lsconv.deconvolve` take
    the name of a rule as their damp and do this themselves. Scaling y, or A, or both, scales the choice with them.
    "lcurve" is a heuristic: it can fail on smooth solutions, and its damp does not converge to the best one with less
    noise.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: data ``(*batch, *out_shape)``; items that are not finite are treated as zero. Where A has a zero row (under a
            Mask, beside what a padding or the adjoint of a Crop fills in) nothing is measured: what stands there is not
            read, and not counted.
        rule: "gcv", "discrepancy", "upre", "lcurve" or "evidence".
        L: the penalty, an operator on ``A.in_shape``; None: the identity. For "evidence" its null space is computed
            where the problem is small, and otherwise taken to be what is constant along its last axes, or nothing,
            whichever its action shows.
        x_prior: what the penalty pulls to, ``(*batch, *in_shape)``.
        observed: True where y was measured, a bool tensor that broadcasts with y; what stands elsewhere is no data.
        weights: the weights of the squares, as in :func:`lsconv.tikhonov`.
        noise_std: standard deviation of the noise in every entry of y (of the whole complex number), a number or one
            per batch item; for "discrepancy" and "upre".
        trace: "auto", "exact" or "stochastic". "auto" takes exact traces when they are cheap: circular convolutions,
            borders of up to 1024 unknowns per block, problems of up to 1024 unknowns (2048 of volumes and where there
            is no border), whose matrices are decomposed, and separable kernels without L. "exact" goes on to 4096.
        surrogate: search large convolutions on a surrogate first (the tapered data, or windows), then refine on the
            whole. False: on the whole alone.

    Returns:
        A :class:`Selection`.

    Raises:
        ArgumentError: an unknown rule or trace; ``noise_std`` missing, not positive, or given to a rule without it;
            nothing was measured (a warning, where that is so of some items).
        MethodError, PlanMemoryError: exact traces are asked for where there are none.
        LsconvError: for tensors that do not fit.

    Source:
        The books and papers named in the module; Hutchinson (1990) for stochastic traces.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, in_size=(36, 36))
        >>> x = torch.randn(1, 36, 36)
        >>> y = A(x) + 0.01 * torch.randn(A.out_shape)
        >>> selection = lsconv.choose_damp(A, y, "evidence")
        >>> bool(0.005 < selection.damp < 0.02)  # the standard deviation of the noise over that of x
        True
    """
    if rule not in RULES:
        rules = ", ".join(map(repr, RULES))
        raise ArgumentError(f"damp: expected a number, or a rule: one of {rules}, got {rule!r}")
    if trace not in ("auto", "exact", "stochastic"):
        raise ArgumentError(f'trace: expected "auto", "exact" or "stochastic", got {trace!r}')
    A, data, zero = _data(A, y, observed, weights)
    L = None if L is None else accept_penalty(L, A)
    if x_prior is not None:
        A.check_input(x_prior, "x_prior")
        data = data - A.apply(x_prior.detach())
    batch = tuple(data.shape[: data.ndim - len(A.out_shape)])
    count, noise = _count(A, zero, batch), _noise(rule, noise_std, batch, A)
    space = ItemSpace(A.out_shape, A.dtype, A.device)
    norm = space.safe_norm(data).double()
    unit = torch.where(norm > 0, norm, 1)
    data = (data / space.broadcast(unit)).expand(*batch, *A.out_shape)
    equal = EqualGroups.of(A, L)
    if equal is not None:
        A, L, data = equal.A, equal.L, equal.split(data)
    else:
        data = data.unsqueeze(0)
    path, surrogate_path = damp_paths(A, data, L, trace, surrogate, count, determinant=rule == "evidence")
    nullity = (
        path.nullity if isinstance(path, DecomposedPath) else null_dimension(L) * len(data) if rule == "evidence" else 0
    )
    criterion = Criterion(rule, None if noise is None else noise / unit, nullity)
    first_path = path if surrogate_path is None else surrogate_path
    first_search = _global_search(first_path, criterion, exact=surrogate_path is None or surrogate_path.exact)
    search = first_search if surrogate_path is None else _local_search(path, criterion, first_search)
    surrogate_curve = None
    if surrogate_path is not None and rule in ("gcv", "discrepancy", "upre"):
        factor = path.data_count / surrogate_path.data_count * unit.square()
        surrogate_curve = (first_search.sorted()[0].exp(), first_search.values() * factor)
    low, high = _range(first_search)
    chosen = torch.where(norm > 0, search.best(), high.expand(batch)).exp()
    t, evaluations = search.sorted()
    return Selection(
        rule,
        chosen.to(real_dtype(A.dtype)),
        t.exp(),
        _in_data_units(criterion, criterion(evaluations, t, path.data_count)[0], unit, path.data_count),
        evaluations.trace_error,
        surrogate_curve,
        _message(rule, path, surrogate_path is not None, search, norm, low, high),
    )


def _data(
    A: OperatorLike, y: Tensor, observed: Tensor | None, weights: Tensor | None
) -> tuple[LinearOperator, Tensor, Tensor | None]:
    """Return A with its masks and weights, the weighted data, and a mask of the rows of A that are zero.

    Zero margins of the kernel are cropped, and a constant weight is multiplied into the kernel.
    """
    A = accept_operator(A, y)
    if observed is not None or weights is not None:
        A.check_output(y, "y")
        A, y = Observation.of(A, observed, weights).of_data(A, y)
    A = constant_weight_in_kernel(A)
    smaller = Reduction.trimmed(A) if isinstance(A, Convolution) else None
    A = smaller.B if smaller is not None and smaller.same_shapes else A
    problem = prepare(A, y, check_finite=False, name="y")
    zero = zero_rows(A)
    if zero is not None:
        problem = prepare(A, torch.where(zero, 0, y), check_finite=False, name="y")
    return A, problem.y, zero


def _range(search: Search) -> tuple[Tensor, Tensor]:
    """The logarithms of the ends of the range that is searched."""
    scale = search.path.scale.double().log()
    return math.log(_RANGE[0]) + scale, math.log(_RANGE[1]) + scale


def _global_search(path: DampPath, criterion: Criterion, *, exact: bool) -> Search:
    """Evaluate the criterion over the whole range, and refine around the best point."""
    search = Search(path, criterion, needs_trace=criterion.rule in WITH_TRACE, slope=criterion.rule == "lcurve")
    density = _CURVATURE_PER_DECADE if criterion.rule == "lcurve" else PER_DECADE
    search.scan(*_range(search), points=1 + round(math.log10(_RANGE[1] / _RANGE[0]) * density))
    search.refine(6 if exact else 2)
    return search


def _local_search(path: DampPath, criterion: Criterion, surrogate_search: Search) -> Search:
    """Search with the whole data, starting from the best damp of a search on a surrogate."""
    if criterion.rule == "lcurve":
        search = Search(path, criterion, needs_trace=False, slope=True, surrogate_search=surrogate_search)
    else:
        search = LocalSearch(
            path, criterion, needs_trace=criterion.rule in WITH_TRACE, surrogate_search=surrogate_search
        )
    search.run()
    return search


def _in_data_units(criterion: Criterion, values: Tensor, unit: Tensor, count: int | Tensor) -> Tensor:
    """Convert values of the criterion from data divided by ``unit`` to data in the user's units."""
    if criterion.rule == "lcurve":
        return -values
    if criterion.rule == "evidence":  # it has the logarithm of a quantity of the dimension of y^2
        return values + (count - criterion.nullity) * 2 * unit.log()
    return values * unit.square()


def _noise(rule: str, noise_std: float | Tensor | None, batch: tuple[int, ...], A: LinearOperator) -> Tensor | None:
    """Check the standard deviation of the noise, and expand it to the batch; None for rules that estimate it."""
    if noise_std is None:
        if rule in WITH_NOISE:
            raise ArgumentError(f"noise_std: {rule!r} needs the standard deviation of the noise in y; 'gcv' does not")
        return None
    if rule not in WITH_NOISE:
        raise ArgumentError(f"noise_std: {rule!r} estimates the noise itself; only 'discrepancy' and 'upre' use it")
    noise = torch.as_tensor(noise_std, dtype=torch.float64, device=A.device)
    if not bool((noise > 0).all()) or not bool(torch.isfinite(noise).all()):
        raise ArgumentError(f"noise_std: expected positive numbers, got {noise_std}")
    try:
        return noise.expand(batch)
    except RuntimeError:
        raise ShapeError(f"noise_std: shape {tuple(noise.shape)} does not broadcast to the batch {batch}") from None


def _count(A: LinearOperator, zero: Tensor | None, batch: tuple[int, ...]) -> Tensor:
    """Count the measured data, ``batch``; warn where some items have none.

    Raises:
        ArgumentError: no item has any.
    """
    if zero is None:
        count = torch.tensor(float(A.out_numel), dtype=torch.float64, device=A.device)
    else:
        count = (~zero).flatten(len(A.batch_shape)).sum(-1).double()
    count = count.expand(batch)
    if not bool(count.any()):
        raise ArgumentError(
            "y: no entry is measured (all rows of A are zero), so nothing tells the damp; give a number"
        )
    if not bool(count.all()):
        empty = int((count == 0).sum())
        warn(f"y: {empty} of {count.numel()} item(s) have no measured entry, so nothing tells their damp", InputWarning)
    return count


def null_dimension(L: LinearOperator | None) -> int:
    """The dimension of the null space of L, which is assumed to be constants along the last axes, or empty."""
    if L is None:
        return 0
    generator = torch.Generator().manual_seed(0)

    def constant_along_last(axes: int) -> Tensor:
        x = torch.randn(*L.in_shape[:axes], *(1 for _ in L.in_shape[axes:]), dtype=L.dtype, generator=generator)
        return x.to(L.device).expand(*L.batch_shape, *L.in_shape)

    size = torch.linalg.vector_norm(L.apply(constant_along_last(len(L.in_shape))))
    for axes in reversed(range(len(L.in_shape))):
        if bool(torch.linalg.vector_norm(L.apply(constant_along_last(axes))) <= 1e-5 * size):
            return math.prod(L.in_shape[:axes])
    return 0


def _message(
    rule: str, path: DampPath, on_surrogate: bool, search: Search, norm: Tensor, low: Tensor, high: Tensor
) -> str:
    """Compose the message of a :class:`Selection`: the kind of search, and the items at an end of the range."""
    how = "no traces needed" if rule not in WITH_TRACE else "exact traces" if path.exact else "stochastic traces"
    parts = [f"{rule}: {search.evaluated} damps, {how}" + (", searched on a surrogate first" if on_surrogate else "")]
    t, zero = search.best(), norm == 0
    width = (high - low) * 1e-3
    at_low, at_high = (t <= torch.maximum(low, search.smallest()) + width) & ~zero, (t >= high - width) & ~zero
    if bool(at_low.any()):
        why = " (noise_std is below what A can leave of y)" if rule == "discrepancy" else " (no noise to be seen)"
        parts.append(f"{int(at_low.sum())} item(s) at the smallest damp searched{why}")
    if bool(at_high.any()):
        why = " (noise_std explains all of y)" if rule == "discrepancy" else " (no signal to be seen)"
        parts.append(f"{int(at_high.sum())} item(s) at the largest damp searched{why}")
    if bool(zero.any()):
        parts.append(f"{int(zero.sum())} item(s) are zero, where every damp gives the same answer")
    return "; ".join(parts)
