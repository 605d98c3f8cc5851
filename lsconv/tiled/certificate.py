"""The certificate of the whole problem, from norms summed over the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lsconv.krylov.loop.batched_scalars import unbounded
from lsconv.krylov.loop.certificate import Norms
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution, Status

__all__ = ["WholeCertificate", "batch_solution"]


@dataclass(frozen=True)
class WholeCertificate:
    """The certificate of one approximate solution x of the whole problem.

    Attributes:
        norms: the norms of y, x, residual, gradient and penalty, summed over all tiles.
        status: the test that x meets, or the reason why it meets none.
        gradient_bound: the largest gradient norm that passes the test.
        iterations: steps of the outer iteration that led to x.
    """

    norms: Norms
    status: Status
    gradient_bound: float
    iterations: int = 0

    @property
    def holds(self) -> bool:
        """Tell whether x has passed one of the tests."""
        return self.status in (Status.RESIDUAL, Status.GRADIENT, Status.ZERO, Status.ROUNDED)

    @classmethod
    def of(cls, judge: Judge, norms: Norms) -> WholeCertificate:
        """Apply the tests of ``judge`` to the norms of an x."""
        found = judge.certificate_of(norms)
        status = Status.STAGNATION
        if norms.y == 0 and norms.x == 0:
            status = Status.ZERO
        elif found.residual_ok:
            status = Status.RESIDUAL
        elif found.gradient_ok:
            status = Status.GRADIENT
        elif unbounded(found.objective + norms.gradient):
            status = Status.NON_FINITE
        return cls(norms, status, found.gradient_bound)


def batch_solution(
    x: Any,
    batch: tuple[int, ...],
    device: torch.device,
    *,
    codes: Sequence[int],
    converged: Sequence[bool],
    iterations: Sequence[int],
    residual_norm: Sequence[float],
    gradient_norm: Sequence[float],
    damp: float,
) -> Solution:
    """Make the :class:`Solution` of all batch items, from their x and numbers."""

    def per_item(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device).reshape(batch)

    return Solution(
        x=x,
        codes=per_item(codes, torch.int64),
        converged=per_item(converged, torch.bool),
        iterations=per_item(iterations, torch.int64),
        residual_norm=per_item(residual_norm, torch.float64),
        gradient_norm=per_item(gradient_norm, torch.float64),
        damp=per_item([damp] * len(codes), torch.float64),
    )
