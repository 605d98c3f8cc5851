"""The choice of the damp path for a problem: exact, through a surrogate, or stochastic."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.cost_model import DEFAULT_LIMITS
from lsconv.border.influence import EXACT_UNKNOWNS, ExactInfluence
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.spectrum import norm as spectral_norm
from lsconv.inverse.damping.decomposed_path import DensePath, SeparablePath
from lsconv.inverse.damping.measured import interpolated
from lsconv.inverse.damping.paths import DampPath, ExactPath, FilterPath
from lsconv.inverse.damping.stochastic_paths import BorderPath, SolverPath
from lsconv.inverse.damping.subimages import as_windows
from lsconv.inverse.damping.surrogate import TaperedPath
from lsconv.inverse.damping.weighted_surrogate import WeightedTaperedPath, weighted_convolution
from lsconv.inverse.plans.missing import are_scattered
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution

__all__ = ["damp_paths"]


def damp_paths(
    A: LinearOperator,
    y: Tensor,
    L: LinearOperator | None,
    trace: str,
    surrogate: bool,
    count: Tensor,
    *,
    determinant: bool,
) -> tuple[DampPath, DampPath | None]:
    """Choose the damp path of the whole data, and that of a surrogate.

    Args:
        A: the operator; a diagonal of one number before a convolution is in the kernel.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp.
        L: the penalty; None: the identity.
        trace: "auto", "exact" or "stochastic".
        surrogate: search large convolutions on a surrogate first.
        count: number of measured data, ``batch``.
        determinant: the rule needs the determinant.

    Returns:
        Both paths; None for the second where the first is cheap, or no surrogate serves.

    Raises:
        MethodError, PlanMemoryError: exact traces are asked for where there are none.
    """
    exact = _exact_path(A, y, L, trace, count)
    if exact is not None:
        return exact, None
    small = _surrogate_path(A, y, L, determinant=determinant) if surrogate else None
    if small is None:
        return _stochastic_path(A, y, L, count=count), None
    return _stochastic_path(A, y, L, small.scale, count, local=True), small


def _exact_path(A: LinearOperator, y: Tensor, L: LinearOperator | None, trace: str, count: Tensor) -> DampPath | None:
    """The path with exact traces, where there is one that is cheap or was asked for; else None."""
    if trace == "stochastic":
        return None
    if L is None and isinstance(A, Convolution) and Embedding.serves(A):
        try:
            limits = {} if trace == "exact" else {"max_unknowns": DEFAULT_LIMITS.dense_unknowns}
            return ExactPath(ExactInfluence(A, **limits), y, count)
        except PlanMemoryError:
            if trace == "exact":
                raise
    if L is not None:
        penalty = FilterPath.penalty(A, L)
        if penalty is not None:
            assert isinstance(A, Convolution)
            return FilterPath(A, y, penalty, count)
    # the stochastic search is more expensive without a border, and for small volumes, so that more are decomposed
    border = isinstance(A, Convolution) and BorderPath.serves(A, L)
    unknowns = DEFAULT_LIMITS.dense_unknowns * (1 if border and len(A.in_shape) < 4 else 2)
    if DensePath.serves(A, L, EXACT_UNKNOWNS if trace == "exact" else unknowns):
        return DensePath(A, y, L, _norm_ratio(A, L), count)
    separable = SeparablePath.where_cheap(A, y, L, count)
    if separable is None and trace == "exact":
        raise MethodError(
            f'trace: "exact" needs at most {EXACT_UNKNOWNS} unknowns, or a convolution with zero or circular padding, '
            f'and with L both circular; got {A!r} and L={L!r}; use trace="stochastic"'
        )
    return separable


def _surrogate_path(A: LinearOperator, y: Tensor, L: LinearOperator | None, *, determinant: bool) -> DampPath | None:
    """The path of a surrogate of a large problem: tapered data, weighted or not, or windows; None where none serves."""
    weighted = weighted_convolution(A)
    if weighted is not None:
        scale, core = weighted
        if not _is_mask(scale):
            return WeightedTaperedPath(core, scale, y, L) if TaperedPath.serves(core, L) else None
    found = _with_missing(A)
    if found is None:
        return None
    core, missing = found
    if TaperedPath.serves(core, L):
        filled = y if missing is None else interpolated(y, ~missing)
        return TaperedPath(core, filled, L, determinant=determinant)
    windows = as_windows(core, y, L) if missing is None else None
    return None if windows is None else _stochastic_path(windows.A, windows.y.flatten(0, 1), windows.L)


def _stochastic_path(
    A: LinearOperator,
    y: Tensor,
    L: LinearOperator | None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
    *,
    local: bool = False,
) -> BorderPath | SolverPath:
    """The path with stochastic traces: through the border for a convolution that has one, else by a solver."""
    scale = _norm_ratio(A, L) if scale is None else scale
    found = _with_missing(A)
    if found is not None and BorderPath.serves(found[0], L):
        return BorderPath(found[0], y, scale, L, count, local=local, missing=found[1])
    return SolverPath(A, y, L, scale, count, local=local)


def _with_missing(A: LinearOperator) -> tuple[Convolution, Tensor | None] | None:
    """Split A into a convolution and the outputs that a mask hides, None where there is no mask.

    None for other operators, and where items or groups miss different outputs, or these are many.
    """
    if isinstance(A, Convolution):
        return A, None
    weighted = weighted_convolution(A)
    if weighted is None or not Embedding.serves(weighted[1]):
        return None
    scale, core = weighted
    if scale.ndim > len(core.out_shape) or not _is_mask(scale):
        return None
    missing = scale == 0
    groups = missing.unflatten(0, (core.groups, -1))
    return (core, missing) if bool((groups == groups[:1]).all()) and are_scattered(missing, core.ndim) else None


def _is_mask(scale: Tensor) -> bool:
    """Tell whether the factors of the outputs are zeros and ones."""
    return bool(((scale == 0) | (scale == 1)).all())


def _norm_ratio(A: LinearOperator, L: LinearOperator | None) -> Tensor:
    """Estimate ``||A|| / ||L||``, or ``||A||`` without L, to about a tenth; norms of zero count as 1."""
    norms = [spectral_norm(operator, rtol=0.1).double() for operator in (A, L) if operator is not None]
    sizes = [torch.where(size > 0, size, 1) for size in norms]
    return sizes[0] if L is None else sizes[0] / sizes[1]
