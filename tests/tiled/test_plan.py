"""The tiled plan: the answer of the whole problem, by tiles in memory and out of core, with the whole's certificate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, DtypeError, MethodError, NonFiniteError, PlanMemoryError, ShapeError
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.tiled.field import Field

F64 = torch.float64
KERNELS = {
    "gauss": lsconv.psf.gaussian(2.0, size=15).to(F64),
    "box": torch.full((9, 9), 1 / 81, dtype=F64),
    "motion": lsconv.psf.motion(15, 30.0).to(F64),
}
BOUNDARIES: dict[str, dict[str, Any]] = {
    "valid": {},
    "same": {"padding": "same"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


def exact(A: lsconv.Convolution, y: Tensor, damp: float, L: lsconv.LinearOperator | None = None) -> Tensor:
    """The answer of one device, in double precision and to a tighter tolerance than the tiles'."""
    A, y = A.to(dtype=F64), y.to(F64)
    L = None if L is None else L.to(dtype=F64)
    return lsconv.tikhonov(A, y, damp, L=L, rtol=1e-13).x


def error(x: Any, reference: Tensor) -> float:
    return float((torch.as_tensor(np.asarray(x)).to(F64) - reference).norm() / reference.norm())


def problem(name: str, boundary: str, size: tuple[int, ...], dtype: torch.dtype = F64) -> tuple[Any, Tensor]:
    A = lsconv.Conv2d(KERNELS[name][None, None].to(dtype), size, **BOUNDARIES[boundary])
    return A, torch.randn(1, *A.spatial_out, generator=torch.Generator().manual_seed(1), dtype=dtype)


def check(A: Any, y: Tensor, damp: float, *, L: Any = None, **options: Any) -> Any:
    """Solve by tiles, and compare answer and certificate with those of one device."""
    plan = lsconv.tiled.Plan(A, damp=damp, L=L, **options)
    solution = plan.solve(y)
    reference = exact(A, y, damp, L)
    assert bool(solution.converged.all()), solution
    assert error(solution.x, reference) <= (1e-10 if A.dtype == F64 else 1e-6)
    wide = A.to(dtype=F64)
    residual = y.to(F64) - wide(solution.x.to(F64))
    items = tuple(range(-A.ndim - 1, 0))
    torch.testing.assert_close(solution.residual_norm, torch.linalg.vector_norm(residual, dim=items))
    return plan, solution


# ------------------------------------------------------------------ the same answer


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name, dtype", [("gauss", F64), ("box", torch.float32), ("box", F64)])
def test_tiles_give_the_answer_of_one_device(name: str, boundary: str, dtype: torch.dtype) -> None:
    A, y = problem(name, boundary, (83, 98), dtype)
    plan, _ = check(A, y, 0.1, tile=40, overlap=24)
    assert plan.path == "tiles"


@pytest.mark.slow
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("damp", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype, penalty", [(torch.float32, False), (F64, False), (F64, True)])
def test_the_plan_gives_the_answer_of_one_device_whatever_it_chooses(
    name: str, boundary: str, damp: float, dtype: torch.dtype, penalty: bool
) -> None:
    A, y = problem(name, boundary, (110, 133), dtype)
    L = lsconv.Gradient(A.in_shape, boundary="periodic" if boundary == "circular" else "neumann", dtype=dtype)
    check(A, y, damp, L=L if penalty else None, tile=50)


def test_a_gradient_penalty_is_solved_by_tiles() -> None:
    for boundary, edge in (("valid", "neumann"), ("circular", "periodic")):
        A, y = problem("box", boundary, (83, 98))
        plan, _ = check(A, y, 0.1, L=lsconv.Gradient(A.in_shape, boundary=edge, dtype=F64), tile=40, overlap=30)
        assert plan.path == "tiles"


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_mirrored_paddings_are_solved_by_tiles(mode: str) -> None:
    A = lsconv.Conv2d(lsconv.psf.gaussian(1.0, size=7).to(F64)[None, None], (60, 72), padding="same", padding_mode=mode)
    y = torch.randn(1, 60, 72, generator=torch.Generator().manual_seed(1), dtype=F64)
    check(A, y, 0.2, tile=30, overlap=16)
    check(A, y, 1.0, tile=16, overlap=8)  # tiles that meet no edge pad nothing


@pytest.mark.parametrize("out, into", [(2, 3), (3, 2), (1, 3)])
def test_channels_are_mixed(out: int, into: int) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out, into, 5, 5, generator=generator, dtype=F64) / 5
    A = lsconv.Conv2d(weight, (70, 81))
    check(A, torch.randn(out, *A.spatial_out, generator=generator, dtype=F64), 0.5, tile=35, overlap=24)


