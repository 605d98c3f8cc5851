r"""The passes over a field: each reads regions with halos, computes, and writes cores, a thread reading ahead.

With :math:`H = A^H W A + \mathrm{damp}^2 L^H L` (W zero where nothing was measured, else one) there are

- the gradient :math:`A^H W (y - Ax) - \mathrm{damp}^2 L^HL x`, with the norms of a certificate,
- the product :math:`H z`,
- the Schwarz preconditioner :math:`\sum_t P_t^T (A_t^H A_t + \mathrm{damp}^2 L_t^H L_t)^{-1} R_t`, where :math:`R_t`
  takes a region out of the field and :math:`P_t` its core; or, where regions overlap by less than the inverse reaches
  and conjugate gradients need a Hermitian one, both with the root of a smooth partition of unity in their places.

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
    """The passes of one problem.

    Args:
        A: the convolution.
        terms: the penalty; empty: the identity.
        damp: the damping.
        axes: the cores.
        overlap: of tiles, per axis.
        wraps: per axis, whether A wraps around.
        ranks: the processes.
        threaded: read and write by a thread of its own.
        symmetric: precondition by the Hermitian form; a solve that is slow without sets it.
        shared: precondition by the inverse of the whole, shared by the ranks, in place of the tiles.
        limits: by which means the border of a tile is solved.

    Attributes:
        halos: the regions of gradients and products.
        tiles: those of the preconditioner.
        step: the outer step, 0 being the first pass.
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
        shared: bool = False,
        limits: Limits | None = None,
    ) -> None:
        self.A, self.terms, self.damp, self.ranks, self.threaded, self.limits = A, terms, damp, ranks, threaded, limits
        self.symmetric, self.shared = symmetric, shared
        wide = double(A.dtype)
        self.wide = A.to(dtype=wide)
        self.wide_terms = [Filter(t.convolution.to(dtype=wide), t.factor.to(wide)) for t in terms]
        reach = [
            max([k - 1, *(t.convolution.kernel_extent[a] - 1 for t in terms)]) for a, k in enumerate(A.kernel_extent)
        ]
        others = [t.convolution for t in terms]
        self.halos = Regions(self.wide, axes, reach, wraps, others)
        self.tiles = Regions(self.wide, axes, [max(o, 1) for o in overlap], wraps, others)
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
        """Write the gradient at x, and return the norms.

        Args:
            x: the field.
            y: the data.
            observed: ones where y was measured; None: everywhere.
            into: the field to write to; None: nowhere.
            rounded: a function of an x that is read, for the norms of what it makes of it.
        """
        self.ranks.exchange(x, self.halos.rows())
        sums = torch.zeros(6, dtype=torch.float64, device=self.A.device)

        def read(region: Region) -> tuple[Tensor, Tensor, Tensor | None]:
            values = x.read(region.start, self.halos.size, self.wide.dtype)
            return values if rounded is None else rounded(values), *self._data(self.halos, region, y, observed)

        def work(region: Region, given: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
            part, data, mask = given
            A, _ = self._local(self.halos, region.kind)
            image = A.apply(part)
            residual = data - image
            if mask is not None:
                residual, data, image = residual * mask, data * mask, image * mask
            outputs = self.halos.core_outputs(region)
            core = region.inside
            penalty = self._penalty(self.halos, region.kind, part)[core]
            g = A.adjoint(residual)[core] - self.damp**2 * penalty
            here = part[core]
            squares = (data[outputs], residual[outputs], g, here)
            found = [values.square().sum() for values in squares]
            found += [(here * penalty).sum(), image[outputs].square().sum()]
            sums.add_(torch.stack(found))
            return g

        self._run("gradient", self.halos, read, work, into)
        y_norm, residual, gradient, x_norm, penalty, image = self.ranks.total(sums).clamp_min(0).sqrt().tolist()
        return Norms(
            y=y_norm, x=x_norm, residual=residual, gradient=gradient, penalty=penalty, operator=divide(image, x_norm)
        )

    def product(self, z: Field, observed: Field | None, into: Field) -> None:
        """Write ``H z``."""
        self.ranks.exchange(z, self.halos.rows())

        def read(region: Region) -> tuple[Tensor, Tensor | None]:
            part = z.read(region.start, self.halos.size, self.wide.dtype)
            return part, self._mask(self.halos, region, observed)

        def work(region: Region, given: tuple[Tensor, Tensor | None]) -> Tensor:
            part, mask = given
            A, _ = self._local(self.halos, region.kind)
            image = A.apply(part)
            back = A.adjoint(image if mask is None else image * mask)
            core = region.inside
            return back[core] + self.damp**2 * self._penalty(self.halos, region.kind, part)[core]

        self._run("product", self.halos, read, work, into)

    def correct(self, g: Field, into: Field, tolerance: float = 1e-4) -> None:
        """Write the preconditioned ``g``, the borders of tiles solved to this tolerance."""
        if self.shared:
            self._all_rows(g, into, tolerance)
            return
        rows = self.tiles.rows()
        self.ranks.exchange(g, rows)

        def read(region: Region) -> Tensor:
            return g.read(region.start, self.tiles.size, self.wide.dtype)

        def restricted(region: Region, part: Tensor) -> Tensor:
            return self.inverse(region.kind)(part, tolerance)[0][region.inside]

        def symmetric(region: Region, part: Tensor) -> Tensor:
            window = self.tiles.window(region).to(part)
            return self.inverse(region.kind)(part * window, tolerance)[0] * window

        if not self.symmetric:
            self._run("tiles", self.tiles, read, restricted, into)
            return
        self.update([into], lambda z: [torch.zeros_like(z)])
        self.ranks.open_spills(into, rows)
        self._run("tiles", self.tiles, read, symmetric, into, add=True)
        self.ranks.collect(into, rows)

    def _all_rows(self, g: Field, into: Field, tolerance: float) -> None:
        """Write the inverse of the whole applied to ``g``."""
        first = (g.first, *(0 for _ in g.size[1:]))
        with self.ranks.together(), torch.no_grad():
            rows = g.read(first, (g.rows, *g.size[1:]), self.wide.dtype)
        with torch.no_grad():
            found = self.pencil(rows, tolerance)
        with self.ranks.together():
            into.write(first, found)
        self.tick("transform")

    @property
    def pencil(self) -> PencilInverse:
        """The inverse of the whole; all ranks ask for it together."""
        if self._pencil is None:
            self._pencil = PencilInverse(self.wide, self.wide_terms, self.damp, self.ranks)
        return self._pencil

    def first(
        self, y: Field, observed: Field | None, into: Field, tolerance: float, done: int, written: Callable[[], None]
    ) -> None:
        """Write the solutions of the tiles for their own data.

        Args:
            y: the data.
            observed: ones where y was measured; None: everywhere.
            into: the field to write to.
            tolerance: to which the borders of tiles are solved.
            done: how many tiles are there already.
            written: called after every tile.
        """

        def read(region: Region) -> tuple[Tensor, Tensor | None]:
            return self._data(self.tiles, region, y, observed)

        def work(region: Region, given: tuple[Tensor, Tensor | None]) -> Tensor:
            A, _ = self._local(self.tiles, region.kind)
            found = self.inverse(region.kind)(A.adjoint(given[0]), tolerance)[0]
            return found[region.inside]

        self._run("tiles", self.tiles, read, work, into, done=done, written=written)

    def update(
        self, fields: Sequence[Field], work: Callable[..., Sequence[Tensor | None]], reads: int | None = None
    ) -> None:
        """Replace the cells of fields by a function of them, core by core.

        Args:
            fields: the fields.
            work: of the cells of one core of each; None leaves a field as it is.
            reads: how many of the fields, the first ones, the function is given; None: all.
        """
        with self.ranks.together(), torch.no_grad():
            for region in self.halos.all:
                parts = [field.read(region.core, region.core_size, self.wide.dtype) for field in fields[:reads]]
                for field, values in zip(fields, work(*parts), strict=True):
                    if values is not None:
                        field.write(region.core, values)

    # ------------------------------------------------------------------ their parts

    def _run(
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
        """Read, compute and write every core, or add every region, those of one kind one after the other."""
        with self.ranks.together(), torch.no_grad():
            ordered = sorted(regions.all, key=lambda r: str(r.kind))[done:]
            for region, given, write in self._ahead(ordered, read, add, written):
                values = work(region, given)
                if into is not None:
                    write(into, region, values)
                self.tick(stage)

    def _ahead(
        self, regions: Sequence[Region], read: Callable[[Region], T], add: bool, written: Callable[[], None]
    ) -> Iterator[tuple[Region, T, Callable[[Field, Region, Tensor], None]]]:
        """Iterate over the regions with the cells that they read; a thread reads the next while one is computed."""

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

            def later(into: Field, region: Region, values: Tensor) -> None:
                pending.append(thread.submit(write, into, region, values))

            ahead = thread.submit(read, regions[0])
            for place, region in enumerate(regions):
                given = ahead.result()
                if place + 1 < len(regions):
                    ahead = thread.submit(read, regions[place + 1])
                while len(pending) > 1:
                    pending.pop(0).result()
                yield region, given, later
            for future in pending:
                future.result()

    def _data(self, regions: Regions, region: Region, y: Field, observed: Field | None) -> tuple[Tensor, Tensor | None]:
        """The data of a region, and its mask; NaN that was not measured is not read."""
        size = self._local(regions, region.kind)[0].spatial_out
        data = y.read(regions.outputs(region), size, self.wide.dtype)
        mask = self._mask(regions, region, observed)
        data = data if mask is None else torch.where(mask > 0, data, 0)
        if not bool(torch.isfinite(data.sum())):
            raise NonFiniteError(f"y: contains NaN or infinity in what tile {region.tile} reads{self._place(region)}")
        return data, mask

    def _mask(self, regions: Regions, region: Region, observed: Field | None) -> Tensor | None:
        if observed is None:
            return None
        size = self._local(regions, region.kind)[0].spatial_out
        return observed.read(regions.outputs(region), size, self.wide.dtype)

    def _place(self, region: Region) -> str:
        cells = ", ".join(f"{c}:{c + n}" for c, n in zip(region.core, region.core_size, strict=True))
        return f" (cells {cells}" + (f", rank {self.ranks.rank})" if self.ranks.size > 1 else ")")

    def _penalty(self, regions: Regions, kind: Kind, x: Tensor) -> Tensor:
        """``L^H L x`` in a region."""
        terms = self._local(regions, kind)[1]
        if not terms:
            return x
        total = torch.zeros_like(x)
        for term in terms:
            total += float(term.factor) ** 2 * term.convolution.adjoint(term.convolution.apply(x))
        return total

    def _local(self, regions: Regions, kind: Kind) -> tuple[Convolution, list[Filter]]:
        """The convolutions within regions of one kind, made once."""
        key = (regions.size, kind)
        if key not in self._convolutions:
            terms = [Filter(regions.convolution(kind, term.convolution), term.factor) for term in self.wide_terms]
            self._convolutions[key] = regions.convolution(kind), terms
        return self._convolutions[key]

    def local(self, region: Region) -> Convolution:
        """A within the region of a gradient."""
        return self._local(self.halos, region.kind)[0]

    def inverse(self, kind: Kind) -> NormalInverse:
        """The inverse that all tiles of one kind share."""
        if kind not in self._inverses:
            A, terms = self._local(self.tiles, kind)
            floor = least_shift(torch.float64, damped=True)
            inverse = normal_inverse(Request.of(A, self.damp, terms, floor=floor, side="solution", limits=self.limits))
            inverse.factorise_if_cheaper((), 2 * sum(region.kind == kind for region in self.tiles.all))
            self._inverses[kind] = inverse
        return self._inverses[kind]

    @property
    def nbytes(self) -> int:
        """Bytes of the inverses made."""
        return sum(inverse.nbytes for inverse in self._inverses.values())
