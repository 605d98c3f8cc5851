r"""The passes over a field: each reads regions with halos, computes, and writes cores; a thread reads ahead.

With :math:`H = A^H W A + \mathrm{damp}^2 L^H L` (W zero where nothing was measured, else one) they compute

- the gradient :math:`A^H W (y - Ax) - \mathrm{damp}^2 L^HL x`, with the norms of a certificate,
- the product :math:`H z`,
- the Schwarz preconditioner :math:`\sum_t P_t^T (A_t^H A_t + \mathrm{damp}^2 L_t^H L_t)^{-1} R_t`, where :math:`R_t`
  cuts region t out of the field and :math:`P_t` cuts out its core (restricted additive Schwarz, not Hermitian); or,
  where conjugate gradients converge slowly with that one, a Hermitian form, in which the root of a smooth partition of
  unity multiplies the region before and after the inverse.

Cai and Sarkis, "A restricted additive Schwarz preconditioner", SIAM J. Sci. Comput. 21 (1999).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from lsconv.border.cost_model import Limits
from lsconv.border.normal_inverse import NormalInverse, normal_inverse
from lsconv.border.normal_problem import Request, least_shift
from lsconv.border.penalty import Filter
from lsconv.errors import NonFiniteError
from lsconv.krylov.loop.batched_scalars import divide
from lsconv.krylov.loop.certificate import Norms
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.tiled.field import Field
from lsconv.tiled.layout import TileAxis
from lsconv.tiled.pencil import PencilInverse
from lsconv.tiled.ranks import Ranks
from lsconv.tiled.regions import Kind, Region, Regions

__all__ = ["Passes"]

T = TypeVar("T")


class Passes:
    """The passes over the tiles of one problem.

    Args:
        A: the convolution.
        terms: the penalty L as convolutions; empty: the identity.
        damp: the damping.
        axes: the cores along each axis.
        overlap: cells by which a tile of the preconditioner exceeds its core, per axis.
        wraps: per axis, whether A is circular.
        ranks: the processes that share the field.
        threaded: read and write in a thread of its own.
        symmetric: use the Hermitian form of the preconditioner; :class:`Iteration` sets it where convergence is slow.
        whole_inverse: precondition by the inverse of the whole, computed by all ranks, in place of the tiles.
        limits: the memory and the choice of solver for the border of a tile.

    Attributes:
        A_double: A in double precision.
        terms_double: the terms in double precision.
        gradient_regions: a core and the halo that gradients and products read, one for every core.
        tile_regions: a core and its overlap, on which the preconditioner inverts, one for every core.
        step: the number of the outer step, 0 being the first pass.
        tick: called after every tile with the name of the pass.
    """

    def __init__(
        self,
        A: Convolution,
        terms: Sequence[Filter],
        damp: float,
        axes: Sequence[TileAxis],
        overlap: Sequence[int],
        wraps: Sequence[bool],
        ranks: Ranks,
        *,
        threaded: bool,
        symmetric: bool,
        whole_inverse: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.A, self.terms, self.damp, self.ranks, self.threaded, self.limits = A, terms, damp, ranks, threaded, limits
        self.symmetric, self.whole_inverse = symmetric, whole_inverse
        dtype = double(A.dtype)
        self.A_double = A.to(dtype=dtype)
        self.terms_double = [Filter(t.convolution.to(dtype=dtype), t.factor.to(dtype)) for t in terms]
        halo = [
            max([k - 1, *(t.convolution.kernel_extent[a] - 1 for t in terms)]) for a, k in enumerate(A.kernel_extent)
        ]
        others = [t.convolution for t in terms]
        self.gradient_regions = Regions(self.A_double, axes, halo, wraps, others)
        self.tile_regions = Regions(self.A_double, axes, [max(o, 1) for o in overlap], wraps, others)
        self.step = 0
        self.tick: Callable[[str], None] = lambda stage: None
        self._convolutions: dict[tuple[Any, ...], tuple[Convolution, list[Filter]]] = {}
        self._inverses: dict[Kind, NormalInverse] = {}
        self._pencil: PencilInverse | None = None

    @property
    def smallest_eigenvalue(self) -> float:
        """A lower bound of the eigenvalues of H."""
        return 0.0 if self.terms else self.damp**2

    # ------------------------------------------------------------------ the passes

    def gradient(self, x: Field, y: Field, observed: Field | None, into: Field | None, rounded: Any = None) -> Norms:
        """Write the gradient at x, and return the norms of a certificate, summed over the field.

        Args:
            x: the iterate.
            y: the data.
            observed: ones where y was measured; None: everywhere.
            into: the field to write the gradient to; None: only the norms are wanted.
            rounded: applied to x as it is read, such as a rounding to single precision; None: x is taken as it is.
        """
        regions = self.gradient_regions
        self.ranks.exchange(x, regions.rows())
        sums = torch.zeros(6, dtype=torch.float64, device=self.A.device)

        def read(region: Region) -> tuple[Tensor, Tensor, Tensor | None]:
            values = x.read(region.start, regions.size, self.A_double.dtype)
            values = values if rounded is None else rounded(values)
            return values, *self._data(regions, region, y, observed)

        def work(region: Region, inputs: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
            part, data, mask = inputs
            A, _ = self._local_operators(self.gradient_regions, region.kind)
            image = A.apply(part)
            residual = data - image
            if mask is not None:
                residual, data, image = residual * mask, data * mask, image * mask
            outputs = self.gradient_regions.core_outputs(region)
            core = region.inside
            penalty = self._penalty(self.gradient_regions, region.kind, part)[core]
            g = A.adjoint(residual)[core] - self.damp**2 * penalty
            x_core = part[core]
            squares = (data[outputs], residual[outputs], g, x_core)
            found = [values.square().sum() for values in squares]
            found += [(x_core * penalty).sum(), image[outputs].square().sum()]
            sums.add_(torch.stack(found))
            return g

        self._run_pass("gradient", self.gradient_regions, read, work, into)
        y_norm, residual, gradient, x_norm, penalty, image = self.ranks.total(sums).clamp_min(0).sqrt().tolist()
        return Norms(
            y=y_norm, x=x_norm, residual=residual, gradient=gradient, penalty=penalty, operator=divide(image, x_norm)
        )

    def product(self, z: Field, observed: Field | None, into: Field) -> None:
        """Write ``H z``."""
        self.ranks.exchange(z, self.gradient_regions.rows())

        def read(region: Region) -> tuple[Tensor, Tensor | None]:
            part = z.read(region.start, self.gradient_regions.size, self.A_double.dtype)
            return part, self._mask(self.gradient_regions, region, observed)

        def work(region: Region, inputs: tuple[Tensor, Tensor | None]) -> Tensor:
            part, mask = inputs
            A, _ = self._local_operators(self.gradient_regions, region.kind)
            image = A.apply(part)
            back = A.adjoint(image if mask is None else image * mask)
            core = region.inside
            return back[core] + self.damp**2 * self._penalty(self.gradient_regions, region.kind, part)[core]

        self._run_pass("product", self.gradient_regions, read, work, into)

    def precondition(self, g: Field, into: Field, tolerance: float = 1e-4) -> None:
        """Write the preconditioned ``g``, the borders of tiles solved to a relative ``tolerance``."""
        if self.whole_inverse:
            self._apply_whole_inverse(g, into, tolerance)
            return
        rows = self.tile_regions.rows()
        self.ranks.exchange(g, rows)

        def read(region: Region) -> Tensor:
            return g.read(region.start, self.tile_regions.size, self.A_double.dtype)

        def restricted(region: Region, part: Tensor) -> Tensor:  # of every tile its core, which no other tile writes
            return self.inverse(region.kind)(part, tolerance)[0][region.inside]

        def symmetric(region: Region, part: Tensor) -> Tensor:  # windows before and after, added up: Hermitian
            window = self.tile_regions.window(region).to(part)
            return self.inverse(region.kind)(part * window, tolerance)[0] * window

        if not self.symmetric:
            self._run_pass("tiles", self.tile_regions, read, restricted, into)
            return
        self.update([into], lambda z: [torch.zeros_like(z)])
        self.ranks.open_remote_sums(into, rows)
        self._run_pass("tiles", self.tile_regions, read, symmetric, into, add=True)
        self.ranks.send_remote_sums(into, rows)

    def _apply_whole_inverse(self, g: Field, into: Field, tolerance: float) -> None:
        """Write the inverse of the whole normal operator applied to ``g``."""
        first = (g.first, *(0 for _ in g.size[1:]))
        with self.ranks.raise_on_all(), torch.no_grad():
            rows = g.read(first, (g.rows, *g.size[1:]), self.A_double.dtype)
        with torch.no_grad():
            found = self.pencil(rows, tolerance)
        with self.ranks.raise_on_all():
            into.write(first, found)
        self.tick("transform")

    @property
    def pencil(self) -> PencilInverse:
        """The inverse of the whole normal operator, made when it is first used, by all ranks at the same time."""
        if self._pencil is None:
            self._pencil = PencilInverse(self.A_double, self.terms_double, self.damp, self.ranks)
        return self._pencil

    def solve_tiles(
        self, y: Field, observed: Field | None, into: Field, tolerance: float, done: int, written: Callable[[], None]
    ) -> None:
        """Write the first x: the core of the solution of every tile for the data of that tile alone.

        Args:
            y: the data.
            observed: ones where y was measured; None: everywhere.
            into: the field to write to.
            tolerance: relative, to which the borders of tiles are solved.
            done: the number of tiles that an earlier run has written.
            written: called after every tile that is written.
        """

        def read(region: Region) -> tuple[Tensor, Tensor | None]:
            return self._data(self.tile_regions, region, y, observed)

        def work(region: Region, inputs: tuple[Tensor, Tensor | None]) -> Tensor:
            A, _ = self._local_operators(self.tile_regions, region.kind)
            found = self.inverse(region.kind)(A.adjoint(inputs[0]), tolerance)[0]
            return found[region.inside]

        self._run_pass("tiles", self.tile_regions, read, work, into, done=done, written=written)

    def update(
        self, fields: Sequence[Field], work: Callable[..., Sequence[Tensor | None]], reads: int | None = None
    ) -> None:
        """Replace the cells of fields by a function of them, core by core.

        Args:
            fields: the fields.
            work: maps the values of the fields on one core to new values of each; None leaves a field as it is.
            reads: the number of fields, from the first on, whose values ``work`` takes; None: all.
        """
        with self.ranks.raise_on_all(), torch.no_grad():
            for region in self.gradient_regions.all:
                parts = [field.read(region.core, region.core_size, self.A_double.dtype) for field in fields[:reads]]
                for field, values in zip(fields, work(*parts), strict=True):
                    if values is not None:
                        field.write(region.core, values)

    # ------------------------------------------------------------------ reading, computing, writing

    def _run_pass(
        self,
        stage: str,
        regions: Regions,
        read: Callable[[Region], T],
        work: Callable[[Region, T], Tensor],
        into: Field | None,
        *,
        add: bool = False,
        done: int = 0,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        """Read, compute and write the core of every region, or add the whole region; regions of one kind in a row."""
        with self.ranks.raise_on_all(), torch.no_grad():
            ordered = sorted(regions.all, key=lambda r: str(r.kind))[done:]
            for region, inputs, write in self._prefetched(ordered, read, add, written):
                values = work(region, inputs)
                if into is not None:
                    write(into, region, values)
                self.tick(stage)

    def _prefetched(
        self, regions: Sequence[Region], read: Callable[[Region], T], add: bool, written: Callable[[], None]
    ) -> Iterator[tuple[Region, T, Callable[[Field, Region, Tensor], None]]]:
        """Iterate over (region, what ``read`` returned, a function that writes), reading ahead in a thread."""

        def write(into: Field, region: Region, values: Tensor) -> None:
            if add:
                into.add(region.start, values)
            else:
                into.write(region.core, values)
            written()

        if not self.threaded or not regions:
            for region in regions:
                yield region, read(region), write
            return
        with ThreadPoolExecutor(1) as thread:
            pending: list[Future[None]] = []

            def write_in_thread(into: Field, region: Region, values: Tensor) -> None:
                pending.append(thread.submit(write, into, region, values))

            next_inputs = thread.submit(read, regions[0])
            for place, region in enumerate(regions):
                inputs = next_inputs.result()
                if place + 1 < len(regions):
                    next_inputs = thread.submit(read, regions[place + 1])
                while len(pending) > 1:
                    pending.pop(0).result()
                yield region, inputs, write_in_thread
            for future in pending:
                future.result()

    def _data(self, regions: Regions, region: Region, y: Field, observed: Field | None) -> tuple[Tensor, Tensor | None]:
        """The data of a region, and its mask; unmeasured data, which may be NaN, are zero."""
        size = self._local_operators(regions, region.kind)[0].spatial_out
        data = y.read(regions.outputs(region), size, self.A_double.dtype)
        mask = self._mask(regions, region, observed)
        data = data if mask is None else torch.where(mask > 0, data, 0)
        if not bool(torch.isfinite(data.sum())):
            raise NonFiniteError(f"y: contains NaN or infinity in what tile {region.tile} reads{self._place(region)}")
        return data, mask

    def _mask(self, regions: Regions, region: Region, observed: Field | None) -> Tensor | None:
        if observed is None:
            return None
        size = self._local_operators(regions, region.kind)[0].spatial_out
        return observed.read(regions.outputs(region), size, self.A_double.dtype)

    def _place(self, region: Region) -> str:
        """The cells of a core and their rank, for an error message."""
        cells = ", ".join(f"{c}:{c + n}" for c, n in zip(region.core, region.core_size, strict=True))
        return f" (cells {cells}" + (f", rank {self.ranks.rank})" if self.ranks.size > 1 else ")")

    def _penalty(self, regions: Regions, kind: Kind, x: Tensor) -> Tensor:
        """``L^H L x`` in a region."""
        terms = self._local_operators(regions, kind)[1]
        if not terms:
            return x
        total = torch.zeros_like(x)
        for term in terms:
            total += float(term.factor) ** 2 * term.convolution.adjoint(term.convolution.apply(x))
        return total

    def _local_operators(self, regions: Regions, kind: Kind) -> tuple[Convolution, list[Filter]]:
        """A and the terms of L restricted to regions of one kind, made once for each."""
        key = (regions.size, kind)
        if key not in self._convolutions:
            terms = [Filter(regions.convolution(kind, term.convolution), term.factor) for term in self.terms_double]
            self._convolutions[key] = regions.convolution(kind), terms
        return self._convolutions[key]

    def gradient_convolution(self, region: Region) -> Convolution:
        """A restricted to one of :attr:`gradient_regions`."""
        return self._local_operators(self.gradient_regions, region.kind)[0]

    def inverse(self, kind: Kind) -> NormalInverse:
        """The inverse of the normal operator of tiles of one kind, made once for each."""
        if kind not in self._inverses:
            A, terms = self._local_operators(self.tile_regions, kind)
            floor = least_shift(torch.float64, damped=True)
            inverse = normal_inverse(Request.of(A, self.damp, terms, floor=floor, side="solution", limits=self.limits))
            inverse.factorise_if_cheaper((), 2 * sum(region.kind == kind for region in self.tile_regions.all))
            self._inverses[kind] = inverse
        return self._inverses[kind]
