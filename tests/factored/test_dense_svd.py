"""The dense decomposition against torch.linalg.pinv of the same matrix in double precision."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.errors import PlanMemoryError
from lsconv.factored.dense_svd import SingularValuePlan
from lsconv.krylov.loop.solution import Status

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SHAPES = ((6, 9), (9, 6), (7, 7))


def deficient(shape: tuple[int, ...], dtype: torch.dtype, rank: int = 4) -> torch.Tensor:
    """A matrix of small integers, so that its rank is exact in every dtype."""
    generator = torch.Generator().manual_seed(0)

    def integers(*size: int) -> torch.Tensor:
        parts = torch.randint(-2, 3, (2, *size), generator=generator, dtype=torch.float64)
        return (torch.complex(parts[0], parts[1]) if dtype.is_complex else parts[0]).to(dtype)

    return integers(*shape[:-1], rank) @ integers(*shape[:-2], rank, shape[-1])


def double(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal to some hundred roundings of ``dtype``, relative to the largest entry."""
    error = (double(found) - exact).abs().max() / exact.abs().max()
    assert error < 300 * torch.finfo(dtype).eps


def regularised_inverse(matrix: torch.Tensor, damp: torch.Tensor) -> torch.Tensor:
    """``V sigma / (sigma^2 + damp^2) U^H``, the singular values below rounding being zero."""
    U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
    sigma = torch.where(sigma > 1e-14 * sigma[..., :1], sigma, 0)
    weight = torch.where(sigma > 0, sigma / (sigma**2 + damp[..., None] ** 2), 0)
    return Vh.mH @ (weight[..., None] * U.mH)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_undamped_answers_are_those_of_the_pseudo_inverse(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = deficient(shape, dtype)
    plan = SingularValuePlan(lsconv.Dense(matrix), rcond=1e-6, rtol=1e-6)
    exact = torch.linalg.pinv(double(matrix), rtol=1e-6)
    y, v = torch.randn(3, shape[0], dtype=dtype), torch.randn(3, shape[1], dtype=dtype)
    solution = plan.solve(y)
    assert solution.converged.all()
    assert solution.rank.tolist() == [4, 4, 4]
    assert solution.nullity.tolist() == [shape[1] - 4] * 3
    assert solution.x.dtype == dtype
    close(solution.x, double(y) @ exact.mT, dtype)
    close(plan.apply(y), double(y) @ exact.mT, dtype)
    close(plan.adjoint(v), double(v) @ exact.mH.mT, dtype)
    close(plan.normal_solve(v), double(v) @ (exact @ exact.mH).mT, dtype)
    close(plan.gram_solve(v), double(v) @ (exact @ exact.mH).mT, dtype)


@pytest.mark.parametrize("rcond", [0.0, 1e-9, 1e-3, 0.2, 0.9])
def test_rcond_is_that_of_torch(rcond: float) -> None:
    generator = torch.Generator().manual_seed(1)
    U, _, Vh = torch.linalg.svd(torch.randn(6, 8, generator=generator, dtype=torch.float64), full_matrices=False)
    matrix = U @ torch.diag(torch.tensor([2.0, 1.0, 0.1, 1e-2, 1e-5, 1e-8]).double()) @ Vh
    plan = SingularValuePlan(lsconv.Dense(matrix), rcond=rcond, rtol=1e-10)
    y = torch.randn(6, generator=generator, dtype=torch.float64)
    expected = torch.linalg.pinv(matrix, rtol=rcond) @ y
    solution = plan.solve(y)
    assert int(plan.rank) == int(torch.linalg.matrix_rank(matrix, rtol=rcond))
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x, expected, rtol=1e-7, atol=1e-7 * float(expected.norm()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_operator_of_a_batch_has_its_own_rank(dtype: torch.dtype) -> None:
    matrices = torch.stack([deficient((5, 7), dtype, rank) for rank in (1, 3, 5)])
    A = lsconv.Dense(matrices)
    y = torch.randn(3, 5, dtype=dtype)
    solution = SingularValuePlan(A, rcond=1e-6, rtol=1e-6).solve(y)
    assert solution.rank.tolist() == [1, 3, 5]
    exact = torch.linalg.pinv(double(matrices), rtol=1e-6)
    for item in range(3):
        close(solution.x[item], exact[item] @ double(y[item]), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damp", [1e-13, 1e-3, 2.0])
def test_damped_answers_are_filtered_and_a_zero_stays_one(
    damp: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    matrix = deficient(shape, dtype)
    plan = SingularValuePlan(lsconv.Dense(matrix), damp, rcond=1e-6, rtol=1e-6)
    exact = regularised_inverse(double(matrix), torch.tensor(damp, dtype=torch.float64))
    y, v = torch.randn(3, shape[0], dtype=dtype), torch.randn(3, shape[1], dtype=dtype)
    close(plan.solve(y).x, double(y) @ exact.mT, dtype)
    close(plan.adjoint(v), double(v) @ exact.mH.mT, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_damped_normal_solve_inverts_the_null_space_too(shape: tuple[int, int]) -> None:
    matrix = deficient(shape, torch.float64)
    plan = SingularValuePlan(lsconv.Dense(matrix), 0.5, rcond=1e-6, rtol=1e-6)
    g = torch.randn(shape[1], dtype=torch.float64)
    normal = matrix.mT @ matrix + 0.25 * torch.eye(shape[1], dtype=torch.float64)
    exact = torch.linalg.solve(normal, g)
    # rounding of either is multiplied by the condition, at most
    bound = float(torch.linalg.cond(normal)) * torch.finfo(torch.float64).eps
    assert (plan.normal_solve(g) - exact).abs().max() < bound * exact.abs().max()


def test_each_item_has_its_own_damping_and_zero_is_one() -> None:
    matrix = deficient((6, 9), torch.float64)
    damp = torch.tensor([0.0, 1e-13, 0.3], dtype=torch.float64)
    y = torch.randn(3, 6, dtype=torch.float64)
    solution = SingularValuePlan(lsconv.Dense(matrix), damp, rcond=1e-9, rtol=1e-10).solve(y)
    exact = regularised_inverse(matrix, damp) if matrix.ndim == 3 else regularised_inverse(matrix[None], damp)
    assert solution.converged.all()
    close(solution.x, (exact @ y[..., None])[..., 0], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_value_on_the_threshold_is_undecided(dtype: torch.dtype) -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=dtype))
    y = torch.ones(3, dtype=dtype)
    on, beside = (SingularValuePlan(lsconv.Dense(matrix), rcond=r, rtol=1e-6) for r in (0.25, 0.26))
    assert bool(on.undecided)
    assert not bool(beside.undecided)
    assert on.solve(y).status == Status.RANK_UNDECIDED
    assert not bool(on.solve(y).converged)
    assert bool(beside.solve(y).converged)
    assert int(beside.rank) == 2


def test_a_damped_item_has_no_rank_to_decide() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    damp = torch.tensor([0.0, 0.1])
    solution = SingularValuePlan(lsconv.Dense(matrix), damp, rcond=0.25, rtol=1e-6).solve(torch.ones(2, 3))
    assert solution.converged.tolist() == [False, True]


def test_an_exact_zero_is_decided_at_rcond_zero() -> None:
    plan = SingularValuePlan(lsconv.Dense(torch.diag(torch.tensor([1.0, 0.0]))), rcond=0.0, rtol=1e-6)
    assert not bool(plan.undecided)
    assert plan.solve(torch.ones(2)).x.tolist() == [1.0, 0.0]


def test_the_zero_operator_has_rank_zero_and_the_answer_zero() -> None:
    solution = SingularValuePlan(lsconv.Dense(torch.zeros(3, 4)), rcond=1e-7, rtol=1e-6).solve(torch.ones(3))
    assert int(solution.rank) == 0
    assert solution.x.tolist() == [0.0] * 4


def test_a_plan_beyond_the_memory_allowed_is_refused() -> None:
    A = lsconv.Dense(torch.ones(20, 30))
    needed = SingularValuePlan.bytes_for(A)
    SingularValuePlan(A, rcond=1e-7, rtol=1e-6, allowed=needed)
    with pytest.raises(PlanMemoryError, match="memory_limit="):
        SingularValuePlan(A, rcond=1e-7, rtol=1e-6, allowed=needed - 1)
