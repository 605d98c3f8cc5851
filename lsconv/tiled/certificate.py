"""The certificate of a whole problem, from norms that passes over its tiles have added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lsconv.krylov.loop.batched_scalars import unbounded
from lsconv.krylov.loop.certificate import Norms
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution, Status

__all__ = ["WholeCertificate", "joined"]


@dataclass(frozen=True)
class WholeCertificate:
    """The judgement of one x by the judge of all methods, with the steps that led to x.

    Attributes:
        norms: residual, gradient and the rest.
        status: why it is the answer, or is not.
        gradient_bound: what the gradient has to reach.
        iterations: outer steps.
    """

    norms: Norms
    status: Status
    gradient_bound: float
    iterations: int = 0

    @property
    def holds(self) -> bool:
        """Tell whether a test is met."""
        return self.status in (Status.RESIDUAL, Status.GRADIENT, Status.ZERO, Status.ROUNDED)

    @classmethod
    def of(cls, judge: Judge, norms: Norms) -> WholeCertificate:
        """Have an x of these norms judged."""
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


def joined(
    certificates: Sequence[WholeCertificate], x: Any, batch: tuple[int, ...], damp: float, device: torch.device
) -> Solution:
    """The solution of a batch."""

    def column(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device).reshape(batch)

    return Solution(
        x=x,
        codes=column([c.status.code for c in certificates], torch.int64),
        converged=column([c.holds for c in certificates], torch.bool),
        iterations=column([c.iterations for c in certificates], torch.int64),
        residual_norm=column([c.norms.residual for c in certificates], torch.float64),
        gradient_norm=column([c.norms.gradient for c in certificates], torch.float64),
        damp=column([damp] * len(certificates), torch.float64),
    )
