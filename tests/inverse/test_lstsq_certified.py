"""What lstsq certifies is the shortest minimiser at some rank that its dtype can mean, by the dense decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.capacitance_plan import CapacitancePlan

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
TAPS = [1.8139713553649717, 0.9069856776824858, -1.9409493502405202, -1.2135468367391662, -0.1795831641811322]
GRADED = [
    [[-1.2763523343646849e-11, -1.814182141643405e-11], [2.49174019435959e-09, -1.2529994406634562e-09]],
    [[2.271896988858911e-08, -4.116922978990546e-08], [2.457476241061712e-06, -1.4848600697309145e-06]],
]


def wrong_items(A: lsconv.Convolution, y: Tensor) -> list[str]:
    """The converged items that are no solution for any cut of the singular values near the tolerance."""
    U, s, Vh = np.linalg.svd(A.to(dtype=torch.float64).to_dense().numpy())
    tolerance = 1e-12 if A.dtype == torch.float64 else 1e-7
    unclear = s[(s > 0) & (s < 10 * tolerance * s[0])] / s[0]
    cuts = [1e-14, tolerance / 10, tolerance, 10 * tolerance, *(unclear * 1.000001)]
    solution = lsconv.lstsq(A, y)
    faults = []
    for item, data in enumerate(y.double().flatten(1).numpy()):
        x, c = solution.x[item].double().flatten().numpy(), U.T @ data
        exact = [Vh[s > cut * s[0]].T @ (c / np.where(s > 0, s, 1))[s > cut * s[0]] for cut in cuts]
        error = min(np.linalg.norm(x - e) / np.linalg.norm(e) for e in exact)
        longer = np.linalg.norm(x) / max(np.linalg.norm(e) for e in exact)
        residual = float(solution.residual_norm[item]) / np.linalg.norm(data)
        if bool(solution.converged[item]) and error > 1e-3 and (residual > 1.001 or longer > 10):
            faults.append(f"item {item}: residual {residual:.1e} |y|, error {error:.1e}, {solution.status[item]}")
    return faults


@pytest.mark.parametrize(
    ("kernel", "size", "padding"),
    [
        (torch.tensor([[TAPS]]), 19, (3, 1)),
        (torch.tensor([[TAPS]], dtype=torch.float64), 19, (3, 1)),
        (torch.tensor(GRADED, dtype=torch.float64), 17, (1, 0)),
    ],
)
def test_size_alone_certifies_nothing(kernel: Tensor, size: int, padding: tuple[int, int]) -> None:
    A = lsconv.Convolution(kernel, (size,), padding=(padding,))
    y = torch.randn(20, len(kernel), size, generator=torch.Generator().manual_seed(0)).to(kernel.dtype)
    assert wrong_items(A, y) == []


def test_kernels_given_by_their_zeros_are_certified_where_they_are_right() -> None:
    """The zeros of the polynomials inside and outside of the unit circle make singular values fall with the size."""
    rng = np.random.default_rng(5)
    for _ in range(25):
        zeros, left = rng.choice([-0.3, 0.3, -1, 1, 1.1, -1.1, 0.5, -2, 0.9], 4), int(rng.integers(5))
        dtype, size = (torch.float32, torch.float64)[int(rng.integers(2))], int(rng.integers(10, 30))
        A = lsconv.Convolution(
            torch.tensor(np.poly(zeros)[None, None], dtype=dtype), (size,), padding=((left, 4 - left),)
        )
        y = torch.tensor(rng.standard_normal((4, 1, size)), dtype=dtype)
        assert wrong_items(A, y) == [], f"zeros {zeros.tolist()}, size {size}, padding {left}"


def test_tikhonov_without_damping_has_the_fallback_of_lstsq() -> None:
    """The direct border loses digits of this kernel, says so, and has the same fallback where it is asked for."""
    taps = [0.2388419151456991, -5.29034865931915, 10.558011910522135, -5.769231966844716, 0.26272636938637567]
    A = lsconv.Conv1d(torch.tensor([[taps]], dtype=torch.float64), 15, padding=((0, 4),))
    y = torch.randn(2, 1, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert not CapacitancePlan(A).solve(y).converged.any()
    one = lsconv.lstsq(A, y)
    assert one.converged.all()
    for other in (
        lsconv.tikhonov(A, y, damp=0.0),
        lsconv.tikhonov(A, y, damp=0.0, method="border"),
        lsconv.lstsq(A, y, method="border"),
    ):
        assert other.converged.all()
        torch.testing.assert_close(other.x, one.x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(lsconv.pinv(A, method="border")(y), one.x, rtol=1e-8, atol=1e-8)


def deficient(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, 4), (4, columns)))
    return left @ right


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("damp", [1e-9, 1e-7])
def test_a_start_in_the_null_space_is_not_certified_at_tiny_damping(method: str, damp: float) -> None:
    matrix = deficient(9, 7)
    null = torch.linalg.svd(matrix).Vh[-1]
    y = torch.ones(9, dtype=torch.float64)
    run = getattr(lsconv, method)
    exact = torch.linalg.pinv(matrix, rtol=1e-12) @ y
    for start in (null, exact + null):
        solution = run(matrix, y, damp=damp, x0=start)
        error = float((solution.x - exact).norm() / exact.norm())
        assert not bool(solution.converged) or error < 1e-6
    clean = run(matrix, y, damp=damp)
    assert bool(clean.converged)
    torch.testing.assert_close(clean.x, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
def test_a_start_is_certified_where_there_is_no_null_space(method: str) -> None:
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.ones(9, dtype=torch.float64)
    solution = getattr(lsconv, method)(matrix, y, damp=1e-8, x0=torch.ones(5, dtype=torch.float64))
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x, torch.linalg.pinv(matrix) @ y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
def test_an_answer_that_a_preconditioner_takes_out_of_the_range_is_brought_back_at_tiny_damping(method: str) -> None:
    matrix, tall = deficient(9, 7), torch.randn(9, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    N = lsconv.Diagonal(torch.logspace(-1, 1, 7, dtype=torch.float64))
    y = torch.ones(9, dtype=torch.float64)
    for A in (matrix, tall):
        solution = lsconv.lstsq(A, y, damp=1e-9, method=method, preconditioner=N)
        exact = torch.linalg.pinv(A, rtol=1e-12) @ y
        assert bool(solution.converged)
        torch.testing.assert_close(solution.x, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels", [(3, 2), (2, 2), (2, 3)])
def test_craig_takes_the_circulant_preconditioner_with_damping(channels: tuple[int, int]) -> None:
    weight = torch.randn(*channels, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = lsconv.Conv1d(weight, 12, padding=1)
    y = torch.randn(channels[0], 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = lsconv.lstsq(A, y, damp=0.1, method="craig", preconditioner="circulant", rtol=1e-10)
    matrix = A.to_dense()
    normal = matrix.mT @ matrix + 0.01 * torch.eye(A.in_numel, dtype=torch.float64)
    exact = torch.linalg.solve(normal, matrix.mT @ y.flatten()).reshape(A.in_shape)
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x, exact, rtol=1e-7, atol=1e-7)
