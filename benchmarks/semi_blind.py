"""Semi-blind: how well does an image tell its own blur, and what does a restoration lose by not knowing it?

Eight photographs of scikit-image that no default was chosen on, each under every blur and noise, cut to the pixels that
the blur knows. The parameters are found by :func:`lsconv.estimate_psf`; PSNR is that of :func:`lsconv.deconvolve` with
the PSF found and with the true one, damp chosen by GCV for both.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Table
from lsconv import psf

PHOTOGRAPHS = ("camera.png", "chelsea.png", "coins.png", "rocket.jpg", "motorcycle_left.png", "brick.png", "grass.png",
               "cell.png")  # fmt: skip
NOISES = (0.003, 0.02)
BLURS: dict[str, tuple[str, Tensor, dict[str, float]]] = {
    "gaussian 1.2": ("gaussian", psf.gaussian(1.2), {"sigma": 1.2}),
    "gaussian 2.5": ("gaussian", psf.gaussian(2.5), {"sigma": 2.5}),
    "disk 2.5": ("disk", psf.disk(2.5), {"radius": 2.5}),
    "disk 5": ("disk", psf.disk(5.0), {"radius": 5.0}),
    "motion 9 at 30°": ("motion", psf.motion(9.0, 30.0), {"length": 9.0, "angle": 30.0}),
}
# Errors that the goals allow: relative, of the angle in degrees.
ALLOWED = {"sigma": 0.1, "radius": 0.05, "length": 0.1, "angle": 5.0}


def photograph(name: str, size: tuple[int, int]) -> Tensor:
    """The middle of a photograph in grey, in [0, 1]."""
    from pathlib import Path

    from skimage import data, io

    pixels = np.asarray(io.imread(Path(data.data_dir) / name), dtype=np.float64) / 255
    grey = torch.from_numpy(pixels if pixels.ndim == 2 else pixels[..., :3].mean(-1))
    top, left = ((have - want) // 2 for have, want in zip(grey.shape, size, strict=True))
    return grey[top : top + size[0], left : left + size[1]]


def case(name: str, blur: str, noise: float, size: int = 256) -> dict[str, Any]:
    """One photograph under one blur and noise."""
    model, kernel, truth = BLURS[blur]
    scene = photograph(name, (size + kernel.shape[0] - 1, size + kernel.shape[1] - 1))
    A = lsconv.blur_operator(kernel, (size, size))
    generator = torch.Generator().manual_seed(0)
    image = A(scene[None])[0] + noise * torch.randn(size, size, dtype=torch.float64, generator=generator)
    start, begun = time.process_time(), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        found = lsconv.estimate_psf(image, model)
    spent, passed = time.process_time() - start, time.perf_counter() - begun
    first = [k // 2 for k in kernel.shape]
    middle = scene[first[0] : first[0] + size, first[1] : first[1] + size]

    def psnr(kernel: Tensor) -> float:
        x = lsconv.deconvolve(image, kernel).x
        return float(-10 * torch.log10((x - middle).square().mean()))

    errors = {p: found.parameters[p] - value for p, value in truth.items()}
    errors = {p: (e + 90) % 180 - 90 if p == "angle" else e for p, e in errors.items()}
    return {
        "photograph": name.partition(".")[0],
        "blur": blur,
        "noise %": 100 * noise,
        "found": str(found),
        "error": {p: e if p == "angle" else e / truth[p] for p, e in errors.items()},
        "in standard errors": {p: e / found.std[p] for p, e in errors.items()},
        "status": found.status.name,
        "PSNR lost dB": psnr(kernel) - psnr(found.psf),
        "CPU s": spent,
        "seconds": passed,
    }


def summary(rows: list[dict[str, Any]], blur: str, noise: float) -> dict[str, Any]:
    """One blur and noise over the photographs."""
    first = next(iter(rows[0]["error"]))
    median = float(np.median([row["error"][first] for row in rows]))
    within = [all(abs(e) <= ALLOWED[p] for p, e in row["error"].items()) for row in rows]
    sure = [good for row, good in zip(rows, within, strict=True) if row["status"] == "FOUND"]
    scores = [abs(z) for row in rows for z in row["in standard errors"].values()]
    lost = [row["PSNR lost dB"] for row in rows]
    return {
        "blur": blur,
        "noise %": 100 * noise,
        "photographs": len(rows),
        "median error %": 100 * median,
        "worst %": 100 * max(abs(row["error"][first]) for row in rows),
        "within the goal": f"{sum(within)} of {len(rows)}",
        "in the 90 % interval": f"{sum(z <= 1.645 for z in scores)} of {len(scores)}",
        "found": f"{len(sure)} of {len(rows)}",
        "of these within": f"{sum(sure)} of {len(sure)}",
        "PSNR lost dB": float(np.median(lost)),
        "at most": max(lost),
        "CPU s": float(np.median([row["CPU s"] for row in rows])),
    }


def own_blur(name: str, size: int = 256) -> dict[str, Any]:
    """The Gaussian blur that a photograph shows before it is blurred."""
    scene = photograph(name, (size, size))
    noise = NOISES[0] * torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        found = lsconv.estimate_psf(scene + noise, "gaussian")
    return {"photograph": name.partition(".")[0], "found": str(found), "status": found.status.name}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its errors spelled out."""
    said = {p: f"{e:+.1f}°" if p == "angle" else f"{100 * e:+.1f} %" for p, e in row["error"].items()}
    scores = ", ".join(f"{z:+.1f}" for z in row["in standard errors"].values())
    return {**row, "error": ", ".join(said.values()), "in standard errors": scores}


def large(name: str, blur: str) -> dict[str, Any]:
    """The time of an image of 512²."""
    model, kernel, _ = BLURS[blur]
    scene = photograph(name, (512, 512))
    A = lsconv.blur_operator(kernel, (512, 512), boundary="periodic")
    image = A(scene[None])[0] + 0.003 * torch.randn(512, 512, dtype=torch.float64)
    start, begun = time.process_time(), time.perf_counter()
    found = lsconv.estimate_psf(image, model)
    return {"blur": blur, "found": str(found), "CPU s": time.process_time() - start,
            "seconds": time.perf_counter() - begun}  # fmt: skip


def tables(quick: bool) -> Iterator[Table]:
    """A summary, every case, and the time of a larger image."""
    names = PHOTOGRAPHS[:1] if quick else PHOTOGRAPHS
    cases, sums = [], []
    for blur in list(BLURS)[: 1 if quick else None]:
        for noise in NOISES:
            rows = [case(name, blur, noise, 128 if quick else 256) for name in names]
            cases += rows
            sums.append(summary(rows, blur, noise))
    yield Table(
        "The parameters found, and what the restoration loses",
        sums,
        "Errors of sigma, radius, length. The goal is 10 % for sigma and length, 5 % for the radius, 5° for the angle.",
    )
    yield Table(
        "The blur that the photographs show before they are blurred",
        [own_blur(name) for name in names],
        "Blurs add as squares: sigma 3.6 of its own under a blur of 1.2 is 3.8, which is counted as an error above.",
    )
    yield Table("Every case", [shown(row) for row in cases])
    if not quick:
        yield Table("The time of 512²", [large("camera.png", blur) for blur in list(BLURS)[::2]])
