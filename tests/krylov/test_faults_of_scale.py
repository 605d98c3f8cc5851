"""Further faults seen in other implementations: of scale, of starts, of adjoints, of audits; each is a test here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lsconv
from lsconv.krylov.cgls import cgls
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.operators.elementary import Dense

Solver = Callable[..., Solution]
every_least_squares = pytest.mark.parametrize("solver", [cgls, lsqr, lsmr])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.dist(x.double(), reference) / reference.norm())


@pytest.mark.parametrize("scale", [1e-9, 1e-14, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_initial_rhobar_of_1_is_no_part_of_the_condition_estimate(scale: float, dtype: torch.dtype) -> None:
    """With it, A scaled by 1e-9 looks like one of condition 1e9, and LSMR stops at once with a wrong x."""
    A, b = normal(20, 12, seed=0), normal(20, seed=1)
    solution = lsmr((A * scale).to(dtype), b.to(dtype), conlim=1e4)
    assert solution.status is Status.GRADIENT
    assert solution.iterations > 5
    assert distance(solution.x, torch.linalg.lstsq(A * scale, b[:, None]).solution[:, 0]) < 1e-3


@every_least_squares
def test_an_eps_beside_the_norms_does_not_stop_a_small_problem_after_one_iteration(solver: Solver) -> None:
    """``|A^H r| / (|A| |r| + eps)`` is small at once when A and y are scaled by 1e-14."""
    A, b = normal(20, 12, seed=0), normal(20, seed=1)
    solution = solver(A * 1e-14, b * 1e-14)
    assert solution.iterations > 5
    assert distance(solution.x, torch.linalg.lstsq(A, b[:, None]).solution[:, 0]) < 1e-8


@every_least_squares
def test_no_constant_overflows_in_float32(solver: Solver) -> None:
    """A 1e100 standing for "very large" is inf in float32, and inf / inf is NaN."""
    solution = solver(normal(20, 12, seed=0).float(), normal(20, seed=1).float())
    assert solution.converged
    for column in (solution.history.residual_norm, solution.history.gradient_norm, solution.history.operator_norm):
        assert column.isfinite().all()


@every_least_squares
@pytest.mark.parametrize("m, n", [(20, 12), (12, 20), (12, 12)])
def test_damped_problem_does_not_minimise_the_distance_to_x0(solver: Solver, m: int, n: int) -> None:
    A, b, x0 = normal(m, n, seed=0), normal(m, seed=1), 10 * normal(n, seed=2)
    answer = torch.linalg.solve(A.mT @ A + 0.5 * torch.eye(n), A.mT @ b)
    assert distance(solver(A, b, damp=0.5**0.5, x0=x0).x, answer) < 1e-8


@every_least_squares
@pytest.mark.parametrize("damp", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("m, n", [(20, 12), (12, 20), (12, 12)])
def test_a_small_damp_with_a_preconditioner_on_the_residual_does_not_end_in_stagnation(
    solver: Solver, m: int, n: int, damp: float
) -> None:
    """A claim that fails its audit by a few per cent, made again at once by every restart."""
    for seed in range(3):
        A, b, root = normal(m, n, seed=seed), normal(m, seed=seed + 50), normal(m, m, seed=seed + 99)
        M = Dense(root @ root.mT / m + 0.3 * torch.eye(m))
        solution = solver(A, b, damp=damp, M=M, max_iter=200)  # the least damp takes about 100, the default limit
        answer = torch.linalg.lstsq(
            torch.cat([A, damp * torch.eye(n)]), torch.cat([b, torch.zeros(n)])[:, None]
        ).solution[:, 0]
        assert solution.converged
        assert distance(solution.x, answer) < 1e-7


@every_least_squares
def test_a_tiny_damp_with_a_preconditioner_on_the_residual_is_beyond_float32_and_said_to_be(solver: Solver) -> None:
    """Beside damping s is ||r|| / damp large, and its rounding is above the tolerance; N has no such limit."""
    A, b, root = (normal(*shape, seed=seed).float() for shape, seed in (((20, 12), 0), ((20,), 50), ((20, 20), 99)))
    answer = torch.linalg.lstsq(A.double(), b.double()[:, None]).solution[:, 0]
    with pytest.warns(lsconv.ConvergenceWarning):
        solution = solver(A, b, damp=3e-4, M=Dense(root @ root.mT / 20 + 0.3 * torch.eye(20)))
    assert not solution.converged
    assert solution.status in (Status.STAGNATION, Status.ITERATION_LIMIT)
    assert distance(solution.x, answer) < 1e-2
    other = solver(A, b, damp=3e-4, N=Dense(torch.diag(1 / (A * A).sum(0))))
    assert other.converged
    assert distance(other.x, answer) < 1e-4


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_adjoint_of_a_padded_convolution_is_not_the_flipped_kernel_padded_alike(mode: str) -> None:
    weight = normal(2, 3, 3, 5, seed=0)
    A = lsconv.Conv2d(weight, in_size=(9, 8), padding=(1, 2), padding_mode=mode)
    x, y = normal(3, 9, 8, seed=1), normal(2, 9, 8, seed=2)
    defect = float(torch.vdot(A(x).flatten(), y.flatten()) - torch.vdot(x.flatten(), A.H(y).flatten()))
    assert abs(defect) < 1e-12 * float(A(x).norm() * y.norm())
    flipped = lsconv.Conv2d(weight.transpose(0, 1).flip(-1, -2), in_size=(9, 8), padding=(1, 2), padding_mode=mode)
    assert torch.allclose(flipped(y), A.H(y)) == (mode in ("circular", "zeros"))


@pytest.mark.parametrize("kernel", [(2, 2), (4, 3), (3, 2)])
def test_even_kernels_are_centred_alike_in_space_and_in_fourier(kernel: tuple[int, int]) -> None:
    weight = 0.1 * normal(1, 1, *kernel, seed=0)
    weight[..., 0, 0] += 1.0
    A = lsconv.Conv2d(weight, in_size=(8, 7), padding="same", padding_mode="circular")
    x = normal(1, 8, 7, seed=1)
    for method in ("fourier", "lsmr"):
        assert distance(lsconv.lstsq(A, A(x), method=method).x, x) < 1e-8
