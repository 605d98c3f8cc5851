"""The certificate of a whole problem, from norms that passes over its tiles have added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.tiled.passes import Norms

__all__ = ["Certificate", "joined"]


@dataclass(frozen=True)
class Certificate:
    """The judgement of one x, with the tests of :mod:`lsconv.krylov.loop.certificate`.

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
    def of(cls, norms: Norms, damp: float, norm: float, A: Convolution, tolerances: Tolerances) -> Certificate:
        """Judge an x.

        Args:
            norms: of x.
            damp: the damping.
            norm: a lower bound of ``||A||``.
            A: the convolution, in the dtype of the passes.
            tolerances: relative ones.
        """
        lower = max(norm, norms.image / norms.x if norms.x else 0.0)
        total = math.hypot(norms.residual, damp * norms.penalty)
        upper = max(float(norm_bound(A)), lower)
        rounding = 8 * torch.finfo(A.dtype).eps * upper * (upper * norms.x + norms.y)
        bound = max(math.hypot(lower, damp) * tolerances.rtol * total, rounding)
        status = Status.STAGNATION
        if norms.y == 0 and norms.x == 0:
            status = Status.ZERO
        elif total <= tolerances.residual_bound(norms.y):
            status = Status.RESIDUAL
        elif norms.gradient <= bound and total <= (1 + math.sqrt(tolerances.eps)) * norms.y:
            status = Status.GRADIENT
        elif not math.isfinite(total + norms.gradient):
            status = Status.NON_FINITE
        return cls(norms, status, bound)


def joined(
    certificates: Sequence[Certificate], x: Any, batch: tuple[int, ...], damp: float, device: torch.device
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
