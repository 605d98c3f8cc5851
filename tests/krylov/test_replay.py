"""Iterations that are recorded and replayed are the iterations that the method does by itself, bit for bit.

There need not be a GPU to know it. A CUDA graph repeats recorded kernels on recorded memory, with recorded numbers; so
does :class:`Emulator`, with torch's operations for kernels: recorded while one iteration runs, taken back then, and
repeated on the same tensors, whatever Python does meanwhile. What the iteration lets lie about is spoiled before every
repetition, so nothing can come out of it but what has been computed in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lsconv
from lsconv.krylov import replay
from lsconv.krylov.cg import _CG, cg
from lsconv.krylov.cgls import _CGLS, cgls
from lsconv.krylov.craig import _CRAIG, craig
from lsconv.krylov.gmres import gmres
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.lsmr import LSMR, lsmr
from lsconv.krylov.lsqr import _LSQR, lsqr
from lsconv.krylov.method import Method
from lsconv.krylov.minres import _MINRES, minres
from lsconv.krylov.monitor import Monitor
from lsconv.krylov.options import Options
from lsconv.krylov.problem import Problem
from lsconv.krylov.solution import Solution
from lsconv.krylov.stopping import Tolerances
from lsconv.operators.elementary import Dense, Diagonal, FromFunctions

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

Solver = Callable[..., Solution]
SPECTRUM = torch.linspace(1, 3, 12, dtype=torch.float64)


class Recording(TorchDispatchMode):
    """Every operation with the tensors it took and gave; what it changed can be taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.inside: set[int] = set()
        self.originals: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        if func._schema.is_mutable:
            for tensor in given:
                if tensor.untyped_storage().data_ptr() not in self.inside:
                    self.originals.append((tensor, tensor.clone()))
        result = func(*args, **kwargs)
        outputs = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        taken = {t.untyped_storage().data_ptr() for t in given}
        fresh = [t for t in outputs if t.untyped_storage().data_ptr() not in taken]
        self.inside |= {t.untyped_storage().data_ptr() for t in fresh}
        self.calls.append((func, args, kwargs, outputs))
        return result


class Emulator:
    """What a CUDA graph does, on the CPU; ``log`` counts."""

    log: dict[str, int]

    def __init__(self, device: torch.device) -> None:
        self.log["recorders"] += 1

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        recording = Recording()
        try:
            with recording:
                body()
        finally:
            for tensor, original in reversed(recording.originals):
                tensor.copy_(original)
        self.log["records"] += 1

        def repeat() -> None:
            self.log["replays"] += 1
            spoil(recording)
            for func, args, kwargs, outputs in recording.calls:
                again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for output, value in zip(outputs, again, strict=True):
                    if output.data_ptr() != value.data_ptr():
                        output.copy_(value)

        return repeat


