"""The least-squares methods against dense linear algebra in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ArgumentError, PreconditionerError
from lsconv.krylov.cgls import cgls
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.operators.elementary import Dense, Diagonal

Solver = Callable[..., Solution]
SOLVERS = [cgls, lsqr, lsmr]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
ACCURACY = {torch.float32: 2e-3, torch.complex64: 2e-3, torch.float64: 1e-8, torch.complex128: 1e-8}

every_solver = pytest.mark.parametrize("solver", SOLVERS)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def matrix(m: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """An m x n matrix with ``rank`` singular values between 1 and 4."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, rank, generator=g, dtype=wide(dtype)))[0]
    v = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=wide(dtype)))[0]
    return ((u * torch.linspace(1, 4, rank, dtype=wide(dtype))) @ v.mH).to(dtype)


def vectors(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(n: int, dtype: torch.dtype, seed: int = 5) -> torch.Tensor:
    """A Hermitian positive definite matrix."""
    root = vectors(n, n, dtype=dtype, seed=seed)
    return root @ root.mH / n + 0.3 * torch.eye(n, dtype=dtype)


def dense_answer(A: torch.Tensor, b: torch.Tensor, damp: float) -> torch.Tensor:
    """The damped, or the minimum-norm, least-squares solution, by the SVD of A in float64."""
    u, s, vh = torch.linalg.svd(A.to(wide(A.dtype)), full_matrices=False)
    filters = torch.where(s > 1e-5 * s.max(), s / (s**2 + damp**2), 0.0)
    return ((b.to(u.dtype) @ u.conj()) * filters) @ vh.conj()


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.to(reference.dtype) - reference).norm() / reference.norm())


@every_solver
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    deficiency=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    damp=st.sampled_from([0.0, 0.1, 3.0]),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")
def test_answer_is_that_of_dense_linear_algebra(
    solver: Solver, m: int, n: int, deficiency: int, dtype: torch.dtype, damp: float, batch: tuple[int, ...], seed: int
) -> None:
    A = matrix(m, n, max(1, min(m, n) - deficiency), dtype, seed)
    b = vectors(*batch, m, dtype=dtype, seed=seed + 1)
    solution, answer = solver(A, b, damp=damp), dense_answer(A, b, damp)
    # Where b is nearly in the range of A, ||r|| is small, and the bound on the gradient, relative to it, may be below
    # what the gradient of the nearest x that can be stored is. (7 x 6, float32, seed 7.)
    norm = torch.linalg.matrix_norm(A, 2).double()
    size = norm * (norm * torch.linalg.vector_norm(answer, dim=-1) + torch.linalg.vector_norm(b, dim=-1))
    assert (solution.converged | (solution.gradient_norm <= torch.finfo(dtype).eps * size)).all()
    assert solution.x.shape == (*batch, n)
    assert solution.x.dtype == dtype
    assert distance(solution.x, answer) < ACCURACY[dtype]


@every_solver
def test_reported_norms_are_recomputed_ones(solver: Solver) -> None:
    A, b = matrix(9, 5, 5, torch.float64), vectors(2, 9, dtype=torch.float64)
    solution = solver(A, b, damp=0.5)
    r = b - solution.x @ A.T
    torch.testing.assert_close(solution.residual_norm, r.norm(dim=-1), rtol=1e-12, atol=0)
    g = r @ A - 0.25 * solution.x
    torch.testing.assert_close(solution.gradient_norm, g.norm(dim=-1), rtol=1e-6, atol=1e-14)


@every_solver
def test_every_item_may_have_its_own_damp(solver: Solver) -> None:
    A, b = matrix(8, 6, 6, torch.float64), vectors(3, 8, dtype=torch.float64)
    solution = solver(A, b, damp=torch.tensor([0.0, 0.5, 5.0]))
    for item, damp in enumerate([0.0, 0.5, 5.0]):
        assert distance(solution.x[item], dense_answer(A, b[item], damp)) < 1e-8
    assert solution.damp.tolist() == [0.0, 0.5, 5.0]


@every_solver
def test_every_item_may_have_its_own_operator(solver: Solver) -> None:
    matrices = torch.stack([matrix(8, 6, 6, torch.float64, seed) for seed in range(3)])
    b = vectors(8, dtype=torch.float64)
    solution = solver(matrices, b)
    assert solution.x.shape == (3, 6)
    for item in range(3):
        assert distance(solution.x[item], dense_answer(matrices[item], b, 0.0)) < 1e-8


@every_solver
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_matrices_are_accepted(solver: Solver) -> None:
    A = matrix(8, 6, 6, torch.float64)
    A[A.abs() < 0.3] = 0
    b = vectors(2, 8, dtype=torch.float64)
    torch.testing.assert_close(solver(A.to_sparse_csr(), b).x, solver(A, b).x, rtol=1e-9, atol=1e-9)


def test_lsqr_agrees_with_scipy() -> None:
    A, b = matrix(30, 20, 20, torch.float64), vectors(30, dtype=torch.float64)
    theirs = scipy.sparse.linalg.lsqr(A.numpy(), b.numpy(), damp=0.3, atol=1e-14, btol=1e-14)
    ours = lsqr(A, b, damp=0.3, rtol=1e-13)
    assert distance(ours.x, torch.from_numpy(theirs[0])) < 1e-11
    assert math.isclose(float(ours.residual_norm), theirs[3], rel_tol=1e-11)


