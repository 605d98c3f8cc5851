"""A volume is answered as an image whose channels are its planes, where that is the cheaper way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.plan import BorderPlan
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.plans.route_costs import Planes, is_one_sided
from lsconv.inverse.route import route
from lsconv.operators.convolution import Convolution
from tests.oracles import dense_tikhonov


def volume(size: tuple[int, ...], kernel: tuple[int, ...] = (3, 4, 5), **options: Any) -> Convolution:
    """A blur whose kernel is no product."""
    dtype, batch = options.pop("dtype", torch.float64), options.pop("batch", ())
    groups = options.get("groups", 1)
    weight = torch.randn(*batch, groups, 1, *kernel, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return Convolution(weight / weight[0].abs().sum() * groups, size, **options)


def data(A: Convolution, *batch: int) -> Tensor:
    """Numbers in the shape of A's outputs."""
    return torch.randn(*batch, *A.out_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "kernel", "padding", "axis"),
    [
        ((6, 12, 13), (3, 4, 5), 0, 0),
        ((12, 13, 6), (3, 4, 5), 0, 2),
        ((12, 6, 13), (3, 4, 5), [(2, 2), (3, 3), (4, 4)], 1),  # full
        ((6, 12, 13), (3, 4, 5), [(1, 1), (0, 0), (0, 0)], 0),  # "same" along the axis
        ((12, 6, 13), (3, 4, 5), [(1, 1), (0, 0), (0, 0)], 0),  # the only axis that leaves the others one-sided
        ((6, 12, 13), (3, 5, 5), [(1, 1), (2, 2), (2, 2)], None),
        ((6, 12, 13), (3, 5, 5), [(0, 0), (4, 4), (0, 0)], 1),  # inputs of that axis, outputs of the others
        ((6, 12, 13), (3, 5, 5), [(2, 2), (0, 0), (2, 2)], None),
    ],
)
def test_the_axis_is_the_cheapest_that_leaves_a_one_sided_image(
    size: tuple[int, ...], kernel: tuple[int, ...], padding: Any, axis: int | None
) -> None:
    way = Planes.of(volume(size, kernel, padding=padding), 0.0)
    assert (None if way is None else way.axis) == axis


def test_images_strides_and_several_channels_have_no_planes() -> None:
    assert Planes.of(Convolution(torch.ones(1, 1, 3, 3), (8, 9)), 0.1) is None
    assert Planes.of(volume((8, 9, 9), stride=2), 0.1) is None
    assert Planes.of(Convolution(torch.ones(2, 1, 3, 3, 3), (6, 8, 8)), 0.1) is None
    assert Planes.of(2.0 * volume((8, 9, 9)), 0.1) is None


def test_planes_beyond_the_memory_limit_are_not_used() -> None:
    A = volume((6, 12, 13))
    way = Planes.of(A, 0.1)
    assert way is not None
    assert Planes.of(A, 0.1, way.bytes) == way
    assert Planes.of(A, 0.1, way.bytes - 1) is None
    several = Planes.of(A, torch.full((3,), 0.1))
    assert several is not None
    assert several.bytes == 3 * way.bytes
    assert isinstance(route(A, 1e-3, method="border"), ReducedPlan)


def test_a_one_sided_convolution_crops_only_outputs_or_only_inputs() -> None:
    A = volume((6, 12, 13), padding=[(0, 0), (3, 3), (2, 2)])
    assert is_one_sided(A, [0])
    assert is_one_sided(A, [1])
    assert not is_one_sided(A, [0, 1])
    assert not is_one_sided(A, [2])
    assert is_one_sided(volume((6, 12, 13), dilation=2), range(3))