def spoil(recording: Recording) -> None:
    """Garbage in everything that the recorded operations made."""
    for *_, outputs in recording.calls:
        for output in outputs:
            if output.untyped_storage().data_ptr() in recording.inside:
                output.fill_(True if output.dtype == torch.bool else 77)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Iterations on the CPU are recorded by the emulator, which counts here."""
    counts = {"recorders": 0, "records": 0, "replays": 0}
    monkeypatch.setattr(Emulator, "log", counts, raising=False)
    monkeypatch.setitem(replay.RECORDERS, "cpu", Emulator)
    return counts


def eager(solve: Callable[[], Any]) -> Any:
    """The same without a recorder."""
    made = replay.RECORDERS.pop("cpu")
    try:
        return solve()
    finally:
        replay.RECORDERS["cpu"] = made


def assert_same(one: Solution, other: Solution) -> None:
    """Every tensor of the two, and the history, bit for bit."""
    for name in ("x", "codes", "converged", "iterations", "residual_norm", "gradient_norm"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    for name in ("residual_norm", "gradient_norm", "operator_norm"):
        first, second = getattr(one.history, name), getattr(other.history, name)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


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


def filled(options: dict[str, Any], m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
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
    solver: Solver, dtype: torch.dtype, options: dict[str, Any], log: dict[str, int]
) -> None:
    """Items that stop at once, early and late; damping, preconditioners, a start."""
    A = matrix(16, 11, dtype)
    b, options = staggered(A, data(3, 16, dtype=dtype)), filled(options, 16, 11, dtype)
    solve = lambda: solver(Dense(A), b, check_every=3, **options)
    solution = solve()
    assert log["replays"] > 3
    assert len(set(solution.iterations.tolist())) > 1
    assert_same(solution, eager(solve))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("solver", [cg, minres])
def test_a_hermitian_system_is_replayed_bit_for_bit(
    solver: Solver, preconditioned: bool, dtype: torch.dtype, log: dict[str, int]
) -> None:
    A = definite(14, dtype)
    b = staggered(A, data(3, 14, dtype=dtype))
    M = Dense(definite(14, dtype) + 0.5 * torch.eye(14, dtype=dtype)) if preconditioned else None
    solve = lambda: solver(Dense(A), b, M=M, check_every=2)
    solution = solve()
    assert log["replays"] > 3
    assert len(set(solution.iterations.tolist())) == 3
    assert_same(solution, eager(solve))


@pytest.mark.parametrize("options", [{}, {"M": 1}, {"N": 1}, {"damp": 0.2}], ids=["plain", "M", "N", "damp"])
def test_craig_is_replayed_bit_for_bit(options: dict[str, Any], log: dict[str, int]) -> None:
    A = matrix(11, 16)
    b, options = staggered(A, data(3, 11)), filled(options, 11, 16, torch.float64)
    solve = lambda: craig(Dense(A), b, check_every=3, **options)
    solution = solve()
    assert log["replays"] > 3
    assert_same(solution, eager(solve))


@pytest.mark.parametrize("solver", [lsqr, lsmr, cgls])
def test_a_convolution_is_replayed_bit_for_bit(solver: Solver, log: dict[str, int]) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3), in_size=(9, 8), padding=1, padding_mode="reflect")
    y = torch.randn(2, *A.out_shape)
    solve = lambda: solver(A, y, damp=0.1, check_every=4, max_iter=30)
    solution = solve()
    assert log["replays"] > 3
    assert_same(solution, eager(solve))


def test_the_preconditioner_of_the_fourier_floor_is_replayed(log: dict[str, int]) -> None:
    A = lsconv.Conv2d(torch.randn(2, 3, 3, 3, dtype=torch.float64), in_size=(9, 8), padding=1)
    M = lsconv.CirculantPreconditioner(A, damp=0.2)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    solve = lambda: lsmr(A, y, damp=0.2, M=M, check_every=2)
    solution = solve()
    assert log["replays"] > 1
    assert_same(solution, eager(solve))


def test_negative_curvature_met_in_a_replay_is_found(log: dict[str, int]) -> None:
    A = Diagonal(torch.cat([torch.linspace(1, 2, 30, dtype=torch.float64), torch.tensor([-1e-3])]))
    b = torch.ones(2, 31, dtype=torch.float64)
    b[0, -1], b[1, -1] = 1e-2, 0
    solve = lambda: cg(A, b, check_every=1)
    solution = solve()
    assert log["replays"] > 3
    assert solution.status == [lsconv.Status.NEGATIVE_CURVATURE, lsconv.Status.RESIDUAL]
    assert_same(solution, eager(solve))


def test_nan_in_one_item_is_replayed_without_touching_the_others(log: dict[str, int]) -> None:
    A, b = matrix(16, 11), data(3, 16)
    b[1, 3] = torch.nan
    solve = lambda: lsmr(Dense(A), b, check_every=3, check_finite=False)
    assert_same(solve(), eager(solve))
    assert torch.equal(solve().x[2], lsmr(Dense(A), torch.stack([b[0], b[0], b[2]])).x[2])
    assert log["replays"] > 3


def test_a_restart_records_anew(log: dict[str, int]) -> None:
    """In float32 a claim is refused and the solve goes on from there, with a new state: a new recording."""
    M = Dense(definite(40, torch.float32) + 0.1 * torch.eye(40))
    b = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    solve = lambda: cg(Dense(definite(40, torch.float32)), b, M=M, check_every=2, rtol=1e-5)
    solution = solve()
    assert solution.converged.all()
    assert log["records"] > 1
    assert_same(solution, eager(solve))


def test_a_callback_keeps_what_it_was_given(log: dict[str, int]) -> None:
    """The states of later iterations are written where those of the earlier ones were."""
    A, b = matrix(16, 11), data(3, 16)

    def watched() -> list[tuple[Tensor, ...]]:
        seen: list[tuple[Tensor, ...]] = []
        lsqr(Dense(A), b, check_every=2, callback=lambda s: seen.append((s.running, s.residual_norm, s.x)))
        return seen

    recorded = watched()
    assert log["replays"] > 3
    plain = eager(watched)
    assert len(recorded) == len(plain)
    for one, other in zip(recorded, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(recorded[0][2], recorded[-1][2])


# ---------------------------------------------------------------------- when nothing is recorded


@pytest.mark.parametrize("solver", [gmres, hybrid])
def test_methods_whose_bases_grow_are_not_recorded(solver: Solver, log: dict[str, int]) -> None:
    solution = solver(Diagonal(SPECTRUM), data(3, 12), check_every=2)
    assert log["recorders"] == 0
    assert int(solution.iterations.max()) > 4


def test_functions_are_recorded_when_their_maker_says_so(log: dict[str, int]) -> None:
    b = data(3, 12)
    for promised in (False, True):
        A = FromFunctions(
            (12,), (12,), lambda x: SPECTRUM * x, lambda y: SPECTRUM * y, dtype=torch.float64, capturable=promised
        )
        cg(A, b, check_every=2)
        assert (log["replays"] > 0) is promised


def test_an_operator_that_is_not_capturable_is_not_recorded(log: dict[str, int]) -> None:
    """Neither as a part of one that is, nor as a preconditioner."""
    foreign = FromFunctions((12,), (12,), lambda x: 2 * x, lambda y: 2 * y, dtype=torch.float64)
    A, b = Diagonal(SPECTRUM), data(3, 12)
    cg(A @ foreign, b, check_every=2)
    cg(A, b, M=foreign, check_every=2)
    assert log["recorders"] == 0
    A.capturable = False
    cg(A, b, check_every=2)
    assert log["recorders"] == 0


def test_a_subclass_says_for_itself_whether_it_is_capturable() -> None:
    class Counting(Diagonal):
        """Counts its calls, which a recording would not."""

    assert Diagonal(SPECTRUM).capturable
    assert not Counting(SPECTRUM).capturable
    assert not Dense(torch.eye(3).to_sparse()).capturable
    assert not lsconv.from_scipy(torch.eye(3).numpy()).capturable


def test_large_problems_and_function_transforms_are_not_recorded(
    log: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    A, b = Diagonal(SPECTRUM), data(3, 12)
    torch.func.vmap(lambda y: cg(A, y, check_every=2).x)(b.reshape(3, 1, 12))
    counted = dict(log)
    monkeypatch.setattr(replay, "LARGEST", 3 * 24 * 8 - 1)
    cg(A, b, check_every=2)
    assert log == counted
    monkeypatch.setattr(replay, "LARGEST", 3 * 24 * 8)
    cg(A, b, check_every=2)
    assert log["recorders"] == counted["recorders"] + 1


def test_a_solve_that_ends_within_the_first_block_records_nothing(log: dict[str, int]) -> None:
    assert int(cg(Diagonal(SPECTRUM), data(3, 12), check_every=20).iterations.max()) < 20
    assert log["recorders"] == 0


@pytest.mark.parametrize("solver", [cg, minres, lsmr])
def test_a_recording_that_fails_changes_nothing(
    solver: Solver, log: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the middle of an iteration; the solve goes on as if it had never been tried."""

    class Refused(Emulator):
        def record(self, body: Callable[[], None]) -> Callable[[], object]:
            def fails() -> None:
                body()
                raise RuntimeError("operation not permitted when stream is capturing")

            return super().record(fails)

    monkeypatch.setitem(replay.RECORDERS, "cpu", Refused)
    A, b = definite(14), data(3, 14)
    solve = lambda: solver(Dense(A), b, check_every=2)
    solution = solve()
    assert log["recorders"] > 0
    assert log["replays"] == 0
    assert_same(solution, eager(solve))


