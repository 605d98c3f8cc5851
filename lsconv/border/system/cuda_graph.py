"""The maps of a border iteration without their launches.

An iteration applies two maps, the preconditioner and the operator on the border: thirty kernels, launched one by one
however little they compute. On a GPU each is recorded as a CUDA graph (:mod:`lsconv.krylov.loop.cuda_graph`) when it
has been called a few times, and replayed from then on: two launches, and two copies into the recorded memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.krylov.loop import cuda_graph
from lsconv.operators.transforms import transforming

__all__ = ["RecordedMap", "recordable"]

# Calls before a map is recorded. A recording waits for the device and costs some milliseconds, a hundred or so calls
# without launches: not for one quick solve. (Reckoned, not measured.)
_CALLS = 20


def recordable(v: Tensor, work_bytes: int) -> bool:
    """Whether maps of vectors like ``v`` may be, and are worth being, replayed.

    Args:
        v: a vector.
        work_bytes: of the arrays that a map makes of it; large ones outlast their launches.
    """
    if v.device.type not in cuda_graph.RECORDERS or work_bytes > cuda_graph.LARGEST or type(v) is not Tensor:
        return False
    return not (transforming() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled())


class RecordedMap:
    """A map of tensors of one shape, recorded after some calls. A call overwrites the result of the one before.

    Args:
        function: the map, of operations on its device alone, on memory that it keeps.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self._calls = function, 0
        self._given: Tensor
        self._result: Tensor
        self._replay: Callable[[], object] | None = None

    @property
    def recorded(self) -> bool:
        """Whether it is replayed."""
        return self._replay is not None

    def __call__(self, v: Tensor) -> Tensor:
        """The image of ``v``."""
        self._calls += 1
        if self._calls == _CALLS:
            self._record(v)
        if self._replay is None:
            return self.function(v)
        self._given.copy_(v)
        self._replay()
        return self._result

    def _record(self, v: Tensor) -> None:
        self._given = v.clone()
        recorder = cuda_graph.RECORDERS[v.device.type](v.device)
        try:
            recorder.warm_up(self._body)
            self._replay = recorder.record(self._body)
        except RuntimeError:  # what CUDA refuses in a recording
            del self._given

    def _body(self) -> None:
        self._result = self.function(self._given)
