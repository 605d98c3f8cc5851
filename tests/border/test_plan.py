"""The border method: iteration counts that hardly grow with the image, and certificates that hold."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.normal_inverse import normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.border.outer_iteration import NormalEquations, iterate_or_drop_factors
from lsconv.border.plan import BorderPlan
from lsconv.krylov.loop.certificate import Tolerances

ALLOWED = 1.2  # times the counts that were measured when the method was chosen


ITERATED = Limits(factorise=Factorise.NEVER)
WITHOUT_DENSE = Limits(factorise=Factorise.NEVER, dense_unknowns=0)


def _gauss(size: int, sigma: float) -> torch.Tensor:
    t = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-(t**2) / (2 * sigma**2))
    kernel = line[:, None] * line
    return (kernel / kernel.sum())[None, None]


def _iterations(weight: torch.Tensor, n: int, padding: int, damp: float, rtol: float, limits: Limits = ITERATED) -> int:
    A = lsconv.Conv2d(weight, (n, n), padding=padding)
    y = A(torch.randn(A.in_shape, dtype=A.dtype))
    solution = BorderPlan(A, damp, limits=limits).solve(y, rtol=rtol)
    assert solution.converged
    return int(solution.iterations)


# name: weight, image size, padding, damp relative to the largest singular value, rtol, iterations of the table
TABLE = {
    "valid 8->8 3x3": (lambda: torch.randn(8, 8, 3, 3, dtype=torch.float64), 128, 0, 0.0, 1e-6, 70),
    "valid 4->4 3x3": (lambda: torch.randn(4, 4, 3, 3, dtype=torch.float64), 64, 0, 0.0, 1e-6, 45),
    "valid 1->1 9x9": (lambda: torch.randn(1, 1, 9, 9, dtype=torch.float64), 128, 0, 0.0, 1e-6, 37),
    "valid gauss 15x15": (lambda: _gauss(15, 2.0), 256, 0, 1e-3, 1e-8, 19),
    "valid box 9x9": (lambda: torch.ones(1, 1, 9, 9, dtype=torch.float64) / 81, 256, 0, 1e-3, 1e-8, 28),
    "same 4->8 3x3": (lambda: torch.randn(8, 4, 3, 3, dtype=torch.float64), 64, 1, 1e-3, 1e-8, 35),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_iterations_stay_within_the_table(name: str) -> None:
    make, n, padding, relative, rtol, expected = TABLE[name]
    weight = make()
    norm = float(lsconv.norm(lsconv.Conv2d(weight, (n, n), padding="same", padding_mode="circular")))
    damp = relative * norm
    if not damp:
        iterations = _iterations(weight, n, padding, damp, rtol)
    else:  # the factors are exact: the table counts one solve of the border system
        A = lsconv.Conv2d(weight, (n, n), padding=padding)
        inverse = normal_inverse(Request.of(A, damp, floor=1e-10, limits=ITERATED))
        y = A(torch.randn(A.in_shape, dtype=A.dtype))
        iterations = int(inverse(y if inverse.side == "residual" else A.H(y), rtol)[1])
    assert 0 < iterations <= ALLOWED * expected


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(64, 128, 256), (64, 512)])
def test_iterations_hardly_grow_with_the_image(sizes: tuple[int, ...]) -> None:
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    counts = [_iterations(weight, n, 0, 0.0, 1e-6, WITHOUT_DENSE) for n in sizes]
    assert max(counts) < 1.5 * min(counts)


def test_iterations_hardly_grow_with_a_small_image() -> None:
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    counts = [_iterations(weight, n, 0, 0.0, 1e-6, WITHOUT_DENSE) for n in (32, 64, 128)]
    assert max(counts) < 1.5 * min(counts)


@pytest.mark.parametrize("padding", [0, 2])
def test_single_precision_reaches_its_tolerance(padding: int) -> None:
    A = lsconv.Conv2d(torch.randn(8, 8, 3, 3), (48, 48), padding=padding)
    y = torch.randn(2, *A.out_shape)
    solution = BorderPlan(A).solve(y)
    assert solution.converged.all()
    double = A.to(dtype=torch.float64)
    residual = y.double() - double(solution.x.double())
    torch.testing.assert_close(solution.residual_norm, residual.flatten(1).norm(dim=1), rtol=1e-10, atol=0)
    if padding == 0:
        assert (residual.flatten(1).norm(dim=1) <= 1e-6 * y.double().flatten(1).norm(dim=1)).all()


def test_original_question_in_small_is_the_minimum_norm_solution() -> None:
    A = lsconv.Conv2d(torch.randn(8, 8, 3, 3), (12, 12))
    x_true = torch.randn(A.in_shape)
    x = BorderPlan(A).solve(A(x_true)).x
    matrix = A.to(dtype=torch.float64).to_dense()
    exact = (torch.linalg.pinv(matrix) @ (matrix @ x_true.double().flatten())).reshape(A.in_shape)
    assert (x.double() - exact).norm() <= 1e-4 * exact.norm()
    assert x.norm() < x_true.norm()


@pytest.mark.slow
@pytest.mark.parametrize("damp", [0.0, 1e-3])
def test_an_answer_out_of_reach_is_called_that(damp: float) -> None:
    A = lsconv.Conv2d(torch.randn(4, 4, 3, 3), (40, 40), padding=1)  # square, nearly singular, single precision
    y = torch.randn(A.out_shape)
    solution = BorderPlan(A, damp).solve(y, rtol=1e-15)
    residual = y.double() - A.to(dtype=torch.float64)(solution.x.double())
    torch.testing.assert_close(solution.residual_norm, residual.norm(), rtol=1e-9, atol=0)
    # with damping the gradient at rounding excuses it; without, it is called out of reach
    assert bool(solution.converged) or solution.status.name in ("STAGNATION", "RANK_DEFICIENT", "ITERATION_LIMIT")
    if solution.converged:
        gradient = A.to(dtype=torch.float64).H(residual) - damp**2 * solution.x.double()
        # x may be so large that storing it in float32 leaves more than the data's rounding
        norm, eps = float(lsconv.norm(A)), torch.finfo(torch.float32).eps
        bound = max(1e-5 * float(y.norm()) * norm, eps * norm**2 * float(solution.x.norm()))
        assert float(gradient.norm()) <= bound, (float(gradient.norm()), bound, float(solution.x.norm()))


def test_square_operator_with_unread_phases_is_solved_without_damp() -> None:
    # as many inputs as outputs, but twice as many columns as rows per frequency: A^H A + mu would be inverted where the
    # symbol has a null space at every frequency
    weight = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = lsconv.Convolution(weight, (1, 2, 1), stride=(1, 1, 2), padding=((0, 0), (0, 1), (0, 1)))
    assert torch.linalg.cond(A.to_dense()) < 10
    x = torch.randn(A.in_shape, dtype=torch.float64)
    solution = BorderPlan(A).solve(A(x))
    assert bool(solution.converged)
    torch.testing.assert_close(solution.x, x, rtol=0, atol=1e-9)


def test_a_limit_on_the_iterations_is_no_reason_for_other_factors() -> None:
    A = lsconv.Conv2d(torch.randn(8, 8, 3, 3), (48, 48))
    plan = BorderPlan(A, limits=Limits(factorise=Factorise.AFTER_ITERATIONS))
    assert not plan.solve(torch.randn(A.out_shape), max_iter=1).converged
    assert plan.factor_dtype == torch.float32


@pytest.mark.parametrize("padding", [0, 7])
def test_float32_data_need_one_step_after_the_first(padding: int) -> None:
    # with the length of the first step from products in float32, what that leaves along its direction takes a third
    profile = torch.exp(-0.5 * ((torch.arange(15) - 7) / 2) ** 2)
    kernel = profile[:, None] * profile
    A = lsconv.Conv2d((kernel / kernel.sum())[None, None], in_size=(256, 256), padding=padding)
    y = torch.nn.functional.interpolate(torch.rand(1, 1, 16, 16), size=A.out_shape[1:], mode="nearest")[0]
    plan = BorderPlan(A, 0.1, limits=ITERATED)
    outer = iterate_or_drop_factors(
        lambda: NormalEquations(plan, y=y.double(), tolerances=Tolerances.of(torch.float32, 1e-6, 0.0))
    )
    assert bool((outer.tolerance_ratio <= 1).all())
    assert outer.steps == 2


@pytest.mark.parametrize("most", [1, 7, 12])
def test_the_limit_on_the_iterations_is_on_all_of_them(most: int) -> None:
    A = lsconv.Conv2d(_gauss(9, 2.0), (64, 64), padding=4)
    plan = BorderPlan(A, 1e-4, limits=ITERATED)
    solution = plan.solve(torch.randn(A.out_shape, dtype=torch.float64), max_iter=most)
    assert 0 < int(solution.iterations) <= most
    assert not solution.converged
