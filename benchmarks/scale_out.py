"""What does an image larger than memory or than one process cost by tiles, and how wrong are tiles that are blended?

Errors are relative to the answer of one device in double precision. Processes exchange by gloo on this machine; the
bytes that a rank receives in a step are counted, and set beside the formula: the rows that its tiles and halos read and
other ranks have. Seconds are CPU seconds of one process with one thread, memory is its largest resident set, torch and
the pages of files included. Run with one thread.
"""

from __future__ import annotations

import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Table
from lsconv.border.plan import BorderPlan
from lsconv.tiled.progress import Progress

F64 = torch.float64


def kernel(name: str) -> Tensor:
    """A blur whose pixels sum to one."""
    if name == "gauss 15":
        return lsconv.psf.gaussian(2.0, size=15).to(F64)
    return torch.full((9, 9), 1 / 81, dtype=F64) if name == "box 9" else lsconv.psf.motion(15, 30.0).to(F64)


def problem(name: str, size: int) -> tuple[lsconv.Convolution, Tensor]:
    """The blur and white data, of which no part is easy."""
    A = lsconv.Conv2d(kernel(name)[None, None], (size, size))
    return A, torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0), dtype=F64)


# ------------------------------------------------------------------ tiles that are only blended


def starts(cells: int, tile: int, overlap: int) -> list[int]:
    """The first cells of tiles that overlap."""
    count = max(math.ceil((cells - overlap) / (tile - overlap)), 1)
    return [round(i * (cells - tile) / max(count - 1, 1)) for i in range(count)]


def blended(A: lsconv.Convolution, y: Tensor, damp: float, tile: int, overlap: int) -> Tensor:
    """Tiles of the data restored one by one, each with nothing assumed beyond it, and blended by linear ramps."""
    k = A.kernel_size
    size = [min(tile, m) for m in A.spatial_out]
    local = lsconv.Conv2d(A.weight, [n + c - 1 for n, c in zip(size, k, strict=True)])
    x, total = torch.zeros(A.in_shape, dtype=F64), torch.zeros(A.spatial_in, dtype=F64)
    ramps = []
    for n, c in zip(local.spatial_in, k, strict=True):
        places = torch.arange(n, dtype=F64) + 1
        ramps.append((torch.minimum(places, n + 1 - places) / (overlap + c)).clamp(max=1))
    window = ramps[0][:, None] * ramps[1]
    inverse = lsconv.pinv(local, damp=damp)
    for i in starts(A.spatial_out[0], size[0], overlap):
        for j in starts(A.spatial_out[1], size[1], overlap):
            part = inverse(y[:, i : i + size[0], j : j + size[1]])
            cells = (slice(i, i + local.spatial_in[0]), slice(j, j + local.spatial_in[1]))
            x[(slice(None), *cells)] += part * window
            total[cells] += window
    return x / total


