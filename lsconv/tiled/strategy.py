"""The strategy of a solve: tiles of a size and overlap, in memory or out of core, or the whole at once; and why."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import Limits, plan_bytes, spared
from lsconv.border.penalty import Filter, Penalty, as_convolutions
from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, MethodError, PlanMemoryError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.elementary import Identity
from lsconv.operators.padding_modes import MODES
from lsconv.tiled.decay import Decay
from lsconv.tiled.iteration import Directions
from lsconv.tiled.layout import TileAxis
from lsconv.tiled.pencil import pencil_bytes
from lsconv.tiled.ranks import Ranks
from lsconv.tiled.regions import Regions
from lsconv.tiled.untiled import untiled_bytes

__all__ = ["Strategy", "TiledProblem", "check_operator", "penalty_terms"]


@dataclass(frozen=True)
class Strategy:
    """The strategy that was chosen.

    Attributes:
        path: "tiles"; "whole", one border solve of the whole image by one rank; or "pencil", one that all ranks share.
        why: the reason of that choice, in words.
        untiled_fits: one rank has memory for a solve of the whole image.
        axes: the cores of this rank, along each axis.
        overlap: cells by which a tile exceeds its core on each side, per axis.
        wraps: per axis, whether A is circular.
        first_pass_error: the relative error that one pass over all tiles leaves, estimated.
        out_of_core: the vectors are kept in files.
        symmetric: the preconditioner starts in its Hermitian form.
        bytes: the memory that a solve takes, estimated.
        limits: the memory and the choice of solver for the border of a tile.
    """

    path: str
    why: str
    untiled_fits: bool
    axes: tuple[TileAxis, ...]
    overlap: tuple[int, ...]
    wraps: tuple[bool, ...]
    first_pass_error: float
    out_of_core: bool
    symmetric: bool
    bytes: int
    limits: Limits

    @classmethod
    def choose(cls, problem: TiledProblem) -> Strategy:
        """Choose by the decay of the inverse and by the memory."""
        tiles = _largest_tiles(problem)
        cut, decay = tiles.least_overlap, problem.decay
        path, why = _path(problem, tiles)
        max_memory = problem.max_memory
        out_of_core = problem.stored or tiles.bytes + problem.vector_bytes > max_memory
        if path == "whole":
            needs = problem.whole_bytes
        else:
            needs = tiles.bytes if path == "tiles" else problem.pencil_bytes or 0
            needs += 0 if out_of_core else problem.vector_bytes
        return cls(
            path=path,
            why=why,
            untiled_fits=problem.whole_bytes <= max_memory,
            axes=tiles.axes,
            overlap=tiles.overlap,
            wraps=problem.wraps,
            first_pass_error=0.0 if cut is None else decay.first_pass_error(cut),
            out_of_core=out_of_core,
            symmetric=cut is not None and decay.contraction(cut) > 0.05,
            bytes=needs,
            limits=spared(None, max(max_memory - needs, 0), 0),
        )


@dataclass(frozen=True)
class TiledProblem:
    """The problem that a strategy is chosen for, and the quantities that the choice depends on.

    Attributes:
        A, damp, tile, overlap, max_memory, ranks: as for :class:`lsconv.tiled.Plan`.
        terms: the penalty L as convolutions; empty: the identity.
        rows: the rows of x that this rank has.
        masked: some data are missing.
        stored: the user gave a folder for the vectors.
    """

    A: Convolution
    terms: tuple[Filter, ...]
    damp: float
    tile: int | Sequence[int] | None
    overlap: int | str
    max_memory: int
    ranks: Ranks
    rows: slice
    masked: bool
    stored: bool

    @functools.cached_property
    def wraps(self) -> tuple[bool, ...]:
        """Per axis, whether A is circular; circular padding of another width than the kernel's is refused."""
        A = self.A
        wraps = tuple(MODES[A.padding_mode].periodic and any(pair) for pair in A.padding)
        for wrap, pair, k in zip(wraps, A.padding, A.kernel_extent, strict=True):
            if wrap and sum(pair) != k - 1:
                raise MethodError(
                    f"padding: a circular convolution of tiles has as many outputs as inputs (padding='same'), got "
                    f"{pair} for a kernel of {k} cells"
                )
        return wraps

    @functools.cached_property
    def decay(self) -> Decay:
        """The decay of the inverse, computed on a periodic grid, and extrapolated beyond."""
        return Decay(self.A, self.terms, self.damp, {1: 4096, 2: 512, 3: 96}[self.A.ndim])

    @property
    def rtol(self) -> float:
        """The error at which tiles count as exact, a tenth of the default tolerance of the dtype."""
        return 1e-7 if double(self.A.dtype) != self.A.dtype else 1e-11

    @property
    def vector_bytes(self) -> int:
        """The bytes of the vectors of an iteration, the directions and their images most of them."""
        A, count = self.A, 3 + 2 * Directions.max_directions
        return count * A.c_in * (self.rows.stop - self.rows.start) * math.prod(A.spatial_in[1:]) * 8

    @functools.cached_property
    def whole_bytes(self) -> int:
        """The bytes of a solve of the whole image by one rank; more than allowed where data are missing."""
        return self.max_memory + 1 if self.masked else untiled_bytes(self.A, self.terms, self.damp)

    @functools.cached_property
    def pencil_bytes(self) -> int | None:
        """The bytes on a rank of a solve of the whole that all ranks share; None where there is none."""
        if self.ranks.size == 1 or self.masked:
            return None
        return pencil_bytes(self.A.to(dtype=double(self.A.dtype)), self.terms, self.damp, self.ranks.size)


