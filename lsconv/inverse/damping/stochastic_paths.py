r"""Damp paths whose influence traces are estimated with random probes, for every operator and penalty.

The estimate is Hutchinson's: for probes v of random signs :math:`\mathrm E\, v^H (I - H) v = m - \operatorname{tr} H`,
and :math:`(I - H) v` is the residual of the problem with the data v. The same probes are used for every damp, so that
the curves are smooth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.penalty import Penalty, as_convolutions, common_grid_filters
from lsconv.errors import MethodError, unreported
from lsconv.fourier.batched_linalg import frobenius
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.damping.paths import TOLERANCE, Evaluation
from lsconv.inverse.plans.normal_iteration import WeightedPlan
from lsconv.inverse.route import penalty_plan, route
from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double

__all__ = ["BorderPath", "SolverPath"]

# The number of probes times the number m of data. The relative standard error of m - tr H is then about sqrt(2 /
# (probes m)) or less. A local search, which needs derivatives and not differences, starts with a fourth of this, and
# takes up to four times as much where m - tr H is not known to one per cent.
_PROBE_ENTRIES = 2**17


class _StochasticPath:
    """The base of the stochastic paths: residuals of the data and of random probes.

    Args:
        A: the operator.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp.
        count: number of measured data, ``batch``; None: all.
        local: the path is for a local search.
        probes: the number of probes; None: by the number of data.
    """

    exact = False

    def __init__(
        self,
        A: LinearOperator,
        y: Tensor,
        count: Tensor | None = None,
        *,
        local: bool = False,
        probes: int | None = None,
    ) -> None:
        self.A, self.y = A, y
        self.space = ItemSpace(A.out_shape, A.dtype, A.device)
        self.rhs = y.shape[0]
        self.data_count: int | Tensor = A.out_numel * self.rhs if count is None else count
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - len(A.out_shape)], A.batch_shape))
        self.local = local
        self._draw(_probe_count(_PROBE_ENTRIES // 4 if local else _PROBE_ENTRIES, A) if probes is None else probes)

    def _draw(self, probes: int) -> None:
        """Draw probes of random signs, with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (probes, *self.A.out_shape), generator=generator) * 2 - 1
        self.probes = signs.to(self.A.device, self.A.dtype).reshape(-1, *(1 for _ in self.batch), *self.A.out_shape)

    def _solve(
        self, damp: Tensor, data: Tensor, start: str | None = None, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Solve for data ``(n, *batch, *out_shape)``; return residuals and ``||L x||^2``.

        Args:
            damp: the damp.
            data: data or probes.
            start: the name under which the solution is stored, as the start for the next damp; None: it is not stored.
            rough: a larger tolerance is enough, because the result enters a quadratic form only.
        """
        raise NotImplementedError

    def _solve_data_and_probes(self, damp: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Solve for data and probes; as one batch if there is one item, which saves calls."""
        if math.prod(self.batch) > 1 or len(self.probes) == 1:
            return self._solve(damp, self.y, "data"), self._solve(damp, self.probes, "probes", rough=True)
        data_rhs = self.y.shape[0]
        right = torch.cat([self.y, self.probes.expand(-1, *self.batch, *self.A.out_shape)])
        r, penalty = self._solve(damp, right, "both")
        return (r[:data_rhs], penalty[:data_rhs]), (r[data_rhs:], penalty[data_rhs:])

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`DampPath`."""
        (r, penalty), probed = self._solve_data_and_probes(damp) if trace else (self._solve(damp, self.y, "data"), None)
        influence = error = change = torch.full_like(penalty[0], torch.nan)
        if probed is not None:
            rv, _ = probed
            free = self.space.inner(self.probes.expand_as(rv), rv).double()
            influence = self.rhs * (self.A.out_numel - free.mean(0))
            # d(I - H)/dlog mu = (I - H) - (I - H)^2
            change = self.rhs * (self.space.norm(rv).double().square() - free).mean(0)
            probes = free.shape[0]
            if probes >= 8:
                error = self.rhs * free.std(0) / probes**0.5
            else:  # the variance is at most 2 ||I - H||_F^2 <= 2 tr(I - H)
                error = self.rhs * (2 * free.mean(0).clamp_min(0) / probes).sqrt()
            if self.local and 2 * probes <= _probe_count(4 * _PROBE_ENTRIES, self.A):
                uncertain = error > 0.01 * (self.data_count - influence)
                if bool((uncertain & (self.space.norm(self.y).amax(0) > 0)).any()):
                    self._draw(2 * probes)
                    return self.evaluate(damp, slope=slope, trace=trace)
        derivative = torch.full_like(penalty[0], torch.nan)
        if slope:
            # d(I - H)/dlog mu = (I - H) H, so d||r||^2/dlog mu = 2 r^H H r, and d||Lx||^2/dmu = -that / mu^2
            residual_of_r, _ = self._solve(damp, r, rough=True)
            derivative = -2 * self.space.inner(r, r - residual_of_r).double().sum(0) / damp.double() ** 4
        values = (self.space.norm(r).double().square().sum(0), penalty.sum(0), influence, error)
        nothing = torch.full(self.batch, torch.nan, dtype=torch.float64, device=self.A.device)
        rss, penalty, influence, error, derivative, change = (
            v.expand(self.batch) for v in (*values, derivative, change)
        )
        return Evaluation(rss, penalty, influence, error, nothing, derivative, change)


class BorderPath(_StochasticPath):
    """The path of a truncated convolution, solved through its border to a loose tolerance; L may be convolutional.

    It is computed in A's dtype while the factors are well enough conditioned, else in double precision. The factors are
    those of the given damp, without a floor (with L in double precision: a floor far below rounding). Every damp starts
    from the border unknowns of the previous one.

    Args:
        A: the convolution.
        y: data ``(rhs, *batch, *out_shape)``.
        scale: norm of A over that of L.
        L: the penalty.
        count: number of measured data, ``batch``; None: all.
        local: the path is for a local search.
        probes: the number of probes; None: by the number of data.
        tolerance: relative residual of the border systems of the data, to begin with; it falls until the identity that
            the solution obeys holds to within it.
        missing: outputs that are not measured, ``out_shape``; they are cells of the border, and no data.

    Raises:
        MethodError: A and L are not crops of block-circulant operators on one grid; see :meth:`serves`.
    """

    def __init__(
        self,
        A: Convolution,
        y: Tensor,
        scale: Tensor,
        L: LinearOperator | None = None,
        count: Tensor | None = None,
        *,
        local: bool = False,
        probes: int | None = None,
        tolerance: float = 10 * TOLERANCE,
        missing: Tensor | None = None,
    ) -> None:
        super().__init__(A, y, count, local=local, probes=probes)
        self.missing = missing
        self.tolerance = tolerance
        self.scale, self.L = scale.expand(self.batch), L
        if not self.serves(A, L):
            raise MethodError(f"L: {L!r} and {A!r} are not convolutions on one grid")
        self.A: Convolution = A
        self.precise = A.to(dtype=double(A.dtype))
        self.precise_L = None if L is None else L.to(dtype=double(A.dtype))
        self.double_below = 0.0  # the largest damp that needs double precision so far
        self.starts: dict[str, Tensor] = {}
        self.latest: tuple[Tensor, tuple[Convolution, LinearOperator | None, NormalInverse]] | None = None

    @staticmethod
    def serves(A: LinearOperator, L: LinearOperator | None) -> bool:
        """Tell whether the border method serves A and L."""
        if not isinstance(A, Convolution) or not Embedding.serves(A):
            return False
        terms = [] if L is None else as_convolutions(L, A.ndim)
        return terms is not None and (not terms or Penalty.serves(A, terms))

    def _inverse(self, A: Convolution, L: LinearOperator | None, damp: Tensor) -> NormalInverse:
        floor = 0.0 if L is None or torch.finfo(A.dtype).bits < 64 else 1e-13
        return normal_inverse(Request.of(A, damp, common_grid_filters(A, L), floor=floor, missing=self.missing))

    def _factors(self, damp: Tensor) -> tuple[Convolution, LinearOperator | None, NormalInverse]:
        """The inverse for a damp, with A and L in its precision: A's own if the factors are well conditioned."""
        smallest = float(damp.min())
        if torch.finfo(self.A.dtype).bits == 32 and smallest > self.double_below:
            if self.L is None:
                well_conditioned = bool((damp**2 >= 1e-5 * self.scale.square()).all())
                inverse = self._inverse(self.A, None, damp) if well_conditioned else None
            else:
                inverse = self._inverse(self.A, self.L, damp)
                # The bound is valid for definite forms only, not for the saddle form.
                largest = frobenius(inverse.inverse.matrices).amax()
                well_conditioned = inverse.form != "saddle" and bool(
                    largest * inverse.norm_squared_bound.amax() * torch.finfo(torch.float32).eps < 2 * TOLERANCE
                )
            if inverse is not None and well_conditioned:
                return self.A, self.L, inverse
            self.double_below = smallest
        return self.precise, self.precise_L, self._inverse(self.precise, self.precise_L, damp)

    def _solve(
        self, damp: Tensor, data: Tensor, start: str | None = None, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.latest is None or not torch.equal(self.latest[0], damp):
            self.latest = None  # freed before the factors of another damp are made
            self.latest = damp, self._factors(damp)
        A, L, inverse = self.latest[1]
        mu = over_items(damp.double().square().to(A.weight.real.dtype), len(A.out_shape))
        y = data.to(A.dtype)
        unmeasured = 0 if self.missing is None else torch.where(self.missing, y, 0)
        y = y - unmeasured
        residual = inverse.side == "residual"
        f = y if residual else A.adjoint(y)
        u = None if start is None else self.starts.get(start)
        # Errors of the solution enter quadratic forms in second order.
        bound = tolerance = self.tolerance * (10 if rough else 1)
        while True:
            z, _, u = self._apply_from(inverse, f, u, tolerance)
            x, r = (A.adjoint(z), mu * z) if residual else (z, y - A.apply(z))
            if self.missing is not None:  # a missing datum has no model, and is added to the residual below
                r = torch.where(self.missing, 0, r)
            Lx, item = (x, A.in_shape) if L is None else (L.apply(x), L.out_shape)
            penalty = _norm_sq(Lx, item)
            if u is None or tolerance <= TOLERANCE**2 or self._is_balanced(y, r, damp, penalty, bound):
                break
            tolerance *= 0.1
        if start is not None and u is not None:
            self.starts[start] = u
        return (r + unmeasured).to(self.A.dtype), penalty

    def _is_balanced(self, y: Tensor, r: Tensor, damp: Tensor, penalty: Tensor, bound: float) -> bool:
        """Tell whether ``<Ax, r> = mu ||Lx||^2``, which the solution satisfies, up to ``bound ||r||^2``."""
        space = ItemSpace(self.A.out_shape, r.dtype, r.device)
        imbalance = (space.inner(r, y - r).double() - damp.double().square() * penalty).abs()
        return bool((imbalance <= bound * space.norm(r).double().square()).all())

    @staticmethod
    def _apply_from(
        inverse: NormalInverse, f: Tensor, start: Tensor | None, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Apply the inverse, starting from ``start`` if that fits this problem, else from zero."""
        if start is not None:
            lead = inverse.embedding.split_batch(tuple(f.shape[: f.ndim - inverse.embedding.ndim - 1]))[1]
            fits = start.shape[:2] == (lead, inverse.embedding.blocks) and start.dtype == f.dtype
            start = start if fits else None
        return inverse.solve_from(f, tolerance, 300, start)


class SolverPath(_StochasticPath):
    """The path of any operator and penalty, by the plan for the damped problem, to a loose tolerance."""

    def __init__(
        self,
        A: LinearOperator,
        y: Tensor,
        L: LinearOperator | None,
        scale: Tensor,
        count: Tensor | None = None,
        *,
        local: bool = False,
    ) -> None:
        super().__init__(A, y, count, local=local)
        self.L, self.scale = L, scale.expand(self.batch)
        self.latest: tuple[Tensor, Any] | None = None

    def _solve(
        self, damp: Tensor, data: Tensor, start: str | None = None, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.latest is None or not torch.equal(self.latest[0], damp):
            self.latest = None  # freed before the setup of another damp
            self.latest = damp, route(self.A, damp) if self.L is None else penalty_plan(self.A, self.L, damp)
        plan = self.latest[1]
        y = data.expand(data.shape[0], *self.batch, *self.A.out_shape)
        if isinstance(plan, WeightedPlan):
            x = plan.approximate(y, 10 * TOLERANCE)
        else:
            with unreported():
                x = plan.solve(y, rtol=TOLERANCE if rough else 0.1 * TOLERANCE).x
        Lx = x if self.L is None else self.L.apply(x)
        return y - self.A.apply(x), _norm_sq(Lx, self.A.in_shape if self.L is None else self.L.out_shape)


def _norm_sq(x: Tensor, item: tuple[int, ...]) -> Tensor:
    """``||x||^2`` of every item of shape ``item``."""
    return torch.linalg.vector_norm(x.flatten(x.ndim - len(item)), dim=-1).double().square()


def _probe_count(entries: int, A: LinearOperator) -> int:
    """The number of probes that have ``entries`` entries in all, at most 128."""
    return min(128, max(1, -(-entries // A.out_numel)))
