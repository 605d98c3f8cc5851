"""Iterations that are recorded and replayed are the iterations that the method does by itself, bit for bit.

There need not be a GPU to know it: see the emulator in conftest.py, which has its own tests at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lsconv
from lsconv.krylov.cg import cg
from lsconv.krylov.cgls import cgls
from lsconv.krylov.craig import craig
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres
from lsconv.operators.elementary import Dense, Diagonal

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

Solver = Callable[..., Solution]
SPECTRUM = torch.linspace(1, 3, 12, dtype=torch.float64)


def matrix(m: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(0))


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Right-hand sides of which the first needs few iterations, and the second is zero."""
    b = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    b[1] = 0
    return b


def definite(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    root = torch.linalg.qr(matrix(n, n, dtype))[0]
    return root @ torch.diag(torch.logspace(0, -2, n, dtype=torch.float64).to(dtype)) @ root.mH


def staggered(A: Tensor, b: Tensor) -> Tensor:
    """The same data, the first item an eigenvector of ``A^H A``: one iteration solves it."""
    b = b.clone()
    b[0] = A @ torch.linalg.svd(A)[2][0].conj()
    return b


LEAST_SQUARES: list[Any] = [cgls, lsqr, lsmr]
OPTIONS: list[dict[str, Any]] = [{}, {"damp": 0.3}, {"M": 1}, {"N": 1}, {"damp": 0.3, "M": 1}, {"damp": 0.3, "x0": 1}]


def with_item_of(options: dict[str, Any], m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(options)
    for side, size in (("M", m), ("N", n)):
        if side in options:
            options[side] = Dense(definite(size, dtype) + 0.5 * torch.eye(size, dtype=dtype))
    if "x0" in options:
        options["x0"] = matrix(3, n, dtype)
    return options


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("solver", LEAST_SQUARES)
def test_least_squares_is_replayed_bit_for_bit(
    solver: Solver, dtype: torch.dtype, options: dict[str, Any], emulator: Any
) -> None:
    """Items that stop at once, early and late; damping, preconditioners, a start."""
    A = matrix(16, 11, dtype)
    b, options = staggered(A, data(3, 16, dtype=dtype)), with_item_of(options, 16, 11, dtype)
    solve = lambda: solver(Dense(A), b, check_every=3, **options)
    solution = solve()
    assert emulator.replays > 3
    assert len(set(solution.iterations.tolist())) > 1
    emulator.assert_unchanged(solution, solve)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("solver", [cg, minres])
def test_a_hermitian_system_is_replayed_bit_for_bit(
    solver: Solver, preconditioned: bool, dtype: torch.dtype, emulator: Any
) -> None:
    A = definite(14, dtype)
    b = staggered(A, data(3, 14, dtype=dtype))
    M = Dense(definite(14, dtype) + 0.5 * torch.eye(14, dtype=dtype)) if preconditioned else None
    solve = lambda: solver(Dense(A), b, M=M, check_every=2)
    solution = solve()
    assert emulator.replays > 3
    assert len(set(solution.iterations.tolist())) == 3
    emulator.assert_unchanged(solution, solve)


@pytest.mark.parametrize("options", [{}, {"M": 1}, {"N": 1}, {"damp": 0.2}], ids=["plain", "M", "N", "damp"])
def test_craig_is_replayed_bit_for_bit(options: dict[str, Any], emulator: Any) -> None:
    A = matrix(11, 16)
    b, options = staggered(A, data(3, 11)), with_item_of(options, 11, 16, torch.float64)
    solve = lambda: craig(Dense(A), b, check_every=3, **options)
    solution = solve()
    assert emulator.replays > 3
    emulator.assert_unchanged(solution, solve)


@pytest.mark.parametrize("solver", [lsqr, lsmr, cgls])
def test_a_convolution_is_replayed_bit_for_bit(solver: Solver, emulator: Any) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3), in_size=(9, 8), padding=1, padding_mode="reflect")
    y = torch.randn(2, *A.out_shape)
    solve = lambda: solver(A, y, damp=0.1, check_every=4, max_iter=30)
    solution = solve()
    assert emulator.replays > 3
    emulator.assert_unchanged(solution, solve)


def test_the_preconditioner_of_the_fourier_floor_is_replayed(emulator: Any) -> None:
    A = lsconv.Conv2d(torch.randn(2, 3, 3, 3, dtype=torch.float64), in_size=(9, 8), padding=1)
    M = lsconv.CirculantPreconditioner(A, damp=0.2)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    solve = lambda: lsmr(A, y, damp=0.2, M=M, check_every=2)
    solution = solve()
    assert emulator.replays > 1
    emulator.assert_unchanged(solution, solve)