@dataclass(frozen=True)
class _Tiles:
    """Tiles of one size.

    Attributes:
        axes: the cores of this rank, along each axis.
        overlap: cells by which a tile exceeds its core on each side, per axis.
        bytes: of the inverses of the tiles, and of the arrays of a pass.
    """

    axes: tuple[TileAxis, ...]
    overlap: tuple[int, ...]
    bytes: int

    @property
    def least_overlap(self) -> int | None:
        """The smallest overlap along the axes that are cut; None where one tile is all."""
        cut = [o for o, axis in zip(self.overlap, self.axes, strict=True) if _is_cut(axis)]
        return min(cut) if cut else None

    @property
    def work(self) -> float:
        """The work of one pass over all tiles, with that of tiles without overlap for unit."""
        cores = [axis.length / axis.count for axis in self.axes]
        tile = (min(c + 2 * o, axis.cells) for c, o, axis in zip(cores, self.overlap, self.axes, strict=True))
        return math.prod(tile) / math.prod(cores)


def _largest_tiles(problem: TiledProblem) -> _Tiles:
    """Lay out the largest tiles whose solve fits in ``max_memory``.

    Raises:
        ArgumentError: the tile or the overlap is no number of cells.
        PlanMemoryError: the smallest tiles do not fit.
    """
    A, overlap, max_memory = problem.A, problem.overlap, problem.max_memory
    if overlap != "auto" and not (isinstance(overlap, int) and overlap >= 1):
        raise ArgumentError(f'overlap: expected "auto" or a number of cells >= 1, got {overlap!r}')
    sizes = _candidates(A, problem.rows) if problem.tile is None else [_per_axis(problem.tile, A)]
    for core in sizes:
        tiles = _tiles_of(problem, core)
        if tiles.bytes <= max_memory:
            return tiles
    raise PlanMemoryError(
        f"max_memory: tiles of {tuple(sizes[-1])} need about {tiles.bytes:.3g} bytes, and {max_memory:.3g} are "
        f"allowed; pass a smaller tile, or a larger max_memory"
    )


