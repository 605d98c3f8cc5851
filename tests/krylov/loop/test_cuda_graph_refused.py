"""Iterations that must not be recorded are not, and one whose recording fails goes on as if it had not been tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.krylov.cg import _CG, cg
from lsconv.krylov.gmres import gmres
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.loop import cuda_graph
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.monitor import Monitor
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem, prepare
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres
from lsconv.operators.elementary import Dense, Diagonal, FromFunctions

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


@pytest.mark.parametrize("solver", [gmres, hybrid])
def test_methods_whose_bases_grow_are_not_recorded(solver: Solver, emulator: Any) -> None:
    solution = solver(Diagonal(SPECTRUM), data(3, 12), check_every=2)
    assert emulator.recorders == 0
    assert int(solution.iterations.max()) > 4


def test_functions_are_recorded_when_their_maker_says_so(emulator: Any) -> None:
    b = data(3, 12)
    for promised in (False, True):
        A = FromFunctions(
            (12,), (12,), lambda x: SPECTRUM * x, lambda y: SPECTRUM * y, dtype=torch.float64, capturable=promised
        )
        cg(A, b, check_every=2)
        assert (emulator.replays > 0) is promised


def test_an_operator_that_is_not_capturable_is_not_recorded(emulator: Any) -> None:
    """Neither as a part of one that is, nor as a preconditioner."""
    foreign = FromFunctions((12,), (12,), lambda x: 2 * x, lambda y: 2 * y, dtype=torch.float64)
    A, b = Diagonal(SPECTRUM), data(3, 12)
    cg(A @ foreign, b, check_every=2)
    cg(A, b, M=foreign, check_every=2)
    assert emulator.recorders == 0
    A.capturable = False
    cg(A, b, check_every=2)
    assert emulator.recorders == 0


def test_a_subclass_says_for_itself_whether_it_is_capturable() -> None:
    class Counting(Diagonal):
        """Counts its calls, which a recording would not."""

    assert Diagonal(SPECTRUM).capturable
    assert not Counting(SPECTRUM).capturable
    assert not Dense(torch.eye(3).to_sparse()).capturable
    assert not lsconv.from_scipy(torch.eye(3).numpy()).capturable


def test_nothing_is_recorded_under_a_function_transform(emulator: Any) -> None:
    problem = prepare(Diagonal(SPECTRUM), data(3, 12))
    method = _CG(problem, None, ~problem.zero)
    found: list[bool] = []

    def asks(x: Tensor) -> Tensor:
        found.append(cuda_graph.recorder_for(problem, method) is None)
        return x

    asks(torch.ones(2))
    torch.func.vmap(asks)(torch.ones(2))
    assert found == [False, True]


@pytest.mark.parametrize("place", ["A", "M"])
@pytest.mark.parametrize("solver", [cg, minres, lsmr, lsqr])
def test_a_recording_that_fails_changes_nothing(
    solver: Solver, place: str, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the middle of an iteration; the solve goes on as if it had never been tried."""
    recording = False
    A, P, b = definite(14), definite(14) + torch.eye(14, dtype=torch.float64), data(3, 14)

    class Refusing(type(emulator)):  # type: ignore[misc]
        def record(self, body: Callable[[], None]) -> Callable[[], object]:
            nonlocal recording
            recording = True
            try:
                return super().record(body)
            finally:
                recording = False

    def refuses(y: Tensor) -> Tensor:
        if recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return y @ (A if place == "A" else P).mT

    emulator = Refusing()
    monkeypatch.setitem(cuda_graph.RECORDERS, "cpu", emulator)
    works = lambda x: x @ A.mT
    operator = FromFunctions(
        (14,), (14,), refuses if place == "A" and solver in (cg, minres) else works,
        refuses if place == "A" else works, dtype=torch.float64, capturable=True,
    )  # fmt: skip
    M = FromFunctions((14,), (14,), refuses, refuses, dtype=torch.float64, capturable=True) if place == "M" else None
    solve = lambda: solver(operator, b, M=M, check_every=2)
    solution = solve()
    assert emulator.recorders > 0
    assert emulator.records == emulator.replays == 0
    emulator.assert_unchanged(solution, solve)


class Adding(Method):
    """A method that adds, and says that it does the same in every step."""

    uniform = True

    def __init__(self, problem: Problem) -> None:
        self.k, self.hidden = 1, [0]
        self.x = self.alias = torch.zeros_like(problem.y)
        self.residual = torch.ones(problem.batch, dtype=torch.float64)
        self.operator_norm = torch.ones(problem.batch, dtype=torch.float64)

    def step(self, running: Tensor) -> None:
        self.hidden[0] += 1
        self.add()

    def add(self) -> None:
        self.x += 1

    def solution(self) -> Tensor:
        return self.x


class Counting(Adding):
    """It counts in Python."""

    def add(self) -> None:
        self.x += self.k
        self.k += 1


class Moving(Adding):
    """It updates in place at first, and makes a new tensor later."""

    def add(self) -> None:
        self.x += 1
        if self.hidden[0] > 1:
            self.x = self.alias = self.x + self.hidden[0]


class Parting(Adding):
    """Two names for one tensor, at first."""

    def add(self) -> None:
        self.x = self.x + 1
        self.alias = self.x if self.hidden[0] == 1 else self.x * self.hidden[0]


def recorded(method: Method, problem: Problem, recorder: Any) -> cuda_graph.Recorded:
    options = Options(Tolerances.of(torch.float64, 0.0, 0.0), 1000, 2, None, False, False)
    monitor = Monitor(problem, options, torch.ones(problem.batch, dtype=torch.float64), square=True)
    monitor.test(method)

    def advance() -> None:
        method.step(monitor.running)
        monitor.count()
        monitor.test(method)

    return cuda_graph.Recorded(advance, method, monitor, recorder)


@pytest.mark.parametrize("kind", [Adding, Counting, Moving, Parting])
def test_a_step_that_is_not_the_same_every_time_is_not_replayed(kind: type[Adding], emulator: Any) -> None:
    problem = prepare(Diagonal(SPECTRUM), data(3, 12))
    method, plain = kind(problem), kind(problem)
    iterate = recorded(method, problem, emulator)
    for _ in range(6):
        iterate()
        plain.step(~problem.zero)
    assert torch.equal(method.x, plain.x)
    assert torch.equal(method.alias, plain.alias)
    assert (emulator.records == 1) is (kind is Adding)
