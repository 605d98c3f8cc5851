"""What an iteration costs beyond one A and one A^H: memory, operator calls, host synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

Solver = Callable[..., Solution]
M, N = 6000, 5000


class Buffers:
    """A diagonal M x N operator that writes into buffers of its own, and counts its calls."""

    def __init__(self) -> None:
        self.y, self.x = torch.zeros(M), torch.zeros(N)
        self.diagonal = torch.logspace(0, -2, N)
        self.calls = {"apply": 0, "adjoint": 0}
        self.operator = FromFunctions((N,), (M,), self.apply, self.adjoint)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["apply"] += 1
        torch.mul(self.diagonal, x, out=self.y[:N])
        return self.y

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        self.calls["adjoint"] += 1
        return torch.mul(self.diagonal, y[:N], out=self.x)


class Allocations(TorchDispatchMode):
    """Vectors (of N or of M numbers) that come into being while the mode is on, views and buffers left out."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.numel() >= N // 2:
            pointer = result.untyped_storage().data_ptr()
            if pointer not in storages and result.element_size() >= 4:
                self.made.append(result.numel())
        return result


def vectors_made(solver: Solver, iterations: int) -> list[int]:
    buffers, b = Buffers(), torch.linspace(1, 2, M)
    with Allocations() as allocations:
        solver(buffers.operator, b, max_iter=iterations, rtol=0)
    return allocations.made


@pytest.mark.parametrize("solver", [cgls, lsqr, lsmr])
def test_an_iteration_allocates_no_vector(solver: Solver) -> None:
    assert vectors_made(solver, 25) == vectors_made(solver, 5)


def held(solver: Solver) -> tuple[int, int]:
    """How many n-vectors and m-vectors a method's state holds in the middle of a solve."""
    import gc

    counts = (0, 0)
    buffers, b = Buffers(), torch.linspace(1, 2, M)
    own = {t.untyped_storage().data_ptr() for t in (buffers.x, buffers.y, buffers.diagonal, b)}

    def look(state: Any) -> bool:
        nonlocal counts
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.dtype == torch.float32
        }
        sizes = [size for pointer, size in found.items() if pointer not in own]
        counts = sizes.count(N), sizes.count(M)
        return state.iteration >= 4

    gc.collect()
    solver(buffers.operator, b, callback=look, rtol=0)
    return counts


@pytest.mark.parametrize("solver, n_vectors, m_vectors", [(lsqr, 3, 1), (lsmr, 4, 1), (craig, 2, 1), (cgls, 2, 1)])
def test_vectors_held_are_those_of_the_specification(solver: Solver, n_vectors: int, m_vectors: int) -> None:
    assert held(solver) == (n_vectors, m_vectors)


@pytest.mark.parametrize("solver", [cgls, lsqr, lsmr])
def test_an_iteration_applies_each_operator_once(solver: Solver) -> None:
    counts = []
    for iterations in (5, 25):
        buffers = Buffers()
        solver(buffers.operator, torch.linspace(1, 2, M), max_iter=iterations, rtol=0)
        counts.append((buffers.calls["apply"], buffers.calls["adjoint"]))
    assert (counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]) == (20, 20)


@pytest.mark.parametrize("solver", [cg, minres, gmres, cgls, lsqr, lsmr, craig, hybrid])
def test_the_host_reads_once_per_check(solver: Solver, host_reads: Any) -> None:
    """Of a batch, as on a GPU: the scalars of a single item on the CPU are the host's own."""
    A = Diagonal(torch.logspace(0, -3, 200, dtype=torch.float64))
    # Almost no noise, so almost no damping, which would end the iteration early.
    options = {"rule": "discrepancy", "noise_std": 1e-9} if solver is hybrid else {}
    counts = []
    for iterations in (20, 40):
        with host_reads() as reads:
            solver(A, torch.linspace(1, 2, 400, dtype=torch.float64).reshape(2, 200), max_iter=iterations, rtol=0,
                   check_every=10, **options)  # fmt: skip
        counts.append(reads.count)
    assert counts[1] - counts[0] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [cg, minres, gmres, cgls, lsqr, lsmr, craig])
def test_no_synchronisation_inside_a_block_on_a_gpu(solver: Solver) -> None:
    """The callback runs where the host has just looked; from there on the next look is the first thing that waits."""
    diagonal = torch.logspace(0, -2, N, device="cuda")
    applied = 0

    def apply(x: torch.Tensor) -> torch.Tensor:
        nonlocal applied
        applied += 1
        return diagonal * x

    def forbid(state: Any) -> None:
        nonlocal applied
        applied = 0
        torch.cuda.set_sync_debug_mode("error")

    A = FromFunctions((N,), (N,), apply, lambda y: diagonal * y, device="cuda")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            solver(A, torch.ones(N, device="cuda"), rtol=0, check_every=10, callback=forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert applied == 10
