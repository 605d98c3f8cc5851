r"""total_variation: edge-preserving reconstruction with total variation, sparsity and bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.border.penalty import as_convolutions
from lsconv.errors import ArgumentError, ArgumentTypeError, ConvergenceError, MethodError, ShapeError, warn
from lsconv.inverse.admm.proximal import Bounds, Term, gaussian_term, poisson_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem
from lsconv.inverse.observation import Observation, mask_of_data
from lsconv.inverse.solve import without_items
from lsconv.krylov.gradients.parameters import any_requires_grad, parameters_of
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, check_damp, prepare
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.algebra import Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.dtypes import double
from lsconv.operators.elementary import Diagonal, Mask
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
    L = None if L is None else accept_operator(L, name="L").for_dtype(A.dtype)
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
    given = {"huber": huber, "noise": noise, "background": background, "bounds": bounds, "L": L}
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
    core, scale = _peeled(A)
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


def _peeled(A: LinearOperator) -> tuple[LinearOperator, Tensor | None]:
    """Split ``A = D B``, B a convolution, D a non-negative diagonal or a mask; A and None where it has no such form."""
    if not isinstance(A, Product) or not isinstance(A.operators[-1], Convolution):
        return A, None
    scale: Tensor | None = None
    for row in A.operators[:-1]:
        if isinstance(row, Mask):
            found = row.mask.to(A.dtype.to_real())
        elif isinstance(row, Diagonal) and not row.is_complex and bool((row.diagonal >= 0).all()):
            found = row.diagonal.detach()
        else:
            return A, None
        scale = found if scale is None else scale * found
    return A.operators[-1], scale


# ---------------------------------------------------------------------- arguments and results


def check_options(A: LinearOperator, y: Tensor, name: str, options: dict[str, Any]) -> None:
    """Refuse options of :func:`total_variation` that do not fit A and the data.

    Args:
        A: the operator.
        y: the data.
        name: what the user calls them.
        options: some of the options.
    """
    huber, noise, L = options.get("huber", 0.0), options.get("noise", "gaussian"), options.get("L")
    if not math.isfinite(huber):
        raise ArgumentError(f"huber: expected a finite number >= 0, got {huber}")
    if noise not in ("gaussian", "poisson"):
        raise ArgumentError(f'noise: expected "gaussian" or "poisson", got {noise!r}')
    if L is not None and L.in_shape != A.in_shape:
        raise ShapeError(f"L: in_shape {L.in_shape} differs from that of A, {A.in_shape}")
    if options.get("bounds") is not None:
        check_bounds(options["bounds"], A)
    if noise == "poisson" and (y.is_complex() or bool((y < 0).any())):
        raise ArgumentError(f"{name}: counts must be >= 0 for Poisson noise; add back what was subtracted, and give it "
                            f"as background=")  # fmt: skip


def check_background(background: Any, A: LinearOperator) -> float | Tensor:
    """A background of the Poisson likelihood as a number, or as a tensor that broadcasts with the data."""
    if isinstance(background, (str, bytes, bool)) or background is None:
        raise ArgumentTypeError(f"background: expected a number >= 0 or a tensor, got {background!r}")
    try:
        found = torch.as_tensor(background)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"background: expected a number >= 0 or a tensor, got {background!r}") from None
    if found.is_complex() or not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ArgumentError("background: expected finite numbers >= 0")
    shape, wanted = tuple(found.shape), A.out_shape
    if shape[-len(wanted) :] != wanted[max(0, len(wanted) - len(shape)) :]:
        raise ShapeError(f"background: shape {shape} does not broadcast with A's out_shape {wanted}")
    return float(found) if found.ndim == 0 else found.to(A.device)


def refuse_gradient(name: str, A: LinearOperator, L: LinearOperator | None, values: dict[str, Any]) -> None:
    """Raise where autograd follows an argument of ``name``, whose answer has no gradient."""
    followed = [key for key, value in values.items() if isinstance(value, Tensor) and any_requires_grad(value)]
    followed += [key for key, op in (("A", A), ("L", L)) if op is not None and any_requires_grad(*parameters_of(op))]
    if followed:
        raise MethodError(
            f"{', '.join(followed)}: autograd follows it, and {name} has no gradient; call it under torch.no_grad() or "
            f"with detached tensors, or use tikhonov, which is differentiable"
        )


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


def check_bounds(bounds: Bounds, A: LinearOperator) -> None:
    """Refuse bounds that are not ``(lowest, highest)`` in order, that bound nothing, or that come with a complex A."""
    if len(bounds) != 2 or A.is_complex:
        raise ArgumentError(f"bounds: expected (lowest, highest) on a real operator, got {bounds!r}")
    low, high = bounds
    if low is not None and high is not None and not low <= high:
        raise ArgumentError(f"bounds: the lowest value {low} exceeds the highest {high}")
    if low is None and high is None:
        raise ArgumentError("bounds: (None, None) bounds nothing; leave bounds out")


def _weight(weight: float | Tensor, A: LinearOperator) -> Tensor:
    try:
        return check_damp(weight, A)
    except (ArgumentError, TypeError) as error:
        raise ArgumentError(f"weight: expected finite numbers >= 0, got {weight}") from error


def batch_of(batch: torch.Size, values: Tensor, name: str) -> torch.Size:
    """The batch dimensions of the data broadcast with those of one value per item."""
    try:
        return broadcast_shapes(batch, values.shape)
    except RuntimeError:
        raise ShapeError(
            f"{name}: shape {tuple(values.shape)} does not broadcast with the batch {tuple(batch)}"
        ) from None


def reported(solution: Solution, broken: Tensor, name: str, raise_on_failure: bool) -> Solution:
    """The solution, with a warning or an error where an item did not converge."""
    if bool(broken.any()):
        solution = without_items(solution, broken)
    if not bool(solution.converged.all()):
        failed = int((~solution.converged).sum())
        text = f"{failed} of {solution.converged.numel()} item(s) did not converge ({name}). {solution.failure_text()}"
        if raise_on_failure:
            raise ConvergenceError(text)
        warn(text)
    return solution
