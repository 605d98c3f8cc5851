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
from lsconv.app.batch import Advance
from lsconv.app.picture import ImageFileError, rounded, working_dtype
from lsconv.app.restore import Restoration
from lsconv.app.stored import opened, written

__all__ = ["TiledRestoration"]


@dataclass(frozen=True)
class TiledRestoration:
    """Restore files by tiles; called with the name of the image to read and that of the one to write.

    Attributes:
        work: the options of the restoration, some of which are refused.
        tile: the side of a tile in pixels.
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
            raise UsageError(f"--tile: is not served with {', '.join(given)}; leave out one or the other")
        if work.rule() == 0:
            raise UsageError("--damp 0: --tile needs a number > 0, or a rule")

    def __call__(self, image: Path, target: Path, advance: Advance = lambda *_: None) -> tuple[str, bool]:
        """Restore one file, as a :data:`~lsconv.app.batch.Work`."""
        ndim, kernel = self.work.kernel.ndim, self.work.kernel
        stored = opened(image)
        order = stored.planes_first(ndim)
        planes = stored.read_as(order)
        size = tuple(planes.shape[-ndim:])
        self.work.check_size(size)
        psf = kernel.values.to(device=self.work.device, dtype=working_dtype(stored.array.dtype))
        A: Any = lsconv.blur_operator(psf, size, boundary=self.work.boundary, origin=self.work.origin)
        rule = self.work.rule()
        damp, chosen = (rule, "") if isinstance(rule, float) else self._damp_of_sample(psf, planes, rule)
        # The same command continues from this folder after an interruption.
        folder = target.parent / f".{target.name}.tiles"
        plan = lsconv.tiled.Plan(
            A.weight[0, 0], A.spatial_in, damp=damp, L=self.work.gradient(A), padding=A.padding,
            padding_mode=A.padding_mode, tile=self.tile, max_memory=self.work.max_memory, storage=folder,
        )  # fmt: skip
        advance("solving", 0, 1)
        start = [0] * ndim
        if self.work.boundary == "unknown":
            known = lsconv.blur_operator(psf, kernel.size, boundary="zero", origin=self.work.origin)
            start = [before for before, _ in known.padding]
        try:
            with written(target, stored, folder) as (array, axes):
                out = _Output(array, axes, order, A.spatial_in, size, start)
                solution = plan.solve(planes, out=out, progress=not self.quiet and sys.stderr.isatty())
        except (ImageFileError, lsconv.LsconvError):  # a restart would meet the same error
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        steps = int(solution.iterations.max())
        line = (
            f"{target}: PSF {'×'.join(map(str, kernel.size))}, boundary {self.work.boundary}, prior {self.work.prior}, "
            f"damp {damp:.3g}{chosen}, tiles of {'×'.join(map(str, plan.passes.tile_regions.size))}, {steps} step(s)"
        )
        return (line + f"\n  {plan}" if self.work.verbose else line), bool(solution.converged.all())

    def _damp_of_sample(self, psf: Tensor, planes: Any, rule: str) -> tuple[float, str]:
        """The damping that the rule chooses on a sample of windows together, and words about the choice.

        The windows, whose surroundings are unknown, are the groups of one convolution: their squared residuals and
        traces of the influence add up, and estimate those of the whole image.
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
    """A sample of windows of the image, ``(windows, *size)``, for the choice of damp.

    A long axis has three windows along it, evenly spaced, any other one of its whole length. Successive windows are cut
    from planes spread over the leading axes.

    Args:
        planes: the image, ``(*leading, *size)``.
        ndim: number of spatial axes.
        kernel: spatial size of the PSF.
    """
    most, part = {1: (16384, 4096), 2: (512, 192), 3: (128, 64)}[ndim]
    along = []
    for n, k in zip(planes.shape[-ndim:], kernel, strict=True):
        length = n if n <= max(most, 4 * k) else max(part, 4 * k)
        firsts = [0] if length == n else [round((2 * i + 1) * n / 6 - length / 2) for i in range(3)]
        along.append([slice(first, first + length) for first in firsts])
    windows, leading = list(itertools.product(*along)), planes.shape[:-ndim]
    samples = []
    for i, cells in enumerate(windows):
        plane = (2 * i + 1) * math.prod(leading) // (2 * len(windows))
        index: Any = (*map(int, np.unravel_index(plane, leading) if leading else ()), *cells)
        samples.append(np.array(planes[index], dtype=np.float64))
    return torch.from_numpy(np.stack(samples))


class _Output:
    """The output of a plan: keeps the pixels of the field that lie in the image, rounded to the file's number type.

    Args:
        array: the array in the file, written by integers and slices.
        axes: for each axis of the array, the axis of the input image that it is.
        order: the axes of the input image in the order in which they are restored, the spatial ones last.
        field: spatial size of the field.
        size: spatial size of the image.
        start: the first cell of the field that lies in the image.

    Attributes:
        shape: the batch dimensions and the spatial size of the field.
        dtype: the number type of the answer.
    """

    dtype = np.dtype(np.float64)

    def __init__(
        self, array: Any, axes: Sequence[int], order: Sequence[int], field: Sequence[int], size: Sequence[int],
        start: Sequence[int],
    ) -> None:  # fmt: skip
        self._array, self._start, self._size = array, tuple(start), tuple(size)
        self._axes = [list(order).index(axis) for axis in axes]
        lengths = dict(zip(self._axes, array.shape, strict=True))
        self.shape = (*(lengths[axis] for axis in range(len(order) - len(field))), *field)

    def __getitem__(self, cells: Any) -> np.ndarray[Any, Any]:
        """Raise NotImplementedError: a plan only writes its output."""
        raise NotImplementedError

    def __setitem__(self, cells: Any, values: np.ndarray[Any, Any]) -> None:
        """Write the part of the values that lies within the image."""
        leading, spatial = cells[: -len(self._size)], cells[-len(self._size) :]
        source, target = [], []
        for region, start, n in zip(spatial, self._start, self._size, strict=True):
            low, high = max(region.start, start), min(region.stop, start + n)
            if low >= high:
                return
            source.append(slice(low - region.start, high - region.start))
            target.append(slice(low - start, high - start))
        part, index = values[tuple(source)], (*leading, *target)
        self._array[tuple(index[axis] for axis in self._axes)] = rounded(part, self._array.dtype)
