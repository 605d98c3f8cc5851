"""What does deblurring cost where the PSF varies across the field, beside LSMR with and without a preconditioner?

Sixteen PSFs on a grid of 4 by 4 points, linear between them: a Gaussian whose width grows from 1.5 to 3 pixels across
the field, and a motion of 9 pixels that turns by a right angle. Times are CPU seconds of one process, a plan and its
first solve: neither a load beside it nor threads blur them. Run with one thread.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks.peers import relative_gradient
from benchmarks.runner import Table
from lsconv.inverse.route import route

F64 = torch.float64
TARGET = 1e-6
SIZE = 15  # of a PSF
POINTS = 4  # per axis
PATIENCE = 8  # times of lsconv that a peer has


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
    solve: Callable[[float], lsconv.Solution], error: Callable[[Tensor], float]
) -> tuple[float, float, lsconv.Solution]:
    """CPU seconds with the loosest tolerance that meets the target, what it reached, and the answer."""
    for decade in range(3, 9):
        start = time.process_time()
        solution = solve(10.0**-decade)
        spent = time.process_time() - start
        reached = error(solution.x)
        if reached <= TARGET:
            break
    return spent, reached, solution


class Stop:
    """The callback that ends LSMR at the target, or after some CPU seconds."""

    def __init__(self, goal: float, seconds: float) -> None:
        self.goal, self.end = goal, time.process_time() + seconds

    def __call__(self, state: Any) -> bool:
        """Tell whether it ends here."""
        return float(state.gradient_norm) <= self.goal or time.process_time() > self.end


def measure(blur: str, size: int, damp: float) -> dict[str, Any]:
    """One row."""
    A, y = problem(blur, size)
    goal = TARGET * float(torch.linalg.vector_norm(A.adjoint(y)))

    def error(x: Tensor) -> float:
        return relative_gradient(A, y, damp, x)  # type: ignore[arg-type]

    def lsmr(preconditioned: bool, limit: float) -> tuple[float, float, lsconv.Solution]:
        start, M = time.process_time(), None
        if preconditioned:
            mean = lsconv.Conv2d(A.kernels.mean(0)[None, None], in_size=A.spatial_in)
            M = lsconv.CirculantPreconditioner(mean, damp, side="solution")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
            solution = lsconv.lstsq(
                A, y, damp=damp, method="lsmr", preconditioner=M, rtol=1e-14, max_iter=10**5,
                callback=Stop(goal, limit),
            )  # fmt: skip
        return time.process_time() - start, error(solution.x), solution

    plan = type(route(A, damp)).__name__
    tiles = plan == "VaryingPlan"
    ours = cpu_seconds(lambda rtol: lsconv.lstsq(A, y, damp=damp, rtol=rtol), error) if tiles else None
    plain = lsmr(False, math.inf if ours is None else PATIENCE * ours[0])
    found = {"lsconv": ours or plain, "LSMR": plain, "LSMR, circulant of the mean PSF": lsmr(True, min(plain[0], 5.0))}
    row: dict[str, Any] = {"case": f"{blur} {size}²", "damp": damp, "plan": plan}
    for name, (seconds, reached, solution) in found.items():
        note = "" if reached <= 1.1 * TARGET else f", only {reached:.0e}"
        row[name] = f"{seconds:.3g} s, {int(solution.iterations)} its{note}"
    if ours is None:
        return row | {"LSMR / lsconv": "the same"}
    more = "" if plain[1] <= 1.1 * TARGET else "> "
    return row | {"LSMR / lsconv": f"{more}{plain[0] / ours[0]:.2g}"}


def tables(quick: bool) -> Iterator[Table]:
    """One table a size."""
    for size in (96,) if quick else (96, 256, 512):
        yield Table(
            f"A PSF that varies, {size}²",
            [measure(blur, size, damp) for blur in BLURS for damp in ((1e-1,) if quick else (1e-1, 1e-2, 1e-3))],
            f"CPU seconds and iterations to a gradient of {TARGET:g} of that of zero, in float64: of lsconv with the "
            "loosest power of ten as rtol. LSMR ends where it is there, or (only: what it had reached) after "
            f"{PATIENCE} times lsconv's time; with the circulant, after as long as plain LSMR took, and 5 s at most. "
            "lsconv takes tiles (VaryingPlan) where they should pay, and else is LSMR (KrylovPlan).",
        )
