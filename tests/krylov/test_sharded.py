"""Vectors in parts on several devices (DTensor): the solvers' reductions and updates are torch's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = """
import sys, warnings
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, path):
    import lsconv
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    diagonal = torch.linspace(1, 3, 40, dtype=torch.float64)
    b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def operator(d):
        # tall: (x, x / 2) times d
        return lsconv.FromFunctions((40,), (2, 40), lambda x: torch.stack([d * x, 0.5 * d * x], -2),
                                    lambda y: d * (y[..., 0, :] + 0.5 * y[..., 1, :]), dtype=torch.float64)

    def square(d):
        return lsconv.FromFunctions((40,), (40,), lambda x: d * x, lambda y: d * y, dtype=torch.float64)

    parts = distribute_tensor(diagonal, mesh, [Shard(0)])
    y = distribute_tensor(b, mesh, [Shard(1)])
    with implicit_replication():
        for name in ("cgls", "lsqr", "lsmr"):
            for options in ({}, {"damp": 0.5}):
                compare(name, operator, diagonal, b, parts, y, options)
        for name in ("cg", "minres", "craig"):
            for options in ({}, {"x0": True}):
                compare(name, square, diagonal, b[0], parts, distribute_tensor(b[0], mesh, [Shard(0)]), options)
    dist.destroy_process_group()


def compare(name, make, diagonal, b, parts, y, options):
    import lsconv
    from torch.distributed.tensor import DTensor

    solver = getattr(lsconv, name)
    given, here = dict(options), dict(options)
    if options.pop("x0", False):
        given["x0"], here["x0"] = 0 * y + 1, 0 * b + 1
    solution = solver(make(parts), y, **given)
    expected = solver(make(diagonal), b, **here)
    assert isinstance(solution.x, DTensor), name
    assert solution.x.to_local().shape[-1] == 20, name
    assert bool(solution.converged.all()), name
    torch.testing.assert_close(solution.x.full_tensor(), expected.x, rtol=1e-9, atol=1e-10)


if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
    print("done")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo and fork")
def test_vectors_in_parts_on_two_processes_are_solved_as_whole_ones(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
