"""observed= and weights= of every solver: the same problem as a Mask or a Diagonal before the operator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from lsconv.inverse.plans.normal_iteration import WeightedPlan
from lsconv.inverse.route import penalty_plan, route

F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


A = lsconv.Conv2d(numbers(1, 1, 3, 3).abs(), in_size=(10, 11), padding=(1, 0))
L = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64)
Y = numbers(*A.out_shape, seed=1)
SEEN = numbers(*A.out_shape, seed=2) > -1
WEIGHTS = 10 ** (1.5 * numbers(*A.out_shape, seed=3).sigmoid())
UNKNOWN = torch.where(SEEN, Y, math.nan)


def dense(weights: Tensor, y: Tensor, damp: float, penalty: bool = False, A: lsconv.Conv2d = A) -> Tensor:
    M = A.to_dense()
    D = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64).to_dense() if penalty else torch.eye(M.shape[1], dtype=F64)
    left = M.T @ (weights.flatten()[:, None] * M) + damp**2 * D.T @ D
    right = M.T @ (weights * torch.where(weights > 0, y, 0)).flatten()
    return torch.linalg.solve(left, right).reshape(A.in_shape)


def apart(x: Tensor, other: Tensor) -> float:
    return float(torch.dist(x, other) / torch.linalg.vector_norm(other))


def denoiser(v: Tensor) -> Tensor:
    return v / 2


@pytest.mark.parametrize(
    "solve",
    [
        lambda A, y, **o: lsconv.lstsq(A, y, damp=0.2, **o).x,
        lambda A, y, **o: lsconv.lstsq(A, y, **o).x,
        lambda A, y, **o: lsconv.lstsq(A, y, damp=0.2, bounds=(0, None), **o).x,
        lambda A, y, **o: lsconv.pinv(A, damp=0.2, **o)(y),
        lambda A, y, **o: lsconv.pinv(A, damp=0.2, **o).solve(y).x,
        lambda A, y, **o: lsconv.tikhonov(A, y, 0.2, L=L, **o).x,
        lambda A, y, **o: lsconv.tikhonov(A, y, "gcv", **o).x,
        lambda A, y, **o: lsconv.choose_damp(A, y, "evidence", **o).damp,
        lambda A, y, **o: lsconv.total_variation(A, y, 0.5, rtol=1e-2, **o).x,
        lambda A, y, **o: lsconv.plug_and_play(A, y, denoiser, 0.5, **o).x,
    ],
)
def test_observed_data_give_the_solution_of_the_masked_operator(solve) -> None:
    expected = solve(lsconv.Mask(SEEN) @ A, torch.where(SEEN, Y, 0))
    for value in (0.0, 1e6, math.inf, math.nan):
        assert torch.equal(solve(A, torch.where(SEEN, Y, value), observed=SEEN), expected)
    weighted = solve(A, UNKNOWN, observed=SEEN, weights=torch.full((1, 1), 4.0, dtype=F64))
    behind = solve(2 * lsconv.Mask(SEEN) @ A, 2 * torch.where(SEEN, Y, 0))
    assert apart(weighted, behind) < 2e-2


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("damp", [1.0, 0.05])
def test_weights_are_those_of_the_squares(damp: float, penalty: bool) -> None:
    weights = torch.where(SEEN, WEIGHTS, 0)
    expected = dense(weights, Y, damp, penalty)
    solution = lsconv.tikhonov(A, UNKNOWN, damp, L=L if penalty else None, weights=weights)
    assert bool(solution.converged)
    assert apart(solution.x, expected) < 1e-7
    again = lsconv.tikhonov(A, UNKNOWN, damp, L=L if penalty else None, weights=WEIGHTS, observed=SEEN)
    assert apart(again.x, expected) < 1e-7
    misfit = (weights * (torch.where(SEEN, Y, 0) - A(solution.x)).square()).sum().sqrt()
    assert torch.allclose(solution.residual_norm, misfit)


def test_varying_weights_go_to_the_border_of_their_mean() -> None:
    D = lsconv.Diagonal(WEIGHTS.sqrt())
    assert isinstance(route(D @ A, 0.1), WeightedPlan)
    assert isinstance(penalty_plan(D @ A, L, 0.1), WeightedPlan)
    assert "weights up to" in repr(route(D @ A, 0.1))
    assert lsconv.pinv(A, damp=0.1, weights=WEIGHTS).dot_test() < 1e-8


@pytest.mark.parametrize("ratio", [10.0, 100.0])
def test_at_a_small_damp_positive_weights_need_no_second_opinion(ratio: float) -> None:
    blur = lsconv.blur_operator(torch.ones(5, 5, dtype=F64) / 25, (36, 38))
    y = blur(numbers(*blur.in_shape)) + 0.01 * numbers(*blur.out_shape, seed=1)
    weights = ratio ** torch.rand(blur.out_shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    plan = route(lsconv.Diagonal(weights.sqrt()) @ blur, 1e-3)
    assert isinstance(plan, WeightedPlan)
    solution = plan.solve(weights.sqrt() * y)
    assert bool(solution.converged)
    M = weights.sqrt().flatten()[:, None] * blur.to_dense()
    z = torch.linalg.solve(M @ M.T + 1e-6 * torch.eye(len(M), dtype=F64), (weights.sqrt() * y).flatten())
    exact = M.T @ z
    assert float(torch.dist(solution.x.flatten(), exact) / exact.norm()) < 1e-6
    range_of_M = torch.linalg.qr(M.T)[0]
    for part, found in ((0.0, False), (1e-6, True)):
        w = numbers(*blur.in_shape, seed=3).flatten()
        w = w - range_of_M @ (range_of_M.T @ w)
        x = (exact + part * exact.norm() * w / w.norm()).reshape(blur.in_shape)
        assert bool(plan._null_suspects(x, weights.sqrt() * y, 1e-9)) == found
    for damp in (1e-7, 1e-12):  # below the shift that the border can have
        plan = route(lsconv.Diagonal(weights.sqrt()) @ blur, damp)
        assert isinstance(plan, WeightedPlan)
        assert plan.inverse.exact or bool(plan._null_suspects(exact.reshape(blur.in_shape), weights.sqrt() * y, 1e-9))
    assert not plan.inverse.exact


def test_every_item_may_have_its_own() -> None:
    seen = numbers(3, *A.out_shape, seed=5) > -1
    weights = numbers(3, *A.out_shape, seed=6).exp()
    y = torch.where(seen, numbers(3, *A.out_shape, seed=7), math.nan)
    solution = lsconv.lstsq(A, y, damp=0.3, observed=seen, weights=weights)
    for item in range(3):
        expected = dense(torch.where(seen[item], weights[item], 0), y[item], 0.3)
        assert apart(solution.x[item], expected) < 1e-8
    shared = lsconv.lstsq(A, torch.nan_to_num(y), damp=0.3, observed=seen[0, 0])
    assert apart(shared.x[1], dense(seen[0].double(), torch.nan_to_num(y[1]), 0.3)) < 1e-8


def test_weights_without_damping_give_the_weighted_least_squares_solution() -> None:
    tall = lsconv.Conv2d(numbers(1, 1, 3, 3), in_size=(6, 7), padding=2)
    weights = numbers(*tall.out_shape, seed=4).exp()
    y = numbers(*tall.out_shape, seed=5)
    solution = lsconv.lstsq(tall, y, weights=weights)
    assert bool(solution.converged)
    assert apart(solution.x, dense(weights, y, 0.0, A=tall)) < 1e-8


@pytest.mark.parametrize("penalty", [False, True])
def test_gradients_by_data_kernel_damp_and_weights(penalty: bool) -> None:
    kernel, damp = numbers(1, 1, 3, 2).requires_grad_(), torch.tensor(0.4, dtype=F64, requires_grad=True)
    y, weights = numbers(1, 4, 5, seed=1).requires_grad_(), numbers(1, 4, 5, seed=2).exp().requires_grad_()
    seen = numbers(1, 4, 5, seed=3) > -1

    def answer(*given: Tensor) -> Tensor:
        B = lsconv.Conv2d(given[0], in_size=(6, 6))
        return lsconv.tikhonov(B, given[1], given[2], L=L, observed=seen, weights=given[3]).x

    def by_dense_algebra(kernel: Tensor, y: Tensor, damp: Tensor, weights: Tensor) -> Tensor:
        unit = torch.eye(36, dtype=F64).reshape(36, 1, 6, 6)
        M = torch.nn.functional.conv2d(unit, kernel).flatten(1).T
        W = torch.where(seen, weights, 0).flatten()
        left = M.T @ (W[:, None] * M) + damp**2 * D.T @ D
        return torch.linalg.solve(left, M.T @ (W * y.flatten())).reshape(1, 6, 6)

    L = lsconv.Gradient((1, 6, 6), ndim=2, dtype=F64) if penalty else None
    D = torch.eye(36, dtype=F64) if L is None else L.to_dense()
    given, cotangent = (kernel, y, damp, weights), numbers(1, 6, 6, seed=9)
    found = torch.autograd.grad((answer(*given) * cotangent).sum(), given)
    expected = torch.autograd.grad((by_dense_algebra(*given) * cotangent).sum(), given)
    for gradient, other in zip(found, expected, strict=True):
        assert apart(gradient, other) < 1e-7
    for gradient in (found[1], found[3]):
        assert bool((gradient[~seen] == 0).all())
        assert bool((gradient[seen] != 0).all())


def test_a_weight_of_zero_has_a_gradient_of_zero_and_hides_its_datum() -> None:
    weights = torch.where(SEEN, WEIGHTS, 0).requires_grad_()
    x = lsconv.lstsq(A, UNKNOWN, damp=0.3, weights=weights).x
    (gradient,) = torch.autograd.grad(x.sum(), weights)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[~SEEN] == 0).all())


def test_float32_weights_of_a_large_range_are_certified() -> None:
    B = A.to(dtype=torch.float32)
    weights = torch.where(SEEN, 10 ** (4 * numbers(*A.out_shape, seed=8).sigmoid()), 0)
    solution = lsconv.lstsq(B, UNKNOWN.float(), damp=0.3, weights=weights.float())
    assert bool(solution.converged)
    assert apart(solution.x.double(), dense(weights, Y, 0.3)) < 1e-4


@pytest.mark.slow
def test_total_variation_of_poisson_counts_takes_observed_but_no_weights() -> None:
    counts = torch.where(SEEN, Y.abs() + 1, math.nan)
    bounds = {"bounds": (0, None), "noise": "poisson", "background": 1.0, "max_iter": 2000}
    x = lsconv.total_variation(A, counts, 0.1, observed=SEEN, **bounds).x
    assert torch.equal(x, lsconv.total_variation(lsconv.Mask(SEEN) @ A, torch.where(SEEN, counts, 0), 0.1, **bounds).x)
    with pytest.raises(ArgumentError, match="weights"):
        lsconv.total_variation(A, counts, 0.1, weights=WEIGHTS, **bounds)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"observed": SEEN.numpy()}, ArgumentTypeError, "observed: expected a bool torch.Tensor"),
        ({"observed": SEEN.double()}, DtypeError, "observed != 0"),
        ({"observed": SEEN[..., 1:]}, ShapeError, "observed: shape"),
        ({"weights": 2.0}, ArgumentTypeError, "weights: expected a torch.Tensor"),
        ({"weights": SEEN}, DtypeError, "observed="),
        ({"weights": -WEIGHTS}, ArgumentError, "weights: expected numbers >= 0"),
        ({"weights": WEIGHTS / 0}, NonFiniteError, "weight 0"),
        ({"weights": WEIGHTS[0, 1:]}, ShapeError, "weights: shape"),
    ],
)
def test_an_observed_or_weights_that_does_not_fit_is_named(
    options: dict[str, object], error: type[Exception], said: str
) -> None:
    for solve in (lambda **o: lsconv.lstsq(A, Y, **o), lambda **o: lsconv.pinv(A, **o)):
        with pytest.raises(error, match=said):
            solve(**options)
