"""The methods for square systems against torch.linalg.solve in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ConvergenceWarning, PreconditionerError, ShapeError
from lsconv.krylov.cg import cg
from lsconv.krylov.gmres import gmres
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.minres import minres
from lsconv.operators.elementary import Dense, FromFunctions

Solver = Callable[..., Solution]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
ACCURACY = {torch.float32: 1e-3, torch.complex64: 1e-3, torch.float64: 1e-9, torch.complex128: 1e-9}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def vectors(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=wide(dtype)).to(dtype)


def positive(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    root = vectors(n, n, dtype=wide(dtype), seed=seed)
    return (root @ root.mH / n + 0.5 * torch.eye(n)).to(dtype)


def nonnormal(n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return vectors(n, n, dtype=dtype, seed=seed) + 1.5 * n**0.5 * torch.eye(n, dtype=dtype)


def error(solution: Solution, A: torch.Tensor, b: torch.Tensor) -> float:
    exact = torch.linalg.solve(A.to(wide(A.dtype)), b.to(wide(A.dtype)).unsqueeze(-1))[..., 0]
    return float((solution.x.to(exact.dtype) - exact).norm() / exact.norm())


@given(
    n=st.integers(1, 14),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 100),
)
def test_cg_answer_is_that_of_dense_linear_algebra(
    n: int, dtype: torch.dtype, batch: tuple[int, ...], seed: int
) -> None:
    A, b = positive(n, dtype, seed), vectors(*batch, n, dtype=dtype, seed=seed + 1)
    solution = cg(A, b)
    assert solution.converged.all()
    assert error(solution, A, b) < ACCURACY[dtype]


@given(
    n=st.integers(1, 14),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    restart=st.sampled_from([4, 30]),
    seed=st.integers(0, 100),
)
def test_gmres_answer_is_that_of_dense_linear_algebra(
    n: int, dtype: torch.dtype, batch: tuple[int, ...], restart: int, seed: int
) -> None:
    A, b = nonnormal(n, dtype, seed), vectors(*batch, n, dtype=dtype, seed=seed + 1)
    with warnings.catch_warnings():
        # only an unrestarted GMRES is sure to arrive: restarted every 4 steps it may stall, and says so
        warnings.simplefilter("error" if restart >= n else "ignore", ConvergenceWarning)
        solution = gmres(A, b, restart=restart)
    assert restart < n or solution.converged.all()
    if solution.converged.all():
        assert error(solution, A, b) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_cg_preconditioner_keeps_the_answer(dtype: torch.dtype) -> None:
    A, b = positive(10, dtype), vectors(3, 10, dtype=dtype)
    assert error(cg(A, b, M=Dense(positive(10, dtype, 9))), A, b) < 1e-9


def test_cg_refuses_a_preconditioner_with_a_kernel() -> None:
    A, b = positive(5, torch.float64), torch.ones(5, dtype=torch.float64)
    with pytest.raises(PreconditionerError):
        cg(A, b, M=Dense(torch.zeros(5, 5, dtype=torch.float64)))


def test_cg_takes_as_many_iterations_as_there_are_eigenvalues() -> None:
    A = torch.diag(torch.tensor([1.0, 1, 1, 4, 4, 9, 9, 9, 9], dtype=torch.float64))
    assert int(cg(A, torch.ones(9, dtype=torch.float64)).iterations) == 3


def test_cg_says_that_an_operator_is_indefinite() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        solution = cg(A, b)
    assert solution.status == [Status.RESIDUAL, Status.NEGATIVE_CURVATURE]


@pytest.mark.parametrize("solver", [cg, minres, gmres])
def test_rectangular_operators_are_refused(solver: Solver) -> None:
    with pytest.raises(ShapeError, match="square"):
        solver(torch.ones(3, 2), torch.ones(3))


@pytest.mark.parametrize("solver", [cg, minres, gmres])
def test_start_near_the_answer_saves_iterations(solver: Solver) -> None:
    A, b = positive(20, torch.float64), vectors(20, dtype=torch.float64)
    x0 = torch.linalg.solve(A, b) + 1e-7 * vectors(20, dtype=torch.float64, seed=4)
    warm = solver(A, b, x0=x0)
    assert error(warm, A, b) < 1e-9
    assert int(warm.iterations) < int(solver(A, b).iterations)


# ---------------------------------------------------------------------------------------------- gmres


def test_gmres_residuals_are_those_of_scipy() -> None:
    A, b = nonnormal(30, torch.float64), vectors(30, dtype=torch.float64)
    theirs: list[float] = []
    scipy.sparse.linalg.gmres(A.numpy(), b.numpy(), restart=10, maxiter=3, rtol=1e-13, callback=theirs.append,
                              callback_type="pr_norm")  # fmt: skip
    history = gmres(A, b, restart=10, rtol=1e-13).history
    assert history is not None
    ours = history.residual_norm[1:31] / b.norm()
    torch.testing.assert_close(ours, torch.tensor(theirs[:30], dtype=torch.float64), rtol=1e-6, atol=1e-12)


def test_gmres_preconditioner_may_vary() -> None:
    A, b = nonnormal(30, torch.float64), vectors(2, 30, dtype=torch.float64)

    def inner(v: torch.Tensor) -> torch.Tensor:
        return gmres(A, v, max_iter=3, rtol=1e-1).x

    with pytest.warns(ConvergenceWarning):
        solution = gmres(A, b, M=inner)
    assert solution.converged.all()
    assert error(solution, A, b) < 1e-9
    assert int(solution.iterations.max()) < int(gmres(A, b).iterations.max())


def test_gmres_preconditioner_need_not_be_definite() -> None:
    A, b = -nonnormal(12, torch.float64), vectors(12, dtype=torch.float64)
    solution = gmres(A, b, M=Dense(torch.linalg.inv(A)))
    assert int(solution.iterations) == 1
    assert error(solution, A, b) < 1e-12


def test_gmres_needs_no_adjoint() -> None:
    matrix = nonnormal(6, torch.float64)

    def no_adjoint(y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    A = FromFunctions((6,), (6,), lambda x: x @ matrix.T, no_adjoint, dtype=torch.float64)
    solution = gmres(A, vectors(6, dtype=torch.float64))
    assert solution.converged
    assert solution.gradient_norm.isnan()


def test_gmres_that_stands_still_says_so() -> None:
    """A cyclic shift: no step before the last one of a full cycle reduces the residual."""
    A = torch.eye(8, dtype=torch.float64).roll(1, 0)
    b = torch.eye(8, dtype=torch.float64)[:2]
    with pytest.warns(ConvergenceWarning, match="no longer improves"):
        solution = gmres(A, b, restart=4)
    assert solution.status == [Status.STAGNATION, Status.STAGNATION]
    assert gmres(A, b, restart=8).converged.all()


def test_gmres_is_not_restarted_up_to_200_unknowns() -> None:
    A = torch.eye(200, dtype=torch.float64).roll(1, 0)
    assert gmres(A, A[3]).converged


def test_gmres_on_a_singular_inconsistent_system_ends() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    with pytest.warns(ConvergenceWarning):
        solution = gmres(A, torch.ones(3, dtype=torch.float64))
    assert solution.status is Status.STAGNATION
    assert solution.x.isfinite().all()


# ---------------------------------------------------------------------------------------------- minres


def hermitian(n: int, dtype: torch.dtype, seed: int = 0, kernel: int = 0) -> torch.Tensor:
    """Indefinite, with ``kernel`` eigenvalues that are zero."""
    q = torch.linalg.qr(vectors(n, n, dtype=wide(dtype), seed=seed))[0]
    eigenvalues = torch.linspace(1, 3, n, dtype=torch.float64) * (-1) ** torch.arange(n)
    eigenvalues[:kernel] = 0
    A = (q * eigenvalues) @ q.mH
    return ((A + A.mH) / 2).to(dtype)


@given(
    n=st.integers(1, 14),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 100),
)
def test_minres_answer_is_that_of_dense_linear_algebra(
    n: int, dtype: torch.dtype, batch: tuple[int, ...], seed: int
) -> None:
    A, b = hermitian(n, dtype, seed), vectors(*batch, n, dtype=dtype, seed=seed + 1)
    solution = minres(A, b)
    assert solution.converged.all()
    assert error(solution, A, b) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_minres_preconditioner_keeps_the_answer(dtype: torch.dtype) -> None:
    A, b = hermitian(10, dtype), vectors(3, 10, dtype=dtype)
    assert error(minres(A, b, M=Dense(positive(10, dtype, 9))), A, b) < 1e-9


def test_minres_refuses_a_preconditioner_with_a_kernel() -> None:
    with pytest.raises(PreconditionerError):
        minres(hermitian(5, torch.float64), torch.ones(5).double(), M=Dense(torch.zeros(5, 5, dtype=torch.float64)))


def test_minres_residual_never_rises_and_is_never_above_that_of_cg() -> None:
    A, b = positive(20, torch.float64), vectors(20, dtype=torch.float64)
    ours, theirs = minres(A, b).history, cg(A, b).history
    assert ours is not None
    assert theirs is not None
    assert (ours.residual_norm.diff() <= 0).all()
    count = min(len(ours.residual_norm), len(theirs.residual_norm))
    assert (ours.residual_norm[:count] <= theirs.residual_norm[:count] * (1 + 1e-9)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_minres_on_a_singular_consistent_system_finds_the_least_norm(dtype: torch.dtype) -> None:
    A = hermitian(9, dtype, kernel=3)
    b = vectors(2, 9, dtype=dtype) @ A.T
    expected = b @ torch.linalg.pinv(A, rtol=1e-10).T
    solution = minres(A, b)
    assert solution.converged.all()
    assert float((solution.x - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("n", [9, 30])
def test_minres_on_a_singular_inconsistent_system_finds_the_least_residual(n: int) -> None:
    A, b = hermitian(n, torch.float64, kernel=3), vectors(2, n, dtype=torch.float64)
    least = (b - b @ torch.linalg.pinv(A, rtol=1e-10).T @ A.T).norm(dim=-1)
    solution = minres(A, b, rtol=1e-7)
    assert solution.status == [Status.GRADIENT, Status.GRADIENT]
    torch.testing.assert_close(solution.residual_norm, least, rtol=1e-12, atol=0)
    assert (solution.x.norm(dim=-1) < 100 * b.norm(dim=-1)).all()
