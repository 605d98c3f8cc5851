"""Solvers on foreign operators, and lsconv operators in foreign solvers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

import lsconv
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.refinement import refine

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


KINDS = ["operator", "dense", "csr", "scipy operator", "scipy csr"]


def as_kind(matrix: torch.Tensor, kind: str) -> object:
    """The matrix in one of the forms that every solver takes."""
    if kind == "operator":
        return lsconv.Dense(matrix)
    if kind == "csr":
        return matrix.to_sparse_csr()
    if kind == "scipy operator":
        return scipy.sparse.linalg.aslinearoperator(matrix.numpy())
    return scipy.sparse.csr_array(matrix.numpy()) if kind == "scipy csr" else matrix


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "solver", [*LEAST_SQUARES, lsconv.craig, lsconv.cg, lsconv.minres, lsconv.gmres, hybrid, refine]
)
def test_every_solver_takes_every_kind_of_matrix(solver: Solver, kind: str) -> None:
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ root.mT / 6 + torch.eye(6, dtype=torch.float64)
    expected = torch.linspace(1, 2, 6, dtype=torch.float64)
    options = {"rule": "discrepancy", "noise_std": 1e-8} if solver is hybrid else {}
    solution = solver(as_kind(matrix, kind), matrix @ expected, **options)
    assert solution.converged
    accuracy = 1e-5 if solver is hybrid else 1e-8
    torch.testing.assert_close(solution.x, expected, rtol=accuracy, atol=accuracy)


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


@pytest.mark.parametrize("theirs", ["cgls", "lsqr"])
def test_convolutions_are_solved_by_pylops(theirs: str) -> None:
    pylops = pytest.importorskip("pylops")
    A = convolution()
    b = right_hand_side(A)
    operator = pylops.aslinearoperator(A.to_scipy())
    limits = {"tol": 1e-15} if theirs == "cgls" else {"atol": 1e-14, "btol": 1e-14, "conlim": 0}
    found = getattr(pylops, theirs)(operator, b.numpy().ravel(), niter=400, **limits)[0]
    ours = lsconv.lsmr(A, b, rtol=1e-13).x
    torch.testing.assert_close(torch.from_numpy(found).reshape(A.in_shape), ours, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_batch_of_images_is_solved_as_the_single_images_are(solver: Solver) -> None:
    A = convolution()
    b = torch.randn(2, 3, *A.out_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = solver(A, b)
    assert together.converged.all()
    torch.testing.assert_close(together.x[1, 2], solver(A, b[1, 2]).x, rtol=1e-8, atol=1e-8)
