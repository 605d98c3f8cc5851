"""Reflect and replicate padding through the border, against dense algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lsconv
from lsconv import psf
from lsconv.border.cost_model import Limits
from lsconv.border.normal_inverse import normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.plan import BorderPlan
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.route import route
from lsconv.krylov.loop.solution import Status
from tests.oracles import dense_tikhonov

MODES = ("reflect", "replicate")


@st.composite
def _problems(draw: Any) -> tuple[lsconv.Convolution, Any]:
    ndim = draw(st.sampled_from([1, 2, 2, 2, 3]))
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.complex128]))
    mode, groups = draw(st.sampled_from(MODES)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 4)) for _ in range(ndim)]
    dilation = [draw(st.integers(1, 2)) for _ in range(ndim)]
    size = [draw(st.integers(2, (14, 9, 5)[ndim - 1])) for _ in range(ndim)]
    padding = [(draw(st.integers(0, n - 1)), draw(st.integers(0, n - 1))) for n in size]
    padding = [
        (min(left, 3), max(min(right, 3), d * (k - 1) + 1 - n - min(left, 3)))
        for (left, right), n, k, d in zip(padding, size, kernel, dilation, strict=True)
    ]
    if mode == "reflect":
        size = [max(n, left + 1, right + 1) for n, (left, right) in zip(size, padding, strict=True)]
    batch = draw(st.sampled_from([(), (), (2,)]))
    channels = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(*batch, groups * channels[0], channels[1], *kernel, dtype=dtype, generator=seed)
    A = lsconv.Convolution(weight, size, padding=padding, dilation=dilation, groups=groups, padding_mode=mode)
    scale = float(weight.abs().sum())
    damp = draw(st.sampled_from([0.03, 0.2, 1.0])) * scale
    return A, torch.tensor([damp, 2 * damp], dtype=torch.float64) if draw(st.booleans()) else damp


@settings(max_examples=20)
@given(problem=_problems(), corners=st.booleans())
def test_answers_are_those_of_dense_algebra(problem: Any, corners: bool) -> None:
    A, damp = problem
    # as on a large image, whose border is not one dense matrix
    plan = BorderPlan(A, damp, limits=Limits(dense_unknowns=0) if corners else None)
    y = torch.randn(3, 2, *A.out_shape, dtype=A.dtype)
    solution = plan.solve(y)
    assert solution.converged.all()
    expected = dense_tikhonov(A, y, damp)
    scale = expected.flatten(-A.ndim - 1).norm(dim=-1).amax().clamp_min(1e-300)
    assert float((solution.x - expected).abs().max()) <= 1e-8 * float(scale)
    # <A^+ y, v> = <y, (A^+)^H v>
    v = torch.randn(3, 2, *A.in_shape, dtype=A.dtype)
    left = (plan.apply(y).conj() * v).sum()
    right = (y.conj() * plan.adjoint(v)).sum()
    torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-7 * float(scale) * float(v.norm()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damp", [1e-1, 1e-3])
def test_a_blur_takes_few_iterations_whatever_the_size(mode: str, damp: float) -> None:
    profile = torch.exp(-0.5 * ((torch.arange(9, dtype=torch.float64) - 4) / 1.5) ** 2)
    kernel = (profile[:, None] * profile)[None, None] / profile.sum() ** 2
    counts = []
    for size in (48, 144):
        A = lsconv.Conv2d(kernel, in_size=(size, size), padding=4, padding_mode=mode)
        solution = BorderPlan(A, damp).solve(torch.randn(A.out_shape, dtype=torch.float64), rtol=1e-8)
        assert solution.converged.all()
        counts.append(int(solution.iterations))
    assert counts[1] <= 1.5 * counts[0] + 10
    assert counts[1] <= {1e-1: 60, 1e-3: 250}[damp]


@pytest.mark.parametrize("mode", MODES)
def test_float32(mode: str) -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, in_size=(70, 60), padding=2, padding_mode=mode)
    y = torch.randn(4, *A.out_shape)
    solution = BorderPlan(A, 0.05).solve(y)
    assert solution.converged.all()
    assert solution.x.dtype == torch.float32
    exact = BorderPlan(A.to(dtype=torch.float64), 0.05).solve(y.double()).x
    torch.testing.assert_close(solution.x.double(), exact, rtol=0, atol=2e-5 * float(exact.abs().max()))


def test_the_route_takes_it_with_damping_and_lsmr_without() -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3), in_size=(20, 20), padding=1, padding_mode="reflect")
    assert isinstance(route(A, 0.1), BorderPlan)
    assert isinstance(route(A, 0.0), KrylovPlan)
    assert isinstance(route(A, torch.tensor([0.0, 0.1])), KrylovPlan)
    with pytest.raises(MethodError, match="needs damp > 0"):
        route(A, 0.0, method="border")
    volume = lsconv.Conv3d(torch.randn(1, 1, 3, 3, 3), in_size=(9, 9, 9), padding=1, padding_mode="reflect")
    assert isinstance(route(volume, 0.1), KrylovPlan)
    assert isinstance(route(volume, 0.1, method="border"), BorderPlan)
    strided = lsconv.Conv2d(torch.randn(2, 2, 3, 3), in_size=(20, 20), padding=1, stride=2, padding_mode="reflect")
    assert isinstance(route(strided, 0.1), KrylovPlan)
    with pytest.raises(MethodError, match="of stride 1"):
        BorderPlan(strided, 0.1)
    with pytest.raises(PlanMemoryError, match="bytes"):
        BorderPlan(A, 0.1, memory_limit=1000)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode: str) -> None:
    weight = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 7, 6, dtype=torch.float64, requires_grad=True)
    damp = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def solve(weight: torch.Tensor, y: torch.Tensor, damp: torch.Tensor) -> torch.Tensor:
        A = lsconv.Conv2d(weight, in_size=(7, 6), padding=1, padding_mode=mode)
        return lsconv.lstsq(A, y, damp=damp, rtol=1e-12).x

    assert torch.autograd.gradcheck(solve, (weight, y, damp), rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_of_the_norm_holds(mode: str) -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 5, 5, dtype=torch.float64), in_size=(9, 8), padding=2, padding_mode=mode)
    inverse = normal_inverse(Request.of(A, 1.0, floor=1e-13))
    largest = float(torch.linalg.matrix_norm(A.to_dense(), 2))
    assert largest <= float(inverse.norm_bound) <= 5 * largest


@pytest.mark.slow
@pytest.mark.parametrize("damp", [1e-3, 1e-4])
def test_an_iteration_that_stagnates_goes_over_to_factors(damp: float) -> None:
    """Its restarts no longer gain a digit, and the certificate would refuse what they leave."""
    A = lsconv.Conv2d(psf.disk(4.0)[None, None], (96, 96), padding=4, padding_mode="reflect")
    y = A(torch.rand(A.in_shape, dtype=torch.float64)) + 0.01 * torch.randn(A.out_shape, dtype=torch.float64)
    solution = lsconv.lstsq(A, y, damp=damp)
    assert solution.status is Status.GRADIENT
    assert int(solution.iterations) <= 400
