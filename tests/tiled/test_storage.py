"""A solve that was killed goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lsconv
from tests.tiled.problems import error, exact, problem

KILLED = """
import sys, torch, lsconv
folder, what, number = sys.argv[1:]
torch.set_num_threads(1)
A = lsconv.Conv2d(torch.full((1, 1, 9, 9), 1 / 81, dtype=torch.float64), (120, 120))
y = torch.randn(1, *A.spatial_out, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
plan = lsconv.tiled.Plan(A, damp=1e-2, tile=60, overlap=24, storage=folder)
counts = {"tiles": 0, "product": 0, "gradient": 0}
def tick(self, which):
    counts[which] += 1
    if which == what and counts[which] == int(number):
        print("now", flush=True)
        sys.stdin.read()
import lsconv.tiled.progress as progress
progress.Progress.tick = tick
solution = plan.solve(y)
torch.save((solution.x, solution.iterations, solution.converged, counts), folder + "/../answer")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what, number, tiles, products", [("tiles", 4, (2, 4), 0), ("product", 9, (12, 12), 8)])
def test_a_solve_that_was_killed_goes_on(
    what: str, number: int, tiles: tuple[int, int], products: int, tmp_path: Path
) -> None:
    """What was done before is not done again: tiles of the first pass that were written, and whole steps."""
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": str(Path(lsconv.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, what, str(number)], env=environment, **pipes) as killed:
        assert killed.stdout.readline() == "now\n"
        killed.send_signal(signal.SIGKILL)
    subprocess.run([*command, "", "0"], check=True, env=environment)
    x, iterations, converged, counts = torch.load(tmp_path / "answer")
    A, y = problem("box", "valid", (120, 120))
    assert bool(converged)
    assert error(x, exact(A, y, 1e-2)) < 1e-10
    steps = int(iterations)
    assert counts["product"] == 4 * steps - products
    assert tiles[0] <= 4 * (steps + 1) - counts["tiles"] <= tiles[1]
