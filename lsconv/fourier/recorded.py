"""The maps of a border iteration without their launches.

An iteration applies two maps, the preconditioner and the operator on the border: thirty kernels, launched one by one
however little they compute. On a GPU each is recorded as a CUDA graph (:mod:`lsconv.krylov.replay`) when it is called
for the second time, and replayed from then on: two launches, and two copies into the recorded memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov import replay
from lsconv.krylov.followed import transforming

__all__ = ["RecordedMap", "recorder_for"]


def recorder_for(v: Tensor, work_bytes: int) -> replay.Recorder | None:
    """A recorder for maps of vectors like ``v``, where these may be and are worth being replayed.

    Args:
        v: a vector.
        work_bytes: of the arrays that a map makes of it; large ones outlast their launches.
    """
    make = replay.RECORDERS.get(v.device.type)
    if make is None or work_bytes > replay.LARGEST or type(v) is not Tensor:
        return None
    if transforming() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return None
    return make(v.device)


class RecordedMap:
    """A map of tensors of one shape, recorded when it is called again. A call overwrites the result of the one before.

    Args:
        function: the map, of operations on its device alone.
        recorder: what records.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], recorder: replay.Recorder) -> None:
        self.function, self._recorder = function, recorder
        self._next: Callable[[Tensor], Tensor] = self._first
        self._given: Tensor
        self._result: Tensor
        self._replay: Callable[[], object]

    def __call__(self, v: Tensor) -> Tensor:
        """The image of ``v``."""
        return self._next(v)

    def _first(self, v: Tensor) -> Tensor:
        self._next = self._record
        return self.function(v)

    def _record(self, v: Tensor) -> Tensor:
        self._given = v.clone()
        try:
            self._recorder.warm_up(self._body)
            self._replay = self._recorder.record(self._body)
        except RuntimeError:  # what CUDA refuses in a recording
            self._next = self.function
            return self.function(v)
        self._next = self._repeat
        return self._repeat(v)

    def _repeat(self, v: Tensor) -> Tensor:
        self._given.copy_(v)
        self._replay()
        return self._result

    def _body(self) -> None:
        self._result = self.function(self._given)
