"""Small matrices behind lstsq and pinv: which operators they answer, their gradients, what callers rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.plan import BorderPlan
from lsconv.errors import ConvergenceWarning, MethodError
from lsconv.factored.kronecker import SeparablePlan
from lsconv.factored.normal_equations import NormalEquationsPlan
from lsconv.factored.patch_matrix import PatchPlan
from lsconv.fourier.circulant import FourierPlan
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.route import route
from lsconv.krylov.loop.solution import Status
from lsconv.operators.dtypes import default_rcond

F64 = torch.float64


def normal(*shape: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def blur(taps: int = 5, dtype: torch.dtype = F64) -> torch.Tensor:
    g = torch.exp(-((torch.arange(taps, dtype=F64) - taps // 2) ** 2) / 3)
    return (torch.outer(g, g) / g.sum() ** 2)[None, None].to(dtype)


def margined() -> torch.Tensor:
    return torch.nn.functional.pad(normal(2, 2, 3, 3), (2, 1, 0, 3))


CASES: dict[str, tuple[torch.Tensor, tuple[int, ...], dict[str, Any], Any]] = {
    "1x1": (normal(4, 6, 1, 1), (5, 6), {}, PatchPlan),
    "1x1 padded": (normal(6, 4, 1, 1), (5, 6), {"padding": 1}, PatchPlan),
    "patches": (normal(5, 2, 2, 2), (6, 7), {"stride": 2}, PatchPlan),
    "row blur": (normal(1, 1, 1, 3), (6, 7), {}, ReducedPlan),
    "rows of several channels": (normal(2, 3, 1, 3), (6, 7), {}, ReducedPlan),
    "columns, rows strided": (normal(3, 2, 3, 1), (6, 7), {"padding": 1, "stride": (1, 2)}, ReducedPlan),
    "blur": (blur(), (9, 8), {}, SeparablePlan),
    "blur, reflected": (blur(), (9, 8), {"padding": 2, "padding_mode": "reflect"}, SeparablePlan),
    "blur, strided": (blur(), (9, 8), {"padding": 2, "stride": 2}, SeparablePlan),
    "few unknowns": (normal(2, 1, 30), (9,), {"padding": 29}, NormalEquationsPlan),
    "few unknowns, not Toeplitz": (normal(1, 1, 12, 13), (4, 5), {"padding": (9, 12)}, NormalEquationsPlan),
    "margins, unread inputs": (margined(), (11, 10), {}, ReducedPlan),
    "margins": (margined(), (9, 9), {"padding": ((3, 3), (2, 4))}, (NormalEquationsPlan, BorderPlan, CapacitancePlan)),
}  # fmt: skip


def operator(name: str, dtype: torch.dtype = F64) -> lsconv.Convolution:
    weight, size, geometry, _ = CASES[name]
    return lsconv.Convolution(weight.to(dtype), size, **geometry)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("damp", [0.0, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_auto_takes_the_small_matrices_and_gives_the_dense_answer(name: str, damp: float, dtype: torch.dtype) -> None:
    A = operator(name, dtype)
    if not ("blur" in name and dtype == torch.float32 and damp == 0):  # a rounded kernel, which is refused there
        assert isinstance(route(A, damp), CASES[name][3])
    M = A.to(dtype=F64).to_dense()
    y = A(normal(3, *A.in_shape, dtype=dtype)) + 0.1 * normal(3, *A.out_shape, dtype=dtype)
    solution = lsconv.lstsq(A, y, damp=damp)
    if damp:
        expected = torch.linalg.solve(
            M.mT @ M + damp**2 * torch.eye(len(M.mT), dtype=F64), M.mT @ y.double().flatten(1).mT
        )
    else:
        expected = torch.linalg.pinv(M, rtol=default_rcond(dtype)) @ y.double().flatten(1).mT
    accuracy = 1e-8 if dtype == F64 else 2e-3 if damp == 0 else 1e-5
    assert solution.converged.all(), str(solution)
    torch.testing.assert_close(
        solution.x.double().flatten(1), expected.mT, rtol=0, atol=accuracy * float(expected.abs().max())
    )
    residual = (y.double().flatten(1) - solution.x.double().flatten(1) @ M.mT).norm(dim=1)
    torch.testing.assert_close(solution.residual_norm, residual, rtol=1e-4, atol=1e-5 * float(y.norm()))
    gradient = (
        y.double().flatten(1) - solution.x.double().flatten(1) @ M.mT
    ) @ M - damp**2 * solution.x.double().flatten(1)
    torch.testing.assert_close(solution.gradient_norm, gradient.norm(dim=1), rtol=1e-2, atol=1e-6 * float(y.norm()))
    if damp == 0 and solution.rank is not None:
        assert (solution.rank == torch.linalg.matrix_rank(M, rtol=default_rcond(dtype))).all()


@pytest.mark.parametrize("name", CASES)
def test_the_pseudo_inverse_and_its_adjoint_agree(name: str) -> None:
    A = operator(name)
    for damp in (0.0, 0.2):
        inverse = lsconv.pinv(A, damp=damp)
        y = normal(2, *A.out_shape)
        assert inverse.dot_test() < 1e-8
        assert inverse(y).is_contiguous()
        torch.testing.assert_close(inverse(y), lsconv.lstsq(A, y, damp=damp).x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_kernel_data_and_damp_are_those_of_finite_differences(name: str) -> None:
    weight, size, geometry, _ = CASES[name]
    A = operator(name)
    y, damp = normal(2, *A.out_shape), torch.tensor([0.3, 0.5], dtype=F64)

    def answer(weight: torch.Tensor, y: torch.Tensor, damp: torch.Tensor) -> torch.Tensor:
        return lsconv.lstsq(lsconv.Convolution(weight, size, **geometry), y, damp=damp).x

    inputs = [t.clone().requires_grad_() for t in (weight, y, damp)]
    assert torch.autograd.gradcheck(answer, inputs, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", ["1x1", "1x1 padded", "patches", "row blur", "blur", "blur, reflected"])
def test_undamped_gradients_by_the_kernel_are_those_of_the_pseudo_inverse(name: str) -> None:
    weight, size, geometry, _ = CASES[name]
    A = operator(name)
    y = normal(*A.out_shape)
    weight = weight + 0 * weight
    direction = A(normal(*A.in_shape))  # data in the range

    def dense(weight: torch.Tensor) -> torch.Tensor:
        return torch.linalg.pinv(lsconv.Convolution(weight, size, **geometry).to_dense()) @ (y + direction).flatten()

    def ours(weight: torch.Tensor) -> torch.Tensor:
        return lsconv.lstsq(lsconv.Convolution(weight, size, **geometry), y + direction).x.flatten()

    cotangent = normal(A.in_numel)
    bars = []
    for function in (dense, ours):
        own = weight.clone().requires_grad_()
        (bar,) = torch.autograd.grad(function(own) @ cotangent, own)
        bars.append(bar)
    torch.testing.assert_close(bars[1], bars[0], rtol=1e-5, atol=1e-6 * float(bars[0].abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_vmap_over_kernels_dampings_and_data(name: str) -> None:
    weight, size, geometry, _ = CASES[name]
    A = operator(name)
    weights, damps = torch.stack([weight, 2 * weight]), torch.tensor([0.2, 0.4], dtype=F64)
    data = normal(2, *A.out_shape)

    def answer(weight: torch.Tensor, damp: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return lsconv.lstsq(lsconv.Convolution(weight, size, **geometry, check_finite=False), y, damp=damp).x

    together = torch.func.vmap(answer)(weights, damps, data)
    for item in range(2):
        torch.testing.assert_close(together[item], answer(weights[item], damps[item], data[item]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_no_data_give_no_answers_and_bad_items_stay_apart(name: str) -> None:
    A = operator(name)
    assert lsconv.lstsq(A, torch.zeros(0, *A.out_shape, dtype=F64), damp=0.1).x.shape == (0, *A.in_shape)
    y = normal(2, *A.out_shape)
    bad = torch.cat([y, torch.full((1, *A.out_shape), torch.nan, dtype=F64)])
    with pytest.warns(ConvergenceWarning):
        solution = lsconv.lstsq(A, bad, damp=0.1, check_finite=False)
    assert solution.status[2] == Status.NON_FINITE
    torch.testing.assert_close(solution.x[:2], lsconv.lstsq(A, y, damp=0.1).x)


@pytest.mark.parametrize("name", ["patches", "blur"])
def test_a_plan_beyond_the_memory_limit_is_replaced_by_lsmr_with_a_warning(name: str) -> None:
    A = operator(name)
    y = normal(*A.out_shape)
    with pytest.warns(ConvergenceWarning, match="falling back to LSMR"):
        plan = route(A, 0.3, memory_limit=500)
    assert not isinstance(plan, (PatchPlan, SeparablePlan))
    with pytest.warns(ConvergenceWarning, match="falling back to LSMR"):
        x = lsconv.lstsq(A, y, damp=0.3, memory_limit=500).x
    torch.testing.assert_close(x, lsconv.lstsq(A, y, damp=0.3).x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["1x1", "row blur"])
def test_a_start_is_refused_where_it_was(name: str) -> None:
    A = operator(name)
    with pytest.raises(MethodError, match="x0"):
        lsconv.lstsq(A, normal(*A.out_shape), damp=0.1, x0=normal(*A.in_shape))


def test_a_start_is_for_lsmr_as_before() -> None:
    u = torch.tensor([0.1, 1.0, 0.2], dtype=F64)
    A = lsconv.Conv2d(torch.outer(u, u)[None, None], (6, 7), padding=1, padding_mode="reflect")
    x = normal(*A.in_shape)
    assert isinstance(route(A), SeparablePlan)
    asked: dict[str, Any] = {"x0": torch.ones_like(x), "max_iter": 3}
    with pytest.warns(ConvergenceWarning):
        expected = lsconv.lstsq(A, A(x), method="lsmr", **asked)
    with pytest.warns(ConvergenceWarning):
        found = lsconv.lstsq(A, A(x), **asked)
    torch.testing.assert_close(found.x, expected.x)
    assert int(found.iterations) == 3


def test_the_users_rcond_decides_the_rank() -> None:
    values = torch.tensor([1.0, 0.1, 1e-3], dtype=F64)
    A = lsconv.Conv2d(torch.diag(values)[:, :, None, None], (3, 3))
    B = lsconv.Conv2d(blur(), (9, 8), padding=2)
    for C, rcond in ((A, 1e-2), (B, 1e-2)):
        solution = lsconv.lstsq(C, torch.ones(C.out_shape, dtype=F64), rcond=rcond)
        M = C.to_dense()
        assert int(solution.rank) == int(torch.linalg.matrix_rank(M, rtol=rcond))
        torch.testing.assert_close(
            solution.x.flatten(), torch.linalg.pinv(M, rtol=rcond) @ torch.ones(len(M), dtype=F64)
        )


def test_circular_kernels_stay_with_fourier_and_methods_asked_for_are_kept() -> None:
    A = lsconv.Conv2d(blur(), (12, 12), padding=2, padding_mode="circular")
    assert isinstance(route(A), FourierPlan)
    B = lsconv.Conv2d(blur(), (12, 12), padding=2)
    assert isinstance(route(B, 0.1, method="border"), (BorderPlan, CapacitancePlan))
    assert isinstance(route(B, 0.1, method="lsmr"), KrylovPlan)
    assert isinstance(route(B, 0.1, method="separable"), SeparablePlan)
    assert isinstance(route(operator("1x1"), 0.1, method="matrix"), PatchPlan)


@pytest.mark.parametrize("method", ["matrix", "separable"])
def test_an_operator_without_small_matrices_is_refused_with_the_reason(method: str) -> None:
    for A in (lsconv.Dense(torch.ones(3, 3)), lsconv.Conv2d(normal(1, 1, 3, 3), (8, 8))):
        with pytest.raises(MethodError, match=method):
            route(A, 0.1, method=method)


def test_zero_margins_leave_the_methods_and_the_gradient_of_the_kernel_whole() -> None:
    wide = torch.nn.functional.pad(blur(), (4, 3, 2, 6)).requires_grad_()
    y = normal(1, 12, 12)
    A = lsconv.Conv2d(wide, (12, 12), padding=((4, 8), (6, 5)))
    assert isinstance(route(A, 0.1), SeparablePlan)
    lsconv.lstsq(A, y, damp=0.1).x.square().sum().backward()
    moved = wide.detach().clone()
    moved[0, 0, 0, 0] += 1e-6
    plain = lsconv.lstsq(A, y, damp=0.1, method="svd").x.detach().square().sum()
    other = lsconv.lstsq(lsconv.Conv2d(moved, (12, 12), padding=A.padding), y, damp=0.1, method="svd").x.square().sum()
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[0, 0, 0, 0], (other - plain) / 1e-6, rtol=1e-3, atol=1e-3)
    assert float(wide.grad[0, 0, 0, 0].abs()) > 1e-3


def test_a_folded_answer_reports_its_worst_slice() -> None:
    A = lsconv.Conv2d(normal(2, 2, 3, 1), (6, 4), padding=(1, 1))
    y = normal(2, *A.out_shape)
    solution = lsconv.lstsq(A, y)
    assert solution.converged.shape == (2,)
    assert solution.status == [Status.GRADIENT, Status.GRADIENT]  # the outputs that read nothing leave a residual
