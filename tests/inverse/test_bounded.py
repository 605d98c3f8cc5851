"""Least squares within bounds against SciPy's, and what its certificate refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, nnls

import lsconv
from lsconv.errors import ArgumentError, MethodError

DOUBLE = torch.float64


def problem(channels: int = 1) -> tuple[lsconv.Convolution, torch.Tensor]:
    torch.manual_seed(0)
    A = lsconv.Conv2d(torch.rand(channels, channels, 3, 3, dtype=DOUBLE) / 5, (9, 8), padding=1)
    return A, torch.randn(2, *A.out_shape, dtype=DOUBLE) + 0.3


PENALTIES = [None, lsconv.Gradient, lsconv.Laplacian]
BOUNDS = [(0, None), (0, 0.8), (None, 0.5)]


@pytest.mark.parametrize(
    ("damp", "penalty", "bounds", "channels"),
    [  # every penalty within all bounds, and either of them with every damp and number of channels
        (0.1 * ((i + j) % 2), penalty, bounds, 1 + (i + j) // 2 % 2)
        for i, penalty in enumerate(PENALTIES)
        for j, bounds in enumerate(BOUNDS)
    ],
)
def test_the_minimiser_is_scipys(damp: float, penalty: type | None, bounds: tuple, channels: int) -> None:
    A, y = problem(channels)
    L = None if penalty is None else penalty(A.in_shape, dtype=DOUBLE)
    solution = lsconv.tikhonov(A, y, damp, L=L, bounds=bounds)
    G = torch.eye(A.in_numel, dtype=DOUBLE) if L is None else L.to_dense()
    rows = torch.cat([A.to_dense(), damp * G]).numpy()
    limits = tuple(np.inf * sign if end is None else end for end, sign in zip(bounds, (-1, 1), strict=True))
    assert bool(solution.converged.all())
    for item in range(2):
        data = np.concatenate([y[item].flatten().numpy(), np.zeros(len(G))])
        expected = lsq_linear(rows, data, limits, tol=1e-14, max_iter=2000)
        x = solution.x[item].flatten().numpy()
        assert np.sum((rows @ x - data) ** 2) <= 2 * expected.cost * (1 + 1e-10)
        assert np.abs(x - expected.x).max() < (1e-5 if damp else 1e-3)
        assert x.min() >= limits[0]
        assert x.max() <= limits[1]


def test_non_negative_least_squares_is_scipys_nnls_for_a_matrix_too() -> None:
    rng = np.random.default_rng(0)
    matrix, data = rng.standard_normal((30, 12)), rng.standard_normal(30)
    solution = lsconv.lstsq(torch.from_numpy(matrix), torch.from_numpy(data), bounds=(0, None))
    assert solution.status is lsconv.Status.OPTIMALITY
    assert np.allclose(solution.x, nnls(matrix, data)[0], atol=1e-8)


def test_the_certificate_refuses_an_x_that_is_not_optimal() -> None:
    A, y = problem()
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = lsconv.lstsq(A, y, bounds=(0, None), max_iter=1)
    assert not bool(solution.converged.any())
    with pytest.raises(lsconv.ConvergenceError):
        lsconv.lstsq(A, y, bounds=(0, None), max_iter=1, raise_on_failure=True)


def test_the_prior_and_wide_bounds_leave_tikhonovs_answer() -> None:
    A, y = problem()
    prior = torch.full(A.in_shape, 2.0, dtype=DOUBLE)
    wide = lsconv.tikhonov(A, y, 0.3, x_prior=prior, bounds=(-1e6, 1e6)).x
    torch.testing.assert_close(wide, lsconv.tikhonov(A, y, 0.3, x_prior=prior).x, rtol=0, atol=1e-6)


def test_float32_and_a_rule_are_served() -> None:
    A, y = problem()
    solution = lsconv.tikhonov(A.to(dtype=torch.float32), y.float(), "gcv", bounds=(0, None))
    assert bool(solution.converged.all())
    assert solution.selection is not None
    assert solution.x.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bounds": (1, 0)}, ArgumentError),
        ({"bounds": (None, None)}, ArgumentError),
        ({"bounds": 3}, ArgumentError),
        ({"bounds": (0, None), "method": "border"}, MethodError),
        ({"bounds": (0, None), "restart": 3}, MethodError),
    ],
)
def test_arguments_that_do_not_fit_bounds_are_refused(options: dict, error: type[Exception]) -> None:
    A, y = problem()
    with pytest.raises(error):
        lsconv.lstsq(A, y, **options)
    with pytest.raises(MethodError, match="no gradient"):
        lsconv.lstsq(A, y.requires_grad_(), bounds=(0, None))
