"""hybrid: the damping it chooses, and that its x solves the problem with that damping."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ArgumentError, ConvergenceWarning
from lsconv.krylov.hybrid import Projected, hybrid
from lsconv.krylov.loop.solution import Status
from lsconv.krylov.lsqr import lsqr

NOISE = 1e-3


def blur(dtype: torch.dtype = torch.float64, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An ill-posed problem: Gaussian blur of smooth signals, with noise."""
    g = torch.Generator().manual_seed(0)
    i = torch.arange(60, dtype=torch.float64)
    A = torch.exp(-((i[:, None] - i) ** 2) / 18) / 7.5
    x = torch.stack([torch.sin((k + 2) * i / 15) + 1 for k in range(batch)])
    b = x @ A.T + NOISE * torch.randn(batch, 60, generator=g, dtype=torch.float64)
    return A.to(dtype), b.to(dtype), x.to(dtype)


def damped(A: torch.Tensor, b: torch.Tensor, damp: torch.Tensor) -> torch.Tensor:
    A, b = A.double(), b.double()
    return torch.stack(
        [torch.linalg.solve(A.T @ A + d**2 * torch.eye(A.shape[1]), A.T @ r) for d, r in zip(damp, b, strict=True)]
    )


@pytest.mark.parametrize("rule", ["gcv", "discrepancy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_x_solves_the_problem_with_the_chosen_damp(rule: str, dtype: torch.dtype) -> None:
    A, b, _ = blur(dtype)
    solution = hybrid(A, b, rule=rule, noise_std=NOISE)
    assert solution.converged.all()
    assert (solution.damp > 0).all()
    expected = damped(A, b, solution.damp)
    assert float((solution.x - expected).norm() / expected.norm()) < 1e-2
    assert solution.selection.rule == rule


@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.complex128]),
    batch=st.sampled_from([(), (3,), (2, 2)]),
    rule=st.sampled_from(["gcv", "discrepancy"]),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")
