"""The certificate of total_variation and plug_and_play: recomputed, independent of the method, and not to be fooled."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse import plug_and_play as plug_and_play_module
from lsconv.inverse.admm import sparse_problem
from lsconv.inverse.admm.optimality import optimality
from lsconv.inverse.admm.proximal import Term, gaussian_term, poisson_term, sparsity_term
from lsconv.inverse.plug_and_play import equilibrium

DOUBLE = torch.float64
WEIGHT = 0.05


def problem() -> tuple[lsconv.Convolution, Tensor]:
    generator = torch.Generator().manual_seed(5)
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=DOUBLE, generator=generator) / 5, (8, 9))
    x = torch.zeros(1, 8, 9, dtype=DOUBLE)
    x[:, 2:6, 3:7] = 1
    return A, A(x) + 0.03 * torch.randn(A.out_shape, dtype=DOUBLE, generator=generator)


def total_variation_terms(A: lsconv.Convolution, y: Tensor, huber: float = 0.0) -> list[Term]:
    weight = torch.tensor(WEIGHT, dtype=DOUBLE)
    return [gaussian_term(A, y), sparsity_term(lsconv.Gradient(A.in_shape, dtype=DOUBLE), weight, (0, 1), huber)]


@functools.cache
def optimum(steps: int = 6000) -> tuple[Tensor, Tensor]:
    """The minimiser and the dual variable of the differences, by the method of Chambolle and Pock on matrices."""
    A, y = problem()
    matrix, G = A.to_dense(), lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
    step = 0.99 / torch.linalg.matrix_norm(torch.cat([matrix, G]), 2)
    x = bar = torch.zeros(A.in_numel, dtype=DOUBLE)
    p, q = torch.zeros(A.out_numel, dtype=DOUBLE), torch.zeros(2 * A.in_numel, dtype=DOUBLE)
    for _ in range(steps):
        p = (p + step * (matrix @ bar - y.flatten())) / (1 + step)
        q = (q + step * (G @ bar)).reshape(2, -1)
        q = (q / (q.norm(dim=0) / WEIGHT).clamp_min(1)).flatten()
        new = x - step * (matrix.mT @ p + G.mT @ q)
        bar, x = 2 * new - x, new
    return x.reshape(A.in_shape), q.reshape(2, *A.in_shape)


def objective(A: lsconv.Convolution, y: Tensor, x: Tensor) -> float:
    gradient = lsconv.Gradient(A.in_shape, dtype=DOUBLE)(x)
    return float(0.5 * (A(x) - y).square().sum() + WEIGHT * torch.linalg.vector_norm(gradient, dim=0).sum())


def certificate(A: lsconv.Convolution, y: Tensor, x: Tensor, q: Tensor, bounds=None):
    return optimality(
        total_variation_terms(A, y), [torch.zeros_like(y), q], x, bounds=bounds, norms=[1.0, 3.0], rounding=1e-16
    )


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


def term_of(kind: str, L: lsconv.Identity, data: Tensor) -> Term:
    weight = torch.tensor(0.7, dtype=DOUBLE)
    return {
        "gaussian": gaussian_term(L, data),
        "sparsity": sparsity_term(L, weight, (0,)),
        "huber": sparsity_term(L, weight, (0,), 0.5),
        "poisson": poisson_term(L, data, 0.3),
    }[kind]


@pytest.mark.parametrize("kind", ["sparsity", "huber", "poisson"])
def test_fenchel_young_gaps_are_never_negative_and_vanish_at_the_subgradient(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    L = lsconv.Identity((2, 1, 4, 4), dtype=DOUBLE)
    counts = torch.poisson(3 * torch.rand(L.out_shape, dtype=DOUBLE, generator=generator))
    term = term_of(kind, L, counts)
    v = torch.rand(L.out_shape, dtype=DOUBLE, generator=generator).requires_grad_()
    (subgradient,) = torch.autograd.grad(term.value(v), v)
    assert float(term.gap(v.detach(), term.dual(subgradient, v.detach()))) == pytest.approx(0, abs=1e-12)
    for _ in range(20):
        p = term.dual(torch.randn(L.out_shape, dtype=DOUBLE, generator=generator), v.detach())
        assert float(term.gap(v.detach(), p)) > 1e-3


@pytest.mark.parametrize("kind", ["gaussian", "sparsity", "huber", "poisson"])
def test_proximal_steps_minimise(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    L = lsconv.Identity((2, 1, 3, 3), dtype=DOUBLE)
    data = torch.poisson(3 * torch.rand(L.out_shape, dtype=DOUBLE, generator=generator))
    term = term_of(kind, L, data)
    v = torch.randn(L.out_shape, dtype=DOUBLE, generator=generator)
    rho = torch.tensor(1.3, dtype=DOUBLE)
    z = torch.empty_like(v)
    term.prox(v, rho.reshape(1, 1, 1, 1), z)

    def value(z: Tensor) -> float:
        return float(term.value(z) + rho / 2 * (z - v).square().sum())

    for _ in range(50):
        other = z + 10 ** float(-4 * torch.rand((), generator=generator)) * torch.randn(
            v.shape, dtype=DOUBLE, generator=generator
        )
        assert (kind == "poisson" and bool((other < -0.3).any())) or value(other) > value(z)


def test_an_answer_that_was_tampered_with_is_not_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the iteration believes of itself counts for nothing."""
    A, y = problem()

    def tampered(module, **changes):
        original = module.admm

        def admm(*args, **options):
            result = original(*args, **options)
            object.__setattr__(result, "x", 1.05 * result.x)
            return result

        monkeypatch.setattr(module, "admm", admm)

    assert bool(lsconv.total_variation(A, y, WEIGHT).converged)
    assert bool(lsconv.plug_and_play(A, y, lambda v: 0.8 * v, 0.5).converged)
    tampered(sparse_problem)
    tampered(plug_and_play_module)
    with pytest.warns(lsconv.ConvergenceWarning):
        assert not bool(lsconv.total_variation(A, y, WEIGHT).converged)
    with pytest.warns(lsconv.ConvergenceWarning):
        assert not bool(lsconv.plug_and_play(A, y, lambda v: 0.8 * v, 0.5).converged)


def test_what_is_reported_is_what_a_dense_computation_finds() -> None:
    """The residual, and with a smooth penalty (Huber, everywhere below its threshold) the gradient too."""
    A, y = problem()
    huber = 100.0
    solution = lsconv.total_variation(A, y, WEIGHT, huber=huber, rtol=1e-4)
    x, matrix = solution.x.flatten(), A.to_dense()
    G = lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
    left = matrix.mT @ (matrix @ x - y.flatten()) + WEIGHT / huber * (G.mT @ (G @ x))
    assert float(solution.residual_norm) == pytest.approx(float((matrix @ x - y.flatten()).norm()), rel=1e-12)
    assert float(left.norm()) <= 2e-3 * float((matrix.mT @ y.flatten()).norm())
    exact = torch.linalg.solve(matrix.mT @ matrix + WEIGHT / huber * G.mT @ G, matrix.mT @ y.flatten())
    assert float((x - exact).norm()) <= 2e-2 * float(exact.norm())


def test_an_iteration_limit_is_no_convergence() -> None:
    A, y = problem()
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = lsconv.total_variation(A, y, WEIGHT, rtol=1e-6, max_iter=5)
    assert not bool(solution.converged)
    assert solution.status is lsconv.Status.ITERATION_LIMIT
    assert int(solution.iterations) == 5


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
