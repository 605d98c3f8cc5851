r"""The whole problem by tiles: in memory, out of core and on many ranks, with the certificate of the whole.

.. math:: \min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|Lx\|^2

The first pass solves every tile for its own data and keeps the cores. Where that is not accurate enough, flexible
conjugate gradients on the whole problem (:mod:`lsconv.tiled.iteration`) follow, preconditioned by the tiles. The
gradient of the whole problem, recomputed from x, is the certificate.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, ShapeError
from lsconv.krylov.loop.certificate import NormBounds, Tolerances, norm_from_below
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution, report
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.dtypes import direct_rtol, double
from lsconv.operators.memory import free_bytes
from lsconv.tiled.certificate import WholeCertificate, batch_solution
from lsconv.tiled.field import ArrayLike, Field
from lsconv.tiled.iteration import Iteration
from lsconv.tiled.passes import Passes
from lsconv.tiled.progress import Progress
from lsconv.tiled.ranks import Ranks
from lsconv.tiled.storage import Storage
from lsconv.tiled.strategy import Strategy, TiledProblem, check_operator, penalty_terms
from lsconv.tiled.untiled import UntiledPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Plan"]


class Plan:
    r"""Setup for one damped problem larger than a device; ``solve`` answers data, item by item.

    Args:
        A: a convolution of stride 1 with zero, circular, reflect or replicate padding, in one to three dimensions; or
            its kernel, ``(*size)`` for planes, of which every leading axis of y is a batch, or
            ``(c_out, c_in, *size)``.
        in_size: spatial size of x, where A is a kernel.
        damp: the damping, > 0, in the units of A over L.
        L: a penalty made of convolutions, such as :class:`lsconv.Gradient`; None: the identity.
        padding: of a kernel, as in :class:`lsconv.Convolution`.
        padding_mode: of a kernel, as there.
        tile: cells of a tile's core, a number or one per axis; None: as long as ``max_memory`` allows.
        overlap: cells around the core that a tile has; "auto": from the measured decay of the inverse.
        max_memory: bytes of memory to work in; None: a quarter of what is free.
        storage: a folder for the vectors of the iteration, as memory-mapped files, from which a solve that was killed
            goes on; None: memory, or a temporary folder where they would not fit.
        mesh: a DeviceMesh of one dimension, whose ranks share the rows (the first spatial axis) of x and of y.
        observed: ones or True where y was measured, an array with the spatial size of y (of this rank's rows), or with
            its channels; None: everywhere.

    Attributes:
        memory: an estimate of the bytes that a solve takes on every rank.
        path: "tiles"; "whole" for one border solve of the whole image, by the first rank; "pencil" for one that all
            ranks share.
        why: the reason of that choice.
        x_rows: the rows of x that this rank has, a slice.
        y_rows: the rows of y that this rank has, a slice.

    Raises:
        ArgumentError, ShapeError, DtypeError, ArgumentTypeError: arguments that do not fit.
        MethodError: A or L that tiles do not serve.
        PlanMemoryError: the smallest tile needs more than ``max_memory``.

    Source:
        Cai and Sarkis, "A restricted additive Schwarz preconditioner", SIAM J. Sci. Comput. 21 (1999).

    Example:
        >>> kernel = lsconv.psf.gaussian(1.5).float()
        >>> y = torch.rand(120, 130)
        >>> plan = lsconv.tiled.Plan(kernel, (120, 130), damp=0.1, padding="same", tile=64)
        >>> solution = plan.solve(y)
        >>> A = lsconv.Conv2d(kernel[None, None], (120, 130), padding="same")
        >>> bool(solution.converged), bool(torch.dist(solution.x, lsconv.lstsq(A, y[None], damp=0.1).x[0]) < 1e-4)
        (True, True)
    """

    def __init__(
        self,
        A: LinearOperator | Tensor,
        in_size: int | Sequence[int] | None = None,
        damp: float | Tensor | None = None,
        *,
        L: LinearOperator | None = None,
        padding: Any = 0,
        padding_mode: str = "zeros",
        tile: int | Sequence[int] | None = None,
        overlap: int | str = "auto",
        max_memory: int | None = None,
        storage: str | Path | None = None,
        mesh: DeviceMesh | None = None,
        observed: ArrayLike | None = None,
    ) -> None:
        self.channels = not (isinstance(A, Tensor) and in_size is not None and A.ndim == _ndim(in_size))
        self.A = check_operator(A, in_size, padding, padding_mode)
        self.damp = _check_damp(damp)
        self.L = L
        self.terms = penalty_terms(self.A, L)
        self.ranks = Ranks(mesh, self.A.device)
        self.x_rows = self.ranks.rows(self.A.spatial_in[0])
        self.y_rows = self.ranks.rows(self.A.spatial_out[0])
        if self.ranks.size > self.A.spatial_in[0]:
            raise ArgumentError(f"mesh: {self.ranks.size} ranks for the {self.A.spatial_in[0]} rows of x; use fewer")
        self.storage = None if storage is None else Path(storage)
        self.max_memory = self.ranks.minimum(free_bytes(self.A.device) // 4 if max_memory is None else int(max_memory))
        problem = TiledProblem(
            A=self.A, terms=tuple(self.terms), damp=self.damp, tile=tile, overlap=overlap, max_memory=self.max_memory,
            ranks=self.ranks, rows=self.x_rows, masked=observed is not None, stored=self.storage is not None,
        )  # fmt: skip
        strategy = Strategy.choose(problem)
        self.strategy, self.path, self.why, self.memory = strategy, strategy.path, strategy.why, strategy.bytes
        self.wraps = strategy.wraps
        self.observed = None if observed is None else self._mask_field(observed)
        self.passes = Passes(
            self.A, self.terms, self.damp, strategy.axes, strategy.overlap, self.wraps, self.ranks,
            threaded=strategy.out_of_core, symmetric=strategy.symmetric, whole_inverse=self.path == "pencil",
            limits=strategy.limits,
        )  # fmt: skip
        self.untiled = None
        if self.path != "tiles" and strategy.untiled_fits:
            self.untiled = UntiledPlan(self.A, self.terms, L, self.damp, self.max_memory)
        self._norm: float | None = None

    # ------------------------------------------------------------------ answers

    def solve(
        self,
        y: ArrayLike,
        out: ArrayLike | None = None,
        rtol: float | None = None,
        progress: bool = False,
        max_iter: int = 200,
    ) -> Solution:
        """The solution for ``y``, ``(*batch, *out_shape)``, with the certificate of the whole problem.

        Args:
            y: the data, of this rank's rows: a tensor, a numpy array or memory map, or anything with shape and dtype
                that is read by slices, such as a Zarr array. Integers are read as numbers of A's dtype.
            out: an array of the shape of x (of this rank's rows) to write to, by slices; None: a tensor of A's dtype.
            rtol: relative tolerance of residual or gradient, and of x; None: 1e-6 in float32, 1e-10 in float64.
            progress: show a bar, by tiles.
            max_iter: limit on the outer steps.

        Returns:
            A :class:`Solution` whose x is ``out``, and whose norms and status are those of the whole image.

        Raises:
            ShapeError, DtypeError: y or out do not fit.
            NonFiniteError: y has NaN or infinity; the message names the tile.
            RankError: another rank has failed, or does not answer.
        """
        batch = self.check(y)
        shape = (*batch, *self.item_shape(self.A.c_in, self.A.spatial_in, self.x_rows))
        if out is None:
            out = torch.empty(shape, dtype=self.A.dtype, device=self.A.device)
        elif tuple(out.shape) != shape:
            raise ShapeError(f"out: expected shape {shape}, of x on this rank, got {tuple(out.shape)}")
        tolerances = Tolerances.of(self.A.dtype, direct_rtol(self.A.dtype, rtol), 0.0)
        found = []
        with Progress(self, progress) as bar, torch.no_grad():
            self.passes.tick = bar.tick
            for item in itertools.product(*map(range, batch)):
                data = self.field(y, self.A.spatial_out, self.y_rows, item)
                target = self.field(out, self.A.spatial_in, self.x_rows, item)
                found.append(self._solve(data, target, item, batch, tolerances, max_iter))
        solution = batch_solution(
            out, batch, self.A.device,
            codes=[c.status.code for c in found],
            converged=[c.holds for c in found],
            iterations=[c.iterations for c in found],
            residual_norm=[c.norms.residual for c in found],
            gradient_norm=[c.norms.gradient for c in found],
            damp=self.damp,
        )  # fmt: skip
        report(solution, self)
        return solution

    def _solve(
        self, y: Field, out: Field, item: tuple[int, ...], batch: tuple[int, ...], tolerances: Tolerances, max_iter: int
    ) -> WholeCertificate:
        """Solve for one batch item."""
        regions = self.passes.gradient_regions, self.passes.tile_regions
        needed = [r.output_rows() for r in regions]
        for field in (y, self.observed):
            if field is not None:
                self.ranks.exchange(field, (min(n[0] for n in needed), max(n[1] for n in needed)))
        shape = (self.A.c_in, out.rows, *self.A.spatial_in[1:])
        options = {"channels": True, "wraps": self.wraps, "first": self.x_rows.start, "device": self.A.device}
        with self.folder(item) as folder:
            vectors = Storage(
                folder, self._problem_digest(batch), shape, self.A.dtype, size=self.A.spatial_in, **options
            )
            iteration = Iteration(
                self.passes, vectors, y, self.observed, self._judge(tolerances), rtol=tolerances.rtol,
                first_pass_error=self._first_pass_error(),
            )  # fmt: skip
            write_first_x = None
            if self.path != "tiles":
                write_first_x = functools.partial(self._first_iterate, vectors, y, tolerances.rtol)
            certificate = iteration.run(max_iter, write_first_x)
            self.passes.update([iteration.x, out], lambda x: [None, x], reads=1)
            vectors.remove()
        return certificate

    @contextlib.contextmanager
    def folder(self, item: tuple[int, ...] = ()) -> Iterator[Path | None]:
        """The folder for the vectors of a batch item, a temporary one where the user gave none; None: memory."""
        if self.storage is None and self.strategy.out_of_core:
            with tempfile.TemporaryDirectory(prefix="lsconv-") as name:
                yield Path(name)
        else:
            yield self.storage / "-".join(map(str, item)) if self.storage is not None and item else self.storage

    def _first_iterate(self, vectors: Storage, y: Field, rtol: float, x: Field) -> float:
        """Write a first x by one solve of the whole image, and return a bound of its relative error."""
        if self.path == "pencil":
            g, tolerance = vectors.vector("g", double(self.A.dtype)), max(0.1 * rtol, 1e-8)
            self.passes.update([x], lambda here: [torch.zeros_like(here)])
            self.passes.gradient(x, y, self.observed, g)
            self.passes.precondition(g, x, tolerance)
            if self.passes.pencil.residual <= 1e3 * tolerance or self.untiled is None:
                return 1.0
            self.path, self.passes.whole_inverse = "whole", False
            self.why += "; its border did not converge there, and one rank can have the whole"
        assert self.untiled is not None
        self.untiled.write(self.ranks, y, x, rtol)
        return 0.0

    # ------------------------------------------------------------------ checks and descriptions

    def check(self, y: ArrayLike) -> tuple[int, ...]:
        """Check y, and return its batch dimensions."""
        if not (hasattr(y, "shape") and hasattr(y, "dtype") and hasattr(y, "__getitem__")):
            raise ArgumentTypeError(f"y: expected a tensor or an array read by slices, got {type(y).__name__}")
        wanted = self.item_shape(self.A.c_out, self.A.spatial_out, self.y_rows)
        shape = tuple(int(n) for n in y.shape)
        if shape[len(shape) - len(wanted) :] != wanted or len(shape) < len(wanted):
            several = self.ranks.size > 1
            rows = f" (rows {self.y_rows.start}:{self.y_rows.stop} of rank {self.ranks.rank})" if several else ""
            raise ShapeError(f"y: expected (*batch, {', '.join(map(str, wanted))}){rows}, got {shape}")
        name = str(y.dtype).removeprefix("torch.")
        if "complex" in name or (name.endswith("float64") and double(self.A.dtype) != self.A.dtype):
            raise DtypeError(f"y: {name} does not fit a kernel of {self.A.dtype}; convert one of them")
        return shape[: len(shape) - len(wanted)]

    def item_shape(self, channels: int, size: Sequence[int], rows: slice) -> tuple[int, ...]:
        """The shape of these rows of x or y, without the axis of channels where the user's arrays have none."""
        lead = (channels,) if self.channels else ()
        return (*lead, rows.stop - rows.start, *size[1:])

    def field(self, array: ArrayLike, size: Sequence[int], rows: slice, item: tuple[int, ...] = ()) -> Field:
        """Wrap an array of these rows of x or y as a :class:`Field`."""
        return Field(
            array, size, channels=self.channels, wraps=self.wraps, first=rows.start, item=item, dtype=self.A.dtype,
            device=self.A.device,
        )  # fmt: skip

    def _mask_field(self, observed: ArrayLike) -> Field:
        """Check the mask ``observed``, and wrap it as a :class:`Field`."""
        plane = self.item_shape(self.A.c_out, self.A.spatial_out, self.y_rows)[-self.A.ndim :]
        shape = tuple(int(n) for n in observed.shape)
        if shape not in (plane, (self.A.c_out, *plane)):
            raise ShapeError(f"observed: expected shape {plane}, or that with {self.A.c_out} channels, got {shape}")
        return Field(
            observed, self.A.spatial_out, channels=len(shape) > len(plane), wraps=self.wraps, first=self.y_rows.start,
            dtype=self.A.dtype, device=self.A.device,
        )  # fmt: skip

    def _first_pass_error(self) -> float:
        """The relative error that the first pass is known to leave; 1 where none is known."""
        if self.observed is not None:
            return 1.0
        return self.strategy.first_pass_error if self.path == "tiles" else 1.0

    def _judge(self, tolerances: Tolerances) -> Judge:
        """The tests of the certificate, with a lower bound of ||A|| from a part of the field, estimated once."""
        if self._norm is None:
            size = [min(n, max(4 * k, 64)) for n, k in zip(self.A.spatial_in, self.A.kernel_extent, strict=True)]
            A = Convolution(self.passes.A_double.weight, size, dilation=self.A.dilation, groups=self.A.groups)
            self._norm = float(norm_from_below(A))
        A = self.passes.A_double
        upper = max(float(norm_bound(A)), self._norm)
        return Judge(A, tolerances, self.damp, norm=NormBounds(math.hypot(self._norm, self.damp), upper))

    def _problem_digest(self, batch: tuple[int, ...]) -> str:
        """A hash by which a restart tells whether the files of a folder are of this problem."""
        digest = hashlib.sha256(np.ascontiguousarray(self.A.weight.detach().cpu().numpy()).tobytes())
        description = (
            self.A,
            self.damp,
            repr(self.L),
            batch,
            self.ranks.rank,
            self.ranks.size,
            self.A.padding,
            self.A.dilation,
        )
        digest.update(repr(description).encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        tiles = " x ".join(str(axis.count) for axis in self.strategy.axes)
        overlap = ", ".join(map(str, sorted(set(self.strategy.overlap))))
        ranks = f", rank {self.ranks.rank} of {self.ranks.size}" if self.ranks.size > 1 else ""
        return (
            f"Plan({self.A.in_shape} -> {self.A.out_shape}, damp={self.damp:g}, path={self.path!r} because {self.why}; "
            f"{tiles} tiles of {self.passes.tile_regions.size} overlapping by {overlap}{ranks}, about "
            f"{self.memory / 2**20:.0f} MiB)"
        )


def _ndim(in_size: int | Sequence[int]) -> int:
    return 1 if isinstance(in_size, int) else len(in_size)


def _check_damp(damp: Any) -> float:
    value = math.nan if damp is None else float(damp)
    if not 0 < value < math.inf:
        raise ArgumentError(
            f"damp: expected a number > 0, because a tile has no unique answer without damping, got {damp}"
        )
    return value
