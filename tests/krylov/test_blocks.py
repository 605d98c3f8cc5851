"""Inside a block of ``check_every`` iterations nothing waits for a device; compiled operators and CUDA graphs.

A single item on the CPU has nothing to wait for and is left out here: batches of two stand for what a GPU gets.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lsconv
from lsconv.krylov.cg import cg
from lsconv.krylov.cgls import cgls
from lsconv.krylov.craig import craig
from lsconv.krylov.gmres import gmres
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres
from lsconv.operators.elementary import Diagonal, FromFunctions

Solver = Callable[..., Solution]
BLOCK = 6
# Each of these makes the host wait for the device, or needs a value there.
WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}


class HostReads(TorchDispatchMode):
    """Fails on an operation that waits, except where ``allowed``."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed = True
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS and not self.allowed:
            self.refused.append(str(func))
        return func(*args, **(kwargs or {}))


def reads_inside_blocks(solver: Solver, **options: Any) -> tuple[list[str], int]:
    """What was read between the first operator call of a block and its last, and the number of blocks.

    The callback runs at the look between two blocks, so a block is what the ``BLOCK`` steps after a callback do.
    """
    diagonal = torch.logspace(0, -3, 200, dtype=torch.float64)
    reads, blocks, calls = HostReads(), 0, 0

    def apply(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == BLOCK:
            # The last A of the block: what is left of this step is looked at by the counting test of test_cost.py.
            reads.allowed = True
        return diagonal * x

    def look(state: Any) -> None:
        nonlocal blocks, calls
        blocks, calls = blocks + 1, 0
        reads.allowed = False

    A = FromFunctions((200,), (200,), apply, lambda y: diagonal * y, dtype=torch.float64)
    with reads, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver(A, torch.linspace(1, 2, 400, dtype=torch.float64).reshape(2, 200), rtol=0, max_iter=4 * BLOCK,
               check_every=BLOCK, callback=look, **options)  # fmt: skip
    return reads.refused, blocks


@pytest.mark.parametrize("solver", [cg, minres, gmres, cgls, lsqr, lsmr, craig])
def test_no_value_is_read_by_the_host_inside_a_block(solver: Solver) -> None:
    assert reads_inside_blocks(solver) == ([], 4)


def test_no_value_is_read_inside_a_block_of_gmres_that_restarts() -> None:
    assert reads_inside_blocks(gmres, restart=4) == ([], 4)


@pytest.mark.parametrize("rule", ["gcv", "discrepancy"])
def test_no_value_is_read_inside_a_block_of_hybrid(rule: str) -> None:
    """Its SVD looks at an error code on a GPU, inside torch, and there alone."""
    refused, blocks = reads_inside_blocks(hybrid, rule=rule, noise_std=1e-9 if rule == "discrepancy" else None)
    assert refused == []
    assert blocks >= 2


@pytest.mark.parametrize("solver", [cgls, lsqr, lsmr])
def test_no_value_is_read_inside_a_block_of_a_damped_problem(solver: Solver) -> None:
    assert reads_inside_blocks(solver, damp=1e-2) == ([], 4)


@pytest.mark.parametrize("side", ["M", "N"])
@pytest.mark.parametrize("solver", [cgls, lsqr, lsmr])
def test_no_value_is_read_inside_a_block_with_a_preconditioner(solver: Solver, side: str) -> None:
    preconditioner = Diagonal(torch.linspace(1, 2, 200, dtype=torch.float64))
    assert reads_inside_blocks(solver, **{side: preconditioner}) == ([], 4)


def test_the_counter_notices_a_read() -> None:
    """The oracle of the tests above: an operator that branches on a value is caught."""
    diagonal = torch.ones(5)
    with HostReads() as reads:
        reads.allowed = False
        if diagonal.sum() > 0:
            diagonal = diagonal + 1
    assert len(reads.refused) == 1


# ---------------------------------------------------------------------- compiled operators


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="no C++ compiler for torch.compile")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("solver", [lsmr, lsqr])
def test_a_compiled_operator_gives_the_same_solution(solver: Solver) -> None:
    A = lsconv.Conv2d(torch.randn(3, 2, 3, 3, dtype=torch.float64), in_size=(12, 11))
    compiled = FromFunctions(
        A.in_shape, A.out_shape, torch.compile(A.apply), torch.compile(A.adjoint), dtype=torch.float64
    )
    y = torch.randn(2, *A.out_shape, dtype=torch.float64)
    plain, solution = solver(A, y, damp=0.1), solver(compiled, y, damp=0.1)
    assert solution.converged.all()
    torch.testing.assert_close(solution.x, plain.x, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("solver", [lsmr, gmres])
def test_an_operator_compiled_without_code_generation_gives_the_same_solution(solver: Solver) -> None:
    """The graph capture of torch.compile alone, which needs no C++ compiler."""
    matrix = torch.randn(20, 20, dtype=torch.float64) / 20 + torch.eye(20, dtype=torch.float64)

    def apply(x: torch.Tensor) -> torch.Tensor:
        return x @ matrix.mT

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        return y @ matrix

    compiled = FromFunctions(
        (20,), (20,), torch.compile(apply, backend="eager"), torch.compile(adjoint, backend="eager"),
        dtype=torch.float64,
    )  # fmt: skip
    y = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(
        solver(compiled, y).x, torch.linalg.solve(matrix, y[..., None])[..., 0], rtol=1e-8, atol=1e-9
    )


# ---------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("build", ["lsqr", "lsmr"])
def test_a_step_is_captured_as_a_cuda_graph(build: str) -> None:
    """Capturing forbids every synchronisation and every allocation outside the graph's pool."""
    from lsconv.krylov import lsmr as lsmr_module
    from lsconv.krylov import lsqr as lsqr_module
    from lsconv.krylov.loop.problem import prepare

    method_class: Any = lsqr_module._LSQR if build == "lsqr" else lsmr_module.LSMR
    diagonal = torch.logspace(0, -2, 500, device="cuda", dtype=torch.float64)
    problem = prepare(Diagonal(diagonal), torch.ones(500, device="cuda", dtype=torch.float64))
    running = torch.ones((), dtype=torch.bool, device="cuda")
    with torch.no_grad():
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):  # type: ignore[no-untyped-call]
            method = method_class(problem, None, running)
            method.step(running)
            torch.cuda.synchronize()
            expected = method_class(problem, None, running)
            for _ in range(2):
                expected.step(running)
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            method.step(running)
        graph.replay()
        torch.cuda.synchronize()
    torch.testing.assert_close(method.solution(), expected.solution(), rtol=1e-10, atol=1e-12)
