"""Settings for the tests below this folder, and what several of them watch an iteration with.

CUDA graphs without CUDA, for the tests of lsconv/krylov/replay.py and lsconv/fourier/recorded.py: a graph repeats
recorded kernels on recorded memory, with recorded numbers. So does :class:`Emulator`, with torch's operations for
kernels: recorded while one iteration runs, taken back then, and repeated on the same tensors, whatever Python does
meanwhile. What the iteration leaves lying about is spoiled before every repetition, so that nothing can come out of it
but what has been computed in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lsconv.krylov import replay
from lsconv.krylov.solution import Solution


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)


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
    """What records on the CPU, and counts."""

    recorders = records = replays = 0

    def __call__(self, device: torch.device) -> Emulator:
        """A recorder for the device: itself."""
        self.recorders += 1
        return self

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run it."""
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Run it, take everything back, and return what repeats it."""
        recording = Recording()
        try:
            with recording:
                body()
        finally:
            for tensor, original in reversed(recording.originals):
                tensor.copy_(original)
        self.records += 1

        def repeat() -> None:
            self.replays += 1
            spoil(recording)
            for func, args, kwargs, outputs in recording.calls:
                again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for output, value in zip(outputs, again, strict=True):
                    if output.data_ptr() != value.data_ptr():
                        output.copy_(value)

        return repeat

    def without(self, solve: Callable[[], Any]) -> Any:
        """What ``solve`` gives when nothing is recorded."""
        del replay.RECORDERS["cpu"]
        try:
            return solve()
        finally:
            replay.RECORDERS["cpu"] = self

    def assert_unchanged(self, solution: Solution, solve: Callable[[], Solution]) -> None:
        """Every tensor of the solution, and its history, is bit for bit what it is when nothing is recorded."""
        plain = self.without(solve)
        for name in ("x", "codes", "converged", "iterations", "residual_norm", "gradient_norm"):
            torch.testing.assert_close(getattr(solution, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)
        for name in ("residual_norm", "gradient_norm", "operator_norm"):
            one, other = getattr(solution.history, name), getattr(plain.history, name)
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def spoil(recording: Recording) -> None:
    """Garbage in everything that the recorded operations made."""
    for *_, outputs in recording.calls:
        for output in outputs:
            if output.untyped_storage().data_ptr() in recording.inside:
                output.fill_(True if output.dtype == torch.bool else 77)


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Emulator:
    """Iterations on the CPU are recorded by it."""
    made = Emulator()
    monkeypatch.setitem(replay.RECORDERS, "cpu", made)
    return made


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        self.count += func in waits
        return func(*args, **(kwargs or {}))


@pytest.fixture
def host_reads() -> type[HostReads]:
    """What counts them."""
    return HostReads