def test_negative_curvature_met_in_a_replay_is_found(emulator: Any) -> None:
    A = Diagonal(torch.cat([torch.linspace(1, 2, 30, dtype=torch.float64), torch.tensor([-1e-3])]))
    b = torch.ones(2, 31, dtype=torch.float64)
    b[0, -1], b[1, -1] = 1e-2, 0
    solve = lambda: cg(A, b, check_every=1)
    solution = solve()
    assert emulator.replays > 3
    assert solution.status == [lsconv.Status.NEGATIVE_CURVATURE, lsconv.Status.RESIDUAL]
    emulator.assert_unchanged(solution, solve)


def test_nan_in_one_item_is_replayed_without_touching_the_others(emulator: Any) -> None:
    A, b = matrix(16, 11), data(3, 16)
    b[1, 3] = torch.nan
    solve = lambda: lsmr(Dense(A), b, check_every=3, check_finite=False)
    emulator.assert_unchanged(solve(), solve)
    assert torch.equal(solve().x[2], lsmr(Dense(A), torch.stack([b[0], b[0], b[2]])).x[2])
    assert emulator.replays > 3


def test_a_restart_records_anew(emulator: Any) -> None:
    """A tolerance below the rounding of float32: its claims are refused, and the solve goes on with a new state."""
    M = Dense(definite(40, torch.float32) + 0.1 * torch.eye(40))
    b = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    solve = lambda: cg(Dense(definite(40, torch.float32)), b, M=M, check_every=2, rtol=1e-7)
    solution = solve()
    assert emulator.records > 1
    emulator.assert_unchanged(solution, solve)


def test_a_callback_keeps_what_it_was_given(emulator: Any) -> None:
    """The states of later iterations are written where those of the earlier ones were."""
    A, b = matrix(16, 11), data(3, 16)

    def watched() -> list[tuple[Tensor, ...]]:
        seen: list[tuple[Tensor, ...]] = []
        lsqr(Dense(A), b, check_every=2, callback=lambda s: seen.append((s.running, s.residual_norm, s.x)))
        return seen

    recorded = watched()
    assert emulator.replays > 3
    plain = emulator.without(watched)
    assert len(recorded) == len(plain)
    for one, other in zip(recorded, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(recorded[0][2], recorded[-1][2])


@pytest.mark.parametrize("solver, copies", [(cg, 0), (cgls, 0), (lsqr, 0), (lsmr, 0), (craig, 0), (minres, 8)])
def test_a_recording_copies_no_vectors_but_those_of_minres(
    solver: Solver, copies: int, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MINRES swaps two pairs: four copies out of their places, four back."""
    found: list[int] = []
    record = type(emulator).record
    vector = 3 * 12

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.copy_.default, torch.ops.aten.clone.default):
                found.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    def counting(self: Any, body: Callable[[], None]) -> Callable[[], object]:
        def counted() -> None:
            with Counting():
                body()

        return record(self, counted)

    monkeypatch.setattr(type(emulator), "record", counting)
    solver(Diagonal(SPECTRUM), data(3, 12), check_every=2)
    assert emulator.records > 0
    assert found.count(vector) == copies * emulator.records


def test_the_derivative_of_a_replayed_solve_is_that_of_the_solve(emulator: Any) -> None:
    """Its backward pass is a solve, and replayed as well."""
    A, y = matrix(9, 16), data(3, 9)

    def gradients() -> tuple[Tensor, ...]:
        matrix_leaf, y_leaf = A.clone().requires_grad_(), y.clone().requires_grad_()
        lsconv.lsmr(Dense(matrix_leaf), y_leaf, check_every=2).x.square().sum().backward()
        assert matrix_leaf.grad is not None
        assert y_leaf.grad is not None
        return matrix_leaf.grad, y_leaf.grad

    replayed = gradients()
    assert emulator.records >= 2
    for one, other in zip(replayed, emulator.without(gradients), strict=True):
        assert torch.equal(one, other)


def test_a_solve_that_ends_within_the_first_block_records_nothing(emulator: Any) -> None:
    assert int(cg(Diagonal(SPECTRUM), data(3, 12), check_every=20).iterations.max()) < 20
    assert emulator.recorders == 0


def test_the_emulator_shows_a_number_of_python_for_what_it_is(emulator: Any) -> None:
    """The oracle of this file: what Python computes anew in every iteration is frozen in a recording."""
    x, count = torch.zeros(2), [0]

    def body() -> None:
        count[0] += 1
        x.add_(count[0])

    emulator.warm_up(body)
    repeat = emulator.record(body)
    assert x.tolist() == [1.0, 1.0]  # recorded, not done
    repeat()
    repeat()
    assert x.tolist() == [5.0, 5.0]


def test_the_emulator_shows_a_value_left_from_the_last_iteration(emulator: Any) -> None:
    """And a result that is not copied to a fixed place is spoiled."""
    state = {"x": torch.ones(2)}

    def body() -> None:
        state["x"] = state["x"] * 2

    emulator.warm_up(body)
    repeat = emulator.record(body)
    for _ in range(3):
        repeat()
    assert state["x"].tolist() == [4.0, 4.0]
