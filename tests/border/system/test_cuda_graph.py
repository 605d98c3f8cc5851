"""The maps of a border iteration that are recorded and replayed give what they give by themselves, bit for bit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.normal_inverse import NormalInverse
from lsconv.border.plan import BorderPlan
from lsconv.border.system import cuda_graph, schwarz
from lsconv.border.system.cost_model import Effort
from lsconv.border.system.cuda_graph import RecordedMap
from lsconv.border.system.krylov import conjugate_gradients, gmres
from lsconv.krylov.loop import cuda_graph as loop_cuda_graph

pytestmark = pytest.mark.usefixtures("iterated")

F64 = torch.float64


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are recorded at their second call."""
    monkeypatch.setattr(cuda_graph, "_CALLS", 2)


@pytest.fixture
def iterating(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small images too, and without a way out."""
    monkeypatch.setattr(schwarz, "_DENSE_UNKNOWNS", 0)
    monkeypatch.setattr(Effort, "ends", lambda *_: False)
    monkeypatch.setattr(Effort, "overdue", lambda *_: False)


CASES: dict[str, tuple[tuple[int, ...], int, float]] = {
    "valid": ((3, 3, 3, 3), 0, 0.05),
    "valid, wide": ((2, 4, 3, 3), 0, 0.0),
    "full": ((3, 2, 3, 3), 2, 0.05),
    "same": ((1, 1, 5, 5), 2, 0.05),
}


def _operator(name: str, device: str = "cpu") -> tuple[lsconv.Convolution, float]:
    shape, padding, damp = CASES[name]
    weight = torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    return lsconv.Conv2d(weight.to(device), (24, 24), padding=padding), damp


def _data(A: lsconv.Convolution, *batch: int) -> Tensor:
    data = torch.randn(*batch, *A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    return data.to(A.device)


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("crossings", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_solve_is_what_it_is_without_recordings(emulator: Any, name: str, crossings: bool) -> None:
    A, damp = _operator(name)
    inverse = NormalInverse(A, damp, floor=1e-6, crossings=crossings)
    f = _data(A, 2) if inverse.side == "residual" else A.adjoint(_data(A, 2))
    replayed = [inverse(f, 1e-8) for _ in range(2)]
    assert emulator.records == 2  # the preconditioner and the product, once
    assert emulator.replays > int(replayed[0][1].max())
    again = NormalInverse(A, damp, floor=1e-6, crossings=crossings)
    plain = emulator.without(lambda: [again(f, 1e-8) for _ in range(2)])
    for (z, count), (expected, expected_count) in zip(replayed, plain, strict=True):
        assert torch.equal(z, expected)
        assert torch.equal(count, expected_count)


@pytest.mark.usefixtures("iterating")
def test_recordings_of_two_shapes_are_kept(emulator: Any) -> None:
    A, damp = _operator("valid")
    plan = BorderPlan(A, damp)
    for batch, records in (((), 2), ((), 2), ((3,), 4), ((), 4), ((3,), 4), ((2,), 6), ((3,), 6), ((), 8)):
        assert bool(plan.solve(_data(A, *batch)).converged.all())
        assert emulator.records == records


@pytest.mark.usefixtures("iterating")
def test_long_vectors_are_not_recorded(monkeypatch: pytest.MonkeyPatch, emulator: Any) -> None:
    A, damp = _operator("valid")
    monkeypatch.setattr(loop_cuda_graph, "LARGEST", 3 * 24 * 24 * 8 - 1)
    plan = BorderPlan(A, damp)
    assert plan.inverse.embedding.grid == (24, 24)
    plan.solve(_data(A))
    assert emulator.records == 0
    monkeypatch.setattr(loop_cuda_graph, "LARGEST", 3 * 24 * 24 * 8)
    plan.solve(_data(A))
    assert emulator.records == 2


@pytest.mark.usefixtures("iterating")
def test_copies_and_threads_have_recordings_of_their_own(emulator: Any) -> None:
    A, damp = _operator("valid")
    plan = BorderPlan(A, damp)
    y = _data(A)
    expected = emulator.without(lambda: BorderPlan(A, damp).solve(y).x)
    plan.solve(y)
    other = copy.deepcopy(plan)
    torch.testing.assert_close(other.solve(2 * y).x, 2 * expected, rtol=1e-9, atol=1e-11)
    assert emulator.records == 4
    with ThreadPoolExecutor(1) as pool:  # while this thread has taken the plan's
        maps = plan.inverse.on_border._take_maps(torch.empty(1, 1, plan.inverse.border.size, dtype=F64))
        assert isinstance(maps.apply, RecordedMap)
        assert maps.apply.recorded
        torch.testing.assert_close(pool.submit(plan.solve, 3 * y).result().x, 3 * expected, rtol=1e-9, atol=1e-11)
    assert emulator.records == 6


def test_a_map_gives_what_its_function_does(monkeypatch: pytest.MonkeyPatch, emulator: Any) -> None:
    monkeypatch.setattr(cuda_graph, "_CALLS", 3)
    matrix = torch.randn(6, 6, dtype=F64)
    image = RecordedMap(lambda v: torch.fft.irfft(torch.fft.rfft(v @ matrix), n=6))
    given = torch.randn(6, 4, 6, dtype=F64)
    for result, v in [(image(v).clone(), v) for v in given]:
        torch.testing.assert_close(result, v @ matrix)
    assert (emulator.records, emulator.replays) == (1, 4)


def test_what_cannot_be_recorded_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def warm_up(self, body: Callable[[], None]) -> None:
            body()

        def record(self, body: Callable[[], None]) -> Callable[[], object]:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(loop_cuda_graph.RECORDERS, "cpu", lambda device: Refusing())
    image = RecordedMap(lambda v: 2 * v)
    for scale in (1.0, 2.0, 3.0):
        assert torch.equal(image(torch.full((3,), scale)), torch.full((3,), 2 * scale))
    assert not image.recorded


@pytest.mark.usefixtures("iterating", "emulator")
def test_a_plan_and_its_recordings_go_with_their_last_reference() -> None:
    A, damp = _operator("valid")
    plan = BorderPlan(A, damp)
    plan.solve(_data(A))
    maps = next(iter(plan.inverse.on_border._maps.values()))
    kept = [weakref.ref(thing) for thing in (maps, maps.apply, plan.inverse.schwarz.sum, plan.inverse.system)]
    gc.collect()
    gc.disable()
    try:
        del plan, maps
        assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()


# ---------------------------------------------------------------------- what waits for a device


@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("iteration", [conjugate_gradients, gmres])
@pytest.mark.parametrize("name", ["valid", "full"])
def test_the_host_reads_once_per_check(host_reads: Any, iteration: Any, name: str) -> None:
    A, damp = _operator(name)
    inverse = NormalInverse(A, damp, floor=1e-6, crossings=iteration is gmres)
    b = torch.randn(2, 1, inverse.border.size, dtype=F64)
    system, counts = inverse.on_border, []
    for iterations in (20, 40):
        with host_reads() as reads:
            iteration(system, inverse.schwarz, b, 0.0 * b[..., :1], iterations, 10)
        counts.append(reads.count)
    assert counts[1] - counts[0] == 2


@pytest.mark.gpu
@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("name", CASES)
def test_a_solve_on_a_gpu_replays_graphs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    A, damp = _operator(name, "cuda")
    plan, y = BorderPlan(A, damp), _data(A, 2)
    solution = plan.solve(y, rtol=1e-12)
    maps = next(iter(plan.inverse.on_border._maps.values()))
    for each in (maps.apply, maps.precondition):
        assert isinstance(each, RecordedMap)
        assert each.recorded
    monkeypatch.setattr(loop_cuda_graph, "RECORDERS", {})
    plain = BorderPlan(A, damp).solve(y, rtol=1e-12)
    torch.testing.assert_close(solution.x, plain.x, rtol=1e-6, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.usefixtures("iterating")
@pytest.mark.parametrize("iteration", [conjugate_gradients, gmres])
@pytest.mark.parametrize("name", ["valid", "full"])
def test_no_synchronisation_between_two_looks_on_a_gpu(iteration: Any, name: str) -> None:
    A, damp = _operator(name, "cuda")
    inverse = NormalInverse(A, damp, floor=1e-6, crossings=iteration is gmres)
    b = torch.randn(2, 1, inverse.border.size, dtype=F64, device="cuda")
    applied = 0

    def apply(v: Tensor) -> Tensor:
        nonlocal applied
        applied += 1
        if applied == 11:  # the host has looked after ten, and will after twenty
            torch.cuda.set_sync_debug_mode("error")
        return inverse.on_border(v)

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            iteration(apply, inverse.schwarz, b, 0.0 * b[..., :1], 40, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert applied == 20
