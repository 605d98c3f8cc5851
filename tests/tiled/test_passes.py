"""Passes over a field: what they read, and what one of them alone is worth."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.errors import NonFiniteError
from tests.tiled.problems import error, exact, problem


def test_what_was_not_observed_is_not_read() -> None:
    A, y = problem("gauss", "valid", (97, 118))
    mask = torch.rand(A.spatial_out, generator=torch.Generator().manual_seed(5)) > 0.05
    y = y.masked_fill(~mask, torch.nan)
    solution = lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=32, observed=mask).solve(y)
    reference = lsconv.lstsq(A, y, damp=0.1, observed=mask, rtol=1e-13).x
    assert bool(solution.converged)
    assert error(solution.x, reference) < 1e-10


@pytest.mark.slow
def test_one_pass_and_blend_is_wrong_where_the_iteration_is_not() -> None:
    A, y = problem("box", "valid", (120, 120))
    plan = lsconv.tiled.Plan(A, damp=1e-2, tile=60, overlap=24)
    reference = exact(A, y, 1e-2)
    with pytest.warns(lsconv.ConvergenceWarning):
        one_pass = plan.solve(y, max_iter=0)
    assert error(one_pass.x, reference) > 0.03
    assert not bool(one_pass.converged)
    solution = plan.solve(y)
    assert bool(solution.converged)
    assert error(solution.x, reference) < 1e-10


def test_nan_is_reported_with_its_tile() -> None:
    A, y = problem("gauss", "valid", (97, 118))
    y[0, 60, 100] = torch.nan
    with pytest.raises(NonFiniteError, match=r"y: contains NaN .* tile \(\d, \d\) reads \(cells"):
        lsconv.tiled.Plan(A, damp=0.1, tile=40).solve(y)
