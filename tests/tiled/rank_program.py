"""The program that every rank of a test runs: ``RANK=r WORLD_SIZE=n python rank_program.py CASE FOLDER``."""

from __future__ import annotations

import datetime
import itertools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import lsconv
from lsconv.tiled.storage import Storage

F64 = torch.float64


def problems() -> list[tuple[Any, ...]]:
    """Operators with damp, penalty and options of the plan."""
    kernels = {
        "gauss": lsconv.psf.gaussian(2.0, size=15).to(F64),
        "box": torch.full((9, 9), 1 / 81, dtype=F64),
        "motion": lsconv.psf.motion(15, 30.0).to(F64),
    }
    paddings: list[dict[str, Any]] = [{}, {"padding": "same"}, {"padding": "same", "padding_mode": "circular"}]
    found: list[tuple[Any, ...]] = []
    for (name, kernel), keywords, damp in itertools.product(kernels.items(), paddings, (1e-1, 1e-2, 1e-3)):
        A = lsconv.Conv2d(kernel[None, None], (71, 83), **keywords)
        # those that would take dozens of steps have the inverse of the whole shared by themselves
        found.append((A, damp, None, {"tile": 30, "overlap": 28 if name == "gauss" and damp > 0.01 else "auto"}))
    for keywords, edge in zip(paddings, ("neumann", "neumann", "periodic"), strict=True):
        A = lsconv.Conv2d(kernels["box"][None, None], (71, 83), **keywords)
        L = lsconv.Gradient(A.in_shape, boundary=edge, dtype=F64)
        found.append((A, 0.2, L, {"tile": 36, "overlap": 20}))
    A = lsconv.Conv2d(kernels["box"][None, None].float(), (71, 83))
    found.append((A, 0.1, None, {"tile": 36, "overlap": 20}))  # the Hermitian preconditioner, in float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, 3, 3, generator=generator, dtype=F64) / 3
    found.append((lsconv.Conv2d(weight, (71, 83)), 0.8, None, {"tile": 30}))
    cube = torch.full((1, 1, 3, 3, 3), 1 / 27, dtype=F64)
    found.append((lsconv.Conv3d(cube, (23, 14, 15)), 0.3, None, {"tile": 12, "overlap": 5}))
    return found


def compare(mesh: DeviceMesh, folder: Path) -> None:
    """Solve every problem on the ranks, and compare with one device."""
    for number, (A, damp, L, options) in enumerate(problems()):
        if (mesh.size() == 4) == bool(number % 3):
            continue  # the two of three that the other number of ranks solves
        y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(number), dtype=A.dtype)
        if number % 4 == 0:
            options["storage"] = folder / f"{number}"
        plan = lsconv.tiled.Plan(A, damp=damp, L=L, mesh=mesh, **options)
        solution = plan.solve(y[:, plan.y_rows].clone())
        wide, L = A.to(dtype=F64), None if L is None else L.to(dtype=F64)
        reference = lsconv.tikhonov(wide, y.to(F64), damp, L=L, rtol=1e-13)
        error = solution.x - reference.x[:, plan.x_rows]
        limit = 1e-10 if A.dtype == F64 else 1e-6
        assert bool(solution.converged), (plan, solution)
        relative = float(error.norm() / reference.x.norm())
        assert relative <= limit, (plan, relative)
        if options.get("overlap") == "auto" and A.kernel_size != (15, 15) and damp < 0.1:
            hard = damp == 1e-3 and A.kernel_size != (9, 9) and any(map(any, A.padding))
            assert plan.path == ("pencil" if not hard or A.padding_mode == "circular" else "whole"), plan
            assert int(solution.iterations) <= 2, solution
        norms = solution.residual_norm, reference.residual_norm
        assert abs(float(norms[0] - norms[1])) <= 1e-6 * float(norms[1]), (plan, norms)


def variation(mesh: DeviceMesh) -> None:
    """Total variation of rows that ranks share: by tiles, by the shared inverse, and on one device."""
    scene = torch.zeros(1, 60, 67, dtype=F64)
    scene[:, 15:40, 20:50], scene[:, ::7, ::9] = 1, 0.6
    for side, tile, overlap in ((9, 12, "auto"), (5, 30, 6)):
        A = lsconv.Conv2d(torch.full((1, 1, side, side), 1 / side**2, dtype=F64), (60, 67))
        y = A(scene) + 0.01 * torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0), dtype=F64)
        rows = lsconv.tiled.Plan(A, damp=1.0, mesh=mesh)
        part = y[:, rows.y_rows].clone()
        solution = lsconv.tiled_total_variation(A, part, 2e-3, tile=tile, overlap=overlap, mesh=mesh, rtol=2e-3)
        whole = lsconv.total_variation(A, y, 2e-3, rtol=2e-4)
        assert bool(solution.converged)
        assert float(torch.dist(solution.x, whole.x[:, rows.x_rows]) / whole.x.norm()) < 1e-2
        assert abs(float(solution.residual_norm / whole.residual_norm) - 1) < 1e-2


