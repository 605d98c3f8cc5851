"""What does deblurring cost where the PSF varies across the field, beside LSMR with and without a preconditioner?

Sixteen PSFs on a grid of 4 by 4 points, linear between them: a Gaussian whose width grows from 1.5 to 3 pixels across
the field, and a motion of 9 pixels that turns by a right angle. Times are CPU seconds of one process, a plan and its
first solve: neither a load beside it nor threads blur them. Run with one thread.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks.peers import relative_gradient
from benchmarks.runner import Table
from lsconv.inverse.varying import VaryingPlan

F64 = torch.float64
TARGET = 1e-6
SIZE = 15  # of a PSF
POINTS = 4  # per axis


def gaussian(share: float) -> Tensor:
    """A Gaussian whose width grows with the share of the field."""
    profile = torch.exp(-0.5 * ((torch.arange(SIZE, dtype=F64) - SIZE // 2) / (1.5 + 1.5 * share)) ** 2)
    kernel = profile[:, None] * profile
    return kernel / kernel.sum()


def motion(share: float) -> Tensor:
    """A line of 9 pixels, half a pixel wide, that turns with the share of the field."""
    places = torch.arange(SIZE, dtype=F64) - SIZE // 2
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    angle = math.pi / 2 * share
    along = rows * math.sin(angle) + columns * math.cos(angle)
    across = rows * math.cos(angle) - columns * math.sin(angle)
    kernel = torch.sigmoid(4 * (4.5 - along.abs())) * torch.exp(-2 * across**2)
    return kernel / kernel.sum()


BLURS = {"gaussian": gaussian, "motion": motion}


def problem(blur: str, size: int) -> tuple[lsconv.VaryingConvolution, Tensor]:
    """The blur of a field of this size, of which the image shows the inside, and a noisy scene under it."""
    image = size - SIZE + 1
    points = [(i + 0.5) * image / POINTS for i in range(POINTS)]
    shares = [(i + j) / (2 * POINTS - 2) for i in range(POINTS) for j in range(POINTS)]
    kernels = torch.stack([BLURS[blur](share) for share in shares])
    A = lsconv.VaryingConvolution.from_grid(kernels, [(y, x) for y in points for x in points], (size, size))
    generator = torch.Generator().manual_seed(0)
    scene = torch.rand(1, 1, 16, 16, dtype=F64, generator=generator)
    y = A(torch.nn.functional.interpolate(scene, size=(size, size), mode="nearest")[0])
    return A, y + 0.01 * torch.randn(y.shape, dtype=F64, generator=generator)


def cpu_seconds(
    solve: Callable[[float], lsconv.Solution], error: Callable[[Tensor], float], repeats: int
) -> tuple[float, float, lsconv.Solution]:
    """CPU seconds with the loosest tolerance that meets the target, what it reached, and the answer."""
    for decade in range(3, 9):
        start = time.process_time()
        solution = solve(10.0**-decade)
        spent = [time.process_time() - start]
        reached = error(solution.x)
        if reached <= TARGET:
            break
    for _ in range(repeats - 1):
        start = time.process_time()
        solve(10.0**-decade)
        spent.append(time.process_time() - start)
    return statistics.median(spent), reached, solution


def measure(blur: str, size: int, damp: float, most: int, repeats: int) -> dict[str, Any]:
    """One row."""
    A, y = problem(blur, size)

    def error(x: Tensor) -> float:
        return relative_gradient(A, y, damp, x)  # type: ignore[arg-type]

    def circulant(rtol: float) -> lsconv.Solution:
        mean = lsconv.Conv2d(A.kernels.mean(0)[None, None], in_size=A.spatial_in)
        M = lsconv.CirculantPreconditioner(mean, damp, side="solution")
        return lsconv.lstsq(A, y, damp=damp, method="lsmr", preconditioner=M, rtol=rtol, max_iter=most)

    methods: dict[str, Callable[[float], lsconv.Solution]] = {
        "lsconv": lambda rtol: lsconv.lstsq(A, y, damp=damp, rtol=rtol),
        "tiles": lambda rtol: VaryingPlan(A, damp).solve(y, rtol=rtol),
        "LSMR": lambda rtol: lsconv.lstsq(
            A, y, damp=damp, method="lsmr", preconditioner=None, rtol=rtol, max_iter=most
        ),
        "circulant of the mean PSF": circulant,
    }
    row: dict[str, Any] = {"case": f"{blur} {size}²", "damp": damp}
    seconds: dict[str, float] = {}
    for name, solve in methods.items():
        seconds[name], reached, solution = cpu_seconds(solve, error, repeats)
        note = "" if reached <= TARGET else f", only {reached:.0e}"
        row[name] = f"{seconds[name]:.3g} s, {int(solution.iterations)} its{note}"
    return row | {"LSMR / lsconv": f"{seconds['LSMR'] / seconds['lsconv']:.2g}"}


def tables(quick: bool) -> Iterator[Table]:
    """One table a size."""
    for size in (96,) if quick else (256, 512):
        yield Table(
            f"A PSF that varies, {size}²",
            [
                measure(blur, size, damp, 300 if quick else 4000, 1)
                for blur in BLURS
                for damp in ((1e-1,) if quick else (1e-1, 1e-2, 1e-3))
            ],
            f"CPU seconds and iterations to a gradient of {TARGET:g} of that of zero, for float64; 'only': what was "
            "reached in the iterations allowed. lsconv takes tiles where they should pay, and else LSMR; 'tiles': "
            "always.",
        )
