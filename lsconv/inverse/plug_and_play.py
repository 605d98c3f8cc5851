r"""plug_and_play: reconstruction with a denoiser as the prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ShapeError
from lsconv.inverse.admm.history import to_solution
from lsconv.inverse.admm.iteration import admm
from lsconv.inverse.admm.operator_step import NormalStep
from lsconv.inverse.admm.proximal import Bounds, Term, box_term
from lsconv.inverse.convex_arguments import batch_of, check_bounds, refuse_gradient, reported
from lsconv.inverse.observation import Observation
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.entry import checks_numbers, serves_empty_batches
from lsconv.krylov.loop.problem import accept_operator, check_damp, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Identity
from lsconv.operators.scipy import OperatorLike
from lsconv.operators.transforms import untraced

__all__ = ["plug_and_play"]

_RTOL = {torch.float32: 1e-3, torch.float64: 1e-5}


@untraced
@checks_numbers
@serves_empty_batches()
def plug_and_play(
    A: OperatorLike,
    y: Tensor,
    denoiser: Callable[[Tensor], Tensor],
    rho: float | Tensor,
    *,
    bounds: tuple[float | None, float | None] | None = None,
    observed: Tensor | None = None,
    weights: Tensor | None = None,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    callback: Callable[[int, Tensor], bool | None] | None = None,
    raise_on_failure: bool = False,
) -> Solution:
    r"""Reconstruction with a denoiser as the prior (plug-and-play ADMM).

    Iterates :math:`x = (A^HA + \rho)^{-1}(A^Hy + \rho(z - u))`, ``z = denoiser(x + u)``, ``u = u + x - z``. Where the
    denoiser is a proximal operator the limit minimises its penalty; otherwise the limit is an equilibrium, and rho is
    part of the model. ``converged`` means that the fixed-point residual, recomputed from x alone,

    .. math:: \|x - \mathrm{denoiser}(x + u)\|, \qquad u = A^H(y - Ax)/\rho,

    is at most ``rtol`` :math:`\|x\|`. With bounds u is divided between the denoiser and the bounds as the iteration has
    it, and the residual of the bounds, :math:`\|x - \Pi(x + u_2)\|`, must be as small. x is not differentiable, nor by
    the parameters of the denoiser, which is called without autograd.

    Args:
        A: an operator.
        y: data, ``(*batch, *out_shape)``.
        denoiser: maps ``(*batch, *in_shape)`` to the same shape.
        rho: weight of the agreement with the denoiser, > 0, in the units of A squared; one per batch item, or a number.
        bounds: ``(lowest, highest)``, each a number or None.
        observed: True where y was measured, a bool tensor that broadcasts with y (one mask for all items, or one per
            item). What stands elsewhere, NaN included, is not read.
        weights: the weights w >= 0 of :math:`\sum_i w_i |(Ax)_i - y_i|^2`, a tensor that broadcasts with y; data of
            weight 0 are missing, and the gradient by such a weight is 0. None: ones.
        x0: where to start.
        rtol: tolerance of the fixed-point residual relative to x; None: 1e-3 in float32, 1e-5 in float64.
        max_iter: limit on the iterations, at least 1; None: 100.
        callback: called with (iteration, x) every few iterations; returning True stops.
        raise_on_failure: raise instead of warning when an item does not converge.

    Returns:
        A :class:`Solution`: ``gradient_norm`` is rho times the larger fixed-point residual, recomputed; ``damp`` the
        square root of rho; ``history`` a :class:`~lsconv.inverse.admm.history.SplittingHistory`.

    Raises:
        MethodError: gradients are enabled, and y, rho or A require grad.
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
    A = accept_operator(A, y)
    refuse_gradient("plug_and_play", A, None, {"y": y, "rho": rho, "weights": weights})
    A.check_output(y, "y")
    A, y = Observation.of(A, observed, weights).of_data(A, y)
    problem = prepare(A, y, x0=x0, name="y")
    strength = check_damp(rho, A)
    if not bool((strength > 0).all()):
        raise ArgumentError(f"rho: expected numbers > 0, got {rho}")
    if bounds is not None:
        check_bounds(bounds, A)
    batch = batch_of(problem.batch, strength, "rho")
    strength = strength.expand(batch)
    data = problem.y.expand(*batch, *A.out_shape)

    def denoised(v: Tensor) -> Tensor:
        z = denoiser(v)
        if z.shape != v.shape:
            raise ShapeError(f"denoiser: returned shape {tuple(z.shape)} for {tuple(v.shape)}")
        return z.to(v.dtype)

    identity = Identity(A.in_shape, dtype=A.dtype, device=A.device)
    terms = [_denoiser_term(identity, denoised)]
    if bounds is not None:
        terms.append(box_term(identity, bounds))
    start = problem.x0.expand(*batch, *A.in_shape).clone() if problem.x0 is not None else A.adjoint(data)
    step = NormalStep(A, data, terms, start)

    def judge(x: Tensor, duals: list[Tensor]) -> Equilibrium:
        return equilibrium(A, data, denoised, strength, x, duals, bounds)

    def answer(x: Tensor, split: list[Tensor]) -> Tensor:
        return x if bounds is None else x.clamp(*bounds)

    rtol = _RTOL[A.dtype.to_real()] if rtol is None else rtol
    max_iter = 100 if max_iter is None else max_iter
    result = admm(step, step.begin(), rho=[strength] * len(terms), batch=tuple(batch), judge=judge, answer=answer,
                  rtol=rtol, max_iter=max_iter, relaxation=1.6, check_every=5, balance=False,
                  callback=callback)  # fmt: skip
    certificate = equilibrium(A, data, denoised, strength, result.x, result.duals, bounds)
    residual = ItemSpace(A.out_shape, A.dtype, A.device).safe_norm(data - A.apply(result.x))
    solution = to_solution(result, certificate, residual, rtol, strength.sqrt())
    return reported(solution, problem.nonfinite.expand(batch), "plug_and_play", raise_on_failure)


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """The distance from a fixed point, per batch item.

    Attributes:
        stationarity: the norm of the fixed-point residual, relative to that of x.
        complementarity: zero.
        gradient_norm: the norm of the fixed-point residual times rho.
        objective: the data term.
    """

    stationarity: Tensor
    complementarity: Tensor
    gradient_norm: Tensor
    objective: Tensor

    def met(self, rtol: float) -> Tensor:
        """Tell whether the relative residual is at most ``rtol``."""
        return self.stationarity <= rtol