class Counter(Method):
    """A method that counts in Python, and says that it does not."""

    uniform = True

    def __init__(self, problem: Problem) -> None:
        self.k = 0
        self.x = torch.zeros_like(problem.y)
        self.residual = torch.ones(problem.batch, dtype=torch.float64)
        self.operator_norm = torch.ones(problem.batch, dtype=torch.float64)

    def step(self, running: Tensor) -> None:
        self.k += 1
        self.x += self.k

    def solution(self) -> Tensor:
        return self.x


def recorded(method: Method, problem: Problem, recorder: Any) -> replay.Recorded:
    options = Options(Tolerances.of(torch.float64, 0.0, 0.0), 1000, 2, None, False, False)
    monitor = Monitor(problem, options, torch.ones(problem.batch, dtype=torch.float64), square=True)
    monitor.test(method)

    def advance() -> None:
        method.step(monitor.running)
        monitor.count()
        monitor.test(method)

    return replay.Recorded(advance, method, monitor, recorder)


def test_a_step_that_counts_in_python_is_not_replayed(log: dict[str, int]) -> None:
    from lsconv.krylov.problem import prepare

    problem = prepare(Diagonal(SPECTRUM), data(3, 12))
    method = Counter(problem)
    iterate = recorded(method, problem, Emulator(torch.device("cpu")))
    for _ in range(6):
        iterate()
    assert float(method.x[0, 0]) == 1 + 2 + 3 + 4 + 5 + 6
    assert log["records"] == 0


