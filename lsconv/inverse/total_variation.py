r"""total_variation: edge-preserving reconstruction with total variation, sparsity and bounds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.border.penalty import as_convolutions
from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError, ShapeError
from lsconv.inverse.admm.proximal import Bounds, Term, gaussian_term, poisson_term, sparsity_term
from lsconv.inverse.admm.sparse_problem import SparseProblem
from lsconv.inverse.solve import without_items
from lsconv.krylov.gradients.parameters import any_requires_grad, parameters_of
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import as_operator, check_damp, prepare
from lsconv.krylov.loop.solution import Solution, report
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.difference import Gradient
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["total_variation"]

_RTOL = {torch.float32: 2e-3, torch.float64: 1e-4}


@untraced
@checks_numbers
@serves_empty_batches()
def total_variation(
    A: OperatorLike,
    y: Tensor,
    weight: float | Tensor,
    *,
    isotropic: bool = True,
    coupled: bool = True,
    L: LinearOperator | None = None,
    huber: float = 0.0,
    bounds: tuple[float | None, float | None] | None = None,
    noise: str = "gaussian",
    background: float = 0.0,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int = 1000,
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
        huber: below this magnitude the penalty is quadratic (Huber), in the units of ``L x``; 0: none.
        bounds: ``(lowest, highest)``, each a number or None.
        noise: "gaussian" or "poisson".
        background: the b of the Poisson likelihood, a number >= 0, in counts.
        x0: where to start; it does not change the answer.
        rtol: tolerance of stationarity and complementarity; None: 2e-3 in float32, 1e-4 in float64.
        max_iter: limit on the ADMM iterations.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`: ``residual_norm`` is :math:`\|y - Ax\|`, ``gradient_norm`` the norm of what the forces
        leave, both recomputed in float64; ``history`` a :class:`~lsconv.inverse.admm.history.SplittingHistory`
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
    A = as_operator(A, y)
    L = None if L is None else as_operator(L).for_dtype(A.dtype)
    refuse_gradient("total_variation", A, L, {"y": y, "weight": weight})
    problem = prepare(A, y, x0=x0, check_finite=check_finite, name="y")
    strength = _weight(weight, A)
    given = {"huber": huber, "noise": noise, "background": background, "bounds": bounds, "L": L}
    check_options(A, problem.y, "y", given)
    batch = batch_of(problem.batch, strength, "weight")
    data = problem.y.expand(*batch, *A.out_shape)
    strength = strength.expand(batch)

    def terms(A: LinearOperator, data: Tensor) -> list[Term]:
        first = gaussian_term(A, data) if noise == "gaussian" else poisson_term(A, data, background)
        return [first, *_penalties(A, L, strength, isotropic, coupled, huber)]

    start = None if problem.x0 is None else problem.x0.expand(*batch, *A.in_shape)
    sparse = SparseProblem(A, data, terms, bounds=bounds, gaussian=noise == "gaussian", x0=start, centred=L is None)
    rtol = _RTOL[A.dtype.to_real()] if rtol is None else rtol
    solution = sparse.solution(sparse.run(rtol, max_iter, callback), rtol, strength)
    return reported(solution, problem.nonfinite.expand(batch), "total_variation", raise_on_failure)


# ---------------------------------------------------------------------- arguments and results


def check_options(A: LinearOperator, y: Tensor, name: str, options: dict[str, Any]) -> None:
    """Refuse options of :func:`total_variation` that do not fit A and the data.

    Args:
        A: the operator.
        y: the data.
        name: what the user calls them.
        options: some of the options.
    """
    unknown = sorted(set(options) - set(inspect.signature(total_variation).parameters))
    if unknown:
        raise ArgumentTypeError(f"{', '.join(unknown)}: total variation takes no such option")
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


def refuse_gradient(name: str, A: LinearOperator, L: LinearOperator | None, values: dict[str, Any]) -> None:
    """Raise where autograd would follow what the answer of ``name`` depends on, and get nothing."""
    followed = [key for key, value in values.items() if isinstance(value, Tensor) and any_requires_grad(value)]
    followed += [key for key, op in (("A", A), ("L", L)) if op is not None and any_requires_grad(*parameters_of(op))]
    if followed:
        raise MethodError(
            f"{', '.join(followed)}: autograd follows it, and {name} has no gradient; call it under torch.no_grad() or "
            f"with detached tensors, or use tikhonov, which is differentiable"
        )


def _penalties(
    A: LinearOperator, L: LinearOperator | None, weight: Tensor, isotropic: bool, coupled: bool, huber: float
) -> list[Term]:
    """The gradient with its magnitudes; or every entry of L by itself, convolution by convolution where it is some."""
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
    """Refuse bounds that are none."""
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
    """The batch of the data and of one value per item."""
    try:
        return broadcast_shapes(batch, values.shape)
    except RuntimeError:
        raise ShapeError(
            f"{name}: shape {tuple(values.shape)} does not broadcast with the batch {tuple(batch)}"
        ) from None


def reported(solution: Solution, nonfinite: Tensor, name: str, raise_on_failure: bool) -> Solution:
    """The solution, with a warning or an error where an item did not converge."""
    if bool(nonfinite.any()):
        solution = without_items(solution, nonfinite)
    report(solution, name, raise_on_failure=raise_on_failure)
    return solution