def failing(case: str, mesh: DeviceMesh) -> None:
    """One rank has NaN, raises, ends or hangs; every other one says so."""
    rank = mesh.get_local_rank()
    if case == "raise":
        failing("nan", mesh)
    A = lsconv.Conv2d(torch.full((1, 1, 9, 9), 1 / 81, dtype=F64), (120, 70))
    plan = lsconv.tiled.Plan(A, damp=0.1, tile=30, overlap=20, mesh=mesh)
    y = torch.ones(1, plan.y_rows.stop - plan.y_rows.start, A.spatial_out[1], dtype=F64)
    if rank == 1:
        if case == "nan":
            y[0, -1, -1] = torch.nan
        else:
            plan.passes.inverse = lambda kind: ending(case)  # type: ignore[method-assign]
    try:
        plan.solve(y)
    except lsconv.LsconvError as error:
        print(f"{type(error).__name__}: {error}", flush=True)


def ending(case: str) -> Any:
    if case == "raise":
        raise RuntimeError("the disk is full")
    if case == "hang":
        sys.stdin.read()
    os._exit(1)


def in_files(mesh: DeviceMesh, folder: Path) -> None:
    """Solve numpy arrays with vectors in files, after ranks that have left different ones behind."""
    A = lsconv.Conv2d(torch.full((1, 1, 9, 9), 1 / 81, dtype=F64), (71, 83))
    y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    plan = lsconv.tiled.Plan(A, damp=0.03, tile=36, overlap=20, mesh=mesh, storage=folder / "work")
    out = np.zeros((1, plan.x_rows.stop - plan.x_rows.start, 83))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan.solve(y[:, plan.y_rows].numpy(), out=out, max_iter=2)
    # as if the second rank had been stopped in the first pass, and the other had not
    digest = plan._problem_digest(())
    vectors = Storage(folder / "work", digest, (1, len(out[0]), 83), F64, size=A.spatial_in, channels=True,
                      wraps=plan.wraps, first=plan.x_rows.start)  # fmt: skip
    vectors.vector("x").array[:] = 0
    vectors.save({"step": -mesh.get_local_rank(), "x": "x", "distance": None, "tiles": 1})
    solution = plan.solve(y[:, plan.y_rows].numpy(), out=out)
    reference = lsconv.lstsq(A, y, damp=0.03, rtol=1e-13)
    assert solution.x is out
    assert float((torch.from_numpy(out) - reference.x[:, plan.x_rows]).norm() / reference.x.norm()) < 1e-10


def batch_sharded(mesh: DeviceMesh) -> None:
    """A batch that ranks share is solved where it is; one whose rows they share is refused, and no conv2d sees it."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.overrides import TorchFunctionMode

    class Watched(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            assert not (name.startswith("conv") and any(isinstance(a, DTensor) for a in args)), name
            return function(*args, **(kwargs or {}))

    A = lsconv.Conv2d(torch.full((1, 1, 3, 3), 1 / 9, dtype=F64), (20, 22))
    y = torch.randn(5, 1, 18, 20, generator=torch.Generator().manual_seed(0), dtype=F64)
    with Watched():
        for solve in (lambda y: lsconv.lstsq(A, y, damp=0.1), lambda y: lsconv.tikhonov(A, y, 0.1)):
            solution = solve(distribute_tensor(y, mesh, [Shard(0)]))
            assert isinstance(solution.x, DTensor)
            assert solution.x.placements == (Shard(0),)
            assert bool(solution.converged.full_tensor().all())
            torch.testing.assert_close(solution.x.full_tensor(), solve(y).x)
            whole = solve(distribute_tensor(y, mesh, [Replicate()]))
            torch.testing.assert_close(whole.x.to_local(), solve(y).x)
            for axis in (1, 2, 3):
                with pytest.raises(lsconv.ArgumentError, match=r"lsconv\.tiled\.Plan"):
                    solve(distribute_tensor(y, mesh, [Shard(axis)]))


def main(case: str, folder: Path) -> None:
    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start = {} if "MASTER_ADDR" in os.environ else {"init_method": f"file://{folder / 'meeting'}"}
    dist.init_process_group(
        "gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=5 if case == "hang" else 60), **start
    )
    mesh = init_device_mesh("cpu", (ranks,))
    if case == "compare":
        compare(mesh, folder)
    elif case == "variation":
        variation(mesh)
    elif case == "files":
        in_files(mesh, folder)
        batch_sharded(mesh)
    else:
        failing(case, mesh)
        os._exit(0)  # a group one of whose ranks is gone cannot be taken down
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
