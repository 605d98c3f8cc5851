"""Total variation by tiles: the answer of the whole image, whatever is read and written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from lsconv.errors import ArgumentError, MethodError, NonFiniteError, ShapeError

F64 = torch.float64


def scene(*size: int) -> torch.Tensor:
    """Flat parts and a few points."""
    x = torch.zeros(size, dtype=F64)
    x[..., size[-2] // 4 : size[-2] // 2, size[-1] // 5 : size[-1] // 2] = 1
    x[..., ::7, ::9] += 0.3
    return x


def observed(A: Any) -> torch.Tensor:
    noise = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    return A(scene(*A.in_shape)) + 0.01 * noise


def objective(A: Any, x: torch.Tensor, y: torch.Tensor, weight: float, dims: tuple[int, ...]) -> float:
    size = torch.linalg.vector_norm(lsconv.Gradient(A.in_shape, dtype=F64)(x), dim=dims) if dims else None
    total = lsconv.Gradient(A.in_shape, dtype=F64)(x).abs().sum() if size is None else size.sum()
    return float(0.5 * (A(x) - y).square().sum() + weight * total)


@pytest.mark.slow
@pytest.mark.parametrize(
    "side, channels, padding, isotropic, coupled, overlap",
    [
        (5, 1, 0, True, True, "auto"),
        (5, 1, "same", True, True, "auto"),
        (5, 2, 0, True, True, "auto"),
        (5, 2, 0, False, True, "auto"),
        (5, 2, 0, True, False, "auto"),
        (5, 1, 0, True, True, 6),  # tiles that are not exact
    ],
)
def test_tiles_give_the_answer_of_the_whole(
    side: int, channels: int, padding: Any, isotropic: bool, coupled: bool, overlap: Any
) -> None:
    eye = torch.eye(channels, dtype=F64)[:, :, None, None]
    A = lsconv.Conv2d(eye * torch.full((side, side), 1 / side**2, dtype=F64), (48, 55), padding=padding)
    y, kind = observed(A), {"isotropic": isotropic, "coupled": coupled}
    solution = lsconv.tiled_total_variation(A, y, 2e-3, tile=28, overlap=overlap, rtol=1e-4, **kind)
    whole = lsconv.total_variation(A, y, 2e-3, rtol=1e-5, max_iter=3000, **kind)
    assert bool(solution.converged)
    assert bool(whole.converged)
    assert float(torch.dist(solution.x, whole.x) / whole.x.norm()) < 2e-3
    dims = ((0,) if isotropic else ()) + ((1,) if coupled else ())
    best, found = (objective(A, x, y, 2e-3, dims) for x in (whole.x, solution.x))
    assert best * (1 - 1e-5) <= found <= best * (1 + 1e-4)
    assert float(solution.residual_norm) == pytest.approx(float((y - A(solution.x)).norm()))


@pytest.mark.slow
def test_a_kernel_and_memory_maps_serve(tmp_path: Path) -> None:
    kernel = torch.full((3, 3), 1 / 9)
    A = lsconv.Conv2d(kernel[None, None].to(F64), (40, 44))
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(2, 38, 42))
    y[:] = observed(A).numpy()
    y[1] *= 0.5
    out = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 40, 44))
    solution = lsconv.tiled_total_variation(
        kernel, y, 2e-3, in_size=(40, 44), out=out, tile=24, storage=tmp_path / "work"
    )
    assert solution.x is out
    assert solution.status == [lsconv.Status.OPTIMALITY] * 2
    whole = lsconv.total_variation(A, torch.from_numpy(np.array(y)).to(F64)[:, None], 2e-3, rtol=1e-4)
    assert float((torch.from_numpy(np.array(out)) - whole.x[:, 0]).norm() / whole.x.norm()) < 1e-2
    assert [file for file in (tmp_path / "work").rglob("*") if file.is_file()] == []


def test_arguments_that_tiles_do_not_serve_are_refused() -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, (20, 20))
    circular = lsconv.Conv2d(torch.ones(1, 1, 3, 3) / 9, (20, 20), padding="same", padding_mode="circular")
    y = torch.ones(1, 18, 18)
    with pytest.raises(ArgumentError, match="weight: expected a finite number > 0"):
        lsconv.tiled_total_variation(A, y, 0.0)
    with pytest.raises(ArgumentError, match="max_iter"):
        lsconv.tiled_total_variation(A, y, 1e-3, max_iter=0)
    with pytest.raises(MethodError, match="zero padding"):
        lsconv.tiled_total_variation(circular, torch.ones(1, 20, 20), 1e-3)
    with pytest.raises(MethodError, match="observed"):
        lsconv.tiled_total_variation(A, y, 1e-3, observed=torch.ones(18, 18))
    with pytest.raises(ShapeError, match="out: expected"):
        lsconv.tiled_total_variation(A, y, 1e-3, out=torch.zeros(20, 20))
    with pytest.raises(NonFiniteError, match=r"y: .* tile"):
        lsconv.tiled_total_variation(A, torch.full_like(y, torch.nan), 1e-3)
