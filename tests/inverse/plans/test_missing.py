"""Outputs that were not measured: what stands there has no say, whatever way the answer takes."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.missing_blocks import MissingBlocks
from lsconv.border.plan import BorderPlan
from lsconv.inverse.plans.missing import MissingBorderPlan, MissingPlan
from lsconv.inverse.plans.normal_iteration import WeightedPlan
from lsconv.inverse.route import penalty_plan, route
from lsconv.operators.base import LinearOperator
from lsconv.operators.observed import MeasuredRows

F64 = torch.float64


def kernel(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


CONVOLUTIONS = {
    "valid": lsconv.Conv2d(kernel(1, 1, 3, 3), in_size=(12, 14)),
    "same": lsconv.Conv2d(kernel(1, 1, 3, 3), in_size=(12, 14), padding=1),
    "full": lsconv.Conv2d(kernel(1, 1, 3, 3), in_size=(12, 14), padding=2),
    "periodic": lsconv.Conv2d(kernel(1, 1, 3, 3), in_size=(12, 14), padding=1, padding_mode="circular"),
    "reflect": lsconv.Conv2d(kernel(1, 1, 3, 3), in_size=(12, 14), padding=1, padding_mode="reflect"),
    "strided": lsconv.Conv2d(kernel(2, 1, 3, 3), in_size=(12, 14), stride=2),
    "wide": lsconv.Conv2d(kernel(2, 3, 3, 3), in_size=(8, 9)),
    "tall": lsconv.Conv2d(kernel(3, 1, 3, 3), in_size=(8, 9)),
    "groups": lsconv.Conv2d(kernel(4, 1, 3, 3), in_size=(8, 9), groups=2),
    "line": lsconv.Conv1d(kernel(1, 1, 5), in_size=(40,)),
    "volume": lsconv.Conv3d(kernel(1, 1, 2, 3, 2), in_size=(5, 6, 7)),
    "complex": lsconv.Conv2d(kernel(1, 1, 3, 3, dtype=torch.complex128), in_size=(9, 10)),
    "separable": lsconv.Conv2d(kernel(1, 1, 3, 1) * kernel(1, 1, 1, 3), in_size=(16, 18)),
    "batch": lsconv.Conv2d(kernel(2, 1, 1, 3, 3), in_size=(9, 10)),
}  # fmt: skip


def minimiser(A: LinearOperator, y: Tensor, damp: float, L: LinearOperator | None = None, prior: Tensor | None = None):
    """The dense answer in float64."""
    M, n = A.to_dense(), A.in_numel
    D = torch.eye(n, dtype=M.dtype) if L is None else L.to_dense()
    normal, right = M.mH @ M + damp**2 * D.mH @ D, (M.mH @ y.flatten(-len(A.out_shape))[..., None])
    if prior is not None:
        right = right + damp**2 * D.mH @ (D @ prior.flatten()[:, None])
    return torch.linalg.solve(normal, right).reshape(*right.shape[:-2], *A.in_shape)


def data(A: LinearOperator, share: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random data, NaN and infinite where they are not measured, and where they are."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(A.out_shape, generator=generator) >= share
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=A.dtype, generator=generator)
    y[..., ~keep] = torch.nan
    return y, keep


def apart(x: Tensor, other: Tensor) -> float:
    return float(torch.dist(x, other) / torch.linalg.vector_norm(other))


@pytest.mark.parametrize("damp", [1.0, 1e-2])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_masked_solution_is_that_without_the_missing_rows(name: str, damp: float) -> None:
    A = CONVOLUTIONS[name]
    y, keep = data(A)
    solution = lsconv.lstsq(lsconv.Mask(keep) @ A, y, damp=damp)
    assert solution.converged.all()
    assert apart(solution.x, minimiser(lsconv.Mask(keep) @ A, torch.where(keep, y, 0), damp)) < 1e-7


@pytest.mark.parametrize("damp", [1.0, 1e-2])
@pytest.mark.parametrize("name", sorted(set(CONVOLUTIONS) - {"complex", "batch", "wide"}))
def test_a_masked_solution_with_a_penalty_and_a_prior_is_that_without_the_missing_rows(name: str, damp: float) -> None:
    A = CONVOLUTIONS[name]
    y, keep = data(A)
    L = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=F64)
    prior = kernel(*A.in_shape)
    solution = lsconv.tikhonov(lsconv.Mask(keep) @ A, y, damp, L=L, x_prior=prior)
    assert solution.converged.all()
    expected = minimiser(lsconv.Mask(keep) @ A, torch.where(keep, y, 0), damp, L, prior)
    assert apart(solution.x, expected) < 1e-5


def test_an_exact_plan_of_the_whole_serves_the_masked_problem() -> None:
    for name in ("valid", "same", "periodic", "strided", "groups", "line", "separable", "complex"):
        A = CONVOLUTIONS[name]
        B = (lsconv.Mask(data(A)[1]) @ A).for_dtype(A.dtype)
        plan = route(B, 0.1)
        assert isinstance(plan, MissingPlan), name
        assert "of the outputs missing" in repr(plan)
        assert not isinstance(route(B, 0.0), MissingPlan)  # the least-norm answer is that of LSMR
    L = lsconv.Gradient((1, 12, 14), ndim=2, dtype=F64)
    A = CONVOLUTIONS["valid"]
    assert isinstance(penalty_plan((lsconv.Mask(data(A)[1]) @ A).for_dtype(F64), L, 0.1), MissingPlan)


def test_a_masked_solution_without_damping_is_the_least_norm_one() -> None:
    for name in ("valid", "same", "full", "periodic", "strided", "line", "volume", "reflect"):
        A = CONVOLUTIONS[name]
        y, keep = data(A)
        M = (lsconv.Mask(keep) @ A).to_dense()
        expected = (torch.linalg.pinv(M) @ torch.where(keep, y, 0).flatten()).reshape(A.in_shape)
        solution = lsconv.lstsq(lsconv.Mask(keep) @ A, y)
        assert bool(solution.converged), name
        assert apart(solution.x, expected) < 1e-6, name


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_values_of_missing_data_change_no_bit_of_the_solution(damp: float) -> None:
    A = CONVOLUTIONS["valid"]
    y, keep = data(A)
    answers = []
    for value in (0.0, 1e9, -math.inf, math.nan):
        answers.append(lsconv.lstsq(lsconv.Mask(keep) @ A, torch.where(keep, y, value), damp=damp))
    for solution in answers[1:]:
        for name in ("x", "residual_norm", "gradient_norm", "iterations"):
            assert torch.equal(getattr(solution, name), getattr(answers[0], name)), name


def test_the_certificate_is_that_of_the_masked_operator() -> None:
    A = CONVOLUTIONS["same"]
    y, keep = data(A)
    B, y = lsconv.Mask(keep) @ A, torch.where(keep, y, 0)
    solution = lsconv.lstsq(B, y, damp=0.1)
    residual = y - B(solution.x)
    gradient = B.adjoint(residual) - 0.01 * solution.x
    assert torch.allclose(solution.residual_norm, residual.norm(), rtol=1e-12)
    assert float((solution.gradient_norm - gradient.norm()).abs()) < 1e-13
    assert float(solution.gradient_norm) < 1e-9


def test_a_crop_a_mask_and_a_constant_diagonal_are_the_same_problem() -> None:
    A = CONVOLUTIONS["same"]
    y = kernel(1, 12, 14)
    keep = torch.zeros(1, 12, 14, dtype=torch.bool)
    keep[:, 2:11, 1:13] = True
    crop = lsconv.Crop((1, 12, 14), (2, 1), (9, 12))
    x = lsconv.lstsq(lsconv.Mask(keep) @ A, y, damp=0.1).x
    for B, given in (
        (crop @ A, crop(y)),
        (lsconv.Diagonal(keep.double()) @ A, y),
        (2 * lsconv.Mask(keep) @ A, 2 * y),
    ):
        damp = 0.2 if given is not y and B.out_shape == A.out_shape else 0.1
        assert isinstance(route(B.for_dtype(F64), damp), MissingPlan)
        assert apart(lsconv.lstsq(B, given, damp=damp).x, x) < 1e-9


def test_every_item_has_a_mask_a_damp_and_a_status_of_its_own() -> None:
    A = CONVOLUTIONS["valid"]
    keep = torch.rand(3, 1, 10, 12, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[1] = True
    damp = torch.tensor([1.0, 0.1, 0.01], dtype=F64)
    y = kernel(2, 3, 1, 10, 12)
    M = lsconv.Mask(keep, 1)
    solution = lsconv.lstsq(M @ A, y, damp=damp)
    assert solution.converged.shape == (2, 3)
    assert solution.converged.all()
    for item in range(3):
        B = lsconv.Mask(keep[item]) @ A
        expected = minimiser(B, torch.where(keep[item], y[:, item], 0), float(damp[item]))
        assert apart(solution.x[:, item], expected) < 1e-8
    alone = lsconv.lstsq(lsconv.Mask(keep[2]) @ A, y[:, 2], damp=0.01)
    assert apart(solution.x[:, 2], alone.x) < 1e-8


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("method", ["auto", "border"])
def test_items_with_masks_of_their_own_share_a_plan(alike: bool, method: str) -> None:
    A = CONVOLUTIONS["separable"]
    keep = torch.rand(3, *A.out_shape, generator=torch.Generator().manual_seed(2)) > 0.1
    keep = keep[:1].expand(keep.shape).clone() if alike else keep
    y = kernel(2, 3, *A.out_shape)
    plan = route(lsconv.Mask(keep, 1) @ A, 0.1, method=method)
    assert isinstance(plan, MissingPlan)
    assert plan.inner.damp.ndim == 0
    assert (len(plan.blocks.index) == len(MissingBlocks(A, plan.damp, ~keep[0]).index)) == alike
    solution = lsconv.lstsq(A, torch.where(keep, y, torch.nan), damp=0.1, observed=keep, method=method)
    assert solution.converged.shape == (2, 3)
    for item in range(3):
        expected = minimiser(lsconv.Mask(keep[item]) @ A, torch.where(keep[item], y[:, item], 0), 0.1)
        assert apart(solution.x[:, item], expected) < 1e-8


def test_items_with_the_same_mask_go_through_one_border() -> None:
    A = CONVOLUTIONS["valid"]
    keep = torch.rand(A.out_shape, generator=torch.Generator().manual_seed(2)) > 0.1
    y = kernel(3, *A.out_shape)
    B = lsconv.Mask(keep.expand(3, *keep.shape).clone(), 1) @ A
    plan = MissingBorderPlan(B, MeasuredRows.of(B), 0.1)
    expected = minimiser(lsconv.Mask(keep) @ A, torch.where(keep, y, 0), 0.1)
    solution = plan.solve(torch.where(keep, y, 0))
    assert solution.converged.shape == (3,)
    assert bool(solution.converged.all())
    assert apart(solution.x, expected) < 1e-8


@pytest.mark.parametrize("with_penalty", [False, True])
def test_items_may_miss_different_outputs_in_the_border_of_the_mean(with_penalty: bool) -> None:
    A = CONVOLUTIONS["valid"]
    L = lsconv.Gradient(A.in_shape).to(dtype=F64) if with_penalty else None
    keep = torch.rand(4, *A.out_shape, generator=torch.Generator().manual_seed(2)) > 0.1
    keep[2] = keep[0]
    B, y = 2 * lsconv.Mask(keep, 1) @ A, kernel(2, 4, *A.out_shape)
    plan = WeightedPlan(B, MeasuredRows.of(B), 0.1, L)
    prior = kernel(*A.in_shape) if with_penalty else None
    solution = plan.solve(torch.where(keep, y, 0), x_prior=prior)
    assert bool(solution.converged.all())
    g, v = kernel(2, 4, *A.in_shape), kernel(2, 4, *A.out_shape)
    for item in range(4):
        own = 2 * lsconv.Mask(keep[item]) @ A
        expected = minimiser(own, torch.where(keep[item], y[:, item], 0), 0.1, L, prior)
        assert apart(solution.x[:, item], expected) < 1e-7
        M, D = own.to_dense(), torch.eye(A.in_numel, dtype=F64) if L is None else L.to_dense()
        normal = M.mH @ M + 0.01 * D.mH @ D
        expected = torch.linalg.solve(normal, g[:, item].flatten(1).mT).mT.reshape(g[:, item].shape)
        assert apart(plan.normal_solve(g)[:, item], expected) < 1e-7
    images = plan.apply(torch.where(keep, v, 0))
    assert apart((images * g).sum(), (torch.where(keep, v, 0) * plan.adjoint(g)).sum()) < 1e-7


@pytest.mark.parametrize(("damp", "mean"), [(1e-3, 0.0), (1e-3, 0.5), (3e-4, 0.0)])
def test_a_small_damp_needs_no_second_opinion(damp: float, mean: float) -> None:
    """The answer to the data with zeros in them is far longer than that to the measured ones, and sets no tolerance."""
    A = lsconv.blur_operator(torch.ones(9, 9, dtype=F64) / 81, (48, 48))
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(A.out_shape, generator=generator) > 0.02
    y = A(torch.randn(A.in_shape, dtype=F64, generator=generator) + 4 * mean)
    y = y + 0.01 * torch.randn(A.out_shape, dtype=F64, generator=generator)
    plan = route(lsconv.Mask(keep, dtype=F64) @ A, damp)
    assert isinstance(plan, MissingPlan)
    assert bool(plan.solve(torch.where(keep, y, 0)).converged)


def test_the_residual_of_a_plan_with_factors_is_that_of_its_solution() -> None:
    A = lsconv.blur_operator(torch.rand(7, 7, dtype=F64) / 49, (40, 44))
    y = torch.randn(2, *A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    for damp in (0.1, 1e-3):
        plan = route(A, damp)
        assert isinstance(plan, BorderPlan)
        plan.inverse.factorise_if_cheaper((2,), solves=1000)
        expected = y - A(plan.apply(y))
        assert (plan.residual(y) - expected).norm() < 1e-9 * y.norm()
        wide = A.to(dtype=torch.float32)
        assert apart(BorderPlan(wide, damp).residual(y.float()).double(), expected) < 1e-4


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
def test_the_answer_scales_with_the_data_in_float32(factor: float) -> None:
    A = CONVOLUTIONS["valid"].to(dtype=torch.float32)
    y, keep = data(CONVOLUTIONS["valid"])
    expected = minimiser(lsconv.Mask(keep) @ CONVOLUTIONS["valid"], torch.where(keep, y, 0), 0.1)
    solution = lsconv.lstsq(lsconv.Mask(keep) @ A, (factor * y).float(), damp=0.1)
    assert solution.converged.all()
    assert apart(solution.x.double() / factor, expected) < 1e-5


def test_a_pseudo_inverse_of_a_masked_operator_has_its_adjoint() -> None:
    A = CONVOLUTIONS["same"]
    _, keep = data(A)
    inverse = lsconv.pinv(lsconv.Mask(keep) @ A, damp=0.1)
    assert isinstance(inverse.plan, MissingPlan)
    assert inverse.dot_test() < 1e-8
    M = (lsconv.Mask(keep) @ A).to_dense()
    dense = torch.linalg.solve(M.T @ M + 0.01 * torch.eye(M.shape[1], dtype=F64), M.T)
    assert apart(inverse.to_dense(), dense) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("penalised", [False, True])
def test_gradients_are_those_of_the_dense_problem(penalised: bool) -> None:
    weight = kernel(1, 1, 3, 3).requires_grad_()
    damp = torch.tensor(0.3, dtype=F64, requires_grad=True)
    shape = (1, 6, 7)
    keep = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    L = lsconv.Gradient(shape, ndim=2, dtype=F64) if penalised else None
    y = kernel(1, 4, 5).requires_grad_()

    def answer(weight: Tensor, y: Tensor, damp: Tensor) -> Tensor:
        B = lsconv.Mask(keep) @ lsconv.Conv2d(weight, in_size=shape[1:])
        return lsconv.tikhonov(B, y, damp, L=L).x

    assert torch.autograd.gradcheck(answer, (weight, y, damp), atol=1e-6, rtol=1e-4, fast_mode=True)
    (g,) = torch.autograd.grad(answer(weight, y, damp).sum(), y)
    assert (g[~keep] == 0).all()
    assert (g[keep] != 0).any()


def test_a_mask_of_everything_changes_nothing_and_one_of_nothing_leaves_the_prior() -> None:
    A = CONVOLUTIONS["valid"]
    y = kernel(1, 10, 12)
    whole = lsconv.lstsq(lsconv.Mask(torch.ones(1, 10, 12, dtype=torch.bool)) @ A, y, damp=0.1)
    assert apart(whole.x, lsconv.lstsq(A, y, damp=0.1).x) < 1e-9
    nothing = lsconv.lstsq(lsconv.Mask(torch.zeros(1, 10, 12, dtype=torch.bool)) @ A, y, damp=0.1)
    assert bool((nothing.x == 0).all())
    assert bool(nothing.converged)


def test_dead_pixels_of_an_image_take_few_iterations() -> None:
    t = torch.arange(-4, 5, dtype=F64)
    gauss = torch.exp(-((t[:, None] ** 2 + t**2) / 4))
    A = lsconv.blur_operator(gauss / gauss.sum(), (64, 64))
    y = A(kernel(*A.in_shape).cumsum(-1))
    keep = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.01
    keep[:, :, 20] = False
    keep[:, 30:40, 40:50] = False
    for damp, most in ((1e-1, 8), (1e-3, 20)):
        solution = lsconv.lstsq(lsconv.Mask(keep) @ A, torch.where(keep, y, torch.nan), damp=damp)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = lsconv.lstsq(lsconv.Mask(keep) @ A, y, damp=damp, method="lsmr", preconditioner=None, max_iter=100)
        assert bool(solution.converged)
        assert int(solution.iterations) <= most < int(plain.iterations)


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("damp", [0.5, 1e-2])
@pytest.mark.parametrize("name", ["valid", "same", "full", "periodic", "tall", "line", "volume", "groups"])
def test_the_missing_outputs_may_be_cells_of_the_border(name: str, damp: float, penalised: bool) -> None:
    A = CONVOLUTIONS[name]
    y, _ = data(A)
    keep = torch.rand(A.out_shape[1:], generator=torch.Generator().manual_seed(1)).expand(A.out_shape) > 0.2
    B, y = (2 * lsconv.Mask(keep) @ A).for_dtype(F64), torch.where(keep, torch.nan_to_num(y), 0)
    L = lsconv.Gradient(A.in_shape, ndim=A.ndim, dtype=F64) if penalised else None
    rows = MeasuredRows.of(B)
    assert rows is not None
    plan = MissingBorderPlan(B, rows, damp, L)
    solution = plan.solve(y)
    assert solution.converged.all()
    assert apart(solution.x, minimiser(B, y, damp, L)) < 1e-7
    v = plan.normal_solve(solution.x)
    left = B.adjoint(B(v)) + damp**2 * (v if L is None else L.adjoint(L(v)))
    assert apart(left, solution.x) < 1e-7


@pytest.mark.usefixtures("iterated")
def test_an_iterating_border_takes_the_missing_outputs_in() -> None:
    A = lsconv.blur_operator(kernel(5, 5).abs() / 15, (40, 44))
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64)
    y, keep = data(A, 0.02)
    B = (lsconv.Mask(keep) @ A).for_dtype(F64)
    plan = penalty_plan(B, L, 0.1)
    assert isinstance(plan, MissingBorderPlan)
    assert "of the outputs missing, form='valid'" in repr(plan)
    y = torch.where(keep, y, 0)
    solution = plan.solve(y)
    unmasked = lsconv.tikhonov(A, y, 0.1, L=L)
    assert bool(solution.converged)
    assert 0 < int(solution.iterations) < 2 * int(unmasked.iterations) + 4
    assert apart(solution.x, minimiser(B, y, 0.1, L)) < 1e-8


def test_items_that_miss_different_outputs_have_no_common_border() -> None:
    A = CONVOLUTIONS["valid"]
    keep = torch.rand(2, *A.out_shape, generator=torch.Generator().manual_seed(1)) > 0.2
    rows = MeasuredRows.of(lsconv.Mask(keep, 1, dtype=F64) @ A)
    assert rows is not None
    with pytest.raises(lsconv.MethodError, match="one border serves items"):
        MissingBorderPlan(lsconv.Mask(keep, 1, dtype=F64) @ A, rows, 0.1)


def test_large_gaps_and_sparse_samples_are_left_to_the_iteration() -> None:
    A = lsconv.blur_operator(kernel(5, 5).abs() / 15, (64, 64))
    gap, few = torch.ones(1, 64, 64, dtype=torch.bool), torch.rand(1, 64, 64) > 0.7
    gap[:, 10:50, 10:50] = False
    columns = torch.ones_like(gap)
    columns[:, :, [20, 40]] = False
    for keep, served in ((gap, False), (few, False), (columns, True)):
        plan = route(lsconv.Mask(keep, dtype=F64) @ A, 0.1)
        assert isinstance(plan, MissingPlan) == served
