"""craig against the dense least-norm solution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ArgumentError, ConvergenceWarning
from lsconv.krylov.craig import craig
from lsconv.krylov.loop.solution import Status
from lsconv.krylov.lsqr import lsqr
from lsconv.operators.elementary import Dense

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
ACCURACY = {torch.float32: 2e-3, torch.complex64: 2e-3, torch.float64: 1e-8, torch.complex128: 1e-8}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def matrix(m: int, n: int, rank: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, rank, generator=g, dtype=wide(dtype)))[0]
    v = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=wide(dtype)))[0]
    return ((u * torch.linspace(1, 4, rank, dtype=wide(dtype))) @ v.mH).to(dtype)


def vectors(*shape: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(n: int, dtype: torch.dtype) -> torch.Tensor:
    root = vectors(n, n, dtype=dtype, seed=5)
    return root @ root.mH / n + 0.3 * torch.eye(n, dtype=dtype)


def dense_answer(A: torch.Tensor, b: torch.Tensor, damp: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(A.to(wide(A.dtype)), full_matrices=False)
    filters = torch.where(s > 1e-5 * s.max(), s / (s**2 + damp**2), 0.0)
    return ((b.to(u.dtype) @ u.conj()) * filters) @ vh.conj()


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x.to(reference.dtype) - reference).norm() / reference.norm())


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    deficiency=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    batch=st.sampled_from([(), (3,)]),
    seed=st.integers(0, 100),
)
def test_consistent_answer_is_the_least_norm_solution(
    m: int, n: int, deficiency: int, dtype: torch.dtype, batch: tuple[int, ...], seed: int
) -> None:
    A = matrix(m, n, max(1, min(m, n) - deficiency), dtype, seed)
    b = vectors(*batch, n, dtype=dtype, seed=seed + 1) @ A.T
    solution = craig(A, b)
    assert solution.converged.all()
    assert distance(solution.x, dense_answer(A, b, 0.0)) < ACCURACY[dtype]


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    damp=st.sampled_from([0.3, 2.0]),
    seed=st.integers(0, 100),
)
def test_damped_answer_needs_no_consistency(m: int, n: int, dtype: torch.dtype, damp: float, seed: int) -> None:
    A, b = matrix(m, n, min(m, n), dtype, seed), vectors(2, m, dtype=dtype, seed=seed + 1)
    solution = craig(A, b, damp=damp)
    assert solution.converged.all()
    assert distance(solution.x, dense_answer(A, b, damp)) < ACCURACY[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_residual_side_preconditioner_keeps_the_answer(dtype: torch.dtype, damp: float) -> None:
    A, b = matrix(6, 9, 6, dtype), vectors(2, 6, dtype=dtype)
    solution = craig(A, b, damp=damp, M=Dense(positive(6, dtype)))
    assert solution.converged.all()
    assert distance(solution.x, dense_answer(A, b, damp)) < 1e-8


def test_solution_side_preconditioner_makes_another_norm_least() -> None:
    A, b, N = matrix(5, 9, 5, torch.float64), vectors(5, dtype=torch.float64), positive(9, torch.float64)
    expected = N @ A.T @ torch.linalg.solve(A @ N @ A.T, b)
    assert distance(craig(A, b, N=Dense(N)).x, expected) < 1e-9


def test_answer_from_a_start_is_the_solution_nearest_to_it() -> None:
    A, b, x0 = matrix(5, 9, 5, torch.float64), vectors(5, dtype=torch.float64), vectors(9, dtype=torch.float64, seed=3)
    expected = x0 + torch.linalg.pinv(A) @ (b - A @ x0)
    assert distance(craig(A, b, x0=x0).x, expected) < 1e-9


def test_error_falls_monotonically_and_below_that_of_lsqr() -> None:
    A = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = vectors(20, dtype=torch.float64)
    exact = dense_answer(A, b, 0.0)
    errors: dict[str, list[float]] = {"craig": [], "lsqr": []}
    craig(A, b, callback=lambda state: errors["craig"].append(float((state.x - exact).norm())))
    lsqr(A, b, callback=lambda state: errors["lsqr"].append(float((state.x - exact).norm())))
    falls = torch.tensor(errors["craig"]).diff()
    assert (falls <= 1e-10).all()
    assert all(c <= q + 1e-10 for c, q in zip(errors["craig"], errors["lsqr"], strict=False))


def test_inconsistent_system_is_reported_and_x_does_not_blow_up() -> None:
    A, b = matrix(10, 5, 5, torch.float64), vectors(3, 10, dtype=torch.float64)
    b[1] = A @ torch.ones(5, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning):
        solution = craig(A, b)
    refused = (Status.STAGNATION, Status.CONDITION_LIMIT)
    assert [status in refused for status in solution.status] == [True, False, True]
    assert solution.converged.tolist() == [False, True, False]
    assert (solution.x.norm(dim=-1) < 1e3).all()


def test_damp_with_a_start_is_refused() -> None:
    with pytest.raises(ArgumentError, match="x0"):
        craig(torch.eye(3), torch.ones(3), damp=1.0, x0=torch.ones(3))
