"""Problems of the tiled plan, and their answers on one device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv

F64 = torch.float64


KERNELS = {
    "gauss": lsconv.psf.gaussian(2.0, size=15).to(F64),
    "box": torch.full((9, 9), 1 / 81, dtype=F64),
    "motion": lsconv.psf.motion(15, 30.0).to(F64),
}


BOUNDARIES: dict[str, dict[str, Any]] = {
    "valid": {},
    "same": {"padding": "same"},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


def exact(A: lsconv.Convolution, y: Tensor, damp: float, L: lsconv.LinearOperator | None = None) -> Tensor:
    """The answer of one device, in double precision and to a tighter tolerance than the tiles'."""
    A, y = A.to(dtype=F64), y.to(F64)
    L = None if L is None else L.to(dtype=F64)
    return lsconv.tikhonov(A, y, damp, L=L, rtol=1e-13).x


def error(x: Any, reference: Tensor) -> float:
    return float((torch.as_tensor(np.asarray(x)).to(F64) - reference).norm() / reference.norm())


def problem(name: str, boundary: str, size: tuple[int, ...], dtype: torch.dtype = F64) -> tuple[Any, Tensor]:
    A = lsconv.Conv2d(KERNELS[name][None, None].to(dtype), size, **BOUNDARIES[boundary])
    return A, torch.randn(1, *A.spatial_out, generator=torch.Generator().manual_seed(1), dtype=dtype)


def check(A: Any, y: Tensor, damp: float, *, L: Any = None, **options: Any) -> Any:
    """Solve by tiles, and compare answer and certificate with those of one device."""
    plan = lsconv.tiled.Plan(A, damp=damp, L=L, **options)
    solution = plan.solve(y)
    reference = exact(A, y, damp, L)
    assert bool(solution.converged.all()), solution
    # rounding of the residual alone, relative to ||A||, moves x by eps over the smallest eigenvalue of A^H A + damp^2
    rounding = 10 * torch.finfo(F64).eps / damp**2
    assert error(solution.x, reference) <= (max(1e-10, rounding) if A.dtype == F64 else 1e-6)
    wide = A.to(dtype=F64)
    residual = y.to(F64) - wide(solution.x.to(F64))
    items = tuple(range(-A.ndim - 1, 0))
    torch.testing.assert_close(solution.residual_norm, torch.linalg.vector_norm(residual, dim=items))
    return plan, solution
