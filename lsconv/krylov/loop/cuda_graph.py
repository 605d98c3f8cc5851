"""Iterations on a GPU without their launches: one iteration is recorded as a CUDA graph, and the rest replay it.

It is off until a GPU has shown its worth: ``RECORDERS["cuda"] = CudaGraph`` turns it on. An iteration launches many
small kernels, whatever they do. While the vectors are short the device waits for the host; a graph is one launch. It
repeats the recorded kernels on the recorded memory, so the state of the method has to stay where it is:
:class:`Recorded` gives every tensor of it a fixed place and lets the recorded iteration end by copying what is new into
the places. (Vectors are updated in place already, so none is copied but the two pairs that MINRES swaps, and what
preconditioners return.)

An iteration is recorded only where nothing can be lost:

* the operators say so (:attr:`~lsconv.operators.base.LinearOperator.capturable`), and the method
  (:attr:`Method.uniform`): every step launches the same operations on tensors of the same shapes. GMRES and the hybrid
  method do not, their bases grow.
* no function transform, no tracing, no tensor spread over devices.
* the first block of ``check_every`` iterations has not been enough.

What an iteration leaves behind is compared with what it found before it is recorded, so a step that counts in Python,
or changes a shape, goes on unrecorded. So does one whose recording fails. The iterates are the same in any case.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.monitor import Monitor
from lsconv.krylov.loop.problem import Problem
from lsconv.operators.transforms import transforming

__all__ = ["RECORDERS", "CudaGraph", "Recorded", "Recorder", "recorder_for"]

# One recording at a time: the beginning of another would synchronise the device, which the first forbids.
_RECORDING = threading.Lock()


class Recorder(Protocol):
    """A recorder of iterations."""

    def warm_up(self, body: Callable[[], None]) -> None:
        """Run the body once where it will be recorded."""

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Record the body without running it, and return what runs it."""


