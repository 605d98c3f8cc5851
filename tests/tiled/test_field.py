"""Fields that stay in memory maps, Zarr arrays, or anything that is read by slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from tests.tiled.problems import error, exact, problem


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
