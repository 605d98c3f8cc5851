"""LSMR before the border: where it is tried, what it promises, and that the border answers what it leaves open."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.plan import BorderPlan
from lsconv.inverse.fallback import Fallback, fallback_plan
from lsconv.inverse.plans.certified_lsmr import CertifiedLsmrPlan
from lsconv.inverse.plans.lsmr_then_border import LsmrThenBorderPlan, _circulant_norm
from lsconv.inverse.route import route
from lsconv.inverse.solve import solve
from lsconv.krylov.loop import batch_groups
from lsconv.krylov.loop.solution import Status
from tests.oracles import dense_tikhonov


def layer(c_out: int = 24, c_in: int = 12, dtype: torch.dtype = torch.float32) -> lsconv.Convolution:
    """A downsampling layer; few enough unknowns for the dense matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(c_out, c_in, 3, 3, generator=generator, dtype=dtype) / (9 * c_in) ** 0.5
    return lsconv.Conv2d(weight, (10, 9), stride=2, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damp", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_layers_are_tried_and_answered_as_exactly_as_by_the_border(damp: float, dtype: torch.dtype) -> None:
    A = layer(dtype=dtype)
    assert isinstance(route(A, damp), LsmrThenBorderPlan)
    y = torch.randn(3, *A.out_shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    solution = lsconv.lstsq(A, y, damp=damp)
    assert solution.converged.all()
    exact = dense_tikhonov(A, y, damp).flatten(1)
    error = (solution.x.double().flatten(1) - exact).norm() / exact.norm()
    assert error < (3e-5 if dtype == torch.float32 else 1e-8)
    r = y.double() - A.to(dtype=torch.float64)(solution.x.double())
    torch.testing.assert_close(solution.residual_norm, r.flatten(1).norm(dim=1), rtol=1e-6, atol=1e-6)


def test_blurs_and_square_operators_without_damping_are_not_tried() -> None:
    blur = lsconv.Conv2d(torch.rand(1, 1, 9, 9), (64, 64))
    square = lsconv.Conv2d(torch.randn(24, 24, 3, 3), (16, 16), padding=1)
    assert isinstance(route(blur, 0.1), (BorderPlan, CapacitancePlan))
    assert isinstance(route(square, 0.0), (BorderPlan, CapacitancePlan))
    assert isinstance(route(square, 0.5), LsmrThenBorderPlan)
    assert isinstance(route(square, 0.5, method="border"), BorderPlan)


def test_a_kernel_of_the_size_of_the_field_is_tried_and_a_strided_blur_where_damping_bounds_the_iterations() -> None:
    wide = lsconv.Conv2d(torch.rand(1, 1, 33, 33) / 33**2, (48, 48), padding=16)
    assert isinstance(route(wide, 0.1), LsmrThenBorderPlan)
    assert isinstance(route(wide, 0.0), (BorderPlan, CapacitancePlan))
    strided = lsconv.Conv2d(torch.rand(1, 1, 9, 9) / 81, (128, 128), stride=4, padding=4)
    assert isinstance(route(strided, 0.3), LsmrThenBorderPlan)
    assert isinstance(route(strided, 1e-3), BorderPlan)


@pytest.mark.parametrize(
    ("size", "taps", "damp", "tried"), [(7, 7, 0.02, False), (48, 49, 0.1, True), (24, 25, 2e-3, False)]
)
def test_a_kernel_of_the_size_of_the_field_goes_to_the_border_where_that_is_small(
    size: int, taps: int, damp: float, tried: bool
) -> None:
    groups = 64 if size < 8 else 1
    weight = torch.rand(groups, 1, taps, taps) / taps**2
    A = lsconv.Conv2d(weight, (size, size), padding=taps // 2, groups=groups)
    assert isinstance(route(A, damp), LsmrThenBorderPlan if tried else BorderPlan)
    solution = lsconv.lstsq(A, torch.randn(2, *A.out_shape), damp=damp)
    assert bool(solution.converged.all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_volume_is_tried_where_damping_bounds_the_iterations(dtype: torch.dtype) -> None:
    kernel = torch.rand(1, 1, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv3d(kernel / kernel.sum(), (16, 24, 24), padding=(1, 2, 2))
    assert isinstance(route(A, 0.2), LsmrThenBorderPlan)
    assert isinstance(route(A, 1e-3).innermost, BorderPlan)
    y = torch.randn(2, *A.out_shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    solution = route(A, 0.2).solve(y)
    assert solution.converged.all()
    exact = lsconv.cgls(A.to(dtype=torch.float64), y.double(), damp=0.2, rtol=1e-13).x
    error = (solution.x.double() - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("padding", [0, (2, 4, 4)])
def test_a_deep_volume_cropped_on_one_side_is_tried_with_the_preconditioner(padding: int | tuple[int, ...]) -> None:
    """Unless it has few planes, or the damping leaves many iterations."""
    kernel = torch.rand(1, 1, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv3d(kernel / kernel.sum(), (22, 22, 22), padding=padding)
    plan = route(A, 0.5)
    assert isinstance(plan, LsmrThenBorderPlan)
    assert plan.M is not None or plan.N is not None
    assert isinstance(route(A, 1e-4).innermost, BorderPlan)
    flat = lsconv.Conv3d(kernel / kernel.sum(), (5, 22, 22), padding=padding)
    assert isinstance(route(flat, 0.5).innermost, BorderPlan)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = plan.solve(y)
    assert solution.converged.all()
    plain = lsconv.cgls(A, y, damp=0.5, rtol=1e-12).x
    assert (solution.x - plain).norm() < 1e-8 * plain.norm()


def test_a_strided_blur_that_is_kept_goes_over_to_the_border() -> None:
    weight = torch.rand(1, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv2d(weight / 81, (128, 128), stride=4, padding=4)
    inverse = lsconv.pinv(A, damp=0.3)
    assert isinstance(inverse.plan, LsmrThenBorderPlan)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = inverse.solve(y)
    while not inverse.plan.exhausted:
        assert bool((inverse.solve(y).iterations > 0).all())
    total = inverse.plan.total
    kept = inverse.solve(y)
    assert kept.converged.all()
    v = torch.randn(2, *A.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose((inverse(y) * v).sum(), (y * inverse.adjoint(v)).sum(), rtol=1e-8)
    assert inverse.plan.total == total  # LSMR was not asked
    assert (kept.x - first.x).norm() < 1e-8 * first.x.norm()


def test_applications_of_the_adjoint_count_as_solves_do() -> None:
    weight = torch.rand(1, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv2d(weight / 81, (128, 128), stride=4, padding=4)
    inverse = lsconv.pinv(A, damp=0.3)
    v = torch.randn(2, *A.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first = inverse.adjoint(v)
    inverse.plan.max_iterations = inverse.plan.total
    assert inverse.plan.exhausted
    kept = inverse.adjoint(v)
    assert inverse.fallback is not None
    assert isinstance(inverse.fallback.plan, BorderPlan)
    assert (kept - first).norm() < 1e-8 * first.norm()


def planes() -> lsconv.Convolution:
    """A depthwise layer."""
    weight = torch.randn(3, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 9
    return lsconv.Conv2d(weight, (128, 128), stride=4, padding=4, groups=3)


def test_large_items_are_tried_in_groups_with_their_own_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) / 6
    A = lsconv.Conv2d(weight, (12, 12), stride=2, padding=1)
    y = torch.randn(3, 2, *A.out_shape, generator=torch.Generator().manual_seed(1))
    damp = torch.tensor([[0.3, 0.2], [0.5, 0.4], [0.3, 0.3]])
    whole = LsmrThenBorderPlan(A, damp, 60).solve(y)
    monkeypatch.setattr(batch_groups, "CACHE_BYTES", 4 * A.in_numel * 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plan = LsmrThenBorderPlan(A, damp, 60)
    parts = plan.solve(y)
    assert parts.converged.all()
    assert plan.total == int(parts.iterations.sum())
    assert plan.solved == 6
    torch.testing.assert_close(parts.x, whole.x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.damp, whole.damp)
    for item in ((0, 1), (2, 0)):
        exact = dense_tikhonov(A, y[item], float(damp[item])).flatten()
        assert (parts.x[item].double().flatten() - exact).norm() < 1e-5 * exact.norm()


def test_strongly_damped_planes_are_tried_unless_a_batch_would_cost_more() -> None:
    A = planes()
    plan = route(A, 1.0)
    assert isinstance(plan, LsmrThenBorderPlan)
    assert plan.max_iterations is not None
    assert plan.expected is not None
    y = torch.randn(A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert not plan.gives_way(y[None])
    assert plan.gives_way(y.expand(1 + int(2 * plan.max_iterations / plan.expected), *A.out_shape))
    item = y[:1].expand(A.out_shape).clone()
    solution = plan.solve(item)
    assert solution.converged
    exact = lsconv.cgls(lsconv.Conv2d(A.weight[:1], (128, 128), stride=4, padding=4), item[:1], damp=1.0, rtol=1e-13).x
    assert (solution.x[:1] - exact).norm() < 1e-8 * exact.norm()


@pytest.mark.slow
def test_planes_with_less_damping_and_batches_of_planes_go_to_the_border() -> None:
    A = planes()
    assert isinstance(route(A, 0.005), BorderPlan)
    inverse = lsconv.pinv(A, damp=1.0)
    items = 1 + int(2 * inverse.plan.max_iterations / inverse.plan.expected)
    y = torch.randn(items, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = inverse.solve(y)
    assert solution.converged.all()
    assert inverse.plan.total == 0  # LSMR was not asked
    alone = inverse.solve(y[0])
    assert inverse.plan.total > 0
    assert (alone.x - solution.x[0]).norm() < 1e-8 * alone.x.norm()


def test_a_layer_that_is_kept_goes_over_to_factors_where_a_solve_with_them_costs_less() -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 27**0.5
    y = torch.randn(8, 48, 48, generator=torch.Generator().manual_seed(1))
    A = lsconv.Conv2d(weight, (48, 48), padding=1)
    inverse = lsconv.pinv(A, damp=0.1)
    assert isinstance(inverse.plan, LsmrThenBorderPlan)
    first = inverse.solve(y)
    for _ in range(4):
        kept = inverse.solve(y)
    assert inverse.plan.exhausted
    border = inverse.fallback.plan
    assert isinstance(border, BorderPlan)
    assert border.inverse.direct is not None
    assert kept.converged.all()
    exact = lsconv.cgls(A.to(dtype=torch.float64), y.double(), damp=0.1, rtol=1e-12).x
    assert (kept.x.double() - exact).norm() < 1e-5 * exact.norm()
    assert (first.x - exact).norm() < 1e-4 * exact.norm()


def test_a_tall_layer_with_little_damping_ends_in_the_trial_and_rounding_does_not_reach_its_null_space() -> None:
    weight = torch.randn(24, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    tall = lsconv.Conv2d(weight, (20, 20), padding=1)
    y = torch.randn(2, *tall.out_shape, generator=torch.Generator().manual_seed(1))
    found = LsmrThenBorderPlan(tall, 1e-3, 60).solve(y)
    assert found.converged.all()
    exact = dense_tikhonov(tall, y, 1e-3).flatten(1)
    assert (found.x.double().flatten(1) - exact).norm() < 3e-5 * exact.norm()
    weight[:, 2] = weight[:, 0]  # a null space
    deficient = lsconv.Conv2d(weight, (20, 20), padding=1)
    found = LsmrThenBorderPlan(deficient, 1e-2, 200).solve(y)
    assert found.converged.all()
    apart = (found.x[:, 2] - found.x[:, 0]).double().norm()
    assert apart < 1e-6 * found.x.double().norm()


def test_gradients_in_single_precision_arrive_and_are_those_in_double() -> None:
    weight = torch.randn(24, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    y = torch.randn(2, 24, 40, 40, generator=torch.Generator().manual_seed(1))

    def gradient(weight: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weight = weight.clone().requires_grad_()
        A = lsconv.Conv2d(weight, (40, 40), padding=1)
        assert isinstance(route(A, 0.05), LsmrThenBorderPlan)
        x = lsconv.lstsq(A, y, damp=0.05).x
        return torch.autograd.grad((x * torch.arange(float(x.numel())).reshape(x.shape).cos()).sum(), weight)[0]

    expected = gradient(weight.double(), y.double())
    assert (gradient(weight, y) - expected).norm() < 1e-4 * expected.norm()  # and no backward solve warns


def test_a_trial_on_its_way_to_the_end_may_take_twice_its_limit() -> None:
    A = layer(dtype=torch.float64)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    needed = int(LsmrThenBorderPlan(A, 0.2, 500).solve(y).iterations.max())
    going = LsmrThenBorderPlan(A, 0.2, round(0.7 * needed)).solve(y)
    assert going.converged.all()
    assert int(going.iterations.max()) == needed
    ended = LsmrThenBorderPlan(A, 0.2, needed // 4).solve(y)
    assert not ended.converged.any()
    assert int(ended.iterations.max()) <= needed // 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize("damp", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_the_border_solves_for_items_that_a_trial_leaves_unconverged(damp: float) -> None:
    A = layer(12, 24, torch.float64)  # more unknowns than equations
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    short = LsmrThenBorderPlan(A, damp, 2)
    nonfinite = torch.zeros(2, dtype=torch.bool)
    alone = short.solve(y)
    assert not alone.converged.any()
    assert alone.status == [Status.ITERATION_LIMIT] * 2
    assert int(alone.iterations.max()) <= 2
    fallback = Fallback(A, damp, short)
    solution, backward = solve(short, y, nonfinite, fallback=fallback)
    assert solution.converged.all()
    assert backward is fallback.plan
    assert backward is not short
    exact = dense_tikhonov(A, y, damp).flatten(1)
    assert (solution.x.flatten(1) - exact).norm() < 1e-8 * exact.norm()


def test_the_fallback_of_a_large_trial_is_the_border() -> None:
    A = lsconv.Conv2d(torch.randn(24, 12, 3, 3), (40, 40), stride=2, padding=1)
    plan = route(A, 0.3)
    assert isinstance(plan, LsmrThenBorderPlan)
    assert isinstance(fallback_plan(A, 0.3, plan, None), BorderPlan)


@pytest.mark.parametrize("damp", [0.0, 0.2])
def test_gradients_are_those_of_the_dense_answer(damp: float) -> None:
    A = layer(dtype=torch.float64)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(2, *A.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(weight: torch.Tensor, y: torch.Tensor, answer: str) -> torch.Tensor:
        B = A.with_parameters([weight])
        if answer == "lstsq":
            x = lsconv.lstsq(B, y, damp=damp).x.flatten(1)
        else:
            M = B.to_dense()
            outer = M @ M.mT + damp**2 * torch.eye(M.shape[0], dtype=M.dtype)
            x = torch.linalg.solve(outer, y.flatten(1).mT).mT @ M
        return (x * cotangent.flatten(1)).sum()

    def gradients(answer: str) -> tuple[torch.Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (A.weight, y)]
        return torch.autograd.grad(loss(*inputs, answer), inputs)

    found, expected = gradients("lstsq"), gradients("dense")
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_the_kept_plan_answers_and_its_adjoint_fits() -> None:
    A = layer(dtype=torch.float64)
    inverse = lsconv.pinv(A, damp=0.2)
    assert isinstance(inverse.plan, LsmrThenBorderPlan)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(inverse(y).flatten(1), dense_tikhonov(A, y, 0.2).flatten(1), rtol=1e-7, atol=1e-8)
    assert inverse.dot_test() < 1e-7


def response(taps: int, size: int, padding: int, dtype: torch.dtype) -> tuple[lsconv.Convolution, torch.Tensor]:
    """A signal in a room: a long, decaying response of norm about one, and two noisy records."""
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(taps, dtype=torch.float64)
    weight = torch.randn(taps, generator=generator, dtype=torch.float64) * torch.exp(-5 * times / taps)
    weight[-1] = 4.0
    A = lsconv.Conv1d((weight / 8).to(dtype)[None, None], size, padding=padding)
    return A, torch.randn(2, *A.out_shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "padding"), [(900, 0), (1500, 719)])
def test_a_long_response_is_tried_with_the_preconditioner_and_a_plan_that_is_kept_goes_over_to_the_border(
    size: int, padding: int, dtype: torch.dtype
) -> None:
    A, y = response(720, size, padding, dtype)
    inverse = lsconv.pinv(A, damp=0.1)
    assert isinstance(inverse.plan, LsmrThenBorderPlan)
    exact, bound = dense_tikhonov(A, y, 0.1).flatten(1), 1e-5 if dtype == torch.float32 else 1e-8
    x = inverse(y)
    assert x.dtype == dtype
    assert (x.double().flatten(1) - exact).norm() < bound * exact.norm()
    w = torch.randn(2, *A.in_shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    turned = inverse.adjoint(w)
    assert turned.dtype == dtype
    there, back = (x.double() * w.double()).sum(), (y.double() * turned.double()).sum()
    assert abs(float(there - back)) < 10 * bound * float(x.norm() * w.norm())
    for _ in range(40):
        if inverse.plan.exhausted:
            break
        solution = inverse.solve(y)
        assert solution.converged.all()
        assert solution.x.dtype == dtype
    assert inverse.plan.exhausted
    total = inverse.plan.total
    kept = inverse.solve(y)
    assert kept.converged.all()
    assert inverse.plan.total == total  # LSMR was not asked
    assert (kept.x.double().flatten(1) - exact).norm() < bound * exact.norm()


def test_two_microphones_are_two_responses() -> None:
    A, _ = response(720, 900, 0, torch.float64)
    both = lsconv.Conv1d(torch.cat([A.weight, A.weight.flip(-1)]), 900, groups=2)
    plan = route(both, 0.1)
    assert isinstance(plan, LsmrThenBorderPlan)
    assert plan.M is not None
    y = torch.randn(2, 181, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    solution = lsconv.lstsq(both, y, damp=0.1)
    assert solution.converged.all()
    alone = lsconv.Conv1d(both.weight[1:], 900)
    exact = dense_tikhonov(alone, y[1][None, None], 0.1).flatten(1)
    assert (solution.x[1] - exact[0]).norm() < 1e-8 * exact.norm()


def test_the_gradient_through_a_long_response_is_that_of_the_dense_answer() -> None:
    A, y = response(720, 900, 0, torch.float64)
    assert isinstance(route(A, 0.1), LsmrThenBorderPlan)
    cotangent = torch.randn(2, 900, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(answer: str) -> tuple[torch.Tensor, ...]:
        weight, data = (t.clone().requires_grad_() for t in (A.weight, y))
        B = A.with_parameters([weight])
        if answer == "lstsq":
            x = lsconv.lstsq(B, data, damp=0.1).x.flatten(1)
        else:
            M = torch.stack([torch.nn.functional.pad(weight.flatten(), (i, 180 - i)) for i in range(181)])
            outer = M @ M.mT + 0.01 * torch.eye(181, dtype=M.dtype)
            x = torch.linalg.solve(outer, data.flatten(1).mT).mT @ M
        return torch.autograd.grad((x * cotangent).sum(), (weight, data))

    for a, b in zip(gradients("lstsq"), gradients("dense"), strict=True):
        assert (a.flatten() - b.flatten()).norm() < 1e-6 * b.norm()


def ball(dtype: torch.dtype) -> lsconv.Convolution:
    """A blur of a small volume, valid."""
    a, b = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (3, 5))
    inside = (a[:, None, None] ** 2 + b[:, None] ** 2 + b**2 <= 1).double()
    return lsconv.Conv3d((inside / inside.sum()).to(dtype)[None, None], (8, 22, 22))


def test_preconditioned_lsmr_solves_for_items_that_the_border_of_a_volume_leaves_unconverged() -> None:
    A = ball(torch.float64)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = BorderPlan(A, 1e-3)
    fallback = Fallback(A, 1e-3, plan)
    assert plan.fallback_after is not None
    other = fallback.plan
    assert type(other) is CertifiedLsmrPlan
    nonfinite = torch.zeros(2, dtype=torch.bool)
    with pytest.warns(lsconv.ConvergenceWarning):
        solution, _ = solve(plan, y, nonfinite, fallback=fallback, max_iter=3)
    assert not solution.converged.any()  # the limit of the user's is one for all
    plan.fallback_after = 3
    solution, _ = solve(plan, y, nonfinite, fallback=fallback)
    assert solution.converged.all()
    M = A.to_dense()
    z = torch.linalg.solve(M @ M.mT + 1e-6 * torch.eye(M.shape[0], dtype=M.dtype), y.flatten(1).mT)
    exact = (M.mT @ z).mT
    assert (solution.x.flatten(1) - exact).norm() < 1e-6 * exact.norm()


def test_an_answer_formed_in_double_precision_needs_no_probe_of_the_null_space() -> None:
    A = ball(torch.float32)
    y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(1))
    plan = BorderPlan(A, 2e-3)
    solution = plan.solve(y)
    assert solution.converged.all()
    assert "_loses_null_part" not in vars(plan)
    exact = BorderPlan(A.to(dtype=torch.float64), 2e-3).solve(y.double()).x
    assert (solution.x.double() - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("stride", [1, 2])
def test_complex_layers_are_tried_in_their_own_precision(dtype: torch.dtype, stride: int) -> None:
    A = lsconv.Conv2d(torch.randn(6, 6, 3, 3, dtype=dtype), in_size=(12, 12), stride=stride, padding=1)
    y = torch.randn(A.out_shape, dtype=dtype)
    solution = lsconv.lstsq(A, y, damp=0.1)
    assert bool(solution.converged)
    D = A.to(dtype=torch.complex128).to_dense()
    eye = torch.eye(D.shape[1], dtype=D.dtype)
    expected = torch.linalg.solve(D.mH @ D + 0.01 * eye, D.mH @ y.to(D.dtype).flatten())
    assert float((solution.x.flatten() - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dtype"),
    [((20, 17), (3, 4), (2, 3), torch.float64), ((21,), (5,), (4,), torch.float64),
     ((16, 16), (3, 3), (1, 1), torch.float64),
     ((15, 12), (5, 2), (2, 1), torch.complex128)],
)  # fmt: skip
def test_the_norm_of_the_circulant_is_a_close_bound_with_strides_too(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 1, *kernel, dtype=dtype, generator=generator)
    make: Any = lsconv.Conv1d if len(size) == 1 else lsconv.Conv2d
    A = make(weight, size, stride=stride, padding=1)
    norm = float(torch.linalg.matrix_norm(A.to_dense().reshape(A.out_numel, A.in_numel), 2))
    assert norm <= float(_circulant_norm(A)) <= 1.2 * norm


def test_lsmr_is_tried_on_depthwise_blurs_with_a_stride_and_on_small_batches_of_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    depthwise = lsconv.Conv2d(torch.randn(32, 1, 3, 3, generator=generator), (48, 48), padding=1, stride=2, groups=32)
    assert isinstance(route(depthwise, 0.1 * float(lsconv.norm(depthwise))), LsmrThenBorderPlan)
    layer = lsconv.Conv2d(torch.randn(8, 8, 3, 3, generator=generator), (24, 24), padding=1)
    plan = route(layer, 0.1 * float(lsconv.norm(layer)))
    assert isinstance(plan, LsmrThenBorderPlan)
    assert not plan.gives_way(torch.zeros(8, *layer.out_shape))
