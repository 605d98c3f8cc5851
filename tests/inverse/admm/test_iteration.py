"""The end of ADMM's iteration."""

from __future__ import annotations

import pytest

import lsconv
from tests.inverse.admm.denoising import WEIGHT, problem


def test_an_iteration_limit_is_no_convergence() -> None:
    A, y = problem()
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = lsconv.total_variation(A, y, WEIGHT, rtol=1e-6, max_iter=5)
    assert not bool(solution.converged)
    assert solution.status is lsconv.Status.ITERATION_LIMIT
    assert int(solution.iterations) == 5
