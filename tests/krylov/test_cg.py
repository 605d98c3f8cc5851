"""cg on singular matrices: a solvable system is solved, an unsolvable one ends unconverged with a finite x."""

from __future__ import annotations

import pytest
import torch

import lsconv

DTYPES = (torch.float32, torch.float64)
PATH = torch.tensor([[1.0, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 2, -1], [0, 0, -1, 1]])  # constants are its null vectors
UNSOLVABLE = {
    "diagonal": (torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([1.0, 2.0])),
    "path": (PATH, torch.tensor([1.0, 0, 0, 0])),
    "zero": (torch.zeros(2, 2), torch.tensor([1.0, 2.0])),
    "ones": (torch.ones(3, 3), torch.tensor([1.0, 2.0, 4.0])),
}


@pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
@pytest.mark.parametrize("kind", UNSOLVABLE)
def test_an_unsolvable_system_ends_finite_and_unconverged(kind: str, scale: float, dtype: torch.dtype) -> None:
    matrix, b = (t.to(dtype) for t in UNSOLVABLE[kind])
    solution = lsconv.cg(scale * matrix, b)
    assert solution.x.isfinite().all()
    assert not bool(solution.converged)


@pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unsolvable_item_disturbs_no_other(dtype: torch.dtype) -> None:
    b = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, -1]], dtype=dtype)
    solution = lsconv.cg(PATH.to(dtype), b)
    assert solution.x.isfinite().all()
    assert solution.converged.tolist() == [False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_solvable_singular_system_gets_its_shortest_solution(dtype: torch.dtype) -> None:
    b = torch.tensor([1.0, 0, 0, -1], dtype=dtype)
    solution = lsconv.cg(PATH.to(dtype), b)
    exact = torch.linalg.pinv(PATH.double(), rtol=1e-12) @ b.double()
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x.double(), exact, rtol=0, atol=100 * torch.finfo(dtype).eps)
