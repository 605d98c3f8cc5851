"""Photons: how good are restored counts, against Richardson-Lucy stopped at its best iteration?

Every scene is blurred and only the part whose pixels the blur knows is kept. Richardson-Lucy is stopped where the truth
says; with the plain and with a mirrored image, whichever turns out better. Nothing of lsconv's is set by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.restoration import Scene, doubled, mirrored
from benchmarks.runner import Table
from lsconv import psf

Array = np.ndarray[Any, Any]


def edge_error(scene: Scene, picture: Tensor | Array, width: int = 10) -> float:
    """Root mean square error of the outer pixels, relative to the scene's peak."""
    x, truth = torch.as_tensor(picture).double(), scene.framed(scene.truth)
    outer = torch.ones_like(truth, dtype=torch.bool)
    outer[width:-width, width:-width] = False
    return float((x - truth)[outer].square().mean().sqrt())


def photon_scenes(quick: bool) -> Iterator[tuple[Scene, float, float]]:
    """Eight scenes of photons in units of their peak, each with its peak and background in photons."""
    from skimage import data

    source = torch.from_numpy(data.camera().astype(np.float64) / 255)
    coins = torch.from_numpy(data.coins()[:288, :352].astype(np.float64) / 255)
    rows, columns = torch.meshgrid(*[torch.arange(150.0, dtype=torch.float64)] * 2, indexing="ij")
    generator = torch.Generator().manual_seed(7)
    beads, filaments = torch.zeros(150, 150, dtype=torch.float64), torch.zeros(150, 150, dtype=torch.float64)
    for row, column, radius, height in torch.rand(40, 4, generator=generator, dtype=torch.float64):
        away = (rows - 150 * row) ** 2 + (columns - 150 * column) ** 2
        beads += (0.3 + 0.7 * height) * (away < (1.5 + 4 * radius) ** 2)
    for start, slope, bend, height in torch.rand(14, 4, generator=generator, dtype=torch.float64):
        path = 150 * start + (slope - 0.5) * 2 * columns + 12 * torch.sin(columns / (10 + 20 * bend))
        filaments += (0.3 + 0.7 * height) * torch.exp(-((rows - path) ** 2) / 2)
    pictures = {
        "camera": source[60:210, 180:330], "coins": coins[20:170, 20:170], "beads": beads.clamp_max(1),
        "filaments": filaments.clamp_max(1),
    }  # fmt: skip
    cases = [("camera", 10), ("camera", 50), ("coins", 10), ("coins", 500), ("beads", 50), ("beads", 500),
             ("filaments", 10), ("filaments", 500)]  # fmt: skip
    kernel, background = psf.gaussian(1.6), 0.05
    for number, (name, peak) in enumerate(cases[: 1 if quick else None]):
        truth = pictures[name]
        A = lsconv.Conv2d(kernel.flip(0, 1)[None, None], in_size=tuple(truth.shape))
        mean = (peak * (A(truth[None])[0] + background)).clamp_min(0)
        y = torch.poisson(mean, generator=torch.Generator().manual_seed(number))
        yield Scene(f"{name}, peak {peak}", truth, kernel, y, A), peak, background * peak


def photon_contestants(scene: Scene, peak: float, background: float) -> dict[str, Array]:
    """Richardson-Lucy at its best iteration, scikit-image's automatic Wiener, and lsconv with nothing set by hand."""
    from scipy.signal import fftconvolve
    from skimage import restoration

    y, kernel = scene.y.numpy(), scene.kernel.numpy()

    def best_richardson_lucy(extended: Array, inner: tuple[slice, ...]) -> Array:
        x, best = np.full(extended.shape, max(extended.mean() - background, 1e-3)), (-np.inf, extended, 0)
        ones = fftconvolve(np.ones_like(extended), kernel, "same")
        for count in range(1, 601):
            ratio = extended / (fftconvolve(x, kernel, "same").clip(0) + background)
            x = (x * fftconvolve(ratio, kernel[::-1, ::-1], "same") / ones).clip(0)
            quality = scene.psnr(x[inner] / peak)
            if quality > best[0]:
                best = (quality, x[inner] / peak, count)
            elif count > best[2] + 60:
                break
        return best[1]

    answers = best_richardson_lucy(y, (slice(None), slice(None))), best_richardson_lucy(*mirrored(y, kernel))
    lucy = max(answers, key=scene.psnr)
    extended, inner = doubled(y, kernel)
    scale = y.max()
    wiener = restoration.unsupervised_wiener(extended / scale, kernel, clip=False, rng=0)[0][inner] * scale
    found = {
        "Richardson-Lucy (oracle)": lucy,
        "skimage unsupervised_wiener": (wiener - background) / peak,
    }
    photons = scene.y.float().numpy()
    for name, options in {
        "lsconv gradient": {}, "lsconv TV": {"prior": "tv"}, "lsconv gradient, discrepancy": {"damp": "discrepancy"},
    }.items():  # fmt: skip
        x = lsconv.deconvolve(photons, kernel.astype(np.float32), noise="poisson", background=background, **options).x
        found[name] = x / peak
    return found


def tables(quick: bool) -> Iterator[Table]:
    """PSNR and the error at the edge of every photon scene."""
    rows = []
    for scene, peak, background in photon_scenes(quick):
        row = {"scene": scene.name, "counts": f"{scene.psnr((scene.y - background) / peak):.2f}"}
        for name, picture in photon_contestants(scene, peak, background).items():
            row[name] = f"{scene.psnr(picture):.2f} / {edge_error(scene, picture):.3f}"
        rows.append(row)
    yield Table(
        "PSNR in dB / root mean square error of the outer 10 pixels",
        rows,
        "The counts less their background stand for no restoration at all.",
    )