class CudaGraph:
    """Records on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def warm_up(self, body: Callable[[], None]) -> None:
        """Libraries allocate and choose on their first calls on a stream, which must not happen in a recording."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                body()
            torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, body: Callable[[], None]) -> Callable[[], object]:
        """Other threads may go on using the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # The outer context returns to the caller's stream after a recording that failed too, torch.cuda.graph does not.
        with (
            _RECORDING,
            torch.cuda.device(self.device),
            torch.cuda.stream(self.stream),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            body()
        replay: Callable[[], object] = graph.replay
        return replay


# The devices whose iterations are recorded, and by what.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {}


def recorder_for(problem: Problem, method: Method) -> Recorder | None:
    """A recorder, where the iterations of ``method`` may be and are worth being replayed."""
    A = problem.A
    make = RECORDERS.get(A.device.type)
    if make is None or problem.host_scalars or not method.uniform:
        return None
    if not all(P.capturable for P in (A, problem.M, problem.N) if P is not None):
        return None
    if type(problem.y) is not Tensor or transforming() or torch.compiler.is_compiling():
        return None
    return make(A.device)


class _IrregularError(Exception):
    """The iteration is not the same operation every time."""


class Recorded:
    """The iterations of a method, one a call: the first two as they are, the others replayed.

    Args:
        advance: one iteration: step, count, test.
        method: the method that it advances.
        monitor: the stopping tests that it runs; its newest row is the iteration's record.
        recorder: what records.
    """

    def __init__(self, advance: Callable[[], None], method: Method, monitor: Monitor, recorder: Recorder) -> None:
        self.advance, self.monitor, self.recorder = advance, monitor, recorder
        self.owners = _owners(method, monitor)
        self.next: Callable[[], None] = self._learn

    def __call__(self) -> None:
        """One iteration."""
        self.next()

    # ------------------------------------------------------------------ the three kinds of iteration

    def _learn(self) -> None:
        """An iteration as it is, which shows what changes in it."""
        before = self._state()
        self.advance()
        self._fix(before, self._state())
        self.next = self._warm_up

    def _warm_up(self) -> None:
        """The iteration that ends in the fixed places: once to see that it does, then once to record it."""
        try:
            self.recorder.warm_up(self._in_place)
        except _IrregularError:
            self.next = self.advance
            return
        self._keep_row()
        try:
            self.replay = self.recorder.record(self._in_place)
        except (RuntimeError, _IrregularError):  # what CUDA refuses in a recording, it has not done either
            self._return()
            self.next = self.advance
            return
        self.next = self._replay

    def _replay(self) -> None:
        self.replay()
        self._keep_row()

    # ------------------------------------------------------------------ the fixed places

    def _state(self) -> dict[tuple[int, str], Any]:
        """Every attribute that says where the method and the tests are."""
        return {
            (index, name): value
            for index, owner in enumerate(self.owners)
            for name, value in vars(owner).items()
            if value is None or isinstance(value, (Tensor, int, float, str))
        }

    def _fix(self, before: dict[tuple[int, str], Any], after: dict[tuple[int, str], Any]) -> None:
        """Give every tensor a place: the tensor itself where the iteration keeps it, a copy where it makes a new one.

        Attributes that hold one tensor before and after are one place: u and what it is normalised from.
        """
        groups: dict[tuple[int, int], list[tuple[int, str]]] = {}
        for key, value in after.items():
            if isinstance(value, Tensor):
                groups.setdefault((id(before.get(key)), id(value)), []).append(key)
        self.places: list[tuple[list[tuple[int, str]], Tensor]] = []
        self.kept: list[bool] = []
        for (old, new), keys in groups.items():
            value = after[keys[0]]
            self.places.append((keys, value if old == new else value.clone()))
            self.kept.append(old == new)
        self._return()
        row = self.monitor.rows[-1]
        self.numbers, self.running = torch.stack(row[:3]), row[3].clone()

    def _return(self) -> None:
        """Let the attributes hold their places again."""
        for keys, place in self.places:
            for index, name in keys:
                if getattr(self.owners[index], name) is not place:
                    setattr(self.owners[index], name, place)

    def _in_place(self) -> None:
        """One iteration, ending where it began."""
        before = self._state()
        self.advance()
        after = self._state()
        new = [after[keys[0]] for keys, _ in self.places]
        if not _alike(before, after) or any(
            any(after[key] is not value for key in keys) or (kept and value is not place)
            for (keys, place), value, kept in zip(self.places, new, self.kept, strict=True)
        ):
            raise _IrregularError
        *numbers, running = self.monitor.rows.pop()
        for number, kept in zip(numbers, self.numbers, strict=True):
            kept.copy_(number)
        self.running.copy_(running)
        storages = {place.untyped_storage().data_ptr() for _, place in self.places}
        moves = [(place, value) for (_, place), value in zip(self.places, new, strict=True) if value is not place]
        # What is new may lie in another place (two vectors that swap), which then must be read before it is written.
        moves = [(p, v.clone() if v.untyped_storage().data_ptr() in storages else v) for p, v in moves]
        for place, value in moves:
            place.copy_(value)
        self._return()

    def _keep_row(self) -> None:
        """The record of the iteration that has just been done, out of the reach of the next one."""
        residual, gradient, norm = self.numbers.clone().unbind()
        self.monitor.rows.append((residual, gradient, norm, self.running.clone()))


def _owners(*roots: object) -> list[object]:
    """The roots and every object in their attributes, but no operator (which can be called)."""
    found: list[object] = []
    waiting = list(roots)
    while waiting:
        owner = waiting.pop()
        if not any(owner is other for other in found):
            found.append(owner)
            waiting.extend(
                value
                for value in vars(owner).values()
                if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Tensor)
            )
    return found


def _alike(before: dict[tuple[int, str], Any], after: dict[tuple[int, str], Any]) -> bool:
    """Tell whether tensors kept their form and everything else its value."""
    return before.keys() == after.keys() and all(_form(before[key]) == _form(after[key]) for key in before)


def _form(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else (type(value), value)
