r"""Least squares within bounds, by gradient projection and conjugate gradients on the face.

.. math:: \min_{lo \le x \le hi} \tfrac12 \|Ax - y\|^2 + \tfrac12 \mathrm{damp}^2 \|L(x - x_{prior})\|^2

Data may be lower bounds of the truth, as those of saturated pixels are: their squares count only where Ax falls short,
:math:`\tfrac12 \min((Ax - y)_i, 0)^2`, which keeps the problem convex. With Q the Hessian and g the gradient, an
iteration

1. takes a step along the projected gradient, of the length that minimises on the free entries, halved until the
   objective falls enough; it changes which entries stand on a bound,
2. minimises over the free entries by conjugate gradients, to a tenth of the gradient there, and goes to that point
   along the projected path, halving again.

The first makes the iteration converge, the second makes it fast: at the solution the face does not change, and what is
left is one linear system. Its preconditioner is the compression of an inverse of Q, which stays positive definite.

The certificate is the natural residual :math:`\|(x - \Pi(x - t g))/t\|`, which is zero exactly at the minimiser, beside
the larger of the two forces whose difference g is; it is recomputed in double precision.

Moré and Toraldo, "On the solution of large quadratic programming problems with bound constraints" (1991).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.admm.optimality import natural_residual
from lsconv.inverse.convex_arguments import check_bounds, refuse_gradient
from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.problem import prepare
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.operators.algebra import VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["RTOL", "bounded_least_squares"]

RTOL = {torch.float32: 1e-4, torch.float64: 1e-8}


@torch.no_grad()
def bounded_least_squares(
    name: str,
    A: LinearOperator,
    y: Tensor,
    bounds: tuple[float | None, float | None],
    damp: float | Tensor = 0.0,
    *,
    L: LinearOperator | None = None,
    x_prior: Tensor | None = None,
    x0: Tensor | None = None,
    rtol: float | None = None,
    max_iter: int | None = None,
    raise_on_failure: bool = False,
    check_finite: bool = True,
    at_least: Tensor | None = None,
) -> Solution:
    """The minimiser within bounds, every batch item by itself.

    Args:
        name: the public function that asks, for messages.
        A: the operator, real.
        y: data, ``(*batch, *out_shape)``.
        bounds: ``(lowest, highest)``, each a number or None.
        damp: the damping, a number or one per batch item.
        L: the penalty; None: the identity.
        x_prior: what the penalty pulls to; None: zero.
        x0: where to start.
        rtol: tolerance of the certificate; None: 1e-4 in float32, 1e-8 in float64.
        max_iter: limit on the iterations; None: 500.
        raise_on_failure: raise instead of warning.
        check_finite: refuse NaN and infinity in y.
        at_least: True where a datum is a lower bound, of a shape that broadcasts with y; None: nowhere.
    """
    check_bounds(bounds, A)
    with torch.enable_grad():
        refuse_gradient(f"{name} with bounds", A, L, {"y": y, "damp": damp, "x_prior": x_prior})
    problem = prepare(A, y, damp=damp, x0=x0, check_finite=check_finite, name="y")
    damping = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
    batch = broadcast_shapes(problem.batch, () if x_prior is None else x_prior.shape[: x_prior.ndim - len(A.in_shape)])
    rtol = RTOL[A.dtype.to_real()] if rtol is None else rtol
    quadratic = _Quadratic(A, problem.y.expand(*batch, *A.out_shape), damping.expand(batch), L, x_prior, at_least)
    start = torch.zeros(*batch, *A.in_shape, dtype=A.dtype, device=A.device)
    if problem.x0 is not None:
        start = start + problem.x0
    elif x_prior is not None:
        start = start + x_prior
    x, iterations, stagnated = _iterate(quadratic, start, bounds, rtol, 500 if max_iter is None else max_iter)
    precise = quadratic.in_double()
    gradient_norm, forces = precise.certificate(x.double(), bounds)
    rounding = torch.finfo(A.dtype).eps * 4 * forces
    met = (gradient_norm <= rtol * forces) | (gradient_norm <= rounding)
    finite = torch.isfinite(gradient_norm)
    failed = torch.where(stagnated, Status.STAGNATION.code, Status.ITERATION_LIMIT.code)
    codes = torch.where(met, Status.OPTIMALITY.code, failed)
    codes = torch.where(finite & ~problem.nonfinite.expand(batch), codes, Status.NON_FINITE.code)
    solution = Solution(
        x=x,
        codes=codes,
        converged=met & ~problem.nonfinite.expand(batch),
        iterations=iterations,
        residual_norm=precise.data_space.safe_norm(precise.counted(precise.A.apply(x.double()) - precise.y)),
        gradient_norm=gradient_norm,
        damp=damping.expand(batch).to(A.dtype),
    )
    report(solution, name, raise_on_failure=raise_on_failure)
    return solution


class _Quadratic:
    """The objective, quadratic but for data that are lower bounds: Hessian, gradient, certificate, a preconditioner.

    Args:
        A: the operator.
        y: data, ``(*batch, *out_shape)``.
        damp: the damping, ``(*batch)``.
        L: the penalty; None: the identity.
        x_prior: what the penalty pulls to, ``(*batch, *in_shape)``; None: zero.
        at_least: True where a datum is a lower bound; broadcasts with y. None: nowhere.
    """

    def __init__(
        self, A: LinearOperator, y: Tensor, damp: Tensor, L: LinearOperator | None, x_prior: Tensor | None,
        at_least: Tensor | None,
    ) -> None:  # fmt: skip
        self.A, self.y, self.damp, self.L, self.prior, self.at_least = A, y, damp, L, x_prior, at_least
        self.space = ItemSpace(A.in_shape, A.dtype, A.device)
        self.data_space = ItemSpace(A.out_shape, A.dtype, A.device)
        self.damped = bool((damp > 0).any())

    def in_double(self) -> _Quadratic:
        """The same objective in float64."""
        prior = None if self.prior is None else self.prior.double()
        L = None if self.L is None else self.L.to(dtype=torch.float64)
        return _Quadratic(self.A.to(dtype=torch.float64), self.y.double(), self.damp, L, prior, self.at_least)

    def penalty(self, v: Tensor) -> Tensor:
        """``damp^2 L^H L v``."""
        image = v if self.L is None else self.L.adjoint(self.L.apply(v))
        return self.space.broadcast(self.damp.square()) * image

    def counted(self, residual: Tensor) -> Tensor:
        """The residual ``Ax - y``, with zeros where Ax exceeds a datum that is a lower bound."""
        return residual if self.at_least is None else torch.where(self.at_least, residual.clamp_max(0), residual)

    def second_order(self, residual: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """The change of the data term less its linear part, per item, and the change of :meth:`counted`.

        Args:
            residual: ``Ax - y``, ``(*batch, *out_shape)``.
            change: the change of ``Ax``.
        """
        if self.at_least is None:
            return 0.5 * self.data_space.norm(change).square(), change
        before, after = self.counted(residual), self.counted(residual + change)
        entries = 0.5 * (after - before) * (after + before) - before * change
        entries = torch.where(self.at_least, entries, 0.5 * change.square())
        return entries.flatten(-len(self.A.out_shape)).sum(-1, dtype=torch.float64), after - before

    def hessian(self, v: Tensor, residual: Tensor) -> Tensor:
        """The Hessian at the x whose ``Ax - y`` is ``residual``, applied to v."""
        image = self.A.apply(v)
        if self.at_least is not None:
            image = torch.where(self.at_least & (residual > 0), 0, image)
        product = self.A.adjoint(image)
        return product + self.penalty(v) if self.damped else product

    def gradient(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The gradient, ``(*batch, *in_shape)``; ``residual`` is ``Ax - y``, None: it is computed."""
        residual = self.A.apply(x) - self.y if residual is None else residual
        g = self.A.adjoint(self.counted(residual))
        return g + self.penalty(x if self.prior is None else x - self.prior) if self.damped else g

    def certificate(self, x: Tensor, bounds: tuple[float | None, float | None]) -> tuple[Tensor, Tensor]:
        """The norms of the natural residual, and of the larger of the two terms of the gradient, per item."""
        image, y = self.A.apply(x), self.y
        g = self.gradient(x, image - y)
        if self.at_least is not None:  # a lower bound that Ax exceeds adds nothing to the gradient
            met = self.at_least & (image > y)
            image, y = image.masked_fill(met, 0), y.masked_fill(met, 0)
        forces = torch.maximum(self.space.norm(self.A.adjoint(y)), self.space.norm(self.A.adjoint(image)))
        return self.space.norm(natural_residual(x, g, forces, bounds, self.space)), forces

    def preconditioner(self) -> LinearOperator | None:
        """An approximate inverse of the Hessian, where A and L have structure."""
        with contextlib.suppress(MethodError, NotImplementedError):
            if not self.damped:
                return CirculantPreconditioner(self.A, side="solution")
            if self.L is None:
                return CirculantPreconditioner(self.A, self.damp, side="solution")
            root: Any = self.damp.to(self.A.dtype)
            return CirculantPreconditioner(VStack([self.A, self.L * root]), side="solution")
        return None


