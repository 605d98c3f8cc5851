"""Deblurring: how long until the gradient of the damped problem is down to its target, against the best peers?

First the heats: the methods of other packages against each other at 256×256. The winner for a boundary and a damp goes
on to the cross of kernels, boundaries, damps and precisions at 512×512, and to sizes up to 2048×2048. A peer has 45
times as long as lsconv, setup included, and at most the seconds stated.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import peers
from benchmarks.runner import Answer, Arrival, Table, reach, reached, run_times, times_faster
from lsconv import psf
from lsconv.border.plan import BorderPlan

# float32 cannot store an x whose gradient is 1e-8.
TARGET = {torch.float64: 1e-8, torch.float32: 1e-6}
OWN_CG = "own CG, circulant M"
_LEAD = 45  # so many times the time of lsconv is what a peer has

Case = tuple[str, int, str, float, torch.dtype]
Heat = tuple[str, float]  # boundary and relative damp


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


def problem(
    kernel: str, size: int, boundary: str, dtype: torch.dtype, scene_number: int = 0
) -> tuple[lsconv.Convolution, Tensor]:
    """A blur and a blurred, noisy scene of edges and texture."""
    generator = torch.Generator().manual_seed(scene_number)
    coarse = torch.rand(1, 1, 16, 16, dtype=torch.float64, generator=generator)
    scene = torch.nn.functional.interpolate(coarse, size=(size, size), mode="nearest")[0]
    weight = kernels()[kernel].to(dtype)[None, None]
    padding = 0 if boundary == "valid" else tuple(extent // 2 for extent in weight.shape[-2:])
    mode = boundary if boundary in ("reflect", "replicate") else "zeros"
    A = lsconv.Conv2d(weight, in_size=(size, size), padding=padding, padding_mode=mode)
    y = A(scene.to(dtype))
    return A, y + 0.01 * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)


def further(kernel: str, size: int, boundary: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """Other scenes, blurred: a plan learns from a solve, so that the same data again would be no further solve."""
    return itertools.cycle([problem(kernel, size, boundary, dtype, number)[1] for number in range(1, 9)])


def border(A: lsconv.Convolution, y: Tensor, damp: float) -> Arrival:
    """How a fresh plan and its first solve, wider crossings included where it makes them, reach the target."""

    def solve(tolerance: float, max_iter: int | None) -> Answer:
        solution = BorderPlan(A, damp).solve(y, rtol=tolerance, max_iter=max_iter)
        return Answer(solution.x, int(solution.iterations))

    solve(TARGET[A.dtype], None)  # warm
    return reach(solve, functools.partial(peers.relative_gradient, A, y, damp), TARGET[A.dtype])


def label(case: Case) -> dict[str, Any]:
    """The first cells of a row."""
    kernel, size, boundary, relative_damp, dtype = case
    return {"case": f"{kernel} {size} {boundary} {str(dtype)[6:]}", "damp/σ": f"{relative_damp:.0e}"}


# ------------------------------------------------------------------ the heats


def heat(case: Case, seconds: float, winners: dict[Heat, str]) -> dict[str, Any]:
    """One row of all foreign peers; notes the fastest, or the closest to the target where none arrives."""
    kernel, size, boundary, relative_damp, dtype = case
    A, y = problem(kernel, size, boundary, dtype)
    damp = relative_damp * float(lsconv.norm(A))
    error = functools.partial(peers.relative_gradient, A, y, damp)
    arrivals = {
        name: reach(functools.partial(peer, A, y, damp), error, TARGET[dtype], seconds=seconds)
        for name, peer in peers.foreign().items()
    }
    times = run_times(arrivals, repeats=2, patience=seconds / 2)
    best = min(arrivals, key=lambda name: (not arrivals[name].arrived, times[name] if arrivals[name].arrived
                                           else arrivals[name].error))  # fmt: skip
    winners[boundary, relative_damp] = best
    return label(case) | {name: reached(times[name], arrivals[name]) for name in arrivals} | {"goes on": best}


# ------------------------------------------------------------------ lsconv against the winner


def measure(case: Case, winners: Mapping[Heat, str], most: float, repeats: int) -> dict[str, Any]:
    """One row: lsconv's setup and solve, the best foreign peer, and CG with lsconv's own preconditioner."""
    kernel, size, boundary, relative_damp, dtype = case
    A, y = problem(kernel, size, boundary, dtype)
    damp = relative_damp * float(lsconv.norm(A))
    error = functools.partial(peers.relative_gradient, A, y, damp)
    ours, plan, others = border(A, y, damp), BorderPlan(A, damp), further(kernel, size, boundary, dtype)
    plan.solve(y, rtol=ours.tolerance)
    seconds = min(most, _LEAD * ours.seconds)
    peer = winners[boundary, relative_damp]
    foreign = {peer: reach(functools.partial(peers.FOREIGN[peer], A, y, damp), error, TARGET[dtype], seconds=seconds)}
    own = {OWN_CG: reach(functools.partial(peers.normal_cg, A, y, damp), error, TARGET[dtype], seconds=seconds)}
    contestants = {
        "setup": lambda: BorderPlan(A, damp),
        "in all": ours.run,
        "kept": lambda: plan.solve(next(others), rtol=ours.tolerance),
    }
    times = run_times(foreign | own, contestants, repeats=repeats, patience=2.0)
    return label(case) | {
        "setup s": times["setup"],
        "in all s": times["in all"],
        "kept s": times["kept"],
        "border its": ours.answer.iterations,
        "gradient": f"{ours.error:.1e}{'' if ours.arrived else ' !'}",
        "best foreign peer": f"{peer}, {reached(times[peer], foreign[peer])}",
        OWN_CG: reached(times[OWN_CG], own[OWN_CG]),
        "peer / in all": times_faster(foreign, times, times["in all"]),
        "peer / kept": times_faster(foreign, times, times["kept"]),
        "own CG / in all": times_faster(own, times, times["in all"]),
    }


NOTE = (
    "The gradient is ‖Aᴴ(y − Ax) − damp²x‖ / ‖Aᴴy‖, measured in float64; the target is 1e-8 in float64, 1e-6 in "
    "float32. Every method has the loosest tolerance that meets it. 'only': the limit came first, this was reached; "
    "'!': lsconv did not meet the target. In all: a fresh plan and its first solve; kept: a further solve with a plan, "
    "of another scene. peer / in all: the seconds of the winner of the heats over lsconv's, '>' where it had not "
    "arrived by then. The CG is lsconv's own, with CirculantPreconditioner, whose setup counts."
)


def tables(quick: bool) -> Iterator[Table]:
    """The heats, the cross (a table a kernel), the sizes."""
    boundaries, winners = ("valid", "same"), dict[Heat, str]()
    damps = (1e-1, 1e-3) if quick else (1e-1, 1e-2, 1e-3, 1e-4)
    seconds = 0.3 if quick else 3.0
    yield Table(
        f"Heats: the methods of other packages, at most {seconds:g} s each",
        [
            heat(("gaussian", 96 if quick else 256, boundary, damp, torch.float64), seconds, winners)
            for boundary in boundaries[: 1 if quick else 2]
            for damp in damps
        ],
        "All products by the FFT. What goes on is the fastest that arrives, else the one that came closest. "
        "lineax's is compiled before it is timed.",
    )
    if quick:
        cases: list[Case] = [(k, 128, "valid", damp, torch.float64) for k in ("gaussian", "motion") for damp in damps]
        rows = [measure(case, winners, 0.5, 1) for case in [*cases, ("gaussian", 128, "valid", 1e-3, torch.float32)]]
        yield Table("Damped deblurring", rows, NOTE)
        return
    for kernel in kernels():
        rows = [
            measure((kernel, 512, boundary, damp, dtype), winners, 45.0, 3)
            for boundary in boundaries
            for dtype in (torch.float64, torch.float32)
            for damp in ((1e-1, 1e-3, 1e-4) if dtype == torch.float64 else (1e-1, 1e-3))
        ]
        yield Table(f"Damped deblurring, {kernel} at 512×512, peers at most 45 s", rows, NOTE)
    for size, most in ((256, 10.0), (1024, 25.0), (2048, 45.0)):
        rows = [
            measure((kernel, size, "valid", damp, torch.float64), winners, most, 2 if size == 2048 else 3)
            for kernel in ("gaussian", "motion")
            for damp in (1e-1, 1e-3)
        ]
        yield Table(f"Damped deblurring at {size}×{size}, peers at most {most:g} s", rows, NOTE)
