"""Data that are lower bounds of the truth, as those of saturated pixels are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import lsconv

F64 = torch.float64
PADDINGS = {"valid": {}, "same": {"padding": 1}, "reflect": {"padding": 1, "padding_mode": "reflect"}}


def problem(padding: dict[str, Any], batch: tuple[int, ...] = ()) -> tuple[lsconv.Convolution, Tensor, Tensor]:
    """A blur, data cut off at a level, and where they are."""
    torch.manual_seed(0)
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=F64) / 9, in_size=(9, 8), **padding)
    y = A(torch.rand(*batch, *A.in_shape, dtype=F64)) + 0.01 * torch.randn(*batch, *A.out_shape, dtype=F64)
    level = float(y.quantile(0.8))
    return A, y.clamp_max(level), y >= level


def dense_answer(
    A: lsconv.Convolution, y: Tensor, at_least: Tensor, damp: float, bounds: tuple[float | None, float | None] | None
) -> Tensor:
    """The minimiser by SciPy, with exact derivatives of the dense problem."""
    M, data, rows = A.to_dense().numpy(), y.flatten().numpy(), at_least.flatten().numpy()

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        r = M @ x - data
        r = np.where(rows, np.minimum(r, 0), r)
        return 0.5 * (r @ r + damp**2 * x @ x), M.T @ r + damp**2 * x

    box = None if bounds is None else [bounds] * M.shape[1]
    start = np.zeros(M.shape[1])
    found = scipy.optimize.minimize(
        value, start, jac=True, method="L-BFGS-B", bounds=box, options={"ftol": 0, "gtol": 1e-13, "maxiter": 20000}
    )
    return torch.from_numpy(found.x).reshape(A.in_shape)


@pytest.mark.parametrize("bounds", [None, (0.0, None), (0.1, 0.6)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_tikhonov_with_lower_bounds_is_the_dense_minimiser(
    padding: str, bounds: tuple[float | None, float | None] | None
) -> None:
    A, y, at_least = problem(PADDINGS[padding])
    solution = lsconv.tikhonov(A, y, 0.1, at_least=at_least, bounds=bounds)
    assert solution.status is lsconv.Status.OPTIMALITY
    torch.testing.assert_close(solution.x, dense_answer(A, y, at_least, 0.1, bounds), rtol=0, atol=1e-6)
    short = torch.where(at_least, (y - A(solution.x)).clamp_min(0), y - A(solution.x))
    torch.testing.assert_close(solution.residual_norm, short.norm())


def test_items_have_lower_bounds_of_their_own() -> None:
    A, y, at_least = problem(PADDINGS["valid"], (3,))
    at_least[1] = False
    together = lsconv.tikhonov(A, y, 0.1, at_least=at_least)
    assert bool(together.converged.all())
    for k in range(3):
        torch.testing.assert_close(together.x[k], dense_answer(A, y[k], at_least[k], 0.1, None), rtol=0, atol=1e-6)
    torch.testing.assert_close(together.x[1], lsconv.tikhonov(A, y[1], 0.1).x, rtol=0, atol=1e-6)


def test_a_lower_bound_far_below_the_truth_does_not_change_the_solution() -> None:
    """Data far below the truth change nothing, and what is missing is the limit of a bound below everything."""
    A, y, at_least = problem(PADDINGS["valid"])
    low = torch.where(at_least, -100.0, y)
    answer = lsconv.tikhonov(A, low, 0.1, at_least=at_least).x
    torch.testing.assert_close(answer, lsconv.tikhonov(A, y, 0.1, observed=~at_least).x, rtol=0, atol=1e-6)


def test_a_rule_judges_by_the_data_that_are_certain() -> None:
    A, y, at_least = problem(PADDINGS["valid"])
    solution = lsconv.tikhonov(A, y, "gcv", at_least=at_least)
    other = lsconv.choose_damp(A, y, "gcv", observed=~at_least)
    torch.testing.assert_close(solution.damp, other.damp)


@pytest.mark.parametrize(("padding", "bounds"), [*((padding, None) for padding in PADDINGS), ("valid", (0.0, None))])
def test_total_variation_with_lower_bounds_is_optimal(
    padding: str, bounds: tuple[float | None, float | None] | None
) -> None:
    A, y, at_least = problem(PADDINGS[padding])
    weight = 2e-3
    solution = lsconv.total_variation(A, y, weight, at_least=at_least, bounds=bounds, rtol=1e-6, max_iter=20000)
    assert bool(solution.converged)
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64)

    def objective(x: Tensor) -> Tensor:
        r = A(x) - y
        r = torch.where(at_least, r.clamp_max(0), r)
        return 0.5 * r.square().sum() + weight * torch.linalg.vector_norm(L(x), dim=0).sum()

    least = objective(solution.x)
    for seed in range(40):  # the minimum of a convex function is one among its neighbours
        step = 1e-2 * torch.randn(A.in_shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        other = solution.x + step
        other = other if bounds is None else other.clamp(*bounds)
        assert float(least) <= float(objective(other)) + 1e-8
    missing = lsconv.total_variation(A, y, weight, observed=~at_least, bounds=bounds, rtol=1e-6, max_iter=20000).x
    assert float(least) <= float(objective(missing)) + 1e-9


def test_a_saturated_lamp_is_brighter_than_its_level_in_the_answer() -> None:
    torch.manual_seed(1)
    scene = torch.full((1, 20, 20), 0.2, dtype=F64)
    scene[:, 9:11, 9:11] = 9.0
    A = lsconv.blur_operator(torch.ones(3, 3, dtype=F64) / 9, (18, 18))
    y = (A(scene) + 0.005 * torch.randn(A.out_shape, dtype=F64)).clamp_max(1.5)
    L, full = lsconv.Gradient(A.in_shape, dtype=F64), y >= 1.5
    answers = {
        name: lsconv.tikhonov(A, y, 0.05, L=L, bounds=(0.0, None), **options).x
        for name, options in {"cut": {}, "missing": {"observed": ~full}, "bound": {"at_least": full}}.items()
    }
    lamp = {name: float(x[:, 9:11, 9:11].mean()) for name, x in answers.items()}
    assert lamp["cut"] < lamp["bound"] < 9.5
    assert float((answers["bound"] - scene).abs().mean()) < float((answers["cut"] - scene).abs().mean())


@pytest.mark.parametrize("call", ["tikhonov", "total_variation"])
def test_lower_bounds_that_are_none_are_refused_by_name(call: str) -> None:
    A, y, at_least = problem(PADDINGS["valid"])
    solve = getattr(lsconv, call)
    with pytest.raises(lsconv.ArgumentTypeError, match="at_least"):
        solve(A, y, 0.1, at_least=at_least.numpy())
    with pytest.raises(lsconv.DtypeError, match="at_least"):
        solve(A, y, 0.1, at_least=at_least.double())
    with pytest.raises(lsconv.ShapeError, match="at_least"):
        solve(A, y, 0.1, at_least=at_least[..., :-1])
    with pytest.raises(lsconv.ArgumentError, match="at_least"):
        lsconv.total_variation(A, y.abs(), 0.1, at_least=at_least, noise="poisson")
    with pytest.raises(lsconv.MethodError, match="at_least"):
        lsconv.tikhonov(A, y, 0.1, at_least=at_least, method="lsmr")