def _iterate(
    f: _Quadratic, x: Tensor, bounds: tuple[float | None, float | None], rtol: float, max_iter: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate from x; return x, the iterations per item, and the items whose last iteration has not changed x."""
    space, M = f.space, f.preconditioner()
    x = x.clamp(*bounds)
    residual = f.A.apply(x) - f.y
    state = _State(x, residual, f.gradient(x, residual))
    batch = x.shape[: x.ndim - len(f.A.in_shape)]
    active = torch.ones(batch, dtype=torch.bool, device=x.device)
    stagnated = torch.zeros_like(active)
    iterations = torch.zeros(batch, dtype=torch.int64, device=x.device)
    for k in range(max_iter + 1):
        gradient_norm, forces = f.certificate(state.x, bounds)
        active = active & (gradient_norm > 0.5 * rtol * forces) & torch.isfinite(gradient_norm)
        if k == max_iter or not bool(active.any()):
            break
        iterations += active
        before = state.x
        steepest = torch.where(_free(state, bounds), state.gradient, 0)
        curvature = space.inner(steepest, f.hessian(steepest, state.residual))
        length = divide(space.inner(steepest, steepest), curvature)
        state = _search(f, state, -state.gradient, torch.where(length > 0, length, 1.0), bounds, active)
        direction = _minimise_on_face(f, state, _free(state, bounds), M)
        state = _search(f, state, direction, torch.ones_like(length), bounds, active)
        still = active & (space.norm(state.x - before) == 0)
        stagnated, active = stagnated | still, active & ~still
    return state.x, iterations, stagnated


@dataclass(frozen=True)
class _State:
    """A point, with ``Ax - y`` and the gradient there."""

    x: Tensor
    residual: Tensor
    gradient: Tensor


def _free(state: _State, bounds: tuple[float | None, float | None]) -> Tensor:
    """The entries that do not stand on a bound against which the gradient holds them."""
    (low, high), x, g = bounds, state.x, state.gradient
    free = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        free &= (x > low) | (g < 0)
    if high is not None:
        free &= (x < high) | (g > 0)
    return free


def _search(
    f: _Quadratic,
    state: _State,
    direction: Tensor,
    length: Tensor,
    bounds: tuple[float | None, float | None],
    active: Tensor,
    sufficient: float = 1e-4,
) -> _State:
    """The first of ever shorter steps on the projected path with sufficient decrease.

    Args:
        f: the objective.
        state: where the path starts.
        direction: its direction, ``(*batch, *in_shape)``.
        length: the first length, per item; it is halved up to 30 times.
        bounds: those that the path is projected to.
        active: the items that move.
        sufficient: the share of the linear model's decrease that the objective has to fall by.
    """
    space, x = f.space, state.x
    chosen, searching = state, active
    for _ in range(30):
        step = (x + space.broadcast(length) * direction).clamp(*bounds) - x
        change = f.A.apply(step)
        second_order, counted_change = f.second_order(state.residual, change)
        product = f.A.adjoint(counted_change)
        slope = space.inner(state.gradient, step)
        if f.damped:
            penalty_step = f.penalty(step)
            second_order = second_order + 0.5 * space.inner(step, penalty_step)
            product = product + penalty_step
        decreased = searching & (slope + second_order <= sufficient * slope) & (slope < 0)
        where, rows = (s.broadcast(decreased.double()).bool() for s in (space, f.data_space))
        chosen = _State(
            torch.where(where, x + step, chosen.x),
            torch.where(rows, state.residual + change, chosen.residual),
            torch.where(where, state.gradient + product, chosen.gradient),
        )
        searching = searching & ~decreased & (slope < 0)
        if not bool(searching.any()):
            break
        length = torch.where(searching, length / 2, length)
    return replace(chosen, x=chosen.x.clamp(*bounds))


def _minimise_on_face(f: _Quadratic, state: _State, free: Tensor, M: LinearOperator | None, steps: int = 40) -> Tensor:
    """Solve ``Q d = -g`` on the free entries by conjugate gradients, until a tenth of g is left there."""
    space = f.space
    r = torch.where(free, -state.gradient, 0)
    d = torch.zeros_like(r)
    z = r if M is None else torch.where(free, M.apply(r), 0)
    p, rz = z, space.inner(r, z)
    goal = 0.1 * space.norm(r)
    for _ in range(steps):
        going = (space.norm(r) > goal) & (rz > 0)
        if not bool(going.any()):
            break
        q = torch.where(free, f.hessian(p, state.residual), 0)
        alpha = torch.where(going, divide(rz, space.inner(p, q)), 0)
        d, r = space.add(d, alpha, p), space.add(r, -alpha, q)
        z = r if M is None else torch.where(free, M.apply(r), 0)
        new = space.inner(r, z)
        p = space.add(z, torch.where(going, divide(new, rz), 0), p)
        rz = new
    return d
