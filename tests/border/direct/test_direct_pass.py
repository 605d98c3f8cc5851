"""The border solved by factors, against dense algebra."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.direct import schur_complement
from lsconv.border.direct.direct_pass import DirectInverse
from lsconv.border.normal_inverse import BorderInverse, normal_inverse
from lsconv.border.normal_problem import NormalProblem, Request
from lsconv.border.plan import BorderPlan
from lsconv.border.stacked_plan import StackedPlan
from lsconv.krylov.loop.solution import Status

F64 = torch.float64
AT_ONCE = Limits(factorise=Factorise.AT_ONCE)


def direct_of(A: lsconv.Convolution, damp: Tensor) -> DirectInverse:
    side = normal_inverse(Request.of(A, damp, floor=1e-13)).side
    return DirectInverse(NormalProblem(Request(A, damp, 0.0, side=side)))


def drawn(seed: int) -> tuple[lsconv.Convolution, Tensor]:
    """A small problem of any shape: kernels up to the image's size, odd and even, strides, groups, batches."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    ndim = pick.choice([1, 2, 2, 2])
    size = tuple(pick.choice([1, 2, 3, 5, 6, 8, 9, 12, 13, 20]) for _ in range(ndim))
    groups = pick.choice([1, 1, 2])
    c_in, c_out = (groups * pick.choice([1, 1, 2, 3]) for _ in range(2))
    if pick.random() < 0.5:
        c_in = c_out = groups = 1
    taps = tuple(pick.randint(1, min(n, 7)) for n in size)
    stride, dilation = (tuple(pick.choice(steps) for _ in size) for steps in ([1, 1, 1, 2, 3], [1, 1, 2]))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    padding = pick.choice([
        tuple((0, 0) for _ in size), tuple((pick.randint(0, 3), pick.randint(0, 3)) for _ in size),
        tuple((e // 2, e // 2) for e in extent), tuple((e - 1, e - 1) for e in extent),
    ])  # fmt: skip
    dtype = pick.choice([F64, F64, F64, torch.complex128])
    lead = pick.choice([(), (), (2,)])
    weight = torch.randn(*lead, c_out, c_in // groups, *taps, dtype=dtype)
    if pick.random() < 0.4:
        for a in range(ndim):
            weight = weight + weight.flip(-1 - a)
    weight = weight / weight.abs().sum().clamp_min(1e-3)
    if any(n + sum(p) < e for n, p, e in zip(size, padding, extent, strict=True)):
        return drawn(seed + 10**6)
    A = lsconv.Convolution(weight, size, stride=stride, padding=padding, dilation=dilation, groups=groups)
    damp = pick.choice([1.0, 0.3, 0.1, 0.03])
    return A, torch.tensor(damp, dtype=F64) if lead or pick.random() < 0.7 else torch.tensor(
        [damp, 2 * damp], dtype=F64
    )


def agrees(found: Tensor, expected: Tensor, condition: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * condition**2 * scale + 1e-14)


@pytest.mark.parametrize(
    "start", [pytest.param(n, marks=[pytest.mark.slow] if n > 0 else []) for n in range(0, 600, 60)]
)
def test_solution_dual_and_normal_are_those_of_dense_algebra(start: int) -> None:
    for seed in range(start, start + 60):
        A, damp = drawn(seed)
        inverse, dense = direct_of(A, damp), A.to_dense()
        batch, n = (3, *inverse.embedding.batch_shape), A.ndim + 1
        y, v = (torch.randn(*batch, *shape, dtype=A.dtype) for shape in (A.out_shape, A.in_shape))
        mu = (damp**2).reshape(*damp.shape, 1, 1)
        gram = dense.mH @ dense + mu * torch.eye(A.in_numel, dtype=A.dtype)
        condition = float(torch.linalg.cond(gram).max()) ** 0.5 / min(1.0, float(damp.min()))
        x = torch.linalg.solve(gram, dense.mH @ y.flatten(-n)[..., None])[..., 0]
        agrees(inverse.solution(y).flatten(-n), x, condition)
        by_dual = (dense @ torch.linalg.solve(gram, v.flatten(-n)[..., None]))[..., 0]
        agrees(inverse.dual(v).flatten(-n), by_dual, condition)
        if inverse.side == "residual":
            gram, f = dense @ dense.mH + mu * torch.eye(A.out_numel, dtype=A.dtype), y
        elif inverse.embedding.observed_inputs() is not None:
            continue  # the grid has no inputs that no output reads
        else:
            f = v
        agrees(inverse.normal(f).flatten(-n), torch.linalg.solve(gram, f.flatten(-n)[..., None])[..., 0], condition)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("padding", [0, "same"])
@pytest.mark.parametrize("size", [(8, 160), (160, 8), (31, 37), (30, 40)])
@pytest.mark.parametrize("taps", [(4, 7), (5, 5), (1, 6), (6, 1), (8, 8)])
def test_any_aspect_and_length_is_certified_after_one_pass(
    taps: tuple[int, int],
    size: tuple[int, int],
    padding: int | str,
    dtype: torch.dtype,
) -> None:
    weight = torch.rand(1, 1, *taps, dtype=dtype)
    both = 0 if padding == 0 else tuple(k // 2 for k in taps)
    A = lsconv.Conv2d(weight / weight.sum(), size, padding=both)
    solution = (plan := BorderPlan(A, 0.05, limits=AT_ONCE)).solve(torch.randn(2, *A.out_shape, dtype=dtype))
    assert isinstance(plan.inverse.direct, DirectInverse)
    assert solution.converged.all()
    assert not solution.iterations.any()


@pytest.mark.parametrize("padding", [0, "same", "full"])
@pytest.mark.parametrize(
    ("size", "taps"), [((400,), (130,)), ((70, 60), (55, 3)), ((70, 60), (3, 52)), ((64, 64), (51, 50))]
)
def test_wide_borders_are_read_by_transforms(size: tuple[int, ...], taps: tuple[int, ...], padding: int | str) -> None:
    torch.manual_seed(0)
    weight = torch.rand(1, 1, *taps, dtype=F64)
    both = {"same": tuple(k // 2 for k in taps), "full": tuple(k - 1 for k in taps)}.get(str(padding), 0)
    A = lsconv.Convolution(weight / weight.sum(), size, padding=both)
    inverse, y = direct_of(A, torch.tensor(0.1, dtype=F64)), torch.randn(2, *A.out_shape, dtype=F64)
    x = inverse.solution(y)
    gradient = A.adjoint(y - A(x)) - 0.01 * x
    assert float(gradient.norm()) <= 1e-11 * float(A.adjoint(y).norm())


@pytest.mark.parametrize("channels, even", [(1, False), (1, True), (3, False)])
def test_couplings_of_some_frequencies_at_a_time_are_those_of_all(
    channels: int, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(channels, channels, 3, 5, dtype=F64)
    weight = weight + weight.flip(-1) + weight.flip(-2) + weight.flip(-1, -2) if even else weight
    A = lsconv.Conv2d(weight / weight.abs().sum(), (12, 9), padding=(1, 2))
    y, damp = torch.randn(A.out_shape, dtype=F64), torch.tensor(0.1, dtype=F64)
    at_once = direct_of(A, damp)
    assert at_once.form == "saddle"
    monkeypatch.setattr(schur_complement, "WORK_BYTES", 1)
    torch.testing.assert_close(direct_of(A, damp).solution(y), at_once.solution(y), rtol=0, atol=1e-12)


def test_no_table_of_a_long_signal_is_as_long_as_its_square() -> None:
    A = lsconv.Conv1d(torch.rand(1, 1, 5, dtype=F64), in_size=20_000)
    with torch.profiler.profile(profile_memory=True) as profile:
        assert BorderPlan(A, 0.1).solve(torch.randn(A.out_shape, dtype=F64)).converged
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 2**29


def test_the_side_that_is_left_for_last_is_the_shorter_one() -> None:
    weight = torch.rand(1, 1, 5, 5, dtype=F64)
    sizes = [
        direct_of(lsconv.Conv2d(weight, size), torch.tensor(0.1, dtype=F64))._border.schur.size  # type: ignore[union-attr]
        for size in ((16, 100), (100, 16))
    ]
    assert sizes[0] == sizes[1] == 4 * 12


@pytest.mark.parametrize("boundary", ["neumann", "dirichlet"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(17, 12), (11, 38)])
def test_penalties_take_the_same_way(size: tuple[int, int], padding: int, boundary: str) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 4, dtype=F64), size, padding=padding)
    L = lsconv.Gradient(A.in_shape, ndim=2, boundary=boundary, dtype=F64)
    prior, y = torch.randn(A.in_shape, dtype=F64), torch.randn(3, *A.out_shape, dtype=F64)
    plan = StackedPlan(A, L, 0.3, limits=AT_ONCE)
    solution = plan.solve(y, x_prior=prior)
    assert isinstance(plan.inverse.direct, DirectInverse)
    assert solution.converged.all()
    assert not solution.iterations.any()
    K, D = A.to_dense(), L.to_dense()
    normal = K.mT @ K + 0.09 * D.mT @ D
    x = torch.linalg.solve(normal, (y.flatten(1) - K @ prior.flatten()) @ K, left=False) + prior.flatten()
    torch.testing.assert_close(solution.x.flatten(1), x, rtol=0, atol=1e-9)
    g = torch.randn(A.in_shape, dtype=F64)
    torch.testing.assert_close(
        plan.normal_solve(g).flatten(), torch.linalg.solve(normal, g.flatten()), rtol=0, atol=1e-8
    )


def damaged(by: Tensor) -> tuple[BorderPlan, lsconv.Convolution]:
    """A plan whose factors are multiplied by these numbers."""
    A = lsconv.Conv2d(torch.rand(1, 1, 5, 5, dtype=F64), (24, 24))
    plan = BorderPlan(A, 0.5, limits=AT_ONCE)
    plan.inverse.factorise_if_cheaper(())
    assert isinstance(plan.inverse.direct, DirectInverse)
    assert isinstance(plan.inverse, BorderInverse)
    plan.inverse.inverse = plan.inverse.Q = plan.inverse.inverse.map(Tensor.clone)  # those of the iteration
    plan.inverse.direct._P.matrices.mul_(by)
    return plan, A


def test_factors_that_have_lost_too_many_digits_give_way_to_the_iteration() -> None:
    plan, A = damaged(torch.randn(24, 13, 1, 1, dtype=F64))
    solution = plan.solve(torch.randn(2, *A.out_shape, dtype=F64))
    assert plan.inverse.direct is None
    assert solution.converged.all()
    assert solution.iterations.all()


def test_an_inexact_pass_is_made_exact_by_the_outer_iteration() -> None:
    plan, A = damaged(1 + 1e-3 * torch.rand(24, 13, 1, 1, dtype=F64))
    solution = plan.solve(torch.randn(2, *A.out_shape, dtype=F64))
    assert isinstance(plan.inverse.direct, DirectInverse)
    assert solution.converged.all()


def test_bare_answers_of_imprecise_factors_are_iterated_for() -> None:
    plan, A = damaged(1 + 1e-3 * torch.rand(24, 13, 1, 1, dtype=F64))
    y = torch.randn(A.out_shape, dtype=F64)
    direct = plan.inverse.direct
    expected = BorderPlan(A, 0.5, limits=AT_ONCE).apply(y)
    assert isinstance(direct, DirectInverse)
    assert float((direct.solution(y / 1.0) / plan.unit - expected).abs().max()) > 1e-6
    torch.testing.assert_close(plan.apply(y), expected, rtol=1e-8, atol=1e-8)


def test_nan_in_one_item_leaves_the_others_alone() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=F64), (16, 16))
    y = torch.randn(3, *A.out_shape, dtype=F64)
    y[1, 0, 0, 0] = math.nan
    solution = BorderPlan(A, 0.5, limits=AT_ONCE).solve(y)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.status[1] == Status.NON_FINITE


def test_logarithms_of_determinants_come_with_the_factors() -> None:
    for seed in range(100, 200):
        A, damp = drawn(seed)
        inverse, dense = direct_of(A, damp), A.to_dense()
        residual = inverse.side == "residual"
        gram = dense @ dense.mH if residual else dense.mH @ dense
        mu = (damp**2).reshape(*damp.shape, 1, 1)
        expected = torch.linalg.slogdet(gram + mu * torch.eye(gram.shape[-1], dtype=A.dtype))[1]
        batch = inverse.embedding.batch_shape
        torch.testing.assert_close(inverse.logdet(), expected.expand(batch), rtol=1e-9, atol=1e-9)
