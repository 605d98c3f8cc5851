"""The end of ADMM's iteration."""

from __future__ import annotations

import pytest
import torch

import lsconv
from tests.inverse.admm.denoising import WEIGHT, problem


def test_an_iteration_limit_is_no_convergence() -> None:
    A, y = problem()
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = lsconv.total_variation(A, y, WEIGHT, rtol=1e-6, max_iter=5)
    assert not bool(solution.converged)
    assert solution.status is lsconv.Status.ITERATION_LIMIT
    assert int(solution.iterations) == 5


@pytest.mark.parametrize("seed", [0, 1])
def test_penalties_stay_in_range_where_the_answer_is_nearly_constant(seed: int) -> None:
    """Without structure in the data one residual vanishes beside the other, and balancing them would never end."""
    data = torch.rand(14, 16, generator=torch.Generator().manual_seed(seed))
    solution = lsconv.deconvolve(data, torch.ones(3, 3) / 9, prior="tv")
    assert bool(solution.converged)