def test_a_plane_of_a_batch_is_an_item_of_its_own() -> None:
    kernel, size = lsconv.psf.gaussian(1.0, size=7).to(F64), (70, 81)
    y = torch.randn(3, 64, 75, generator=torch.Generator().manual_seed(3), dtype=F64)
    y[1] = 0
    solution = lsconv.tiled.Plan(kernel, size, damp=0.2, tile=35).solve(y)
    A = lsconv.Conv2d(kernel[None, None], size)
    assert error(solution.x, exact(A, y[:, None], 0.2)[:, 0]) < 1e-10
    assert solution.status[1] is lsconv.Status.ZERO
    assert bool(solution.converged.all())


def test_lines_and_volumes_have_tiles() -> None:
    profile = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1], dtype=F64)
    A = lsconv.Conv1d(profile[None, None], (500,))
    check(A, torch.randn(1, 496, generator=torch.Generator().manual_seed(4), dtype=F64), 0.1, tile=100)
    cube = profile[:3, None, None] * profile[:3, None] * profile[:3] / profile[:3].sum() ** 3
    A3 = lsconv.Conv3d(cube[None, None], (20, 22, 24))
    y = torch.randn(1, *A3.spatial_out, generator=torch.Generator().manual_seed(4), dtype=F64)
    check(A3, y, 0.3, tile=10, overlap=6)


def test_what_was_not_observed_is_not_read() -> None:
    A, y = problem("gauss", "valid", (97, 118))
    mask = torch.rand(A.spatial_out, generator=torch.Generator().manual_seed(5)) > 0.05
    y = y.masked_fill(~mask, torch.nan)
    solution = lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=32, observed=mask).solve(y)
    reference = lsconv.lstsq(A, y, damp=0.1, observed=mask, rtol=1e-13).x
    assert bool(solution.converged)
    assert error(solution.x, reference) < 1e-10


@pytest.mark.slow
def test_one_pass_and_blend_is_wrong_where_the_iteration_is_not() -> None:
    A, y = problem("box", "valid", (120, 120))
    plan = lsconv.tiled.Plan(A, damp=1e-2, tile=60, overlap=24)
    reference = exact(A, y, 1e-2)
    with pytest.warns(lsconv.ConvergenceWarning):
        one_pass = plan.solve(y, max_iter=0)
    assert error(one_pass.x, reference) > 0.03
    assert not bool(one_pass.converged)
    solution = plan.solve(y)
    assert bool(solution.converged)
    assert error(solution.x, reference) < 1e-10


# ------------------------------------------------------------------ what is chosen


def test_the_plan_says_what_it_does_and_why() -> None:
    A, _ = problem("gauss", "valid", (97, 118))
    text = repr(lsconv.tiled.Plan(A, damp=0.1, tile=40))
    assert "path='tiles' because beyond" in text
    assert "2 x 3 tiles" in text
    assert "MiB" in text


def test_an_inverse_that_reaches_too_far_goes_to_the_whole_where_that_fits() -> None:
    A, y = problem("motion", "valid", (97, 118))
    plan, _ = check(A, y, 1e-2, tile=40)
    assert plan.path == "whole"
    assert "steps of tiles" in plan.why
    assert lsconv.tiled.Plan(A, damp=0.5, tile=40).path == "tiles"


@pytest.mark.slow
def test_a_wider_overlap_leaves_less() -> None:
    A, y = problem("gauss", "circular", (160, 160))
    steps = [int(lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=o).solve(y).iterations) for o in (16, 24)]
    assert steps[0] > steps[1]


def test_memory_is_stated_and_bounds_the_tiles() -> None:
    A, _ = problem("gauss", "valid", (2000, 2100))
    large, small = (lsconv.tiled.Plan(A, damp=0.1, max_memory=m, storage="unused") for m in (2**31, 2**29))
    assert small.memory <= 2**29
    assert small.passes.tiles.size < large.passes.tiles.size
    with pytest.raises(PlanMemoryError, match="max_memory"):
        lsconv.tiled.Plan(A, damp=0.1, max_memory=2**20)


# ------------------------------------------------------------------ out of core


def test_memory_maps_are_read_and_written(tmp_path: Path) -> None:
    A, y = problem("gauss", "same", (97, 118), torch.float32)
    data = np.memmap(tmp_path / "y", np.float32, "w+", shape=y.shape)
    data[:] = y.numpy()
    out = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1, *A.spatial_in))
    solution = lsconv.tiled.Plan(A, damp=0.1, tile=40, storage=tmp_path / "work").solve(data, out=out)
    assert solution.x is out
    assert bool(solution.converged)
    assert error(out, exact(A, y, 0.1)) < 1e-6
    assert list((tmp_path / "work").iterdir()) == []


