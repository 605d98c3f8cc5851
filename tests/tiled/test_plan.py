"""The tiled plan: the answer of the whole problem, with the whole's certificate."""

from __future__ import annotations

import pytest
import torch

import lsconv
from tests.tiled.problems import BOUNDARIES, F64, KERNELS, check, error, exact, problem

KINDS = [(torch.float32, False), (F64, False), (F64, True)]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name, dtype", [("gauss", F64), ("box", torch.float32), ("box", F64)])
def test_tiles_give_the_answer_of_one_device(name: str, boundary: str, dtype: torch.dtype) -> None:
    A, y = problem(name, boundary, (83, 98), dtype)
    plan, _ = check(A, y, 0.1, tile=40, overlap=24)
    assert plan.path == "tiles"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "boundary", "damp", "dtype", "penalty"),
    [  # every pair of two of the four
        (name, boundary, (1e-1, 1e-2, 1e-3)[(i + j) % 3], *KINDS[(i + 2 * j) % 3])
        for i, name in enumerate(KERNELS)
        for j, boundary in enumerate(BOUNDARIES)
    ],
)
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
