r"""total_variation: edge-preserving reconstruction with total variation, sparsity and bounds; plug_and_play."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ConvergenceError, ConvergenceWarning, ShapeError
from lsconv.inverse.lstsq import without_items
from lsconv.inverse.splitting import SplittingResult, Term, admm
from lsconv.krylov.batch import ItemSpace
from lsconv.krylov.problem import as_operator, check_damp, prepare
from lsconv.krylov.solution import Solution, Status
from lsconv.operators.base import LinearOperator
from lsconv.operators.difference import Gradient
from lsconv.operators.elementary import Identity

__all__ = ["plug_and_play", "total_variation"]

_RTOL = {torch.float32: 1e-3, torch.float64: 1e-5}


def total_variation(
    A: Any,
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
    Solved by ADMM whose quadratic step is the exact border solve (:mod:`lsconv.inverse.splitting`).

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
        background: the b of the Poisson likelihood, >= 0, in counts.
        x0: where to start; it does not change the answer.
        rtol: relative tolerance of the optimality conditions; None: 1e-3 in float32, 1e-5 in float64.
        max_iter: limit on the ADMM iterations.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`: ``residual_norm`` is :math:`\|y - Ax\|`; ``gradient_norm`` the norm of what the
        optimality condition :math:`\nabla f(x) + \sum_j K_j^H p_j = 0` leaves, with the multipliers p in the
        subdifferentials of the terms; ``history`` a
        :class:`~lsconv.inverse.splitting.SplittingHistory` (primal and dual residuals, objective); ``damp`` the weight.

    Raises:
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
    problem = prepare(A, y, x0=x0, check_finite=check_finite, name="y")
    strength = _weight(weight, A)
    if huber < 0 or not math.isfinite(huber):
        raise ArgumentError(f"huber: expected a finite number >= 0, got {huber}")
    if noise not in ("gaussian", "poisson"):
        raise ArgumentError(f'noise: expected "gaussian" or "poisson", got {noise!r}')
    if L is not None and L.in_shape != A.in_shape:
        raise ShapeError(f"L: in_shape {L.in_shape} differs from that of A, {A.in_shape}")
    batch = _batch(problem.batch, strength)
    data = problem.y.expand(*batch, *A.out_shape)
    penalty = L if L is not None else _gradient(A)
    groups = _groups(penalty, isotropic, coupled) if L is None else ()
    terms = [_sparsity(penalty, strength.expand(batch), groups, huber)]
    if bounds is not None:
        terms.append(_box(A, bounds))
    if noise == "poisson":
        if bool((data < 0).any()) or background < 0:
            raise ArgumentError("y: counts must be >= 0 for Poisson noise, and so must background")
        terms.insert(0, _poisson(A, data, background))
    scale = _image_scale(A, data)
    rho = strength.expand(batch) / (0.05 * scale) if noise == "gaussian" else 1 / _mean(data, A)
    rho = torch.where((rho > 0) & torch.isfinite(rho), rho, 1.0)

    def objective(x: Tensor, images: list[Tensor]) -> Tensor:
        values = [term.value(image) for term, image in zip(terms, images, strict=True) if term.value is not None]
        total = torch.stack([value.double() for value in values]).sum(0)
        if noise == "gaussian":
            total = total + 0.5 * ItemSpace(A.out_shape, A.dtype, A.device).norm(data - A.apply(x)) ** 2
        return total

    rtol = _RTOL[A.dtype.to_real()] if rtol is None else rtol
    start = problem.x0 if problem.x0 is not None else torch.zeros(A.in_shape, dtype=A.dtype, device=A.device)
    gaussian = noise == "gaussian"
    result = admm(A if gaussian else None, data if gaussian else None, terms, rho=rho, batch=tuple(batch), x0=start,
                  rtol=rtol, max_iter=max_iter, objective=objective, callback=callback)  # fmt: skip
    solution = _solution(A, data, terms, result, strength.expand(batch), bounds, gaussian)
    return _reported(solution, problem.broken.expand(batch), "total_variation", raise_on_failure)


def plug_and_play(
    A: Any,
    y: Tensor,
    denoiser: Callable[[Tensor], Tensor],
    rho: float | Tensor,
    *,
    bounds: tuple[float | None, float | None] | None = None,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int = 100,
    callback: Callable[[int, Tensor], bool | None] | None = None,
    raise_on_failure: bool = False,
) -> Solution:
    r"""Reconstruction with a denoiser as the prior (plug-and-play ADMM).

    Iterates :math:`x = (A^HA + \rho)^{-1}(A^Hy + \rho(z - u))`, ``z = denoiser(x + u)``, ``u = u + x - z``. Where the
    denoiser is a proximal operator the limit minimises its penalty; otherwise the limit is an equilibrium, and rho is
    part of the model.

    Args:
        A: an operator.
        y: data, ``(*batch, *out_shape)``.
        denoiser: maps ``(*batch, *in_shape)`` to the same shape.
        rho: weight of the agreement with the denoiser, > 0, in the units of A squared; one per batch item, or a number.
        bounds: ``(lowest, highest)``, each a number or None.
        x0: where to start.
        rtol: relative tolerance; None: 1e-3 in float32, 1e-5 in float64.
        max_iter: limit on the iterations.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.

    Returns:
        A :class:`Solution`, as from :func:`total_variation`; ``damp`` is the square root of rho.

    Raises:
        ArgumentError: rho is not positive.
        ShapeError: the denoiser changes the shape.

    Source:
        Venkatakrishnan, Bouman, Wohlberg, "Plug-and-play priors for model based reconstruction" (2013).

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, in_size=(24, 24))
        >>> smooth = lambda v: torch.nn.functional.avg_pool2d(v, 3, 1, 1, count_include_pad=False)
        >>> lsconv.plug_and_play(A, A(torch.rand(1, 24, 24)), smooth, 1e-1, max_iter=200).x.shape
        torch.Size([1, 24, 24])
    """
    A = as_operator(A, y)
    problem = prepare(A, y, x0=x0, name="y")
    strength = check_damp(rho, A)
    if not bool((strength > 0).all()):
        raise ArgumentError(f"rho: expected numbers > 0, got {rho}")
    batch = _batch(problem.batch, strength)
    data = problem.y.expand(*batch, *A.out_shape)

    def denoised(v: Tensor, _: Tensor) -> Tensor:
        z = denoiser(v)
        if z.shape != v.shape:
            raise ShapeError(f"denoiser: returned shape {tuple(z.shape)} for {tuple(v.shape)}")
        return z.to(v.dtype)

    identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
    terms = [Term(identity, denoised)]
    if bounds is not None:
        terms.append(_box(A, bounds))

    def objective(x: Tensor, images: list[Tensor]) -> Tensor:
        return 0.5 * ItemSpace(A.out_shape, A.dtype, A.device).norm(data - A.apply(x)) ** 2

    rtol = _RTOL[A.dtype.to_real()] if rtol is None else rtol
    start = problem.x0 if problem.x0 is not None else A.adjoint(data)
    result = admm(A, data, terms, rho=strength, batch=tuple(batch), x0=start, rtol=rtol, max_iter=max_iter,
                  objective=objective, convex=False, callback=callback)  # fmt: skip
    solution = _solution(A, data, terms, result, strength.expand(batch).sqrt(), bounds, True)
    return _reported(solution, problem.broken.expand(batch), "plug_and_play", raise_on_failure)


# ---------------------------------------------------------------------- terms


def _sparsity(L: LinearOperator, weight: Tensor, groups: tuple[int, ...], huber: float) -> Term:
    space = ItemSpace(L.out_shape, L.dtype, L.device)
    dims = tuple(group - len(L.out_shape) for group in groups)
    spread = space.spread(weight).real

    def magnitude(v: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(v, dim=dims, keepdim=True) if dims else v.abs()
        return norm

    def prox(v: Tensor, rho: Tensor) -> Tensor:
        size, threshold = magnitude(v), spread / rho
        shrink = (1 - threshold / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0)
        if huber > 0:  # quadratic where the minimiser stays below huber
            shrink = torch.where(size <= huber + threshold, huber / (huber + threshold), shrink)
        return v * shrink

    def value(v: Tensor) -> Tensor:
        size = magnitude(v).double()
        if huber > 0:
            size = torch.where(size <= huber, size**2 / (2 * huber), size - huber / 2)
        return weight * size.flatten(v.ndim - len(L.out_shape)).sum(-1)

    return Term(L, prox, value)


def _box(A: LinearOperator, bounds: tuple[float | None, float | None]) -> Term:
    if len(bounds) != 2 or A.is_complex:
        raise ArgumentError(f"bounds: expected (lowest, highest) on a real operator, got {bounds!r}")
    low, high = bounds
    if low is not None and high is not None and not low <= high:
        raise ArgumentError(f"bounds: the lowest value {low} exceeds the highest {high}")
    if low is None and high is None:
        raise ArgumentError("bounds: (None, None) bounds nothing; leave bounds out")
    identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
    return Term(identity, lambda v, rho: v.clamp(low, high))


def _poisson(A: LinearOperator, y: Tensor, background: float) -> Term:
    def prox(v: Tensor, rho: Tensor) -> Tensor:
        p = v + background - 1 / rho
        root = torch.sqrt(p**2 + 4 * y / rho)
        # the positive root, without cancelling where p < 0
        t = torch.where(p >= 0, (p + root) / 2, 2 * y / rho / (root - p).clamp_min(torch.finfo(v.dtype).tiny))
        return t - background

    def value(v: Tensor) -> Tensor:
        t = (v + background).double().clamp_min(torch.finfo(torch.float64).tiny)
        return (t - torch.xlogy(y.double(), t)).flatten(v.ndim - len(A.out_shape)).sum(-1)

    return Term(A, prox, value)


# ---------------------------------------------------------------------- arguments and results


def _gradient(A: LinearOperator) -> Gradient:
    ndim = max(len(A.in_shape) - 1, 1)
    return Gradient(A.in_shape, ndim=ndim, dtype=A.dtype, device=A.device)


def _groups(L: LinearOperator, isotropic: bool, coupled: bool) -> tuple[int, ...]:
    """The dimensions of ``L x``, ``(directions, channels, *spatial)``, that are measured together."""
    channels = len(L.out_shape) > 2
    return ((0,) if isotropic else ()) + ((1,) if coupled and channels else ())


def _weight(weight: float | Tensor, A: LinearOperator) -> Tensor:
    try:
        return check_damp(weight, A)
    except (ArgumentError, TypeError) as error:
        raise ArgumentError(f"weight: expected finite numbers >= 0, got {weight}") from error


def _batch(batch: torch.Size, weight: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(batch, weight.shape)
    except RuntimeError:
        raise ShapeError(
            f"weight: shape {tuple(weight.shape)} does not broadcast with the batch {tuple(batch)}"
        ) from None


def _image_scale(A: LinearOperator, y: Tensor) -> Tensor:
    """The size of the values of x that y suggests: what the backprojection needs to explain it."""
    back = A.adjoint(y)
    inputs, outputs = ItemSpace(A.in_shape, A.dtype, A.device), ItemSpace(A.out_shape, A.dtype, A.device)
    image = outputs.norm(A.apply(back))
    step = inputs.norm(back) ** 2 / image.clamp_min(torch.finfo(image.dtype).tiny) ** 2
    return step * inputs.norm(back) / math.sqrt(A.in_numel)


def _mean(y: Tensor, A: LinearOperator) -> Tensor:
    return y.double().flatten(y.ndim - len(A.out_shape)).mean(-1)


def _solution(
    A: LinearOperator,
    y: Tensor,
    terms: list[Term],
    result: SplittingResult,
    strength: Tensor,
    bounds: tuple[float | None, float | None] | None,
    gaussian: bool,
) -> Solution:
    """The x inside the bounds, with residual and optimality recomputed."""
    x = result.x if bounds is None else result.x.clamp(*bounds)
    inputs, outputs = ItemSpace(A.in_shape, A.dtype, A.device), ItemSpace(A.out_shape, A.dtype, A.device)
    r = y - A.apply(x)
    force = -A.adjoint(r) if gaussian else torch.zeros_like(x)
    for term, p in zip(terms, result.multipliers, strict=True):
        force = force + term.operator.adjoint(p)
    codes = torch.where(result.converged, Status.OPTIMALITY.code, Status.ITERATION_LIMIT.code)
    residual = outputs.safe_norm(r)
    return Solution(
        x=x,
        codes=torch.where(torch.isfinite(residual), codes, Status.NON_FINITE.code),
        converged=result.converged & torch.isfinite(residual),
        iterations=result.iterations,
        residual_norm=residual,
        gradient_norm=inputs.safe_norm(force),
        damp=strength,
        history=result.history,  # type: ignore[arg-type]
    )


def _reported(solution: Solution, broken: Tensor, name: str, raise_on_failure: bool) -> Solution:
    if bool(broken.any()):
        solution = without_items(solution, broken)
    if not bool(solution.converged.all()):
        failed = int((~solution.converged).sum())
        text = f"{failed} of {solution.converged.numel()} item(s) did not converge ({name}). {solution.failure_text()}"
        if raise_on_failure:
            raise ConvergenceError(text)
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
    return solution
