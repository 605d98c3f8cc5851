"""The strategy of a solve: tiles of a size and overlap, in memory or out of core, or the whole at once; and why."""

from __future__ import annotations

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

__all__ = ["Strategy", "check_operator", "penalty_terms"]


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
    def choose(
        cls,
        A: Convolution,
        terms: Sequence[Filter],
        damp: float,
        tile: int | Sequence[int] | None,
        overlap: int | str,
        max_memory: int,
        ranks: Ranks,
        rows: slice,
        *,
        masked: bool,
        stored: bool,
    ) -> Strategy:
        """Choose by the decay of the inverse and by the memory; the parameters are those of :class:`Plan`."""
        if overlap != "auto" and not (isinstance(overlap, int) and overlap >= 1):
            raise ArgumentError(f'overlap: expected "auto" or a number of cells >= 1, got {overlap!r}')
        wraps = _wraps(A)
        decay = Decay(A, terms, damp, {1: 4096, 2: 512, 3: 96}[A.ndim])
        rtol = 1e-7 if double(A.dtype) != A.dtype else 1e-11
        count = 3 + 2 * Directions.max_directions
        vectors = count * A.c_in * (rows.stop - rows.start) * math.prod(A.spatial_in[1:]) * 8
        untiled = untiled_bytes(A, terms, damp) if not masked else max_memory + 1
        several, shared = ranks.size > 1, None

        def tiles(core: Sequence[int]) -> tuple[tuple[TileAxis, ...], tuple[int, ...], int]:
            """Lay out cores of about this size: (axes, overlap per axis, bytes); all ranks find the same overlap."""
            axes = _axes(A, core, rows, wraps)
            shortest = (A.spatial_in[0] // ranks.size, *A.spatial_in[1:])
            nominal = [min(n, c) for n, c in zip(shortest, core, strict=True)]
            cut = [n for n, axis in zip(nominal, axes, strict=True) if _is_cut(axis)]
            cells = decay.overlap(cut, min(cut), rtol) if isinstance(overlap, str) and cut else overlap
            per_axis = tuple(int(cells) if _is_cut(axis) else axis.cells for axis in axes)
            return axes, per_axis, _tile_bytes(A, terms, damp, axes, per_axis, wraps)

        sizes = [_per_axis(tile, A)] if tile is not None else _candidates(A, rows)
        for core in sizes:
            axes, cells, needed = tiles(core)
            if needed <= max_memory:
                break
        else:
            raise PlanMemoryError(
                f"max_memory: tiles of {tuple(core)} need about {needed:.3g} bytes, and {max_memory:.3g} are allowed; "
                f"pass a smaller tile, or a larger max_memory"
            )
        out_of_core = stored or needed + vectors > max_memory
        cut = [o for o, axis in zip(cells, axes, strict=True) if _is_cut(axis)]
        error, steps = (decay.first_pass_error(min(cut)), decay.steps(min(cut), rtol)) if cut else (0.0, 0)
        cores = [axis.length / axis.count for axis in axes]
        tile_cells = (min(c + 2 * o, axis.cells) for c, o, axis in zip(cores, cells, axes, strict=True))
        cost = math.prod(tile_cells) / math.prod(cores) * (1 + 1.5 * steps) if cut else 1.0
        path, why = "tiles", f"beyond {min(cut)} cells {error:.1e} of the inverse is left" if cut else "one tile is all"
        if untiled <= max_memory and tile is None and ranks.size == 1 and not stored:
            path, why = "whole", f"it takes {untiled / 2**20:.0f} MiB, and {max_memory / 2**20:.0f} are allowed"
        elif (steps > 4 or cost > (20 if several else 40)) and isinstance(overlap, str):
            why = f"{why}, which are about {steps} steps of tiles, {cost:.0f} times the work of a solve without overlap"
            shared = (
                pencil_bytes(A.to(dtype=double(A.dtype)), terms, damp, ranks.size) if several and not masked else None
            )
            if shared is not None and shared <= max_memory:
                path, why = "pencil", f"{why}; the whole, shared, takes {shared / 2**20:.0f} MiB a rank"
            elif untiled <= max_memory and (steps > 4 * ranks.size or cost > 40 * ranks.size):
                path, why = "whole", f"{why}; one border solve of the whole takes {untiled / 2**20:.0f} MiB"
            elif not masked:
                each = "" if shared is None else f" on one rank, {shared / 2**20:.0f} on each"
                why += (
                    f"; the whole would take {untiled / 2**20:.0f} MiB{each}, and {max_memory / 2**20:.0f} are allowed"
                )
        inside = 0 if out_of_core else vectors
        used = {"whole": untiled, "pencil": (shared or 0) + inside, "tiles": needed + inside}[path]
        limits = spared(None, max(max_memory - used, 0), 0)
        return cls(
            path,
            why,
            untiled <= max_memory,
            axes,
            cells,
            wraps,
            error,
            out_of_core,
            bool(cut) and decay.contraction(min(cut)) > 0.05,
            used,
            limits,
        )


def _is_cut(axis: TileAxis) -> bool:
    """Tell whether a tile is shorter than the field along an axis."""
    return axis.count > 1 or axis.length < axis.cells


def _wraps(A: Convolution) -> tuple[bool, ...]:
    """Tell per axis whether A is circular, and refuse circular padding of another width than the kernel's."""
    wraps = tuple(MODES[A.padding_mode].periodic and any(pair) for pair in A.padding)
    for wrap, pair, k in zip(wraps, A.padding, A.kernel_extent, strict=True):
        if wrap and sum(pair) != k - 1:
            raise MethodError(
                f"padding: a circular convolution of tiles has as many outputs as inputs (padding='same'), got {pair} "
                f"for a kernel of {k} cells"
            )
    return wraps


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
        penalty = None
        if terms:
            filters = [
                Filter(regions.convolution(kind, t.convolution.to(dtype=A_double.dtype)), t.factor) for t in terms
            ]
            penalty = Penalty(local, filters, torch.tensor(damp, dtype=torch.float64, device=A.device))
        plans.append(plan_bytes(local, penalty=penalty))
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
