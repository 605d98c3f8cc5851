"""Deblurring: how long until the gradient of the damped problem is down to its target, against the best peers?

The whole cross of kernels, boundaries, damps and precisions at 256×256, then sizes to 2048×2048 for two kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import peers
from benchmarks.runner import Answer, Table, race, reach, shown
from lsconv.app import psf
from lsconv.fourier.border import BorderPlan

PEERS = {"scipy lsmr": peers.scipy_lsmr, "scipy lsqr": peers.scipy_lsqr, "CG, circulant M": peers.normal_cg}
# float32 cannot store an x whose gradient is 1e-8.
TARGET = {torch.float64: 1e-8, torch.float32: 1e-6}

Case = tuple[str, int, str, float, torch.dtype]


def kernels() -> dict[str, Tensor]:
    """The four blurs, each of sum one: Gaussian 15×15, box 9×9, disk of radius 5, a braking motion (asymmetric)."""
    profile = torch.exp(-0.5 * ((torch.arange(15, dtype=torch.float64) - 7) / 2) ** 2)
    gaussian = profile[:, None] * profile
    motion = psf.motion(15, 30)
    motion = motion * torch.exp(-torch.arange(motion.shape[1], dtype=torch.float64) / 5)
    return {
        "gaussian": gaussian / gaussian.sum(),
        "box": psf.box(9),
        "disk": psf.disk(5),
        "motion": motion / motion.sum(),
    }


def cases(quick: bool) -> Iterator[Case]:
    """``(kernel, size, boundary, damp / sigma_max, dtype)``."""
    if quick:
        for kernel in ("gaussian", "motion"):
            for damp in (1e-1, 1e-3):
                yield kernel, 128, "valid", damp, torch.float64
        yield "gaussian", 256, "valid", 1e-3, torch.float32
        return
    for kernel in kernels():
        for boundary in ("valid", "same"):
            for damp in (1e-1, 1e-3, 1e-4):
                for dtype in (torch.float32, torch.float64):
                    yield kernel, 256, boundary, damp, dtype
    for size in (512, 1024, 2048):
        for kernel in ("gaussian", "motion"):
            for damp in (1e-1, 1e-3, 1e-4):
                yield kernel, size, "valid", damp, torch.float64


def problem(kernel: str, size: int, boundary: str, dtype: torch.dtype) -> tuple[lsconv.Convolution, Tensor]:
    """A blur and a blurred, noisy scene of edges and texture."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 16, 16, dtype=torch.float64, generator=generator)
    scene = torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")[0]
    A = lsconv.Conv2d(
        kernels()[kernel].to(dtype)[None, None], in_size=(size, size), padding="same" if boundary == "same" else 0
    )
    y = A(scene.to(dtype))
    return A, y + 0.01 * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    """One row: lsconv's setup and solve, and the peers."""
    kernel, size, boundary, relative_damp, dtype = case
    A, y = problem(kernel, size, boundary, dtype)
    damp = relative_damp * float(lsconv.norm(A))
    error = functools.partial(peers.relative_gradient, A, y, damp)
    target = TARGET[dtype]
    plan = BorderPlan(A, damp)

    def through_border(tolerance: float, max_iter: int | None) -> Answer:
        solution = plan.solve(y, rtol=tolerance, max_iter=max_iter)
        return Answer(solution.x, int(solution.iterations))

    arrivals = {"solve": reach(through_border, error, target)}
    for name, peer in PEERS.items():
        solve = functools.partial(peer, A, y, damp)
        arrivals[name] = reach(solve, error, target, seconds=0.5 if quick else 20.0)
    runs: dict[str, Any] = {name: arrival.run for name, arrival in arrivals.items()}
    times = race(
        {"setup": lambda: BorderPlan(A, damp), **runs}, repeats=2 if quick else 5, patience=0.2 if quick else 5
    )
    ours, total = arrivals["solve"], times["setup"].median + times["solve"].median
    row: dict[str, Any] = {
        "case": f"{kernel} {size} {boundary} {str(dtype)[6:]}",
        "damp/σ": f"{relative_damp:.0e}",
        "setup s": times["setup"].median,
        "solve s": times["solve"].median,
        "border its": ours.answer.iterations,
        "gradient": f"{ours.error:.1e}{'' if ours.arrived else ' !'}",
    }
    for name in PEERS:
        arrival = arrivals[name]
        # what did not arrive shows how far it got
        row[name] = f"{shown(times[name].median)} s, {arrival.answer.iterations} its" + (
            "" if arrival.arrived else f", only {arrival.error:.0e}"
        )
    arrived = [times[name].median for name in PEERS if arrivals[name].arrived]
    slowest = max(times[name].median for name in PEERS)
    row["best peer / lsconv"] = f"{min(arrived) / total:.1f}" if arrived else f"> {slowest / total:.0f}"
    row["best peer / solve"] = (
        f"{min(arrived) / times['solve'].median:.1f}" if arrived else f"> {slowest / times['solve'].median:.0f}"
    )
    return row


def tables(quick: bool) -> Iterator[Table]:
    """One table, a row a case."""
    yield Table(
        "Damped deblurring to a relative gradient of 1e-8 (float64) or 1e-6 (float32)",
        [measure(case, quick=quick) for case in cases(quick)],
        "The gradient is ‖Aᴴ(y − Ax) − damp²x‖ / ‖Aᴴy‖, measured in float64. Every method has the loosest tolerance "
        "that meets the target. 'only': the limit came first, this was reached; '!': lsconv did not meet the target. "
        "Best peer / lsconv counts setup and solve; CG's seconds count its preconditioner's setup.",
    )