# ---------------------------------------------------------------------------------------------- starts


@every_solver
def test_start_moves_the_answer_by_its_null_space_part(solver: Solver) -> None:
    A, b, x0 = matrix(5, 9, 5, torch.float64), vectors(5, dtype=torch.float64), vectors(9, dtype=torch.float64, seed=3)
    null_part = x0 - torch.linalg.pinv(A) @ (A @ x0)
    assert distance(solver(A, b, x0=x0).x, dense_answer(A, b, 0.0) + null_part) < 1e-8


@every_solver
def test_start_does_not_move_a_damped_answer(solver: Solver) -> None:
    A, b = matrix(5, 9, 5, torch.float64), vectors(2, 5, dtype=torch.float64)
    x0 = 10 * vectors(2, 9, dtype=torch.float64, seed=3)
    damp = torch.tensor([0.3, 2.0])
    solution = solver(A, b, damp=damp, x0=x0)
    for item in range(2):
        assert distance(solution.x[item], dense_answer(A, b[item], float(damp[item]))) < 1e-8


@every_solver
def test_exact_start_returns_a_copy(solver: Solver) -> None:
    A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    x0 = torch.tensor([1.0, 2.0])
    solution = solver(A, A @ x0, x0=x0)
    assert torch.equal(solution.x, x0)
    assert solution.x.data_ptr() != x0.data_ptr()
    assert int(solution.iterations) == 0


# ---------------------------------------------------------------------------------------------- preconditioners


@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.4])
def test_solution_side_preconditioner_keeps_the_answer(solver: Solver, dtype: torch.dtype, damp: float) -> None:
    A, b = matrix(9, 6, 6, dtype), vectors(2, 9, dtype=dtype)
    solution = solver(A, b, damp=damp, N=Dense(positive(6, dtype)))
    assert solution.converged.all()
    assert distance(solution.x, dense_answer(A, b, damp)) < 1e-8


@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.4])
def test_residual_side_preconditioner_keeps_the_answer(solver: Solver, dtype: torch.dtype, damp: float) -> None:
    A, b = matrix(6, 9, 6, dtype), vectors(2, 6, dtype=dtype)
    solution = solver(A, b, damp=damp, M=Dense(positive(6, dtype)))
    assert solution.converged.all()
    assert distance(solution.x, dense_answer(A, b, damp)) < 1e-8


@every_solver
def test_residual_side_preconditioner_keeps_a_damped_inconsistent_answer(solver: Solver) -> None:
    A, b = matrix(9, 6, 6, torch.float64), vectors(2, 9, dtype=torch.float64)
    solution = solver(A, b, damp=torch.tensor([0.4, 2.0]), M=Dense(positive(9, torch.float64)))
    assert solution.converged.all()
    assert distance(solution.x[1], dense_answer(A, b[1], 2.0)) < 1e-8


@every_solver
def test_reweighted_inconsistent_equations_are_not_called_converged(solver: Solver) -> None:
    A, b = matrix(9, 6, 6, torch.float64), vectors(9, dtype=torch.float64)
    M = positive(9, torch.float64)
    with pytest.warns(UserWarning, match="did not converge"):
        solution = solver(A, b, M=Dense(M))
    assert not solution.converged
    root = torch.linalg.cholesky(M).mH
    assert distance(solution.x, dense_answer(root @ A, root @ b, 0.0)) < 1e-6


@every_solver
def test_exact_inverse_converges_at_once(solver: Solver) -> None:
    A, b = matrix(9, 6, 6, torch.float64), vectors(9, dtype=torch.float64)
    solution = solver(A, b, N=Dense(torch.linalg.inv(A.T @ A)))
    assert int(solution.iterations) <= 2


@every_solver
def test_preconditioner_with_a_kernel_is_refused(solver: Solver) -> None:
    A, b = matrix(6, 6, 6, torch.float64), vectors(6, dtype=torch.float64)
    kernel = torch.zeros(6, 6, dtype=torch.float64)
    with pytest.raises(PreconditionerError, match="positive definite"):
        solver(A, b, M=Dense(kernel))
    with pytest.raises(PreconditionerError, match="positive definite"):
        solver(A, b, N=Dense(kernel))
    with pytest.raises(PreconditionerError, match="positive definite"):
        solver(A, b, N=Diagonal(-torch.ones(6, dtype=torch.float64)))


@every_solver
def test_preconditioner_of_the_wrong_shape_is_refused(solver: Solver) -> None:
    with pytest.raises(PreconditionerError, match=r"\(6,\)"):
        solver(matrix(6, 4, 4, torch.float64), torch.ones(6, dtype=torch.float64), M=Dense(torch.eye(4).double()))


@every_solver
def test_start_with_residual_side_preconditioner_and_damp_is_refused(solver: Solver) -> None:
    A, b = matrix(6, 6, 6, torch.float64), torch.ones(6, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="x0"):
        solver(A, b, M=Dense(positive(6, torch.float64)), damp=1.0, x0=b)