def test_the_emulator_shows_a_number_of_python_for_what_it_is(log: dict[str, int]) -> None:
    """The oracle of this file: what Python computes anew in every iteration is frozen in a recording."""
    x, count = torch.zeros(2), [0]

    def body() -> None:
        count[0] += 1
        x.add_(count[0])

    recorder = Emulator(torch.device("cpu"))
    recorder.warm_up(body)
    repeat = recorder.record(body)
    assert x.tolist() == [1.0, 1.0]  # recorded, not done
    repeat()
    repeat()
    assert x.tolist() == [5.0, 5.0]


def test_the_emulator_shows_a_value_left_from_the_last_iteration(log: dict[str, int]) -> None:
    """And a result that is not copied to a fixed place is spoiled."""
    state = {"x": torch.ones(2)}

    def body() -> None:
        state["x"] = state["x"] * 2

    recorder = Emulator(torch.device("cpu"))
    recorder.warm_up(body)
    repeat = recorder.record(body)
    for _ in range(3):
        repeat()
    assert state["x"].tolist() == [4.0, 4.0]


# ---------------------------------------------------------------------- on a device that is not there

METHODS: dict[str, Callable[[Problem, Tensor], Method]] = {
    "cg": lambda problem, running: _CG(problem, None, running),
    "minres": lambda problem, running: _MINRES(problem, None, running),
    "cgls": lambda problem, running: _CGLS(problem, None, running),
    "lsqr": lambda problem, running: _LSQR(problem, None, running),
    "lsmr": lambda problem, running: LSMR(problem, None, running),
    "craig": lambda problem, running: _CRAIG(problem, None, running),
}


