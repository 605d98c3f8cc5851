"""Memory: the peak of setup and solve against the size of what the plan keeps."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import lsconv
from benchmarks.runner import Table
from benchmarks.scaling import smoothing
from lsconv.border.cost_model import plan_bytes
from lsconv.border.plan import BorderPlan

_MIB = 2**20


def resident() -> dict[str, int]:
    """Resident size of this process now and at its peak, in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def forget_peak() -> int:
    """Make the peak that of what follows; returns the resident size now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident()["now"]


def measure(size: int, channels: int, kernel: int, dtype: str, threads: int) -> dict[str, Any]:
    """What setup and one solve add to the peak of this process; meant for a fresh one."""
    torch.set_num_threads(threads)
    small = smoothing(kernel + 8, channels, kernel).to(dtype=getattr(torch, dtype))
    BorderPlan(small, 1.0).solve(torch.randn(small.out_shape, dtype=small.dtype))  # libraries loaded, pools made
    A = smoothing(size, channels, kernel).to(dtype=getattr(torch, dtype))
    damp = 1e-2 * float(lsconv.norm(A))
    y = torch.randn(A.out_shape, dtype=A.dtype)
    before = forget_peak()
    plan = BorderPlan(A, damp)
    after_setup = resident()["peak"]
    plan.solve(y)
    peak = resident()["peak"]
    grid = plan.inverse.embedding.grid
    frequencies = grid[0] * (grid[1] // 2 + 1)
    kept = plan.inverse.nbytes
    symbol = frequencies * channels**2 * (8 if A.dtype == torch.float32 else 16)
    return {
        "case": f"{channels} × {size}², {kernel}×{kernel}, {dtype}",
        "picture MiB": A.in_numel * y.element_size() / _MIB,
        "symbol MiB": symbol / _MIB,
        "plan keeps MiB": kept / _MIB,
        "estimated MiB": plan_bytes(A) / _MIB,
        "setup peak MiB": (after_setup - before) / _MIB,
        "setup + solve peak MiB": (peak - before) / _MIB,
        "peak / (symbol + strips)": (peak - before) / (symbol + kept),
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table, a fresh process a row."""
    cases: list[tuple[int, int, int, str]] = [(256, 1, 9, "float32")]
    if not quick:
        cases += [
            (1024, 1, 9, "float32"),
            (2048, 1, 9, "float32"),
            (1024, 1, 9, "float64"),
            (1024, 1, 31, "float32"),
            (256, 3, 9, "float32"),
            (128, 32, 3, "float32"),
        ]
    rows = []
    root = Path(__file__).parents[1]
    for case in cases:
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps([*case, torch.get_num_threads()])]
        rows.append(json.loads(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout))
    yield Table(
        "Peak resident memory that setup and one solve add",
        rows,
        "symbol + strips: the per-frequency matrices and the factors that the plan keeps. Estimated: what the plan "
        "says it needs before it starts. Peaks are of the process's resident size, above that before the setup.",
    )


if __name__ == "__main__":
    print(json.dumps(measure(*json.loads(sys.argv[1]))))
