"""Solvers on foreign operators, and lsconv operators in foreign solvers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import lsconv
from lsconv.krylov.solution import Solution

Solver = Callable[..., Solution]
LEAST_SQUARES = [lsconv.cgls, lsconv.lsqr, lsconv.lsmr]


def convolution() -> lsconv.Conv2d:
    weight = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lsconv.Conv2d(weight, in_size=(7, 6), padding=1)


def right_hand_side(A: lsconv.LinearOperator) -> torch.Tensor:
    return torch.randn(*A.out_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_scipy_operators_and_matrices_are_solved(solver: Solver) -> None:
    matrix = np.random.default_rng(0).standard_normal((9, 5))
    b = torch.linspace(1, 2, 9, dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.lstsq(matrix, b.numpy(), rcond=None)[0])
    for A in (scipy.sparse.linalg.aslinearoperator(matrix), scipy.sparse.csr_matrix(matrix)):
        torch.testing.assert_close(solver(A, b).x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("theirs", [scipy.sparse.linalg.lsqr, scipy.sparse.linalg.lsmr])
def test_convolutions_are_solved_by_scipy(theirs: Callable[..., tuple[np.ndarray, ...]]) -> None:
    A = convolution()
    b = right_hand_side(A)
    found = theirs(A.to_scipy(), b.numpy().ravel(), atol=1e-13, btol=1e-13)[0]
    ours = lsconv.lsmr(A, b, rtol=1e-13).x
    torch.testing.assert_close(torch.from_numpy(found).reshape(A.in_shape), ours, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_pylops_operators_are_solved(solver: Solver) -> None:
    pylops = pytest.importorskip("pylops")
    matrix = np.random.default_rng(0).standard_normal((9, 5))
    b = torch.linspace(1, 2, 9, dtype=torch.float64)
    expected = torch.from_numpy(np.linalg.lstsq(matrix, b.numpy(), rcond=None)[0])
    torch.testing.assert_close(solver(pylops.MatrixMult(matrix), b).x, expected, rtol=1e-9, atol=1e-9)


def test_convolutions_are_solved_by_pylops() -> None:
    pylops = pytest.importorskip("pylops")
    A = convolution()
    b = right_hand_side(A)
    operator = pylops.aslinearoperator(A.to_scipy())
    found = pylops.cgls(operator, b.numpy().ravel(), niter=400, tol=1e-15)[0]
    ours = lsconv.lsmr(A, b, rtol=1e-13).x
    torch.testing.assert_close(torch.from_numpy(found).reshape(A.in_shape), ours, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_batch_of_images_is_solved_as_the_single_images_are(solver: Solver) -> None:
    A = convolution()
    b = torch.randn(2, 3, *A.out_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = solver(A, b)
    assert together.converged.all()
    torch.testing.assert_close(together.x[1, 2], solver(A, b[1, 2]).x, rtol=1e-8, atol=1e-8)