@pytest.mark.parametrize("padding", [0, [(1, 1), (0, 0), (0, 0)], [(2, 2), (3, 3), (4, 4)]], ids=str)
@pytest.mark.parametrize("damp", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_the_answer_is_that_of_the_dense_matrix(padding: Any, damp: float, dtype: torch.dtype) -> None:
    A = volume((5, 8, 9), dtype=dtype, padding=padding)
    plan = route(A, damp, method="border")
    assert isinstance(plan, ReducedPlan)
    assert isinstance(plan.innermost, BorderPlan)
    y = data(A, 2)
    solution = plan.solve(y)
    assert solution.converged.all()
    exact = dense_tikhonov(A, y, damp)
    error = (solution.x.to(exact.dtype) - exact).norm() / exact.norm()
    single = dtype == torch.float32
    assert error < (1e-3 if single else 1e-8)
    norm = (y.to(exact.dtype) - A.to(dtype=exact.dtype)(solution.x.to(exact.dtype))).flatten(1).norm(dim=1)
    assert (solution.residual_norm - norm).abs().max() <= (1e-5 if single else 1e-12) * y.flatten(1).norm(dim=1).max()


@pytest.mark.parametrize("options", [{"groups": 2}, {"batch": (2,)}, {"dilation": (1, 2, 1)}], ids=str)
def test_groups_items_and_dilation_are_served(options: dict[str, Any]) -> None:
    A = volume((5, 9, 9), **options)
    damp = torch.tensor([0.05, 0.2], dtype=torch.float64)
    plan = route(A, damp, method="border")
    assert isinstance(plan, ReducedPlan)
    y = data(A, 2)
    solution = plan.solve(y)
    assert solution.converged.all()
    exact = dense_tikhonov(A, y, damp)
    assert (solution.x - exact).norm() < 1e-9 * exact.norm()


def test_the_other_answers_of_the_plan_are_those_of_the_dense_matrix() -> None:
    A, damp = volume((5, 8, 9)), 0.05
    plan = route(A, damp, method="border")
    M = A.to_dense()
    normal = M.mT @ M + damp**2 * torch.eye(A.in_numel, dtype=M.dtype)
    y = data(A)
    v = torch.randn(A.in_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(2))
    for answer, exact in [
        (plan.apply(y), torch.linalg.solve(normal, M.mT @ y.flatten())),
        (plan.adjoint(v), M @ torch.linalg.solve(normal, v.flatten())),
        (plan.normal_solve(v), torch.linalg.solve(normal, v.flatten())),
        (plan.residual(y), y.flatten() - M @ torch.linalg.solve(normal, M.mT @ y.flatten())),
    ]:
        assert (answer.flatten() - exact).norm() < 1e-8 * exact.norm()


def test_gradients_are_those_of_the_volume() -> None:
    size, damp = (4, 7, 7), 0.3
    weight = volume(size, (2, 3, 4)).weight.detach().requires_grad_()
    y = data(Convolution(weight, size)).requires_grad_()
    x = lsconv.lstsq(Convolution(weight, size), y, damp=damp, method="border").x
    dense = dense_tikhonov(Convolution(weight, size), y, damp)
    cotangent = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((x * cotangent).sum(), (weight, y))
    oracle = torch.autograd.grad((dense * cotangent).sum(), (weight, y))
    for a, b in zip(ours, oracle, strict=True):
        assert (a - b).norm() < 1e-7 * b.norm()


def test_a_plan_that_is_kept_factorises_the_border_of_the_planes() -> None:
    A = volume((6, 24, 24), (3, 5, 5))
    inverse = lsconv.pinv(A, damp=1e-2)
    y = data(A)
    for _ in range(40):
        inverse(y)
    innermost = inverse.plan.innermost
    assert isinstance(innermost, BorderPlan)
    assert innermost.inverse.direct is not None
    solution = inverse.solve(y)
    assert int(solution.iterations.max()) == 0
    x = lsconv.cgls(A, y, damp=1e-2, rtol=1e-12).x
    assert (solution.x - x).norm() < 1e-8 * x.norm()


def test_a_volume_of_inputs_and_outputs_is_served_where_its_factors_pay() -> None:
    A = volume((5, 12, 12), (3, 3, 3), padding=1)
    assert Planes.of(A, 0.0) is None
    assert Planes.of(volume((16, 64, 64), (5, 9, 9), padding=(2, 4, 4)), 1e-2) is None
    plan = route(A, 1e-3, method="border")
    assert isinstance(plan, ReducedPlan)
    y = data(A)
    solution = plan.solve(y)
    assert solution.converged.all()
    exact = dense_tikhonov(A, y, 1e-3)
    assert (solution.x - exact).norm() < 1e-8 * exact.norm()
