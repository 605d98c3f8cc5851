"""The certificate of total_variation and plug_and_play: recomputed, independent of the method, and not to be fooled."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.inverse.admm.optimality import optimality
from lsconv.inverse.admm.proximal import gaussian_term, sparsity_term
from lsconv.inverse.plug_and_play import equilibrium
from tests.inverse.admm.denoising import DOUBLE, WEIGHT, certificate, objective, optimum, problem


def test_the_optimum_of_another_method_is_certified() -> None:
    A, y = problem()
    x, q = optimum()
    assert bool(certificate(A, y, x, q).met(1e-5))


@pytest.mark.parametrize("wrong", ["shifted", "scaled", "noisy", "zero", "data", "without a dual variable"])
def test_a_wrong_answer_is_not_certified(wrong: str) -> None:
    """Whatever dual variable comes with it: that of the optimum, which is the best there is."""
    A, y = problem()
    x, q = optimum()
    if wrong == "shifted":
        x = x + 0.01
    elif wrong == "scaled":
        x = 1.01 * x
    elif wrong == "noisy":
        x = x + 1e-3 * torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    elif wrong == "zero":
        x = torch.zeros_like(x)
    elif wrong == "data":
        x = lsconv.lstsq(A, y).x
    else:
        q = torch.zeros_like(q)
    assert not bool(certificate(A, y, x, q).met(1e-3))


def test_the_certificate_bounds_the_distance_of_the_objective() -> None:
    """F(x) - F(x*) <= c + <s, x - x*> for every x and every dual variable, also ones outside the dual ball."""
    A, y = problem()
    best, _ = optimum()
    least = objective(A, y, best)
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = best + 10.0 ** (-(seed % 4)) * torch.randn(best.shape, dtype=DOUBLE, generator=generator)
        q = 0.1 * torch.randn(2, *best.shape, dtype=DOUBLE, generator=generator)
        found = certificate(A, y, x, q)
        assert float(found.objective) == pytest.approx(objective(A, y, x), rel=1e-12)
        gap = found.complementarity * found.objective + found.gradient_norm * (x - best).norm()
        assert objective(A, y, x) - least <= float(gap) * (1 + 1e-9)


def test_bounds_hold_a_force_only_where_they_are_reached() -> None:
    """Min (x - 2)^2 / 2 + (x - 1/2)^2 / 2 with x <= 1: the first entry is held, the second must be free."""
    A = lsconv.Identity((2,), dtype=DOUBLE)
    terms, duals = [gaussian_term(A, torch.tensor([2.0, 0.5], dtype=DOUBLE))], [torch.zeros(2, dtype=DOUBLE)]

    def to_solution(*x: float):
        return optimality(terms, duals, torch.tensor(x, dtype=DOUBLE), bounds=(0, 1), norms=[1.0], rounding=1e-16)

    assert bool(to_solution(1.0, 0.5).met(1e-9))
    assert not bool(to_solution(0.9, 0.5).met(1e-2))
    assert not bool(to_solution(1.0, 1.0).met(1e-2))


def test_the_certificate_does_not_depend_on_units() -> None:
    A, y = problem()
    x, q = optimum(300)
    once = certificate(A, y, x, q)
    large = optimality(
        [gaussian_term(A, 1e6 * y), sparsity_term(lsconv.Gradient(A.in_shape, dtype=DOUBLE),
                                                  torch.tensor(1e6 * WEIGHT, dtype=DOUBLE), (0, 1))],
        [torch.zeros_like(y), 1e6 * q], 1e6 * x, norms=[1.0, 3.0], rounding=1e-16,
    )  # fmt: skip
    torch.testing.assert_close(large.stationarity, once.stationarity)
    torch.testing.assert_close(large.complementarity, once.complementarity)


def test_the_fixed_point_residual_of_a_linear_denoiser() -> None:
    """With the denoiser v -> c v the equilibrium is linear, and the residual of any x known."""
    A, y = problem()
    rho, c = torch.tensor(0.5, dtype=DOUBLE), 0.8
    matrix = A.to_dense()
    # x = c (x + A^H (y - A x) / rho)
    left = (1 - c) * torch.eye(A.in_numel, dtype=DOUBLE) + c / rho * matrix.mT @ matrix
    exact = torch.linalg.solve(left, c / rho * matrix.mT @ y.flatten())
    for x in (exact, exact + 0.01, torch.ones_like(exact)):
        found = equilibrium(A, y, lambda v: c * v, rho, x.reshape(A.in_shape), [])
        residual = float((left @ (x - exact)).norm())
        assert float(found.gradient_norm) == pytest.approx(float(rho) * residual, abs=1e-12)
    solution = lsconv.plug_and_play(A, y, lambda v: c * v, 0.5, rtol=1e-7, max_iter=500)
    torch.testing.assert_close(solution.x.flatten(), exact, rtol=0, atol=1e-6)