def test_any_answer_is_that_of_dense_linear_algebra_at_its_damp(
    m: int, n: int, rank: int, dtype: torch.dtype, batch: tuple[int, ...], rule: str, seed: int
) -> None:
    """Whatever the damping: tall, square, wide, rank-deficient, one by one."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    A = torch.randn(m, min(m, n, rank), generator=g, dtype=wide) @ torch.randn(
        min(m, n, rank), n, generator=g, dtype=wide
    )
    b = torch.randn(*batch, m, generator=g, dtype=wide)
    solution = hybrid(A.to(dtype), b.to(dtype), rule=rule, noise_std=0.1 if rule == "discrepancy" else None)
    u, s, vh = torch.linalg.svd(A, full_matrices=False)
    filters = torch.where(s > 1e-5 * s[0], s / (s**2 + solution.damp.unsqueeze(-1) ** 2), 0.0)
    expected = ((b @ u.conj()) * filters) @ vh.conj()
    error = torch.linalg.vector_norm(solution.x.to(wide) - expected, dim=-1) / torch.linalg.vector_norm(
        expected, dim=-1
    )
    # In single precision the tolerance may be below the gradient of the nearest x that can be stored.
    size = s[0] * (s[0] * torch.linalg.vector_norm(expected, dim=-1) + torch.linalg.vector_norm(b, dim=-1))
    assert (solution.converged | (solution.gradient_norm <= torch.finfo(dtype).eps * size)).all()
    assert (error < (1e-2 if dtype in (torch.float32, torch.complex64) else 1e-4)).all()


def test_discrepancy_reaches_the_noise_level() -> None:
    A, b, _ = blur()
    solution = hybrid(A, b, rule="discrepancy", noise_std=torch.tensor([1e-3, 2e-3, 4e-3]), safety=1.1)
    expected = 1.1 * math.sqrt(60) * torch.tensor([1e-3, 2e-3, 4e-3], dtype=torch.float64)
    torch.testing.assert_close(solution.residual_norm, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["gcv", "discrepancy"])
def test_error_is_near_that_of_the_best_damp(rule: str) -> None:
    A, b, x = blur()
    solution = hybrid(A, b, rule=rule, noise_std=NOISE)
    grid = torch.logspace(-6, 0, 61, dtype=torch.float64)
    errors = torch.stack([(damped(A, b, d.expand(3)) - x).norm(dim=-1) for d in grid])
    assert ((solution.x - x).norm(dim=-1) < 2 * errors.min(0).values).all()


def test_undamped_lsqr_is_far_worse_on_the_same_data() -> None:
    A, b, x = blur()
    with pytest.warns(ConvergenceWarning):
        plain = lsqr(A, b, rtol=1e-14, max_iter=100)
    assert ((plain.x - x).norm(dim=-1) > 10 * (hybrid(A, b).x - x).norm(dim=-1)).all()


def test_neighbours_of_zero_and_nan_items_are_bit_identical() -> None:
    A, b, _ = blur()
    full = hybrid(A, b)
    b[1] = 0
    with_zero = hybrid(A, b)
    assert with_zero.status[1] is Status.ZERO
    b[1, 5] = float("nan")
    with pytest.warns(ConvergenceWarning):
        with_nan = hybrid(A, b, check_finite=False)
    assert with_nan.status[1] is Status.NON_FINITE
    for item in (0, 2):
        assert torch.equal(with_zero.x[item], full.x[item])
        assert torch.equal(with_nan.x[item], full.x[item])
        assert with_nan.damp[item] == full.damp[item]


@pytest.mark.parametrize("a_scale, b_scale", [(1e-14, 1.0), (1e14, 1.0), (1e14, 1e-14)])
def test_scaling_scales_the_damp_with_the_operator(a_scale: float, b_scale: float) -> None:
    A, b, _ = blur()
    plain, scaled = hybrid(A, b), hybrid(A * a_scale, b * b_scale)
    torch.testing.assert_close(scaled.damp / a_scale, plain.damp, rtol=1e-3, atol=0)
    torch.testing.assert_close(scaled.x * (a_scale / b_scale), plain.x, rtol=1e-3, atol=1e-3)


def test_complex_problems_are_solved() -> None:
    A, b, _ = blur()
    phase = torch.exp(1j * torch.arange(60, dtype=torch.float64))
    real = hybrid(A, b)
    turned = hybrid(phase[:, None] * A, phase * b)
    torch.testing.assert_close(turned.damp, real.damp, rtol=1e-6, atol=0)
    torch.testing.assert_close(turned.x, real.x.to(torch.complex128), rtol=1e-6, atol=1e-6)


def test_weighted_gcv_finds_the_minimum_of_a_fine_grid() -> None:
    g = torch.Generator().manual_seed(3)
    B = torch.diag_embed(torch.rand(2, 8, generator=g, dtype=torch.float64)) @ torch.eye(8, dtype=torch.float64)
    B = torch.cat([B, torch.zeros(2, 1, 8, dtype=torch.float64)], 1)
    B[:, 1:, :] += torch.diag_embed(torch.rand(2, 8, generator=g, dtype=torch.float64))
    small, omega = Projected(B, torch.ones(2, dtype=torch.float64)), torch.tensor([1.0, 0.6], dtype=torch.float64)
    damp, score = small.weighted_gcv(omega)
    for item in range(2):
        eye, e1 = torch.eye(8, dtype=torch.float64), torch.eye(9, dtype=torch.float64)[0]
        values = []
        for d in [*torch.logspace(-5, 1, 4001, dtype=torch.float64), damp[item]]:
            hat = B[item] @ torch.linalg.solve(B[item].T @ B[item] + d**2 * eye, B[item].T)
            values.append(float((hat @ e1 - e1).norm() ** 2 / (9 - omega[item] * hat.trace()) ** 2))
        assert values[-1] == pytest.approx(float(score[item]), rel=1e-9)
        assert values[-1] <= min(values[:-1]) * (1 + 1e-6)


def test_weight_makes_the_smallest_singular_value_stationary() -> None:
    # Coefficients that decay, down to a residual: the shape of an ill-posed problem.
    first = torch.tensor([1.0, 0.5, 0.2, 0.05, 0.02, 0.01, 0.5], dtype=torch.float64)
    q = torch.linalg.qr(torch.cat([first.unsqueeze(1), torch.eye(7, dtype=torch.float64)[:, 1:]], 1))[0]
    B = (q.T[:, :6] * torch.linspace(3, 1, 6, dtype=torch.float64)).unsqueeze(0)
    small = Projected(B, torch.ones(1, dtype=torch.float64))
    omega, damp = small.weight(), small.sigma[:, -1]
    assert 0 < float(omega) < 1

    def score(d: torch.Tensor) -> torch.Tensor:
        f = small.sigma**2 / (small.sigma**2 + d**2)
        return small.residual(d) ** 2 / (7 - omega * f.sum(-1)) ** 2

    h = 1e-5 * damp
    slope = (score(damp + h) - score(damp - h)) / (2 * h) * damp / score(damp)
    assert abs(float(slope)) < 1e-7


def test_discrepancy_needs_the_noise() -> None:
    A, b, _ = blur()
    with pytest.raises(ArgumentError, match="noise_std"):
        hybrid(A, b, rule="discrepancy")
    with pytest.raises(ArgumentError, match="rule"):
        hybrid(A, b, rule="lcurve")
