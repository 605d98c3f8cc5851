r"""total_variation: edge-preserving reconstruction with total variation, sparsity and bounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ConvergenceError, ConvergenceWarning, MethodError, ShapeError
from lsconv.fourier.penalty import as_convolutions
from lsconv.inverse.extended_grid import ExtendedGrid
from lsconv.inverse.lstsq import without_items
from lsconv.inverse.normal_step import NormalStep
from lsconv.inverse.optimality import Optimality, operator_norm, optimality
from lsconv.inverse.proximal import Term, box_term, gaussian_term, poisson_term, sparsity_term
from lsconv.inverse.splitting import Image, SplittingResult, admm
from lsconv.krylov.batch import ItemSpace
from lsconv.krylov.problem import as_operator, check_damp, prepare
from lsconv.krylov.solution import Solution, Status
from lsconv.operators.algebra import Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.elementary import Identity

__all__ = ["total_variation"]

Bounds = tuple[float | None, float | None]

_RTOL = {torch.float32: 2e-3, torch.float64: 1e-4}
# The penalty of the data's image in units of its curvature, and those of bounds and of cells held at zero relative to
# it. Three times more or less cost up to twice the iterations on photographs under four blurs.
_DATA_PENALTY = 0.1
_BOX_PENALTY = 0.3
_HELD_PENALTY = 1.0
# The first threshold of the differences, in units of their root mean square.
_FIRST_THRESHOLD = 0.7


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
    Solved by ADMM (:mod:`lsconv.inverse.splitting`) whose quadratic step, for convolutions, is one division per
    frequency on a periodic grid that has the unknown or zero surroundings in it
    (:mod:`lsconv.inverse.extended_grid`).

    ``converged`` is decided by a certificate recomputed from x and dual variables p, whatever the iteration believed
    (:mod:`lsconv.inverse.optimality`): the stationarity :math:`\|A^H(Ax - y) + L^H p\|` (beside what the bounds hold)
    relative to the larger of its two forces, and the complementarity :math:`\mathrm{weight}\,\|Lx\|_{2,1} - \langle
    p, Lx\rangle`, which with p in the dual ball is the duality gap that stationarity leaves, relative to the objective.

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
        rtol: tolerance of stationarity and complementarity; None: 2e-3 in float32, 1e-4 in float64.
        max_iter: limit on the ADMM iterations.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.
        check_finite: refuse NaN and infinity in y; False gives such items :attr:`Status.NON_FINITE`.

    Returns:
        A :class:`Solution`: ``residual_norm`` is :math:`\|y - Ax\|`, ``gradient_norm`` the norm of what the forces
        leave, both recomputed in float64; ``history`` a :class:`~lsconv.inverse.splitting.SplittingHistory` (primal
        and dual residuals, certificate, objective); ``damp`` the weight.

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
    if bounds is not None:
        check_bounds(bounds, A)
    batch = batch_of(problem.batch, strength, "weight")
    data = problem.y.expand(*batch, *A.out_shape)
    if noise == "poisson" and (bool((data < 0).any()) or background < 0):
        raise ArgumentError("y: counts must be >= 0 for Poisson noise, and so must background")
    strength = strength.expand(batch)

    def terms(A: LinearOperator, data: Tensor) -> list[Term]:
        first = gaussian_term(A, data) if noise == "gaussian" else poisson_term(A, data, background)
        return [first, *_penalties(A, L, strength, isotropic, coupled, huber)]

    start = None if problem.x0 is None else problem.x0.expand(*batch, *A.in_shape)
    splitting = _Splitting(A, data, terms, bounds, noise == "gaussian", start)
    rtol = _RTOL[A.dtype.to_real()] if rtol is None else rtol
    result = splitting.run(rtol, max_iter, callback)
    solution = splitting.solution(result, rtol, strength)
    return reported(solution, problem.broken.expand(batch), "total_variation", raise_on_failure)


class _Splitting:
    """One problem: its terms, its quadratic step, and its certificate in the precision of the data and in double."""

    def __init__(
        self,
        A: LinearOperator,
        y: Tensor,
        terms: Callable[[LinearOperator, Tensor], list[Term]],
        bounds: Bounds | None,
        gaussian: bool,
        x0: Tensor | None,
    ) -> None:
        self.A, self.y, self.bounds, self.gaussian = A, y, bounds, gaussian
        self.batch = tuple(y.shape[: y.ndim - len(A.out_shape)])
        self.terms = terms(A, y)
        wide = torch.complex128 if A.is_complex else torch.float64
        self.precise = self.terms if A.dtype == wide else terms(A.to(dtype=wide), y.to(wide))
        self.norms = [operator_norm(term.operator) for term in self.terms]
        split = list(self.terms)
        self.box: int | None = None
        if bounds is not None:
            self.box = len(split)
            split.append(box_term(Identity(A.in_shape, dtype=A.dtype, device=A.device), bounds))
        self.step: ExtendedGrid | NormalStep
        try:
            if not isinstance(A, Convolution):
                raise MethodError(f"{A!r} is no convolution")
            self.step = ExtendedGrid(A, split, self.batch)
            self.images = self.step.begin(x0, y, [self._first(term) for term in self.step.terms])
            self.skipped = 0
        except MethodError:
            x = torch.zeros(*self.batch, *A.in_shape, dtype=A.dtype, device=A.device) if x0 is None else x0.clone()
            if x0 is None:
                x = A.adjoint(y) / max(self.norms[0], torch.finfo(A.dtype).tiny) ** 2
            self.skipped = int(gaussian)  # the quadratic data term stays whole
            self.step = NormalStep(A if gaussian else None, y, split[self.skipped :], x)
            self.images = self.step.begin()
            self.box = None if self.box is None else self.box - self.skipped

    def _curvature(self) -> Tensor:
        """The second derivative of the data term by ``Ax``, about."""
        if self.gaussian:
            return torch.ones(self.batch, dtype=torch.float64, device=self.A.device)
        mean = self.y.double().flatten(self.y.ndim - len(self.A.out_shape)).mean(-1)
        return torch.where(mean > 0, 1 / mean, 1.0)

    def _first(self, term: Term) -> Tensor:
        """The penalties of the quadratic problem whose answer is the start."""
        data = _DATA_PENALTY * self._curvature()
        square = max(self.norms[0], torch.finfo(torch.float32).tiny) ** 2
        if term.balanced:
            return data * 0.2 * square / self.norms[self.terms.index(term)] ** 2
        return data if term is self.terms[0] else data * 1e-3 * square

    def _penalties(self) -> list[Tensor]:
        """The penalties to begin with: thresholds of the size of the images."""
        data = _DATA_PENALTY * self._curvature()
        square = max(self.norms[0], torch.finfo(torch.float32).tiny) ** 2
        rho: list[Tensor] = []
        views: Sequence[Image] = self.step.images
        for term, view, image in zip(self.step.terms, views, self.images, strict=True):
            if term.weight is not None:
                K = term.operator
                size = ItemSpace(K.out_shape, K.dtype, K.device).norm(view.item(image)) / math.sqrt(term.entries)
                usual = data * square / self.norms[self.terms.index(term)] ** 2
                value = term.weight / (_FIRST_THRESHOLD * size)
                value = torch.where(torch.isfinite(value) & (value > 0), value, usual)
                rho.append(torch.clamp(value, 1e-4 * usual, 1e4 * usual))
            elif term is self.terms[0]:
                rho.append(data)
            else:
                held = isinstance(self.step, ExtendedGrid) and self.step.held
                rho.append(data * (_HELD_PENALTY if held else _BOX_PENALTY) * square)
        if isinstance(self.step, NormalStep):
            chosen = next(value for value, term in zip(rho, self.step.terms, strict=True) if term.balanced)
            rho = [chosen for _ in rho]
        return rho

    def run(self, rtol: float, max_iter: int, callback: Callable[[int, Tensor], bool | None] | None) -> SplittingResult:
        """ADMM until the certificate meets ``rtol``, in double precision too."""

        def judge(x: Tensor, duals: list[Tensor]) -> Optimality:
            verdict = self.certificate(x, duals, self.terms)
            if self.precise is not self.terms and bool(verdict.met(rtol).any()):
                verdict = self.certificate(x, duals, self.precise)
            return verdict

        def answer(x: Tensor, split: list[Tensor]) -> Tensor:
            return x if self.box is None else split[self.box]

        return admm(self.step, self.images, rho=self._penalties(), batch=self.batch, judge=judge, answer=answer,
                    rtol=rtol, max_iter=max_iter, balance=True, callback=callback)  # fmt: skip

    def certificate(self, x: Tensor, duals: list[Tensor], terms: list[Term]) -> Optimality:
        """The certificate of x in the precision of ``terms``."""
        dtype = terms[0].operator.dtype
        kept = [torch.zeros_like(self.y)] * self.skipped + duals
        return optimality(terms, [p.to(dtype) for p in kept[: len(terms)]], x.to(dtype), bounds=self.bounds,
                          norms=self.norms, rounding=torch.finfo(self.A.dtype).eps)  # fmt: skip

    def solution(self, result: SplittingResult, rtol: float, weight: Tensor) -> Solution:
        """The answer, with everything that is reported recomputed from it in double precision."""
        verdict = self.certificate(result.x, result.duals, self.precise)
        data = self.precise[0].operator
        outputs = ItemSpace(data.out_shape, data.dtype, data.device)
        residual = outputs.safe_norm(self.y.to(data.dtype) - data.apply(result.x.to(data.dtype)))
        met = verdict.met(rtol) & torch.isfinite(residual)
        failed = Status.CALLBACK.code if result.stopped else Status.ITERATION_LIMIT.code
        codes = torch.where(met, Status.OPTIMALITY.code, failed)
        return Solution(
            x=result.x,
            codes=torch.where(torch.isfinite(residual), codes, Status.NON_FINITE.code),
            converged=met,
            iterations=result.iterations,
            residual_norm=residual,
            gradient_norm=verdict.gradient_norm,
            damp=weight,
            history=result.history,  # type: ignore[arg-type]
        )


# ---------------------------------------------------------------------- arguments and results


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
        return torch.broadcast_shapes(batch, values.shape)
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
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
    return solution
