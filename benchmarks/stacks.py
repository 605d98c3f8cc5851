"""A stack of a microscope: how good and how dear is it with nothing to choose, against 30 steps of Richardson-Lucy?

Synthetic specimens, of which the stack shows a part; counts of photons as 16-bit integers. Every row has a process of
its own. Richardson-Lucy as scikit-image and RedLionfish (on a CPU) run it, thirty iterations each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.memory import forget_peak, resident
from benchmarks.runner import Table

Array = np.ndarray[Any, Any]

_PSF = (9, 15, 15)
_PEAK, _GAIN = 300.0, 20.0  # photons where the specimen is one, and grey levels of each
_EDGE = 10
_WAYS = ("lsconv", "scikit-image", "RedLionfish")


def specimen(name: str, size: tuple[int, ...]) -> Tensor:
    """Beads or filaments in a volume, from 0 to 1."""
    generator = torch.Generator().manual_seed(3)
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    truth = torch.zeros(size)
    share = size[1] * size[2] / 256**2
    if name == "beads":
        for at in torch.rand(round(150 * share), 5, generator=generator):
            away = 2 * (z - at[0] * size[0]) ** 2 + (y - at[1] * size[1]) ** 2 + (x - at[2] * size[2]) ** 2
            truth += (0.3 + 0.7 * at[3]) * (away < (2 + 4 * at[4]) ** 2)
    else:
        for at in torch.rand(round(25 * share**0.5), 6, generator=generator):
            row = size[1] * at[0] + (at[1] - 0.5) * 2 * x + 15 * torch.sin(x / (12 + 25 * at[2]))
            depth = size[0] * (at[3] + (at[4] - 0.5) * x / size[2])
            truth += (0.3 + 0.7 * at[5]) * torch.exp(-((y - row) ** 2) / 2.5 - (z - depth) ** 2)
    return truth.clamp_max(1)


def point_spread(name: str) -> Tensor:
    """A Gaussian, which is a product of its axes, or a cone of light, which is none."""
    z, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - n // 2 for n in _PSF), indexing="ij")
    if name == "gaussian":
        kernel = torch.exp(-(z**2) / (2 * 1.8**2) - (y**2 + x**2) / (2 * 2.0**2))
    else:
        width = 1.3 * (1 + (z / 2.5) ** 2).sqrt()
        kernel = torch.exp(-(y**2 + x**2) / (2 * width**2)) / width**2
    return kernel / kernel.sum()


def scene(name: str, psf: str, size: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """The truth under the stack in grey levels, the PSF, and the stack."""
    field = tuple(n + k - 1 for n, k in zip(size, _PSF, strict=True))
    truth, kernel = specimen(name, field), point_spread(psf)
    blurred = lsconv.blur_operator(kernel.float(), size)(truth[None])[0]
    photons = torch.poisson(_PEAK * (blurred.clamp_min(0) + 0.02), generator=torch.Generator().manual_seed(5))
    inside = tuple(slice(k // 2, k // 2 + n) for n, k in zip(size, _PSF, strict=True))
    stack = (_GAIN * photons).clamp_max(65535).numpy().astype(np.uint16)
    return _GAIN * _PEAK * truth[inside].double().numpy(), kernel.numpy(), stack


def restored(way: str, stack: Array, psf: Array) -> Array:
    """The stack as one of the ways restores it, less its background."""
    background = 0.02 * _GAIN * _PEAK
    if way == "lsconv":
        return lsconv.deconvolve(stack, psf, background=background).x.astype(float)
    image = np.clip(stack.astype(np.float32) - background, 0, None)
    if way == "scikit-image":
        from skimage.restoration import richardson_lucy

        scale = float(image.max())
        return richardson_lucy(image / scale, psf.astype(np.float32), num_iter=30, clip=False) * scale
    from RedLionfishDeconv import doRLDeconvolutionFromNpArrays

    with contextlib.redirect_stdout(io.StringIO()):
        return doRLDeconvolutionFromNpArrays(image, psf.astype(np.float32), niter=30, method="cpu")


def measure(way: str, name: str, psf: str, size: tuple[int, ...], threads: int) -> dict[str, Any]:
    """One restoration, meant for a fresh process; a small one before it loads the libraries."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    truth, kernel, stack = scene(name, psf, size)
    restored(way, np.ascontiguousarray(stack[:10, :32, :32]), kernel)
    before = forget_peak()
    start, spent = time.perf_counter(), time.process_time()
    x = restored(way, stack, kernel)
    seconds, spent, peak = time.perf_counter() - start, time.process_time() - spent, resident()["peak"]
    outer = np.ones(x.shape, dtype=bool)
    outer[:, _EDGE:-_EDGE, _EDGE:-_EDGE] = False
    error = (np.asarray(x, dtype=float) - truth) / (_GAIN * _PEAK)
    return {
        "specimen": name,
        "PSF": psf,
        "by": way,
        "seconds": seconds,
        "CPU seconds": spent,
        "peak MiB": (peak - before) / 2**20,
        "PSNR dB": f"{-10 * np.log10(np.square(error).mean()):.2f}",
        "error of the outer 10": f"{np.sqrt(np.square(error[outer]).mean()):.4f}",
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    size = (12, 48, 48) if quick else (32, 256, 256)
    ways = [way for way in _WAYS if way != "RedLionfish" or importlib.util.find_spec("RedLionfishDeconv")]
    rows = []
    for name in ("filaments",) if quick else ("filaments", "beads"):
        for psf in ("gaussian",) if quick else ("gaussian", "cone"):
            for way in ways:
                arguments = f"{way!r}, {name!r}, {psf!r}, {size!r}, {torch.get_num_threads()}"
                code = f"import json; from benchmarks.stacks import measure; print(json.dumps(measure({arguments})))"
                done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True,
                                      text=True, check=True)  # fmt: skip
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    yield Table(
        f"{'×'.join(map(str, size))}, 16 bits, PSF {'×'.join(map(str, _PSF))}",
        rows,
        "PSNR of the voxels of the stack, in units of the brightest; the error of the outer 10 voxels along the rows "
        "and columns in the same units. RedLionfish is left out where it is not installed.",
    )