@torch.no_grad()
def equilibrium(
    A: LinearOperator,
    y: Tensor,
    denoiser: Callable[[Tensor], Tensor],
    rho: Tensor,
    x: Tensor,
    duals: list[Tensor],
    bounds: Bounds | None = None,
) -> Equilibrium:
    """Measure how far x is from a fixed point of plug-and-play.

    At a fixed point the force of the data, ``u = A^H (y - A x) / rho``, moves x to where the denoiser moves it back:
    ``x = denoiser(x + u)``. With bounds the denoiser takes a part p of that force, its dual variable over rho, and the
    bounds the rest: ``x = denoiser(x + p)`` and ``x = clamp(x + u - p)``.

    Args:
        A: the operator.
        y: its data.
        denoiser: the denoiser.
        rho: the penalty, per batch item.
        x: the x to judge.
        duals: the dual variables, that of the denoiser first; read with bounds alone.
        bounds: lowest and highest value of x.
    """
    inputs, outputs = ItemSpace(A.in_shape, A.dtype, A.device), ItemSpace(A.out_shape, A.dtype, A.device)
    r = y - A.apply(x)
    u = A.adjoint(r) / inputs.broadcast(rho)
    force = u if bounds is None else duals[0] / inputs.broadcast(rho)
    residual = inputs.norm(x - denoiser(x + force))
    if bounds is not None:
        residual = torch.maximum(residual, inputs.norm(x - (x + u - force).clamp(*bounds)))
    size = inputs.norm(x).clamp_min(torch.finfo(torch.float64).tiny)
    return Equilibrium(residual / size, torch.zeros_like(residual), rho * residual, 0.5 * outputs.norm(r) ** 2)


def _denoiser_term(identity: Identity, denoiser: Callable[[Tensor], Tensor]) -> Term:
    """Return a denoiser as a term of ADMM: its proximal step is the denoiser, and it has no objective."""

    def nothing(v: Tensor) -> Tensor:
        return torch.zeros(v.shape[: v.ndim - len(identity.out_shape)], dtype=torch.float64, device=v.device)

    return Term(
        identity,
        lambda v, rho, out: out.copy_(denoiser(v)),
        value=nothing,
        dual=lambda p, v: p,
        gap=lambda v, p: nothing(v),
    )