class Crossings(TorchDispatchMode):
    """Operations that bring values from the host to the device or back: they wait, and no recording allows them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.found.append(str(func))
        return result


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_on_a_device_never_touches_the_host(name: str, damped: bool, preconditioned: bool) -> None:
    """With tensors on the meta device, which have no values: reading one fails, and what crosses over is counted."""
    weight = torch.ones(3, 3, 3, 3)
    A = lsconv.Conv2d(weight, in_size=(6, 5), padding=1, padding_mode="circular").to("meta")
    P = Diagonal(torch.ones(3, 6, 5)).to("meta")
    batch, device = torch.Size((2,)), torch.device("meta")
    damp = torch.ones(batch, dtype=torch.float64, device=device) if damped else None
    M = P if preconditioned else None
    N = P if preconditioned and name not in ("cg", "minres", "craig") else None
    no = torch.zeros(batch, dtype=torch.bool, device=device)
    problem = Problem(A, torch.ones(2, 3, 6, 5, device=device), None, damp, M, N, batch, no, no)
    for space in (problem.domain, problem.codomain):
        space.safe_norm = space.norm  # type: ignore[method-assign] # the start may look at its norms; here it cannot
    options = Options(Tolerances.of(torch.float32, None, 1e-9), 1000, 10, None, False, False)
    with torch.no_grad():
        method = METHODS[name](problem, ~no)
        monitor = Monitor(problem, options, torch.ones(batch, dtype=torch.float64, device=device), square=False)
        with Crossings() as crossings:
            for _ in range(2):
                method.step(monitor.running)
                monitor.count()
                monitor.test(method)
    assert crossings.found == []


def test_crossings_are_noticed() -> None:
    with Crossings() as crossings:
        torch.ones(2, device="meta") * torch.tensor(2.0)
    assert len(crossings.found) == 1
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.ones(2, device="meta").any())


# ---------------------------------------------------------------------- on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what CUDA graphs do."""
    counts = {"records": 0, "replays": 0}
    record = replay.CudaGraph.record

    def counting(self: replay.CudaGraph, body: Callable[[], None]) -> Callable[[], object]:
        repeat = record(self, body)
        counts["records"] += 1

        def counted() -> object:
            counts["replays"] += 1
            return repeat()

        return counted

    monkeypatch.setattr(replay.CudaGraph, "record", counting)
    return counts


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("options", [{}, {"damp": 0.1}], ids=["plain", "damp"])
@pytest.mark.parametrize("solver", [cg, minres, cgls, lsqr, lsmr, craig])
def test_a_solve_on_a_gpu_replays_a_graph(solver: Solver, options: dict[str, Any], graphs: dict[str, int]) -> None:
    """A convolution, Hermitian and definite, on a batch with one item that is solved at once."""
    if solver in (cg, minres):
        options = {}
    weight = torch.tensor([[[[0.0, -1, 0], [-1, 4.5, -1], [0, -1, 0]]]], device="cuda", dtype=torch.float64)
    A = lsconv.Conv2d(weight, in_size=(32, 32), padding=1)
    b = torch.randn(3, *A.out_shape, device="cuda", dtype=torch.float64)
    b[1] = 0
    solution = solver(A, b, **options)
    assert graphs["records"] >= 1
    assert graphs["replays"] > 10
    assert solution.converged.all()
    A.capturable = False
    counted = dict(graphs)
    plain = solver(A, b, **options)
    assert graphs == counted
    torch.testing.assert_close(solution.x, plain.x, rtol=1e-9, atol=1e-11)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("solver", [cg, minres, cgls, lsqr, lsmr, craig])
def test_no_synchronisation_inside_a_block_of_replays(solver: Solver, graphs: dict[str, int]) -> None:
    """From the third look on nothing may wait, and the fourth look is the first thing that does."""
    A = Diagonal(torch.logspace(0, -2, 5000, device="cuda"))
    before = 0

    def forbid(state: Any) -> None:
        nonlocal before
        if state.iteration == 30:
            before = graphs["replays"]
            torch.cuda.set_sync_debug_mode("error")

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            solver(A, torch.ones(5000, device="cuda"), rtol=0, check_every=10, callback=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert graphs["replays"] - before == 10


@pytest.mark.gpu
@needs_cuda
def test_an_operator_that_cannot_be_captured_after_all_is_iterated(graphs: dict[str, int]) -> None:
    """It promised to, and looks at a value all the same; torch goes on working after the refusal."""
    diagonal = torch.logspace(0, -2, 500, device="cuda", dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return diagonal * x if float(x.abs().amax()) >= 0 else x

    A = FromFunctions((500,), (500,), apply, apply, dtype=torch.float64, device="cuda", capturable=True)
    solution = cg(A, diagonal, rtol=1e-10)
    assert graphs == {"records": 0, "replays": 0}
    torch.testing.assert_close(solution.x, torch.ones_like(diagonal), rtol=1e-6, atol=1e-6)
    assert cg(Diagonal(diagonal), diagonal).converged
    assert graphs["replays"] > 0