def accuracy(size: int, tile: int, cases: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Errors of both, and steps of ours, by tiles alone and as the plan chooses."""
    rows = []
    for name, damp in cases:
        A, y = problem(name, size)
        exact = lsconv.lstsq(A, y, damp=damp, method="border", rtol=1e-12).x

        def error(x: Tensor, exact: Tensor = exact) -> float:
            return float((x - exact).norm() / exact.norm())

        plan = lsconv.tiled.Plan(A, damp=damp, tile=tile)
        solution = plan.solve(y)
        forced = lsconv.tiled.Plan(A, damp=damp, tile=tile, overlap=max(plan.strategy.overlap))
        cropped = lsconv.tiled.Plan(A, damp=damp, tile=tile, overlap=32)
        by_tiles = forced.solve(y, max_iter=100)
        rows.append({
            "blur": name, "damp": damp, "overlap": max(plan.strategy.overlap),
            "tile and blend, overlap 32": f"{error(blended(A, y, damp, tile, 32)):.1e}",
            "tile and crop, overlap 32": f"{error(cropped.solve(y, max_iter=0).x):.1e}",
            "plan": plan.path, "error": f"{error(solution.x):.1e}", "certified": bool(solution.converged),
            "steps of tiles": f"{int(by_tiles.iterations)}" if by_tiles.converged else "over 100",
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------ ranks


def traffic_of(mesh: Any, size: int) -> dict[str, Any]:
    """Solve as one of several processes, and report what was sent."""
    ranks = mesh.size()
    A, y = problem("box 9", size)
    plan = lsconv.tiled.Plan(A, damp=0.1, tile=size // 4, overlap=24, mesh=mesh)
    data = y[:, plan.y_rows].clone()
    begun = time.process_time()
    solution = plan.solve(data)
    spent, steps = time.process_time() - begun, int(solution.iterations)
    sent, received = plan.ranks.sent, plan.ranks.received
    shorter = plan.solve(data, max_iter=1)
    between = max(steps - int(shorter.iterations), 1)
    own = plan.x_rows.stop - plan.x_rows.start
    tiles, halos = plan.passes.tile_regions, plan.passes.gradient_regions
    width = A.spatial_in[1] * 8

    def foreign(rows: tuple[int, int]) -> int:
        return max(min(rows[1], size) - max(rows[0], 0) - own, 0)

    return {
        "ranks": ranks, "rank": plan.ranks.rank, "steps": steps, "certified": bool(solution.converged),
        "MB sent a step": f"{(2 * sent - plan.ranks.sent) / between / 1e6:.3f}",
        "MB received a step": f"{(2 * received - plan.ranks.received) / between / 1e6:.3f}",
        "MB received a step, by the formula": f"{(foreign(tiles.rows()) + foreign(halos.rows())) * width / 1e6:.3f}",
        "cells of its tiles / its own": f"{len(tiles.all) * math.prod(tiles.size) / (own * size):.2f}",
        "CPU s": f"{spent:.2f}",
    }  # fmt: skip


def as_rank(number: int, program: Any, ranks: int, given: tuple[Any, ...], meeting: str, answers: Any) -> None:
    """Run a program as one of several processes, and report what it finds."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=ranks)
    answers.put(program(init_device_mesh("cpu", (ranks,)), *given))
    dist.barrier()  # no rank is gone while another still speaks to it
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo that still lets go of a tensor aborts an interpreter that is being taken down


def spawned(program: Any, ranks: int, *given: Any) -> list[dict[str, Any]]:
    """What every one of several processes reports, by its rank."""
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(as_rank, (program, ranks, given, f"{folder}/meeting", answers), nprocs=ranks)
    return sorted((answers.get() for _ in range(ranks)), key=lambda row: row["rank"])


def traffic(size: int, counts: Sequence[int]) -> list[dict[str, Any]]:
    """A row for every rank of 1, 2, 4 processes."""
    return [row for ranks in counts for row in spawned(traffic_of, ranks, size)]


def work_of(mesh: Any, size: int, name: str, damp: float) -> dict[str, Any]:
    """Solve as one of several processes, and report the work that was done and sent."""
    A, y = problem(name, size)
    plan = lsconv.tiled.Plan(A, damp=damp, tile=size // 4, mesh=mesh)
    data, passes = y[:, plan.y_rows].clone(), plan.passes
    plan.solve(data, max_iter=1)  # which makes the factors
    work = {"tiles": 0, "transform": 0, "iterations": 0}

    class Counted(Progress):
        def tick(self, what: str) -> None:
            work[what] = work.get(what, 0) + 1
            work["iterations"] += passes.pencil.iterations if what == "transform" else 0

    lsconv.tiled.plan.Progress = Counted  # type: ignore[misc, attr-defined]
    sent = plan.ranks.sent
    begun = time.process_time()
    solution = plan.solve(data)
    spent = time.process_time() - begun
    tiles = work["tiles"] * math.prod(passes.tile_regions.size) / size**2
    if work["transform"]:
        part = passes.pencil.grid.part
        transforms = work["transform"] * 2 * (part.stop - part.start) / passes.pencil.grid.frequencies[1]
    return {
        "rank": plan.ranks.rank, "blur": name, "damp": damp, "ranks": mesh.size(), "path": plan.path,
        "certified": bool(solution.converged), "steps": int(solution.iterations),
        "border iterations": work["iterations"], "images solved by tiles": tiles,
        "images transformed": transforms if work["transform"] else 0.0, "CPU s": spent,
        "MB sent": (plan.ranks.sent - sent) / 1e6,
    }  # fmt: skip


def scaling(size: int, counts: Sequence[int], cases: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The most that a rank does, for the same image on more and more processes."""
    rows = []
    for name, damp in cases:
        alone = 0.0
        for ranks in counts:
            found = spawned(work_of, ranks, size, name, damp)
            row = {key: found[0][key] for key in found[0] if key != "rank"}
            for key, digits in (("images solved by tiles", 2), ("images transformed", 2), ("CPU s", 2), ("MB sent", 1)):
                row[key] = f"{max(each[key] for each in found):.{digits}f}"
            alone = alone or float(row["CPU s"])
            row["CPU s of one / all"] = f"{alone / (ranks * float(row['CPU s'])):.2f}"
            rows.append(row)
    return rows


# ------------------------------------------------------------------ out of core


def process(which: str, size: int, memory: float, folder: Path) -> None:
    """Solve in a process of its own, and print what it took."""
    torch.set_num_threads(1)
    psf = kernel("gauss 15").float()
    A = lsconv.Conv2d(psf[None, None], (size, size))
    y = np.memmap(folder / "y", np.float32, "r", shape=A.spatial_out)
    x = np.memmap(folder / which, np.float32, "w+", shape=A.spatial_in)
    begun = time.process_time()
    stated = math.nan
    if which == "tiles":
        plan = lsconv.tiled.Plan(psf, (size, size), damp=0.1, max_memory=int(memory), storage=folder / "work")
        stated = plan.memory / 1e6
        solution = plan.solve(y, out=x)
    else:
        solution = BorderPlan(A, 0.1).solve(torch.from_numpy(np.array(y))[None])
        x[:] = solution.x[0].numpy()
    spent = time.process_time() - begun
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{spent} {most} {stated} {int(solution.iterations)} {bool(solution.converged)}")


def out_of_core(size: int, memory: float) -> list[dict[str, Any]]:
    """Both in processes of their own, in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        A = lsconv.Conv2d(kernel("gauss 15").float()[None, None], (size, size))
        y = np.memmap(folder / "y", np.float32, "w+", shape=A.spatial_out)
        generator = np.random.default_rng(0)
        for first in range(0, A.spatial_out[0], 512):
            part = y[first : first + 512]
            part[:] = generator.standard_normal(part.shape, dtype=np.float32)
        y.flush()
        seconds = {}
        for which in ("one device", "tiles"):
            code = f"from pathlib import Path; from benchmarks.scale_out import process; process({which!r}, {size}, "
            code += f"{memory}, Path({name!r}))"
            done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True,
                                  text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
            spent, most, stated, steps, converged = done.stdout.split()
            seconds[which] = float(spent)
            rows.append({
                "by": which, "CPU s": f"{float(spent):.1f}", "MB resident at most": f"{float(most):.0f}",
                "MB stated": "" if which != "tiles" else f"{float(stated):.0f}", "steps": steps, "certified": converged,
                "time / one device": f"{float(spent) / seconds['one device']:.2f}",
            })  # fmt: skip
        x, reference = (np.memmap(folder / which, np.float32, "r") for which in ("tiles", "one device"))
        wide = [np.float64(array) for array in (x[::97], reference[::97])]
        rows[-1]["difference"] = f"{np.linalg.norm(wide[0] - wide[1]) / np.linalg.norm(wide[1]):.1e}"
    return rows


def tables(quick: bool) -> Iterator[Table]:
    """Accuracy, traffic, scaling and memory."""
    every = [(name, damp) for name in ("gauss 15", "box 9", "motion 15") for damp in (1e-1, 1e-2, 1e-3)]
    cases = every[::8] if quick else every
    size, tile = (150, 70) if quick else (512, 170)
    yield Table(f"{size}² in tiles of {tile}², double precision: relative errors", accuracy(size, tile, cases))
    size = 160 if quick else 1024
    yield Table(f"{size}² on several processes, box 9, damp 0.1", traffic(size, (2,) if quick else (1, 2, 4)))
    cases = [("box 9", 1e-1), ("box 9", 1e-3), ("motion 15", 1e-2)]
    yield Table(
        f"{size}² on more and more processes: the most that one of them does in a solve, its factors made",
        scaling(size, (1, 2) if quick else (1, 2, 4), cases[:1] if quick else cases),
    )
    size, memory = (700, 4e8) if quick else (8192, 1.2e9)
    yield Table(
        f"{size}² in float32, gauss 15, damp 0.1: out of core, max_memory = {memory / 1e9:.2g} GB",
        out_of_core(size, memory),
    )
