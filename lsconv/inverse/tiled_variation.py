r"""tiled_total_variation: total variation of images larger than a device, by tiles with halos.

.. math:: \min_x \tfrac12 \|Ax - y\|^2 + \mathrm{weight}\, \|Gx\|_{2,1}

ADMM as in :mod:`lsconv.inverse.admm.iteration` with one split image, :math:`z = Gx`. The quadratic step has the normal
operator :math:`A^HA + \rho\,G^HG` of a :class:`lsconv.tiled.Plan`: its tiles correct x by their inverses applied to the
gradient of the whole, by the exact length where they are not exact themselves. The differences read a halo of one cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, MethodError, NonFiniteError, ShapeError
from lsconv.inverse.admm.optimality import Optimality
from lsconv.inverse.admm.proximal import sparsity_term
from lsconv.inverse.total_variation import RTOL
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.difference import Gradient
from lsconv.operators.dtypes import double
from lsconv.operators.padding_modes import MODES
from lsconv.tiled.certificate import batch_solution
from lsconv.tiled.field import ArrayLike, Field
from lsconv.tiled.plan import Plan
from lsconv.tiled.progress import Progress
from lsconv.tiled.regions import Region
from lsconv.tiled.storage import Storage
from lsconv.tiled.strategy import check_operator

__all__ = ["tiled_total_variation"]


def tiled_total_variation(
    A: LinearOperator | Tensor,
    y: ArrayLike,
    weight: float,
    *,
    in_size: int | Sequence[int] | None = None,
    padding: Any = 0,
    out: ArrayLike | None = None,
    isotropic: bool = True,
    coupled: bool = True,
    rtol: float | None = None,
    max_iter: int = 1000,
    progress: bool = False,
    **tiles: Any,
) -> Solution:
    r"""The answer of :func:`lsconv.total_variation` for an image larger than a device.

    Args:
        A: a convolution of stride 1 with zero padding, or its kernel, as in :class:`lsconv.tiled.Plan`.
        y: the data, ``(*batch, *out_shape)`` (of this rank's rows): anything that is read by slices.
        weight: the weight of the penalty, > 0.
        in_size: spatial size of x, where A is a kernel.
        padding: of a kernel, as in :class:`lsconv.Convolution`.
        out: an array of the shape of x to write to, by slices; None: a tensor.
        isotropic: Euclidean norm over the directions.
        coupled: Euclidean norm over the channels as well.
        rtol: tolerance of stationarity and complementarity; None: 2e-3 in float32, 1e-4 in float64.
        max_iter: limit on the iterations.
        progress: show a bar, by tiles.
        tiles: ``tile``, ``overlap``, ``max_memory``, ``storage`` and ``mesh`` of :class:`lsconv.tiled.Plan`.

    Returns:
        A :class:`Solution` whose x is ``out``; norms and status are those of the whole image, recomputed by A itself.

    Raises:
        ArgumentError, ShapeError, DtypeError, ArgumentTypeError: arguments that do not fit.
        MethodError: A that tiles do not serve, or ``observed``.
        NonFiniteError: y has NaN or infinity.

    Source:
        Rudin, Osher, Fatemi (1992); Boyd, Parikh, Chu, Peleato, Eckstein (2011) for ADMM.

    Example:
        >>> x = torch.zeros(60, 70); x[20:40, 25:50] = 1
        >>> kernel = torch.ones(3, 3) / 9
        >>> y = lsconv.Conv2d(kernel[None, None], (60, 70))(x[None])[0]
        >>> solution = lsconv.tiled_total_variation(kernel, y, 1e-3, in_size=(60, 70), tile=30)
        >>> bool(solution.converged), bool((solution.x - x).abs().max() < 0.2)
        (True, True)
    """
    if max_iter < 1:
        raise ArgumentError(f"max_iter: expected an integer >= 1, got {max_iter}")
    if not 0 < float(weight) < math.inf:
        raise ArgumentError(f"weight: expected a finite number > 0, got {weight}; without a penalty use tiled.Plan")
    if tiles.get("observed") is not None:
        raise MethodError("observed: total variation by tiles has no missing data; use total_variation")
    operator = check_operator(A, in_size, padding, "zeros")
    if not MODES[operator.padding_mode].zero:
        raise MethodError(
            f"A: total variation by tiles has zero padding, got padding_mode={operator.padding_mode!r}; use "
            f"total_variation"
        )
    channels = not isinstance(A, Tensor) or A.ndim == operator.ndim + 2
    problem = _TiledVariation(operator, channels, float(weight), isotropic, coupled, tiles)
    plan = problem.plan
    batch = plan.check(y)
    shape = (*batch, *plan.item_shape(operator.c_in, operator.spatial_in, plan.x_rows))
    if out is None:
        out = torch.empty(shape, dtype=operator.dtype, device=operator.device)
    elif tuple(out.shape) != shape:
        raise ShapeError(f"out: expected shape {shape}, of x on this rank, got {tuple(out.shape)}")
    rtol = RTOL[operator.dtype] if rtol is None else rtol
    found = []
    for item in itertools.product(*map(range, batch)):
        data = plan.field(y, operator.spatial_out, plan.y_rows, item)
        target = plan.field(out, operator.spatial_in, plan.x_rows, item)
        with torch.no_grad():
            found.append(problem.solve(data, target, rtol, max_iter, progress))
    met = [bool(certificate.optimality.met(rtol)) for certificate, _ in found]
    codes = [(Status.OPTIMALITY if good else Status.ITERATION_LIMIT).code for good in met]
    solution = batch_solution(
        out, batch, operator.device,
        codes=codes,
        converged=met,
        iterations=[count for _, count in found],
        residual_norm=[certificate.residual for certificate, _ in found],
        gradient_norm=[float(certificate.optimality.gradient_norm) for certificate, _ in found],
        damp=weight,
    )  # fmt: skip
    report(solution, plan)
    return solution


@dataclass(frozen=True)
class _Certificate:
    """The certificate of an x, with the residuals that the iteration balances its penalty by."""

    optimality: Optimality
    residual: float
    primal: float
    dual: float


class _TiledVariation:
    """Total variation of one item in tiles, by ADMM: the penalty rho, and the plan of the quadratic step for it.

    Args:
        A: the convolution.
        channels: the image has a dimension of channels.
        weight: that of the variation.
        isotropic: the differences of a cell along all axes share a norm.
        coupled: the differences of all channels share a norm.
        tiles: options of the tiled plan.

    Attributes:
        typical_rho: a tenth of the curvature of the data term over that of the differences.
        exact: the quadratic step needs no iteration.
    """

    def __init__(
        self, A: Convolution, channels: bool, weight: float, isotropic: bool, coupled: bool, tiles: dict[str, Any]
    ) -> None:
        self.A, self.channels, self.weight, self.tiles = A, channels, weight, tiles
        self.double = double(A.dtype)
        self.groups = ((0,) if isotropic else ()) + ((1,) if coupled else ())
        together = (A.ndim if isotropic else 1) * (A.c_in if coupled else 1)
        self.entries = A.ndim * A.in_numel // together
        self.norm_a, self.norm_g = float(norm_bound(A)), 2 * math.sqrt(A.ndim)
        # the same rule as in total_variation: a part of the curvature of the data term
        self.typical_rho = 0.1 * (self.norm_a / self.norm_g) ** 2
        self._set_penalty(0.2 * self.typical_rho)

    def _set_penalty(self, rho: float) -> None:
        """Make the plan of the quadratic step with this penalty."""
        A, self.rho = self.A, rho
        penalty = Gradient(A.in_shape, ndim=A.ndim, dtype=A.dtype, device=A.device)
        self.plan = Plan(A, damp=math.sqrt(rho), L=penalty, **self.tiles)
        self.plan.channels = self.channels
        self.exact = self.plan.passes.whole_inverse or self.plan.strategy.first_pass_error < 1e-4
        region = (A.c_in, *self.plan.passes.gradient_regions.size)
        self.G = Gradient(region, ndim=A.ndim, dtype=self.double, device=A.device)
        self.term = sparsity_term(self.G, torch.tensor(self.weight, dtype=self.double, device=A.device), self.groups)

    def solve(self, y: Field, out: Field, rtol: float, max_iter: int, progress: bool) -> tuple[_Certificate, int]:
        """Solve for one item; returns the certificate and the iterations."""
        A, plan = self.A, self.plan
        options = {"channels": True, "wraps": plan.wraps, "first": plan.x_rows.start, "device": A.device}
        shape = (out.rows, *A.spatial_in[1:])
        with plan.folder() as folder, Progress(plan, progress) as bar:
            vectors = Storage(folder, "", (A.c_in, *shape), self.double, size=A.spatial_in, **options)
            splits = Storage(folder, "", (A.ndim * A.c_in, *shape), self.double, size=A.spatial_in, **options)
            try:
                x, certificate, count = self._iterate(vectors, splits, y, rtol, max_iter, bar)
                self.plan.passes.update([x, out], lambda here: [None, here], reads=1)
            finally:
                vectors.remove()
                splits.remove()
        return certificate, count

    def _iterate(
        self, vectors: Storage, splits: Storage, y: Field, rtol: float, max_iter: int, bar: Progress
    ) -> tuple[Field, _Certificate, int]:
        """Iterate from zero until the certificate is met, and return x, its certificate and the iterations."""
        x, s = (
            [vectors.vector(f"x-{name}") for name in ("even", "odd")],
            [splits.vector(f"x-split-{name}") for name in ("even", "odd")],
        )
        work = [vectors.vector(name) for name in ("g", "direction", "image")]
        self._exchange_data(y, bar)
        self.plan.passes.update([x[0], s[0]], lambda u, v: [torch.zeros_like(u), torch.zeros_like(v)])
        # the first step solves the quadratic problem, the size of whose differences is that of the first threshold
        self._step(x, s, y, work, 1.0)
        size = self._size(s[1]) / math.sqrt(self.entries)
        first = min(
            max(self.weight / size if size else self.typical_rho, 1e-4 * self.typical_rho), 1e3 * self.typical_rho
        )
        self._rescale(first, s[1], y, bar)
        x.reverse()
        s.reverse()
        for k in range(1, max_iter + 1):
            self._step(x, s, y, work, 1.8)
            x.reverse()
            s.reverse()
            self.plan.passes.step = k
            if k % 10 and k != max_iter:
                continue
            certificate = self._certificate_of(x[0], s, y)
            if bool(certificate.optimality.met(rtol)) or k == max_iter:
                return x[0], certificate, k
            # the schedule of changes of rho, and the ratio of residuals, are those of :func:`admm`
            ratio = min(max(4 * certificate.primal / max(certificate.dual, 1e-30), 1e-2), 1e2)
            if k in (10, 20, 40, 80, 160, 320) and not 1 / 3 <= ratio <= 3:
                self._rescale(min(max(self.rho * math.sqrt(ratio), first / 100), first * 100), s[0], y, bar)
        raise AssertionError("the loop returns at max_iter")

    def _exchange_data(self, y: Field, bar: Progress) -> None:
        """Give every rank the rows of y that its tiles read, and show the progress of the passes."""
        passes = self.plan.passes
        passes.tick = bar.tick
        self.plan.ranks.exchange(y, passes.gradient_regions.output_rows())

    def _rescale(self, rho: float, s: Field, y: Field, bar: Progress) -> None:
        """Change the penalty to ``rho``, with the dual variables ``rho (s - z)`` unchanged."""
        change = self.rho / rho

        def scaled(values: Tensor) -> list[Tensor]:
            v = self._image(values)
            z = self._shrunk(v)
            return [(z + change * (v - z)).flatten(0, 1)]

        self.plan.passes.update([s], scaled)
        self._set_penalty(rho)
        self._exchange_data(y, bar)

    # ------------------------------------------------------------------ passes

    def _image(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self.A.ndim, self.A.c_in))

    def _shrunk(self, s: Tensor) -> Tensor:
        """The proximal step z of the split image s."""
        z = torch.empty_like(s)
        self.term.prox(s, torch.tensor(self.rho, dtype=s.dtype, device=s.device), z)
        return z

    def _read(self, field: Field, region: Region) -> Tensor:
        return field.read(region.start, self.plan.passes.gradient_regions.size, self.double)

    def _step(self, x: list[Field], s: list[Field], y: Field, work: list[Field], relaxation: float) -> None:
        """One iteration from ``x[0], s[0]`` to ``x[1], s[1]``."""
        passes, (g, d, w) = self.plan.passes, work
        self._forces(x[0], s[0], y, g)
        passes.precondition(g, d, 1e-4)
        length = 1.0 if self.exact else self._length(g, d, w)
        passes.ranks.exchange(d, passes.gradient_regions.rows())
        with passes.ranks.raise_on_all():
            for region in passes.gradient_regions.all:
                new, core = self._read(x[0], region).add_(self._read(d, region), alpha=length), region.inside
                here, inside = self._image(s[0].read(region.core, region.core_size, self.double)), (slice(None), *core)
                moved = self.G.apply(new)[inside] - self._shrunk(here)
                x[1].write(region.core, new[core])
                s[1].write(region.core, here.add_(moved, alpha=relaxation).flatten(0, 1))

    def _forces(self, x: Field, s: Field, y: Field, into: Field) -> None:
        """Write the descent ``A^H (y - A x) + rho G^H (2 z - s - G x)`` of the quadratic step."""
        passes = self.plan.passes
        for field in (x, s):
            passes.ranks.exchange(field, passes.gradient_regions.rows())
        with passes.ranks.raise_on_all():
            for region in passes.gradient_regions.all:
                A, part = passes.gradient_convolution(region), self._read(x, region)
                v = self._image(self._read(s, region))
                data = y.read(passes.gradient_regions.outputs(region), A.spatial_out, self.double)
                if not bool(torch.isfinite(data.sum())):
                    raise NonFiniteError(f"y: contains NaN or infinity in what tile {region.tile} reads")
                target = 2 * self._shrunk(v) - v - self.G.apply(part)
                g = A.adjoint(data - A.apply(part)) + self.rho * self.G.adjoint(target)
                into.write(region.core, g[region.inside])

    def _length(self, g: Field, d: Field, w: Field) -> float:
        """The length of the step along ``d`` that minimises the quadratic."""
        passes, sums = self.plan.passes, torch.zeros(2, dtype=self.double, device=self.A.device)
        passes.product(d, None, w)

        def dots(d: Tensor, g: Tensor, w: Tensor) -> list[None]:
            sums.add_(torch.stack([(d * g).sum(), (d * w).sum()]))
            return [None, None, None]

        passes.update([d, g, w], dots)
        along, energy = passes.ranks.total(sums).tolist()
        return along / energy if energy > 0 else 0.0

    def _size(self, s: Field) -> float:
        total = torch.zeros((), dtype=self.double, device=self.A.device)

        def add(values: Tensor) -> list[None]:
            total.add_(values.square().sum())
            return [None]

        self.plan.passes.update([s], add)
        return float(self.plan.ranks.total(total).sqrt())

    def _certificate_of(self, x: Field, s: list[Field], y: Field) -> _Certificate:
        """The certificate of x, rounded as it is returned, and the residuals of ADMM after the last step."""
        passes, sums = self.plan.passes, torch.zeros(11, dtype=self.double, device=self.A.device)
        for field in (x, *s):
            passes.ranks.exchange(field, passes.gradient_regions.rows())
        with passes.ranks.raise_on_all():
            for region in passes.gradient_regions.all:
                A, core = passes.gradient_convolution(region), region.inside
                part = self._read(x, region).to(self.A.dtype).to(self.double)
                r = A.apply(part) - y.read(passes.gradient_regions.outputs(region), A.spatial_out, self.double)
                v = self.G.apply(part)
                now, old = (self._image(self._read(field, region)) for field in s)
                z = self._shrunk(now)
                p = self.term.dual(self.rho * (now - z), v)
                data, force = A.adjoint(r)[core], self.G.adjoint(p)[core]
                back = self.G.adjoint(z - self._shrunk(old))[core]
                misfit, inside = r[passes.gradient_regions.core_outputs(region)], (slice(None), *core)
                v, z, p = v[inside], z[inside], p[inside]
                squares = (data + force, data, force, misfit, part[core], v - z, v, z, self.rho * back)
                found = [values.square().sum() for values in squares]
                sums.add_(torch.stack([*found, self.term.value(v), self.term.gap(v, p)]))
        sums = passes.ranks.total(sums)
        gradient, data, force, r, size, splitting, image, split, back = sums[:9].sqrt()
        rounding = 2 * torch.finfo(self.A.dtype).eps
        bound = self.weight * math.sqrt(self.entries)
        allowed_gap = rounding * (self.norm_g * size * bound)
        allowed_force = rounding * (self.norm_a**2 * size + self.norm_g * bound)
        objective, tiny = 0.5 * r**2 + sums[9], torch.finfo(torch.float64).tiny
        largest = torch.maximum(data, force)
        optimality = Optimality(
            stationarity=(gradient - allowed_force).clamp_min(0) / largest.clamp_min(tiny),
            complementarity=(sums[10] - allowed_gap).clamp_min(0) / objective.clamp_min(tiny),
            gradient_norm=gradient, objective=objective, forces=largest,
        )  # fmt: skip
        primal = splitting / torch.maximum(image, split).clamp_min(tiny)
        return _Certificate(optimality, float(r), float(primal), float(back / force.clamp_min(tiny)))
