"""Even kernels with reflect padding against dense matrices, and kernels that only seem even."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import MethodError
from lsconv.inverse.plans.cosine_plan import CosinePlan
from lsconv.inverse.route import route
from tests.oracles import dense_tikhonov

OPTIONS: dict[str, Any] = {"rcond": 1e-12, "rtol": 1e-10}
SIZES = [(7,), (2,), (9, 13), (2, 5), (1, 6), (8, 3), (4, 5, 6), (2, 3, 4)]


def even_kernel(radii: tuple[int, ...], *lead: int, seed: int = 0, identity: float = 2.0) -> Tensor:
    """Random kernels even along every axis, none of them separable, of a dominant centre."""
    K = torch.randn(*lead, *(2 * r + 1 for r in radii), generator=torch.Generator().manual_seed(seed)).double()
    for a in range(-len(radii), 0):
        K = K + K.flip(a)
    K = K / K.abs().sum(tuple(range(-len(radii), 0)), keepdim=True)
    K[(..., *radii)] += identity
    return K


def reflected(K: Tensor, size: tuple[int, ...], dilation: tuple[int, ...] | None = None, **options: Any) -> Any:
    """The convolution with reflect padding that keeps the size."""
    dilation = (1,) * len(size) if dilation is None else dilation
    padding = tuple(d * (k // 2) for d, k in zip(dilation, K.shape[-len(size) :], strict=True))
    conv = (lsconv.Conv1d, lsconv.Conv2d, lsconv.Conv3d)[len(size) - 1]
    return conv(K, size, padding=padding, dilation=dilation, padding_mode="reflect", **options)


def disk(radius: float) -> Tensor:
    i = torch.arange(-math.ceil(radius), math.ceil(radius) + 1).double()
    K = (i[:, None] ** 2 + i**2 <= radius**2).double()
    return K[None, None] / K.sum()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("damp", [0.0, 1e-6, 1e-2, 3.0])
@pytest.mark.parametrize("size", SIZES)
def test_the_solve_its_adjoint_and_its_normal_inverse_are_those_of_the_matrix(
    size: tuple[int, ...], damp: float
) -> None:
    A = reflected(even_kernel(tuple(n - 1 for n in size), 1, 1), size)  # extents as large as reflect allows
    plan, y, D = CosinePlan(A, damp, **OPTIONS), numbers(3, *A.out_shape), A.to_dense()
    solution = plan.solve(y)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, dense_tikhonov(A, y, damp), rtol=1e-9, atol=1e-9)
    normal = torch.linalg.inv(D.mT @ D + damp**2 * torch.eye(len(D)).double())
    for found, matrix in ((plan.adjoint(y), D @ normal), (plan.normal_solve(y), normal)):
        torch.testing.assert_close(found.flatten(1), y.flatten(1) @ matrix.mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damp", [1e-6, 1e-2, 3.0])
@pytest.mark.parametrize("size", [(9,), (7, 8), (4, 5, 6)])
def test_the_condition_of_the_preconditioned_equations_is_that_of_kantorovich(
    size: tuple[int, ...], damp: float
) -> None:
    A = reflected(even_kernel((1,) * len(size), 1, 1, identity=0.0), size)
    plan = CosinePlan(A, damp, **OPTIONS)
    N, M = (plan._normal_operators[power].to_dense() for power in (2, -2))
    bound = (1 + 2 ** len(size)) ** 2 / 2 ** (2 + len(size))
    for matrix, largest in ((N, 2 ** len(size)), (M @ N, bound)):
        values = torch.linalg.eigvals(matrix).real
        assert float(values.min()) >= 1 - 1e-9
        assert float(values.max()) <= largest + 1e-9
    if damp < 1e-3:
        torch.testing.assert_close(M @ N, torch.eye(A.in_numel).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dilation", [(2, 1), (3, 2)])
def test_dilated_kernels_of_several_channels_and_items(dilation: tuple[int, int]) -> None:
    A = reflected(even_kernel((1, 2), 2, 3, 1), (11, 8), dilation, groups=3)
    assert A.batch_shape == (2,)
    damp = torch.tensor([[0.1, 0.0], [1e-4, 2.0], [0.0, 1e-3]]).double()
    y, plan = numbers(3, 2, *A.out_shape), CosinePlan(A, damp, **OPTIONS)
    solution = plan.solve(y)
    assert bool(solution.converged.all())
    D = A.to_dense()
    normal = D.mT @ D + damp[..., None, None] ** 2 * torch.eye(A.in_numel).double()
    expected = torch.linalg.solve(normal, D.mT @ y.flatten(2).unsqueeze(-1)).reshape(y.shape)
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-9)
    again = plan.with_damp(0.5).solve(y).x
    torch.testing.assert_close(again, dense_tikhonov(A, y, 0.5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("damp", [0.0, 1e-9, 1e-3, 0.1])
def test_a_disk_is_solved_to_the_accuracy_of_the_decomposition(damp: float) -> None:
    A = reflected(disk(4), (17, 20))
    assert isinstance(route(A, damp), CosinePlan)
    y = numbers(2, *A.out_shape)
    U, values, Vh = torch.linalg.svd(A.to_dense())
    filtered = values / (values**2 + damp**2)
    expected = ((y.flatten(1) @ U) * filtered) @ Vh
    solution = lsconv.lstsq(A, y, damp=damp)
    assert bool(solution.converged.all())
    assert float(torch.dist(solution.x.flatten(1), expected) / expected.norm()) < 1e-11
    inverse = lsconv.pinv(A, damp=damp)
    torch.testing.assert_close(inverse(y), solution.x, rtol=1e-11, atol=0)
    assert inverse.dot_test() < 1e-9


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_and_precision_change_nothing_but_rounding(scale: float, dtype: torch.dtype) -> None:
    A = reflected((disk(2.5) * scale).to(dtype), (24, 21))
    y = numbers(*A.out_shape).to(dtype)
    for damp in (0.0, 1e-2 * scale):
        solution = lsconv.lstsq(A, y, damp=damp)
        assert bool(solution.converged)
        assert isinstance(route(A, damp), CosinePlan)
        expected = dense_tikhonov(A.to(dtype=torch.float64), y.double(), damp)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert float(torch.dist(solution.x.double(), expected) / expected.norm()) < tolerance


def test_items_of_a_batch_do_not_disturb_each_other() -> None:
    A = reflected(disk(3), (20, 20))
    y = numbers(4, *A.out_shape) * torch.tensor([1e-20, 1.0, 0.0, 1e20]).double().reshape(4, 1, 1, 1)
    damp = torch.tensor([1e-5, 0.0, 0.1, 1e-2]).double()
    together = lsconv.lstsq(A, y, damp=damp)
    assert bool(together.converged.all())
    for item in range(4):
        alone = lsconv.lstsq(A, y[item], damp=damp[item])
        assert float(torch.dist(together.x[item], alone.x)) <= 1e-8 * float(alone.x.norm())


@pytest.mark.parametrize("kind", ["one axis", "by its centre", "not at all", "off its centre"])
def test_kernels_that_are_not_even_along_every_axis_are_left_to_others(kind: str) -> None:
    K = numbers(1, 1, 3, 5)
    if kind == "one axis":
        K = K + K.flip(-1)
    elif kind == "by its centre":
        K = K + K.flip(-1, -2)
    K[..., 1, 2] += 8
    A = reflected(K, (9, 10))
    if kind == "off its centre":
        A = lsconv.Conv2d(even_kernel((1, 1), 1, 1)[..., 1:], (9, 10), padding="same", padding_mode="reflect")
    y = numbers(*A.out_shape)
    for damp in (0.0, 0.1):
        assert not isinstance(route(A, damp), CosinePlan)
        found = lsconv.lstsq(A, y, damp=damp)
        assert bool(found.converged)
        torch.testing.assert_close(found.x, dense_tikhonov(A, y, damp), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padding_mode", ["replicate", "zeros", "circular"])
def test_other_padding_is_left_to_others(padding_mode: str) -> None:
    A = lsconv.Conv2d(disk(2), (9, 9), padding=2, padding_mode=padding_mode)
    assert not isinstance(route(A, 0.1), CosinePlan)


@pytest.mark.parametrize("error", [1e-15, 1e-9, 1e-4])
@pytest.mark.parametrize("damp", [0.0, 1e-6, 0.3])
def test_nearly_even_kernels_are_refined_to_the_answer_of_the_kernel_itself_or_refused(
    error: float, damp: float
) -> None:
    A = reflected(disk(4) + error * numbers(1, 1, 9, 9), (17, 20))
    y = numbers(*A.out_shape)
    try:
        plan = CosinePlan(A, damp, **OPTIONS)
    except MethodError:
        assert error > 1e-9
        assert damp < 0.3
        return
    solution = plan.solve(y)
    assert bool(solution.converged)
    expected = dense_tikhonov(A, y, damp) if damp != 1e-6 else lsconv.lstsq(A, y, damp=damp, method="svd").x
    for x in (solution.x, plan.apply(y)):
        assert float(torch.dist(x, expected) / expected.norm()) < 1e-9
    adjoint = lsconv.lstsq(A.H, y, damp=damp, method="svd").x
    assert float(torch.dist(plan.adjoint(y), adjoint) / adjoint.norm()) < 1e-9


def test_without_damping_a_symbol_of_tiny_values_is_left_to_others() -> None:
    K = torch.tensor([[0.0, 1.0, 0.0], [1.0, 4.0 + 1e-12, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    A = reflected(K[None, None], (9, 8))
    with pytest.raises(MethodError, match=r"damp: some singular values may count as zero.*damp = 0"):
        CosinePlan(A, 0.0, **OPTIONS)
    assert not isinstance(route(A), CosinePlan)


@pytest.mark.parametrize("damp", [0.0, 1e-300, 1e-14, 1e-8, 1e-3])
def test_a_singular_symbol_with_little_damping_or_none(damp: float) -> None:
    K = torch.tensor([[0.3, 0.0, 0.3], [0.0, 1.2, 0.0], [0.3, 0.0, 0.3]]).double()
    A = reflected(K[None, None], (12, 13))
    assert float(torch.linalg.svdvals(A.to_dense())[-1]) < 1e-15
    plan, y = CosinePlan(A, damp, **OPTIONS), numbers(*A.out_shape)
    solution = plan.solve(y)
    assert bool(solution.converged)
    U, values, Vh = torch.linalg.svd(A.to_dense())
    values = torch.where(values < 1e-14, 0, values)
    filtered = torch.where(values > 0, values / (values**2 + damp**2), 0)
    for x, matrix in ((solution.x, (U * filtered) @ Vh), (plan.adjoint(y), (Vh.mT * filtered) @ U.mT)):
        expected = y.flatten() @ matrix
        assert float(torch.dist(x.flatten(), expected) / expected.norm()) < 1e-11
    if damp == 0:
        rank = int((values > 0).sum())
        assert int(solution.rank) == rank < A.in_numel  # type: ignore[arg-type]
        expected = ((y.flatten() @ Vh.mT) * filtered**2) @ Vh
        assert float(torch.dist(plan.normal_solve(y).flatten(), expected) / expected.norm()) < 1e-10


@pytest.mark.parametrize("rcond", [1e-1, 1e-3])
def test_a_rank_of_the_users_is_decided_by_other_plans(rcond: float) -> None:
    A = reflected(disk(2.5), (12, 13))
    y = numbers(*A.out_shape)
    expected = torch.linalg.pinv(A.to_dense(), rtol=rcond) @ y.flatten()
    torch.testing.assert_close(lsconv.lstsq(A, y, rcond=rcond).x.flatten(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("damp", [0.0, 0.05])
def test_gradients_by_data_kernel_and_damping(damp: float) -> None:
    K = even_kernel((1, 1), 1, 1)
    size = (4, 3)
    y = numbers(1, *size).requires_grad_()
    inputs: tuple[Tensor, ...] = (y, K.requires_grad_())
    if damp:
        inputs = (*inputs, torch.tensor(damp).double().requires_grad_())

    def solve(y: Tensor, K: Tensor, *damping: Tensor) -> Tensor:
        return lsconv.lstsq(reflected(K, size), y, damp=damping[0] if damping else 0.0).x

    assert torch.autograd.gradcheck(solve, inputs, rtol=1e-3)


def test_the_gradient_of_a_kept_plan_is_that_of_the_matrix() -> None:
    A = reflected(disk(3), (18, 15))
    y, v = numbers(*A.out_shape).requires_grad_(), numbers(*A.in_shape)
    inverse = lsconv.pinv(A, damp=1e-3)
    (inverse(y) * v).sum().backward()
    D = A.to_dense()
    expected = D @ torch.linalg.solve(D.mT @ D + 1e-6 * torch.eye(len(D)).double(), v.flatten())
    assert y.grad is not None
    assert float(torch.dist(y.grad.flatten(), expected) / expected.norm()) < 1e-8
    torch.testing.assert_close(inverse.H(v), y.grad)


def test_missing_data() -> None:
    A, y = reflected(disk(2.5), (16, 17)), numbers(1, 16, 17)
    seen = torch.rand(1, 16, 17, generator=torch.Generator().manual_seed(3)) > 0.2
    D = A.to_dense() * seen.flatten()[:, None]
    expected = torch.linalg.solve(D.mT @ D + 1e-2 * torch.eye(len(D)).double(), D.mT @ (y * seen).flatten())
    masked = lsconv.lstsq(A, y, damp=0.1, observed=seen)
    torch.testing.assert_close(masked.x.flatten(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_chosen_damping_is_that_of_the_dense_criterion() -> None:
    A = reflected(disk(3), (24, 26))
    scene = torch.zeros(1, 24, 26).double()
    scene[:, 6:15, 8:20] = 1
    y = A(scene) + 0.02 * numbers(1, 24, 26)
    U, values, _ = torch.linalg.svd(A.to_dense())
    beta = (U.mT @ y.flatten()).square()

    def criterion(damp: float) -> float:
        left = damp**2 / (values**2 + damp**2)
        return float((left.square() * beta).sum() / left.sum() ** 2)

    chosen = lsconv.tikhonov(A, y, "gcv")
    best = min(criterion(10 ** (k / 20 - 4)) for k in range(100))
    assert criterion(float(chosen.damp)) < 1.05 * best