def _tiles_of(problem: TiledProblem, core: Sequence[int]) -> _Tiles:
    """Lay out cores of about this size; all ranks find the same overlap."""
    A, overlap = problem.A, problem.overlap
    axes = _axes(A, core, problem.rows, problem.wraps)
    shortest = (A.spatial_in[0] // problem.ranks.size, *A.spatial_in[1:])
    nominal = [min(n, c) for n, c in zip(shortest, core, strict=True)]
    cut = [n for n, axis in zip(nominal, axes, strict=True) if _is_cut(axis)]
    cells = problem.decay.overlap(cut, min(cut), problem.rtol) if isinstance(overlap, str) and cut else overlap
    per_axis = tuple(int(cells) if _is_cut(axis) else axis.cells for axis in axes)
    return _Tiles(axes, per_axis, _tile_bytes(A, problem.terms, problem.damp, axes, per_axis, problem.wraps))


def _path(problem: TiledProblem, tiles: _Tiles) -> tuple[str, str]:
    """Choose "tiles", "whole" or "pencil"; return it and the reason, in words."""
    cut, max_memory, ranks = tiles.least_overlap, problem.max_memory, problem.ranks.size
    whole, allowed = f"{problem.whole_bytes / 2**20:.0f} MiB", f"{max_memory / 2**20:.0f} are allowed"
    if problem.whole_bytes <= max_memory and problem.tile is None and ranks == 1 and not problem.stored:
        return "whole", f"it takes {whole}, and {allowed}"
    if cut is None:
        return "tiles", "one tile is all"
    why = f"beyond {cut} cells {problem.decay.first_pass_error(cut):.1e} of the inverse is left"
    steps = problem.decay.steps(cut, problem.rtol)
    work = tiles.work * (1 + 1.5 * steps)  # as in Decay.overlap: a later step costs more than the first pass
    if not isinstance(problem.overlap, str) or (steps <= 4 and work <= (40 if ranks == 1 else 20)):
        return "tiles", why
    why = f"{why}, which are about {steps} steps of tiles, {work:.0f} times the work of a solve without overlap"
    pencil = problem.pencil_bytes
    if pencil is not None and pencil <= max_memory:
        return "pencil", f"{why}; the whole, shared, takes {pencil / 2**20:.0f} MiB a rank"
    if problem.whole_bytes <= max_memory and (steps > 4 * ranks or work > 40 * ranks):
        return "whole", f"{why}; one border solve of the whole takes {whole}"
    if problem.masked:
        return "tiles", why
    each = "" if pencil is None else f" on one rank, {pencil / 2**20:.0f} on each"
    return "tiles", f"{why}; the whole would take {whole}{each}, and {allowed}"


def _is_cut(axis: TileAxis) -> bool:
    """Tell whether a tile is shorter than the field along an axis."""
    return axis.count > 1 or axis.length < axis.cells


def _axes(A: Convolution, core: Sequence[int], rows: slice, wraps: Sequence[bool]) -> tuple[TileAxis, ...]:
    """Cut the rows of this rank, and the other axes, into cores of about ``core`` cells."""
    axes = []
    for a, (n, cells) in enumerate(zip(A.spatial_in, core, strict=True)):
        first, last = (rows.start, rows.stop) if a == 0 else (0, n)
        count = min(max(round((last - first) / cells), 1), last - first)
        axes.append(TileAxis(n, count, 0, 0, wraps[a], first, last))
    return tuple(axes)


def _per_axis(tile: int | Sequence[int], A: Convolution) -> tuple[int, ...]:
    cells = (tile,) * A.ndim if isinstance(tile, int) else tuple(int(n) for n in tile)
    if len(cells) != A.ndim or min(cells) < 1:
        raise ArgumentError(f"tile: expected a number of cells >= 1, or {A.ndim} of them, got {tile!r}")
    return cells


def _candidates(A: Convolution, rows: slice) -> list[tuple[int, ...]]:
    """List core sizes, the largest first: the longest axis is halved again and again, down to twice the kernel."""
    size = [rows.stop - rows.start, *A.spatial_in[1:]]
    least = [max(2 * k, 16) for k in A.kernel_extent]
    found = [tuple(size)]
    while any(n > m for n, m in zip(size, least, strict=True)):
        longest = max(size)
        size = [max(-(-n // 2), m) if n == longest and n > m else n for n, m in zip(size, least, strict=True)]
        found.append(tuple(size))
    return found


def _tile_bytes(
    A: Convolution,
    terms: Sequence[Filter],
    damp: float,
    axes: Sequence[TileAxis],
    overlap: Sequence[int],
    wraps: Sequence[bool],
) -> int:
    """Estimate the bytes of the inverses of all kinds of tiles, and of the arrays of a pass."""
    A_double = A.to(dtype=double(A.dtype))
    regions = Regions(A_double, axes, overlap, wraps, [t.convolution for t in terms])
    plans = []
    for kind in {region.kind for region in regions.all}:
        local = regions.convolution(kind)
        filters = [Filter(regions.convolution(kind, t.convolution), t.factor) for t in terms]
        plans.append(plan_bytes(local, penalty=Penalty.of_terms(local, filters, damp)))
    # Setups run one after the other and keep a third of their peak; a pass holds ten arrays of a region's size.
    inverses = max(plans) + (sum(plans) - max(plans)) // 3
    return inverses + 10 * 8 * max(A.c_in, A.c_out) * math.prod(regions.size)


def check_operator(A: Any, in_size: Any, padding: Any, padding_mode: str) -> Convolution:
    """Make A a convolution, of a kernel where that is given, and refuse one that tiles do not serve.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError, MethodError: A, or an argument beside it, does not serve.
    """
    if isinstance(A, Tensor):
        if in_size is None:
            raise ArgumentError("in_size: needed beside a kernel, the spatial size of x")
        ndim = 1 if isinstance(in_size, int) else len(in_size)
        if A.ndim not in (ndim, ndim + 2):
            raise ShapeError(
                f"A: expected a kernel with {ndim} spatial axes, as in_size has, (*size) or (c_out, c_in, *size), got "
                f"shape {tuple(A.shape)}"
            )
        A = Convolution(A.reshape(1, 1, *A.shape) if A.ndim == ndim else A, in_size, padding=padding,
                        padding_mode=padding_mode)  # fmt: skip
    elif in_size is not None:
        raise ArgumentError(f"in_size: A has one, {getattr(A, 'spatial_in', '')}; give it beside a kernel only")
    if not isinstance(A, Convolution):
        raise ArgumentTypeError(
            f"A: expected a Convolution or a kernel, got {type(A).__name__}; other operators have no tiles, use lstsq"
        )
    if set(A.stride) != {1} or A.batch_shape:
        given = f"stride {A.stride}" if not A.batch_shape else f"a kernel per batch item {A.batch_shape}"
        raise MethodError(
            f"A: tiles serve convolutions of stride 1 with one kernel for all items, got {given}; use lstsq"
        )
    if A.dtype not in (torch.float32, torch.float64):
        raise DtypeError(f"A: tiles serve float32 and float64, got {A.dtype}")
    mode = MODES[A.padding_mode]
    if not (mode.zero or mode.periodic or (mode.copies and A.ndim < 3)):
        raise MethodError(f"padding_mode: {A.padding_mode!r} has no border plan in {A.ndim} dimensions; use 'zeros'")
    return A


def penalty_terms(A: Convolution, L: LinearOperator | None) -> list[Filter]:
    """Take the penalty L apart into convolutions, none for the identity.

    Raises:
        MethodError: L is not made of convolutions, or shares no grid with A.
    """
    if L is None or isinstance(L, Identity):
        return []
    L = L.for_dtype(A.dtype)
    if L.in_shape != A.in_shape:
        raise ShapeError(f"L: in_shape {L.in_shape} differs from that of A, {A.in_shape}")
    terms = as_convolutions(L, A.ndim)
    if terms is None or not Penalty.serves(A, terms):
        raise MethodError(
            f"L: tiles serve penalties made of convolutions beside zero or circular padding (with lsconv.Gradient, "
            f"boundary='periodic' beside circular padding), got {L!r} beside {A!r}"
        )
    return terms
