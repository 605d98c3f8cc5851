"""Faults seen in other implementations; each is a test here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lsconv
from lsconv.errors import ArgumentError, ConvergenceError, ConvergenceWarning, NonFiniteError, ShapeError
from lsconv.krylov.cg import cg
from lsconv.krylov.cgls import cgls
from lsconv.krylov.gmres import gmres
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres

Solver = Callable[..., Solution]
LEAST_SQUARES = [cgls, lsqr, lsmr]
SQUARE = [cg, minres, gmres]

every_solver = pytest.mark.parametrize("solver", LEAST_SQUARES + SQUARE)
every_least_squares = pytest.mark.parametrize("solver", LEAST_SQUARES)
quiet = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

SCALES = [
    (1e-14, 1.0),
    (1e14, 1.0),
    (1.0, 1e-14),
    (1.0, 1e14),
    (1e-14, 1e-14),
    (1e14, 1e14),
    (1e-14, 1e14),
    (1e14, 1e-14),
]


def system(
    solver: Solver, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = (4,)
) -> tuple[torch.Tensor, ...]:
    """A matrix that suits the solver, inconsistent where it may be, and right-hand sides."""
    g = torch.Generator().manual_seed(7)
    m = 12 if solver in SQUARE else 20
    A = torch.randn(m, 12, generator=g, dtype=torch.float64)
    if solver in SQUARE:
        A = A @ A.T / 12 + torch.eye(12, dtype=torch.float64)
    b = torch.randn(*batch, m, generator=g, dtype=torch.float64)
    return A.to(dtype), b.to(dtype)


@every_solver
@pytest.mark.parametrize("check_every", [1, 4])
def test_zero_item_does_not_zero_its_neighbours(solver: Solver, check_every: int) -> None:
    A, b = system(solver)
    full = solver(A, b)
    b[1] = 0
    solution = solver(A, b, check_every=check_every)
    assert solution.status[1] is Status.ZERO
    assert torch.equal(solution.x[1], torch.zeros(12, dtype=torch.float64))
    assert int(solution.iterations[1]) == 0
    for item in (0, 2, 3):
        assert torch.equal(solution.x[item], full.x[item])
        assert solution.iterations[item] == full.iterations[item]


@every_solver
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("check_every", [1, 4])
def test_non_finite_item_leaves_its_neighbours_bit_identical(solver: Solver, bad: float, check_every: int) -> None:
    A, b = system(solver)
    full = solver(A, b)
    b[2, 3] = bad
    with pytest.warns(ConvergenceWarning, match=r"batch item\(s\) 2"):
        solution = solver(A, b, check_finite=False, check_every=check_every)
    assert solution.status[2] is Status.NON_FINITE
    assert solution.x[2].isnan().all()
    assert solution.converged.tolist() == [True, True, False, True]
    for item in (0, 1, 3):
        assert torch.equal(solution.x[item], full.x[item])


@every_solver
def test_overflowing_item_leaves_its_neighbours_bit_identical(solver: Solver) -> None:
    A, b = system(solver, torch.float32)
    matrices = A.expand(4, *A.shape).clone()
    full = solver(matrices, b)
    matrices[0] *= 0.9 * torch.finfo(torch.float32).max / A.abs().max()
    with pytest.warns(ConvergenceWarning):
        solution = solver(matrices, b, check_every=3)
    assert not solution.converged[0]
    assert torch.equal(solution.x[1:], full.x[1:])


@every_solver
def test_non_finite_input_is_refused_and_named(solver: Solver) -> None:
    A, b = system(solver)
    b[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"b: .* 2"):
        solver(A, b)


@every_least_squares
def test_inconsistent_data_stop_by_the_gradient(solver: Solver) -> None:
    A, b = system(solver)
    solution = solver(A, b)
    assert all(status is Status.GRADIENT for status in solution.status)
    assert (solution.residual_norm > 0.1).all()
    assert (solution.iterations < 40).all()


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a_scale, b_scale", SCALES)
def test_scaling_changes_only_the_scale_of_x(
    solver: Solver, dtype: torch.dtype, a_scale: float, b_scale: float
) -> None:
    A, b = system(solver, dtype)
    plain = solver(A, b)
    scaled = solver(A * a_scale, b * b_scale)
    assert scaled.converged.all()
    assert (scaled.iterations - plain.iterations).abs().max() <= 2
    error = (scaled.x.double() * (a_scale / b_scale) - plain.x.double()).norm() / plain.x.double().norm()
    assert error < (1e-3 if dtype == torch.float32 else 1e-9)


@every_least_squares
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a_scale, b_scale", SCALES)
def test_scaling_a_damped_problem_changes_only_the_scale_of_x(
    solver: Solver, dtype: torch.dtype, a_scale: float, b_scale: float
) -> None:
    A, b = system(solver, dtype)
    plain = solver(A, b, damp=0.7)
    scaled = solver(A * a_scale, b * b_scale, damp=0.7 * a_scale)
    assert scaled.converged.all()
    error = (scaled.x.double() * (a_scale / b_scale) - plain.x.double()).norm() / plain.x.double().norm()
    assert error < (1e-3 if dtype == torch.float32 else 1e-9)


@every_solver
def test_zero_right_hand_side_with_a_start_answers_zero(solver: Solver) -> None:
    A, b = system(solver)
    solution = solver(A, 0 * b, x0=torch.ones(4, 12, dtype=torch.float64))
    assert torch.equal(solution.x, torch.zeros(4, 12, dtype=torch.float64))
    assert solution.iterations.tolist() == [0, 0, 0, 0]
    assert solution.converged.all()


@every_solver
def test_iteration_limit_is_not_success(solver: Solver) -> None:
    A, b = system(solver)
    with pytest.warns(ConvergenceWarning, match="iteration limit"):
        solution = solver(A, b, max_iter=2)
    assert not solution.converged.any()
    assert all(status is Status.ITERATION_LIMIT for status in solution.status)
    assert solution.iterations.tolist() == [2, 2, 2, 2]
    with pytest.raises(ConvergenceError, match="iteration limit"):
        solution.raise_for_status()
    with pytest.raises(ConvergenceError, match="iteration limit"):
        solver(A, b, max_iter=2, raise_on_failure=True)


def test_condition_limit_is_not_success() -> None:
    A = torch.diag(torch.logspace(0, -6, 20, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="condition number"):
        solution = lsqr(A, torch.ones(20, dtype=torch.float64), conlim=1e2)
    assert solution.status is Status.CONDITION_LIMIT
    assert not solution.converged


@every_solver
@quiet
def test_claims_of_the_recurrence_are_audited_in_float32(solver: Solver) -> None:
    """Asked for more than float32 holds, a solver says so instead of believing its recurrence."""
    A, b = system(solver, torch.float32)
    A = A + 0.0
    solution = solver(A, b, rtol=1e-9)
    r = b.double() - solution.x.double() @ A.double().T
    truth = r.norm(dim=-1) if solver in SQUARE else (r @ A.double()).norm(dim=-1) / (A.double().norm() * r.norm(dim=-1))
    assert not solution.converged[truth > 1e-8].any()
    assert (truth < 1e-5).all()


@every_solver
def test_host_looks_only_change_when_not_what(solver: Solver) -> None:
    A, b = system(solver)
    often, seldom = solver(A, b, check_every=1), solver(A, b, check_every=7)
    assert torch.equal(often.x, seldom.x)
    assert torch.equal(often.iterations, seldom.iterations)


@every_solver
def test_callback_can_stop(solver: Solver) -> None:
    A, b = system(solver)
    solution = solver(A, b, callback=lambda state: state.iteration >= 3)
    assert all(status is Status.CALLBACK for status in solution.status)
    assert solution.iterations.tolist() == [3, 3, 3, 3]
    assert not solution.converged.any()


@every_solver
def test_bad_arguments_are_named(solver: Solver) -> None:
    A, b = system(solver)
    with pytest.raises(ShapeError, match="b: shape"):
        solver(A, b[:, :-1])
    with pytest.raises(ArgumentError, match="rtol"):
        solver(A, b, rtol=-1.0)
    with pytest.raises(ArgumentError, match="max_iter"):
        solver(A, b, max_iter=-1)
    if solver in LEAST_SQUARES:
        with pytest.raises(ArgumentError, match="damp"):
            solver(A, b, damp=-1.0)


@every_least_squares
def test_zero_operator_answers_zero(solver: Solver) -> None:
    solution = solver(torch.zeros(3, 2), torch.ones(3))
    assert solution.converged
    assert torch.equal(solution.x, torch.zeros(2))


@every_solver
def test_inputs_are_left_alone(solver: Solver) -> None:
    A, b = system(solver)
    x0 = torch.ones(4, 12, dtype=torch.float64)
    copies = A.clone(), b.clone(), x0.clone()
    solver(A, b, x0=x0)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((A, b, x0), copies, strict=True))


@pytest.mark.parametrize("method", [lsconv.lsmr, lsconv.lsqr, lsconv.cgls, lsconv.craig])
@pytest.mark.parametrize("side", ["M", "N"])
def test_the_identity_as_preconditioner_changes_nothing(method, side):
    """It gives back its argument, which was then scaled twice."""
    A = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    A = A if side == "N" else A.T
    b = torch.ones(len(A), dtype=torch.float64)
    if method is lsconv.craig:
        A, b = A[:4, :4], b[:4]
    plain = method(A, b)
    found = method(A, b, **{side: lsconv.Identity((len(b) if side == "M" else A.shape[1],))})
    assert found.iterations <= plain.iterations + 1
    assert torch.allclose(found.x, plain.x)