class Sliced:
    """An array that does what a Zarr array does: shape, dtype, and slices."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def __getitem__(self, cells: Any) -> np.ndarray[Any, Any]:
        return self.values[cells]

    def __setitem__(self, cells: Any, values: np.ndarray[Any, Any]) -> None:
        self.values[cells] = values


def test_anything_that_is_read_by_slices_serves() -> None:
    kernel, size = lsconv.psf.gaussian(1.0, size=7), (70, 81)
    counts = np.random.default_rng(0).integers(0, 60000, (64, 75)).astype(">u2")
    out = Sliced(np.zeros(size, np.float32))
    solution = lsconv.tiled.Plan(kernel, size, damp=0.2, tile=35).solve(Sliced(counts), out=out)
    A = lsconv.Conv2d(kernel[None, None], size)
    assert str(solution).startswith("Solution: (70, 81), float32")
    assert error(out.values, exact(A, torch.from_numpy(counts.astype(np.float64))[None], 0.2)[0]) < 1e-6


def test_zarr_arrays_are_read_and_written(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    A, y = problem("box", "valid", (83, 98), torch.float32)
    data = zarr.create_array(str(tmp_path / "y"), shape=tuple(y.shape), chunks=(1, 30, 30), dtype="f4")
    data[...] = y.numpy()
    out = zarr.create_array(str(tmp_path / "x"), shape=A.in_shape, chunks=(1, 32, 32), dtype="f4")
    solution = lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=24, storage=tmp_path / "work").solve(data, out=out)
    assert solution.x is out
    assert bool(solution.converged)
    assert error(out[...], exact(A, y, 0.1)) < 1e-6


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


def test_norms_measured_by_tiles_are_judged_as_those_of_the_whole() -> None:
    A, y = problem("box", "same", (83, 98))
    plan = lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=24)
    judge = plan._judge(Tolerances.of(F64, 1e-10, 0.0))
    answer = exact(A, y, 0.1)
    for x, converged in ((answer, True), (answer + 1e-6 * torch.cos(torch.arange(98.0)), False)):
        options = {"channels": True, "wraps": plan.wraps}
        fields = Field(x, A.spatial_in, **options), Field(y, A.spatial_out, **options)
        streamed = plan.passes.gradient(*fields, None, None)
        found, whole = judge.judged(streamed), judge.certify(x, y, single=True)
        assert bool(found.converged) == bool(whole.converged) == converged
        for name in ("residual_norm", "objective"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-6)
        if not converged:  # that of the answer is rounding
            assert found.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-6)


# ------------------------------------------------------------------ what is refused


def test_nan_is_reported_with_its_tile() -> None:
    A, y = problem("gauss", "valid", (97, 118))
    y[0, 60, 100] = torch.nan
    with pytest.raises(NonFiniteError, match=r"y: contains NaN .* tile \(\d, \d\) reads \(cells"):
        lsconv.tiled.Plan(A, damp=0.1, tile=40).solve(y)


def test_arguments_that_do_not_fit_are_refused() -> None:
    kernel = torch.ones(3, 3) / 9
    A = lsconv.Conv2d(kernel[None, None], (40, 40))
    refused: list[tuple[Any, str, Any, dict[str, Any]]] = [
        (ArgumentError, "damp: expected a number > 0", A, {"damp": 0.0}),
        (ArgumentError, "in_size: needed", kernel, {"damp": 1.0}),
        (ArgumentError, "tile: expected", A, {"damp": 1.0, "tile": (1, 2, 3)}),
        (ArgumentError, "overlap: expected", A, {"damp": 1.0, "overlap": "wide"}),
        (MethodError, "stride", lsconv.Conv2d(kernel[None, None], (40, 40), stride=2), {"damp": 1.0}),
        (MethodError, "a kernel per batch item", lsconv.Conv2d(kernel[None, None, None], (40, 40)), {"damp": 1.0}),
        (MethodError, "as many outputs as inputs",
         lsconv.Conv2d(kernel[None, None], (40, 40), padding=2, padding_mode="circular"), {"damp": 1.0}),
        (MethodError, "no border plan in 3 dimensions",
         lsconv.Conv3d(torch.ones(1, 1, 3, 3, 3), (9, 9, 9), padding=1, padding_mode="reflect"), {"damp": 1.0}),
        (MethodError, "L: tiles serve penalties", lsconv.Conv2d(kernel[None, None], (40, 40), padding=1,
         padding_mode="reflect"), {"damp": 1.0, "L": lsconv.Gradient((1, 40, 40))}),
        (ShapeError, "observed", A, {"damp": 1.0, "observed": torch.ones(3, 3)}),
    ]  # fmt: skip
    for kind, text, operator, options in refused:
        with pytest.raises(kind, match=text):
            lsconv.tiled.Plan(operator, **options)
    plan = lsconv.tiled.Plan(A, damp=1.0)
    with pytest.raises(ShapeError, match="y: expected"):
        plan.solve(torch.zeros(1, 40, 40))
    with pytest.raises(ShapeError, match="out: expected"):
        plan.solve(torch.zeros(1, 38, 38), out=torch.zeros(40, 40))
    with pytest.raises(DtypeError, match="y: float64"):
        plan.solve(torch.zeros(1, 38, 38, dtype=F64))
