"""The certificate: an x that is no minimiser is not certified, however small its gradient is."""

from __future__ import annotations

import warnings

import pytest
import torch

import lsconv
from lsconv.krylov.loop.certificate import NormBounds, NullSpaceBound, RankThreshold, Tolerances
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Status
from lsconv.operators.elementary import Dense

DTYPES = (torch.float32, torch.float64)


def graded(dtype: torch.dtype, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix of singular values from 1 to ``smallest``, and the vector of the smallest."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    sigma = torch.logspace(0, -2, 8, dtype=torch.float64)
    sigma[-1] = smallest
    return (Q @ torch.diag(sigma) @ Q.mT).to(dtype), Q[:, -1].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [1, 3, 6])
def test_length_excuses_no_objective_above_that_at_zero(power: int, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    sigma = eps / 4
    matrix, v = graded(torch.float64, sigma)
    A = Dense(matrix)
    exact = torch.linspace(1, 2, 8, dtype=torch.float64)
    y = matrix @ exact
    x = exact + 10.0**power / sigma * v
    tolerances = Tolerances.of(dtype, None, 0.0)
    assert float((A(x) - y).norm()) > float(y.norm())
    certificate = Judge(A, tolerances, rounding=eps, norm=NormBounds(upper=torch.tensor(1.0).double())).certify(x, y)
    assert not bool(certificate.no_worse)
    assert not bool(certificate.converged)
    assert bool(Judge(A, tolerances, rounding=eps).certify(exact, y).converged)


def test_rounding_alone_excuses_what_float64_meets() -> None:
    """An x that is long beside y; a short one's gradient is excused its rounding as it is."""
    matrix, v = graded(torch.float64, 1e-5)
    exact = 1e5 * v + torch.linspace(1, 2, 8, dtype=torch.float64) / 3
    y = matrix @ exact
    tolerances = Tolerances.of(torch.float32, 1e-9, 0.0)
    rounded = Judge(Dense(matrix), tolerances, dtype=torch.float32).solution(exact, y)
    assert rounded.status == Status.ROUNDED
    assert bool(rounded.converged)
    assert Judge(Dense(matrix), tolerances).solution(exact, y).status == Status.RESIDUAL
    off = Judge(Dense(matrix), tolerances, dtype=torch.float32).solution(exact + 1e-2, y)
    assert not bool(off.converged)


def test_rounding_excuses_no_objective_above_that_at_zero() -> None:
    """The exact x of float64 is so long that its rounding alone is worse than x = 0."""
    matrix, v = graded(torch.float64, 1e-12)
    A, exact = Dense(matrix), 1e12 * v + torch.linspace(0, 1, 8, dtype=torch.float64)
    y = matrix @ exact
    tolerances = Tolerances.of(torch.float32, None, 0.0)
    assert bool(Judge(A, tolerances).solution(exact, y).converged)
    solution = Judge(A, tolerances, dtype=torch.float32).solution(exact, y)
    assert float(solution.residual_norm) > float(y.norm())
    assert not bool(solution.converged)
    assert solution.status == Status.STAGNATION


def test_singular_values_cut_off_may_leave_their_gradient() -> None:
    A = Dense(torch.diag(torch.tensor([1.0, 1e-3], dtype=torch.float64)))
    y, x = torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()  # right at rank 1
    tolerances = Tolerances.of(torch.float64, None, 0.0)
    assert bool(Judge(A, tolerances, rank=RankThreshold(1e-2, truncated=True)).certify(x, y).converged)
    assert not bool(Judge(A, tolerances, rank=RankThreshold(1e-2)).certify(x, y).converged)
    assert not bool(Judge(A, tolerances, rank=RankThreshold(1e-4, truncated=True)).certify(x, y).converged)


def test_with_damping_nothing_is_cut_off() -> None:
    A = Dense(torch.diag(torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)))
    y, damp = torch.ones(3, dtype=torch.float64), 0.5
    s = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
    exact = s / (s**2 + damp**2) * y
    judge = Judge(A, Tolerances.of(torch.float64, None, 0.0), damp, rank=RankThreshold(0.1, truncated=True))
    assert bool(judge.certify(exact, y).converged)
    assert not bool(judge.certify(1.02 * exact, y).converged)
    assert not bool(judge.solution(1.02 * exact, y).converged)


