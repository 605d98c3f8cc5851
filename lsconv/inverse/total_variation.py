r"""total_variation: edge-preserving reconstruction with total variation, sparsity and bounds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.border.penalty import as_convolutions
from lsconv.errors import ArgumentError
from lsconv.inverse.admm.proximal import Bounds, Term, gaussian_term, poisson_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem
from lsconv.inverse.convex_arguments import (
    batch_of,
    check_background,
    check_options,
    refuse_gradient,
    reported,
)
from lsconv.inverse.observation import Observation, mask_of_data
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, accept_penalty, check_damp, prepare
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.dtypes import double
from lsconv.operators.observed import MeasuredRows
from lsconv.operators.transforms import untraced

__all__ = ["total_variation"]

RTOL = {torch.float32: 2e-3, torch.float64: 1e-4}


@untraced
@checks_numbers
@serves_empty_batches()
def total_variation(
    A: Any,
    y: Tensor,
    weight: float | Tensor,
    *,
    isotropic: bool = True,
    coupled: bool = True,
    L: LinearOperator | None = None,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    at_least: Tensor | None = None,
    huber: float = 0.0,
    bounds: tuple[float | None, float | None] | None = None,
    noise: str = "gaussian",
    background: float | Tensor = 0.0,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    callback: Callable[[int, Tensor], bool | None] | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
) -> Solution:
    r"""Least squares, or Poisson likelihood, with total variation or another sparsifying penalty.

    .. math:: \min_{lo \le x \le hi}\; \tfrac12 \|Ax - y\|^2 + \mathrm{weight}\, \|Lx\|_{2,1}
              \quad\text{or}\quad
              \min_{lo \le x \le hi}\; \sum_i (Ax + b)_i - y_i \log (Ax + b)_i + \mathrm{weight}\, \|Lx\|_{2,1}

    With L the gradient (Neumann boundary) this is total variation: isotropic takes the Euclidean norm over the
    directions at every pixel, ``coupled`` also over the channels, anisotropic the absolute value of every difference.
    Solved by ADMM (:mod:`lsconv.inverse.admm.iteration`) whose quadratic step, for convolutions, is one division per
    frequency on a periodic grid that has the unknown or zero surroundings in it
    (:mod:`lsconv.inverse.admm.fourier_step`). x is not differentiable (:func:`lsconv.tikhonov`'s is).

    ``converged`` is decided by a certificate recomputed from x and dual variables p, whatever the iteration believed
    (:mod:`lsconv.inverse.admm.optimality`): the stationarity :math:`\|A^H(Ax - y) + L^H p\|` (beside what the bounds
    hold) relative to the larger of its two forces, and the complementarity :math:`\mathrm{weight}\,\|Lx\|_{2,1} -
    \langle p, Lx\rangle`, which with p in the dual ball is the duality gap that stationarity leaves, relative to the
    objective.

    Args:
        A: an operator; also a dense or sparse matrix, or a SciPy LinearOperator.
        y: data, ``(*batch, *out_shape)``; counts (>= 0) for Poisson noise.
        weight: the weight of the penalty, >= 0, a number or a tensor with one per batch item.
        isotropic: Euclidean norm over the directions.
        coupled: Euclidean norm over the channels as well (edges shared by the colours).
        L: another sparsifying operator on ``A.in_shape``; then every entry of ``L x`` counts by its absolute value.
        observed: True where y was measured, a bool tensor that broadcasts with y (one mask for all items, or one per
            item). What stands elsewhere, NaN included, is not read.
        weights: the weights w >= 0 of :math:`\sum_i w_i |(Ax)_i - y_i|^2`, a tensor that broadcasts with y; data of
            weight 0 are missing, and the gradient by such a weight is 0. None: ones. Poisson noise takes ``observed``
            alone.
        at_least: True where a datum is a lower bound of the truth, as that of a saturated pixel is: its residual counts
            only where Ax falls short of it. Bool, broadcasts with y; of Gaussian noise.
        huber: below this magnitude the penalty is quadratic (Huber), in the units of ``L x``; 0: none.
        bounds: ``(lowest, highest)``, each a number or None.
        noise: "gaussian" or "poisson".
        background: the b of the Poisson likelihood, in counts: a number >= 0, or a tensor that broadcasts with y.
        x0: where to start; it does not change the answer.
        rtol: tolerance of stationarity and complementarity; None: 2e-3 in float32, 1e-4 in float64.
        max_iter: limit on the ADMM iterations, at least 1; None: 1000.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`: ``residual_norm`` is :math:`\|y - Ax\|`, ``gradient_norm`` the norm of what the forces
        leave, both recomputed in float64; ``history`` a :class:`~lsconv.inverse.admm.iteration.SplittingHistory`
        (primal and dual residuals, certificate, objective); ``damp`` the weight.

    Raises:
        MethodError: gradients are enabled, and y, weight, A or L require grad.
        LsconvError: for arguments that do not fit.
        ConvergenceError: with ``raise_on_failure``.

    Source:
        Rudin, Osher, Fatemi (1992); Almeida and Figueiredo, "Deconvolving images with unknown boundaries using the
        alternating direction method of multipliers" (2013); Figueiredo and Bioucas-Dias, "Restoration of Poissonian
        images using alternating direction optimization" (2010).

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, in_size=(24, 24))
        >>> x = torch.zeros(1, 24, 24); x[:, 8:16, 8:16] = 1
        >>> solution = lsconv.total_variation(A, A(x), 1e-3, bounds=(0, 1))
        >>> bool(solution.converged), bool((solution.x - x).abs().max() < 0.1)
        (True, True)
    """
    A = accept_operator(A, y)
    L = None if L is None else accept_penalty(L, A)
    refuse_gradient("total_variation", A, L, {"y": y, "weight": weight, "weights": weights})
    if observed is not None or weights is not None:
        A.check_output(y, "y")
        if weights is not None and noise == "poisson":
            raise ArgumentError('weights: are of noise="gaussian"; with Poisson noise say observed=')
        A, y = Observation.of(A, observed, weights).of_data(A, y)
    if at_least is not None:
        if noise == "poisson":
            raise ArgumentError('at_least: is of noise="gaussian"; with Poisson noise leave such data out by observed=')
        at_least = mask_of_data("at_least", at_least, A, "a datum is a lower bound")
    problem = prepare(A, y, x0=x0, check_finite=check_finite, name="y")
    strength = _weight(weight, A)
    background = check_background(background, A)
    given = {"huber": huber, "noise": noise, "background": background, "bounds": bounds}
    check_options(A, problem.y, "y", given)
    batch = batch_of(problem.batch, strength, "weight")
    data = problem.y.expand(*batch, *A.out_shape)
    strength = strength.expand(batch)
    start = None if problem.x0 is None else problem.x0.expand(*batch, *A.in_shape)
    rtol = RTOL[A.dtype.to_real()] if rtol is None else rtol
    max_iter = 1000 if max_iter is None else max_iter
    penalties = functools.partial(_penalties, L=L, weight=strength, isotropic=isotropic, coupled=coupled, huber=huber)
    solution = sparse_solution(
        A, data, penalties, bounds=bounds, background=background if noise == "poisson" else None, x0=start,
        centred=L is None, strength=strength, rtol=rtol, max_iter=max_iter, callback=callback, at_least=at_least,
    )  # fmt: skip
    nothing = ~data.flatten(len(batch)).any(-1) & ~solution.x.flatten(len(batch)).any(-1) & solution.converged
    solution = replace(solution, codes=torch.where(nothing, Status.ZERO.code, solution.codes))
    return reported(solution, problem.nonfinite.expand(batch), "total_variation", raise_on_failure)


def sparse_solution(
    A: LinearOperator,
    y: Tensor,
    penalties: Callable[[LinearOperator], list[Term]],
    *,
    bounds: Bounds | None,
    background: float | Tensor | None,
    x0: Tensor | None,
    centred: bool,
    strength: Tensor,
    rtol: float,
    max_iter: int,
    callback: Callable[[int, Tensor], bool | None] | None,
    at_least: Tensor | None = None,
) -> Solution:
    """The minimiser of a data term and convex penalties; a mask or diagonal before A goes into the data term.

    Args:
        A: the operator.
        y: data, ``(*batch, *out_shape)``.
        penalties: the terms beside that of the data, for an operator with the dtype to have them in.
        bounds: lowest and highest value.
        background: of the Poisson likelihood; None: least squares.
        x0: where to start.
        centred: the penalties do not see constants.
        strength: what is reported as :attr:`Solution.damp`.
        rtol, max_iter, callback: when to stop.
        at_least: rows whose datum is a lower bound; of least squares.
    """
    core, scale = _without_diagonal(A)
    if at_least is not None and scale is None:
        scale = torch.ones_like(y)
    gaussian = background is None
    data = y if scale is None or not gaussian else torch.where(scale > 0, y / scale, 0)

    def terms(B: LinearOperator, data: Tensor) -> list[Term]:
        if background is None:
            first = gaussian_term(B, data if scale is None else scale.to(data.dtype) * data, scale, at_least)
        else:
            first = poisson_term(B, data, background, scale)
        return [first, *penalties(B)]

    sparse = SparseProblem(core, data, terms, bounds=bounds, gaussian=gaussian, x0=x0, centred=centred, scale=scale)
    solution = sparse.solution(sparse.run(rtol, max_iter, callback), rtol, strength)
    if scale is None:
        return solution
    precise = A.to(dtype=double(A.dtype))
    space = ItemSpace(precise.out_shape, precise.dtype, precise.device)
    residual = y.to(precise.dtype) - precise.apply(solution.x.to(precise.dtype))
    residual = residual if at_least is None else torch.where(at_least, residual.clamp_min(0), residual)
    return replace(solution, residual_norm=space.safe_norm(residual))


def _without_diagonal(A: LinearOperator) -> tuple[LinearOperator, Tensor | None]:
    """Split ``A = D B``, B a convolution and D a diagonal that is >= 0; A and None where it has no such form."""
    rows = MeasuredRows.of(A)
    if rows is None or not isinstance(rows.core, Convolution) or rows.core.out_shape != A.out_shape:
        return A, None
    scale = rows.scale.real
    return (rows.core, scale) if bool((rows.scale == scale).all() and (scale >= 0).all()) else (A, None)


def _penalties(
    A: LinearOperator, *, L: LinearOperator | None, weight: Tensor, isotropic: bool, coupled: bool, huber: float
) -> list[Term]:
    """The terms of the penalty: the magnitudes of the gradient, or the entries of L; one for each convolution in L."""
    if L is None:
        ndim = max(len(A.in_shape) - 1, 1)
        gradient = Gradient(A.in_shape, ndim=ndim, dtype=A.dtype, device=A.device)
        channels = len(gradient.out_shape) > 2
        groups = ((0,) if isotropic else ()) + ((1,) if coupled and channels else ())
        return [sparsity_term(gradient, weight, groups, huber)]
    L = L.to(dtype=A.dtype)
    parts = [L]
    if isinstance(L, (VStack, Scaled)):
        found = as_convolutions(L, len(A.in_shape) - 1)
        if found is not None and all(part.factor.numel() == 1 for part in found):
            parts = [part.convolution.with_parameters([part.convolution.weight * part.factor]) for part in found]
    return [sparsity_term(part, weight, (), huber) for part in parts]


def _weight(weight: float | Tensor, A: LinearOperator) -> Tensor:
    try:
        return check_damp(weight, A)
    except (ArgumentError, TypeError) as error:
        raise ArgumentError(f"weight: expected finite numbers >= 0, got {weight}") from error
