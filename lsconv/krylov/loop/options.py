"""The arguments of an iteration that all methods have, and the state that a callback gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.problem import Problem

__all__ = ["IterationState", "Options"]


@dataclass(eq=False)
class IterationState:
    """The state that a callback gets, every ``check_every`` iterations.

    Attributes:
        iteration: iterations done since the last (re)start.
        running: items that still iterate, ``batch``.
        residual_norm: the method's estimate, ``batch``.
        gradient_norm: the method's estimate, ``batch``.
        x: the current iterate (computed when asked for).
    """

    iteration: int
    running: Tensor
    residual_norm: Tensor
    gradient_norm: Tensor
    _solution: Callable[[], Tensor] = field(repr=False)

    @property
    def x(self) -> Tensor:
        """The current iterate."""
        return self._solution()


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of an iteration that are common to all methods."""

    tolerances: Tolerances
    max_iter: int
    check_every: int
    callback: Callable[[IterationState], bool | None] | None
    progress: bool
    raise_on_failure: bool

    @classmethod
    def of(
        cls,
        problem: Problem,
        *,
        rtol: float | None,
        atol: float,
        conlim: float | None = None,
        max_iter: int | None,
        check_every: int | None,
        callback: Callable[[IterationState], bool | None] | None,
        progress: bool,
        raise_on_failure: bool,
    ) -> Options:
        """Fill in the defaults and check the values.

        Raises:
            ArgumentError: for a negative limit or tolerance.
        """
        A = problem.A
        if max_iter is None:
            size = min(math.prod(A.in_shape), math.prod(A.out_shape))
            max_iter = max(500, min(4 * size, 10_000))
        if max_iter < 0:
            raise ArgumentError(f"max_iter: expected a number >= 0, got {max_iter}")
        if check_every is None:
            check_every = 1 if A.device.type == "cpu" else 10
        if check_every < 1:
            raise ArgumentError(f"check_every: expected a number >= 1, got {check_every}")
        tolerances = Tolerances.of(A.dtype, rtol, atol, conlim)
        return cls(tolerances, int(max_iter), int(check_every), callback, progress, raise_on_failure)