@pytest.mark.parametrize("dtype", DTYPES)
def test_who_asks_for_more_than_the_dtype_holds_is_not_excused(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    assert Tolerances.of(dtype, 11 * eps, 0.0).rounding > 0
    assert Tolerances.of(dtype, 9 * eps, 0.0).rounding == 0
    assert Tolerances.of(dtype, 0.0, 0.0).rounding == 0
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = lsconv.lsqr(matrix, torch.ones(9, dtype=dtype), rtol=1e-3 * eps, max_iter=50)
    assert not bool(solution.converged)


def test_a_part_in_the_null_space_is_seen_at_large_damping_only() -> None:
    A = Dense(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    y = torch.ones(1, dtype=torch.float64)
    tolerances = Tolerances.of(torch.float64, 1e-8, 0.0)
    for damp in (1e-6, 1e-3, 1.0):
        exact = torch.tensor([1 / (1 + damp**2), 0.0], dtype=torch.float64)
        share = torch.tensor(1e-7, dtype=torch.float64)
        assert bool(Judge(A, tolerances, damp).certify(exact, y).null_part <= share) == (damp > 1e-4)
        wrong = exact + torch.tensor([0.0, 1e-3])
        assert Judge(A, tolerances, damp).certify(wrong, y).null_part > share
        solution = Judge(A, tolerances, damp, null_space=NullSpaceBound(share)).solution(wrong, y)
        assert not bool(solution.converged)


def test_a_residual_is_not_small_by_chance() -> None:
    """Of so long an x the residual is rounding, whatever number comes out."""
    matrix = torch.diag(torch.tensor([1.0, 2.0**-46], dtype=torch.float64))
    y = torch.ones(2, dtype=torch.float64)
    tolerances = Tolerances.of(torch.float64, None, 0.0)
    norm, x = torch.tensor(1.0, dtype=torch.float64), torch.tensor([1.0, 2.0**46], dtype=torch.float64)
    long = Judge(Dense(matrix), tolerances, norm=NormBounds(norm)).certify(x, y)
    assert float(long.residual_norm) == 0
    assert not bool(long.residual_ok)
    matrix[1, 1] = 1e-3
    x = torch.tensor([1.0, 1e3], dtype=torch.float64)
    assert bool(Judge(Dense(matrix), tolerances).certify(x, y).residual_ok)


def test_a_gradient_near_its_bound_gets_a_better_bound_of_the_norm() -> None:
    """From an x and a residual along small singular values ||A|| looks as small as these."""
    A = Dense(torch.diag(torch.tensor([1.0, 1e-2, 1e-2], dtype=torch.float64)))
    y, x = torch.tensor([0.0, 1.5, 1.0]).double(), torch.tensor([0.0, 100.0, 99.0]).double()
    tolerances = Tolerances.of(torch.float64, 2e-2, 0.0)  # and the gradient is a hundredth of the residual
    assert bool(Judge(A, tolerances).certify(x, y).gradient_ok)
    assert not bool(Judge(A, tolerances).certify(x, y, sharpen=False).gradient_ok)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
@pytest.mark.parametrize("method", ["auto", "svd", "lsmr", "lsqr", "cgls", "craig", "gmres"])
def test_float64_is_served_in_all_its_range(method: str, scale: float) -> None:
    weight = torch.tensor([[[1.0, 3.0, 0.5]]], dtype=torch.float64)
    A = lsconv.Conv1d(weight, 8, padding=1)
    y = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(1, 8)
    exact = torch.linalg.solve(A.to_dense().reshape(8, 8), y.flatten())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = lsconv.lstsq(A, scale * y, method=method)
    torch.testing.assert_close(solution.x.flatten() / scale, exact, rtol=1e-9, atol=1e-9)
    assert bool(solution.converged) or scale == 1e-300  # there the residual leaves the range
    assert solution.status != Status.ZERO
