"""Iterations on devices: what an iteration may not do in a recording, and CUDA graphs where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import lsconv
from lsconv.krylov.cg import _CG, cg
from lsconv.krylov.cgls import _CGLS, cgls
from lsconv.krylov.craig import _CRAIG, craig
from lsconv.krylov.loop import cuda_graph
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.monitor import Monitor
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.krylov.lsmr import LSMR, lsmr
from lsconv.krylov.lsqr import _LSQR, lsqr
from lsconv.krylov.minres import _MINRES, minres
from lsconv.operators.elementary import Diagonal, FromFunctions

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

Solver = Callable[..., Solution]
SPECTRUM = torch.linspace(1, 3, 12, dtype=torch.float64)


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
    problem = Problem(A, torch.ones(2, 3, 6, 5, device=device), None, damp, M, N, batch, no)
    vars(problem)["zero"] = no  # found before the iteration, by values
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


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts what CUDA graphs do."""
    counts = {"records": 0, "replays": 0}
    record = cuda_graph.CudaGraph.record

    def counting(self: cuda_graph.CudaGraph, body: Callable[[], None]) -> Callable[[], object]:
        repeat = record(self, body)
        counts["records"] += 1

        def counted() -> object:
            counts["replays"] += 1
            return repeat()

        return counted

    monkeypatch.setattr(cuda_graph.CudaGraph, "record", counting)
    monkeypatch.setitem(cuda_graph.RECORDERS, "cuda", cuda_graph.CudaGraph)
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
