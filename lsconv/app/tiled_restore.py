"""The restoration of one file larger than memory by ``lsconv deblur --tile``: read and written by slices."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from lsconv.app.arguments import UsageError
from lsconv.app.picture import ImageFileError, rounded
from lsconv.app.restore import Advance, Restoration
from lsconv.app.stored import opened, written

__all__ = ["TiledRestoration"]


@dataclass(frozen=True)
class TiledRestoration:
    """The options of a restoration by tiles; called with the names of a file and of what to write.

    Attributes:
        work: the restoration, of which tiles serve a part.
        tile: cells of a tile.
        quiet: show no progress.
    """

    work: Restoration
    tile: int
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.tile < 1:
            raise UsageError(f"--tile {self.tile}: expected a number of pixels >= 1")
        work = self.work
        refused = {
            f"--prior {work.prior}": work.prior != "gradient",
            f"--boundary {work.boundary}": work.boundary == "reflect",
            "--noise poisson": work.noise == "poisson",
            "--plot": work.plot,
            "--report": work.report,
            "--error-bars": work.error_bars,
            "--bad-pixels": work.bad_pixels,
            "--saturated": work.saturated,
            "--min, --max, --nonnegative": work.bounds != (None, None),
            "--psf auto": work.kernel.model,
            "--psf-grid": work.kernel.positions is not None,
            "a PSF per channel": work.kernel.channels,
            "--background": work.background,
            "--offset": work.offset,
        }
        given = [name for name, value in refused.items() if value]
        if given:
            raise UsageError(f"--tile: is not served with {', '.join(given)}")
        if work.rule() == 0:
            raise UsageError("--damp 0: --tile needs a number > 0")

    def __call__(self, image: Path, target: Path, advance: Advance = lambda *_: None) -> tuple[str, bool]:
        """Restore one file; answers a line about it, and whether every solve converged."""
        ndim, kernel = self.work.kernel.ndim, self.work.kernel
        stored = opened(image)
        order = stored.planes_first(ndim)
        planes = stored.read_as(order)
        size = tuple(planes.shape[-ndim:])
        if self.work.boundary != "zero" and any(k > n for k, n in zip(kernel.size, size, strict=True)):
            raise UsageError(f"psf: its size {kernel.size} exceeds that of the image, {size}")
        wide = stored.array.dtype.itemsize > 4 or (stored.array.dtype.kind in "iu" and stored.array.dtype.itemsize == 4)
        psf = kernel.values.to(device=self.work.device, dtype=torch.float64 if wide else torch.float32)
        A = self._blur(psf, size)
        rule = self.work.rule()
        damp, chosen = (rule, "") if isinstance(rule, float) else self._damp_of_sample(psf, planes, rule)
        # a restart with the same command finds here what was done
        folder = target.parent / f".{target.name}.tiles"
        plan = lsconv.tiled.Plan(
            A.weight[0, 0], A.spatial_in, damp=damp, L=self._penalty(A), padding=A.padding, padding_mode=A.padding_mode,
            tile=self.tile, max_memory=self.work.max_memory, storage=folder,
        )  # fmt: skip
        advance("solving", 0, 1)
        start = [0] * ndim
        if self.work.boundary == "unknown":
            known = lsconv.blur_operator(psf, kernel.size, boundary="zero", origin=self.work.origin)
            start = [before for before, _ in known.padding]
        try:
            with written(target, stored, folder) as (array, place):
                out = _Output(array, place, order, A.spatial_in, size, start)
                solution = plan.solve(planes, out=out, progress=not self.quiet and sys.stderr.isatty())
        except (ImageFileError, lsconv.LsconvError):  # which a restart would meet again
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        steps = int(solution.iterations.max())
        line = (
            f"{target}: PSF {'×'.join(map(str, kernel.size))}, boundary {self.work.boundary}, prior {self.work.prior}, "
            f"damp {damp:.3g}{chosen}, tiles of {'×'.join(map(str, plan.passes.tile_regions.size))}, {steps} step(s)"
        )
        return (line + f"\n  {plan}" if self.work.verbose else line), bool(solution.converged.all())

    def _blur(self, psf: Tensor, size: Sequence[int]) -> Any:
        return lsconv.blur_operator(psf, tuple(size), boundary=self.work.boundary, origin=self.work.origin)

    def _penalty(self, A: Any) -> lsconv.Gradient:
        edge = "periodic" if self.work.boundary == "periodic" else "neumann"
        return lsconv.Gradient(A.in_shape, ndim=A.ndim, boundary=edge, dtype=A.dtype, device=A.device)

    def _damp_of_sample(self, psf: Tensor, planes: Any, rule: str) -> tuple[float, str]:
        """The damping that the rule chooses on a sample of windows together, and words about it.

        The windows, whose surroundings are unknown, are groups of one convolution: their squared residuals and
        influences add up, and estimate those of the whole.
        """
        sample = _windows(planes, self.work.kernel.ndim, self.work.kernel.size).to(psf)
        count, size = sample.shape[0], sample.shape[1:]
        one: Any = lsconv.blur_operator(psf, tuple(size), origin=self.work.origin)
        A = lsconv.Convolution(
            one.weight.expand(count, *one.weight.shape[1:]), one.spatial_in, padding=one.padding, groups=count,
            padding_mode=one.padding_mode,
        )  # fmt: skip
        L = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=A.dtype, device=A.device)
        chosen = lsconv.choose_damp(A, sample, rule, L=L, noise_std=self.work.noise_std)
        value = float(chosen.values[(chosen.damps - chosen.damp).abs().argmin()])
        where = f"{count} window(s) of {'×'.join(map(str, size))}"
        return float(chosen.damp), f" (by {rule} on {where}, where it is {value:.3g})"


def _windows(planes: Any, ndim: int, kernel: Sequence[int]) -> Tensor:
    """A sample of the image, ``(windows, *size)``: three along every axis that is long, each of another plane."""
    longest, part = {1: (16384, 4096), 2: (512, 192), 3: (128, 64)}[ndim]
    along = []
    for n, k in zip(planes.shape[-ndim:], kernel, strict=True):
        length = n if n <= max(longest, 4 * k) else max(part, 4 * k)
        firsts = [0] if length == n else [round((2 * i + 1) * n / 6 - length / 2) for i in range(3)]
        along.append([slice(first, first + length) for first in firsts])
    found, lead = list(itertools.product(*along)), planes.shape[:-ndim]
    places = [np.unravel_index((2 * i + 1) * math.prod(lead) // (2 * len(found)), lead) if lead else ()
              for i in range(len(found))]  # fmt: skip
    parts = []
    for at, cells in zip(places, found, strict=True):
        index: Any = (*map(int, at), *cells)
        parts.append(np.array(planes[index], dtype=np.float64))
    return torch.from_numpy(np.stack(parts))


class _Output:
    """The image's pixels of a field that is larger, rounded to the number type of the file.

    Args:
        array: of the file, read and written by integers and slices.
        place: the axis of the image read that each axis of the array is.
        order: the axes of the image read as they are restored, the field's last.
        field: spatial size of the field.
        size: spatial size of the image.
        start: the first cell of the field that is the image's.

    Attributes:
        shape: of the whole field, after the batch dimensions.
        dtype: that of the answer.
    """

    dtype = np.dtype(np.float64)

    def __init__(
        self, array: Any, place: Sequence[int], order: Sequence[int], field: Sequence[int], size: Sequence[int],
        start: Sequence[int],
    ) -> None:  # fmt: skip
        self._array, self._start, self._size = array, tuple(start), tuple(size)
        self._axes = [list(order).index(axis) for axis in place]
        lengths = dict(zip(self._axes, array.shape, strict=True))
        self.shape = (*(lengths[axis] for axis in range(len(order) - len(field))), *field)

    def __getitem__(self, cells: Any) -> np.ndarray[Any, Any]:
        """Refuse to read, which a plan does not do."""
        raise NotImplementedError

    def __setitem__(self, cells: Any, values: np.ndarray[Any, Any]) -> None:
        """Write the part of the values that lies within the image."""
        lead, cuts = cells[: -len(self._size)], cells[-len(self._size) :]
        inner, outer = [], []
        for cut, start, n in zip(cuts, self._start, self._size, strict=True):
            low, high = max(cut.start, start), min(cut.stop, start + n)
            if low >= high:
                return
            inner.append(slice(low - cut.start, high - cut.start))
            outer.append(slice(low - start, high - start))
        part, dtype, place = values[tuple(inner)], self._array.dtype, (*lead, *outer)
        found = rounded(part, dtype) if dtype.kind in "iu" else part.astype(dtype)
        self._array[tuple(place[axis] for axis in self._axes)] = found
