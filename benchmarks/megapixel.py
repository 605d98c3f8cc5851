"""A megapixel: what does it take to restore a picture of 1024² with nothing to choose, in seconds and in memory?

The picture is scikit-image's camera at twice its size, blurred by a Gaussian of 15×15 pixels, with noise of 1 % and
unknown surroundings, in float32; damp or weight are chosen automatically. Each row has a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks.memory import forget_peak, resident
from benchmarks.runner import Table

_MIB = 2**20
_PSF = 15


def scene(size: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The truth ``(channels, field, field)``, the PSF, and the picture ``(channels, size, size)``."""
    from skimage import data

    camera = torch.from_numpy(data.camera()).double() / 255
    field = size + _PSF - 1
    truth = torch.nn.functional.interpolate(camera[None, None], (field, field), mode="bicubic")[0].clamp(0, 1)
    # colours that are different pictures: the camera, turned
    truth = torch.cat([torch.rot90(truth, quarter, (1, 2)) for quarter in range(channels)])
    profile = torch.exp(-0.5 * ((torch.arange(_PSF, dtype=torch.float64) - _PSF // 2) / 2.5) ** 2)
    psf = profile[:, None] * profile / profile.sum() ** 2
    y = lsconv.blur_operator(psf, (size, size), channels=channels)(truth)
    generator = torch.Generator().manual_seed(0)
    y = y + 0.01 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return truth.float(), psf.float(), y.float()


def measure(prior: str, size: int, channels: int, threads: int) -> dict[str, Any]:
    """One restoration, meant for a fresh process; a small one before it loads the libraries."""
    torch.set_num_threads(threads)
    truth, psf, y = scene(size, channels)
    lsconv.deconvolve(y[:, :96, :96].contiguous(), psf, prior=prior, channels="first")
    before = forget_peak()
    start, spent = time.perf_counter(), time.process_time()
    solution = lsconv.deconvolve(y, psf, prior=prior, channels="first")
    seconds, spent, peak = time.perf_counter() - start, time.process_time() - spent, resident()["peak"]
    half = _PSF // 2
    inner = truth[:, half:-half, half:-half]
    psnr = [float(-10 * torch.log10((picture - inner).square().mean())) for picture in (y, solution.x)]
    given: dict[str, Any] = {} if prior == "tv" else {"damp": float(solution.damp)}
    if given:
        start = time.perf_counter()
        lsconv.deconvolve(y, psf, prior=prior, channels="first", **given)
    return {
        "picture": f"{size}²" + (f" × {channels}" if channels > 1 else ""),
        "prior": prior,
        "seconds": seconds,
        "CPU seconds": spent,
        "with its damp given": time.perf_counter() - start if given else None,
        "peak MiB": (peak - before) / _MIB,
        "pictures": (peak - before) / (y.numel() * 4),
        "PSNR before": f"{psnr[0]:.2f}",
        "PSNR after": f"{psnr[1]:.2f}",
        "converged": str(bool(solution.converged.all())),
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table, a fresh process a row."""
    size = 128 if quick else 1024
    cases = [("gradient", size, 1), ("tikhonov", size, 1), ("tv", size, 1), ("gradient", size, 3)][2 if quick else 0 :]
    root = Path(__file__).parents[1]
    rows = []
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.megapixel", json.dumps([*case, torch.get_num_threads()])]
        rows.append(json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout))
    yield Table(
        f"deconvolve on {size}², 15×15 PSF, unknown boundary, float32, everything automatic",
        rows,
        "Peak: of the process's resident size, above that before; pictures: the same in float32 pictures of that size.",
    )


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
