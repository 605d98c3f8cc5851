"""Blurs that vary across the field, and their preconditioner as a matrix."""

from __future__ import annotations

from typing import Any

import torch

import lsconv
from lsconv.tiled.schwarz import SchwarzInverse

F64 = torch.float64


def blur(sigma: float, size: int = 7) -> torch.Tensor:
    profile = torch.exp(-0.5 * ((torch.arange(size, dtype=F64) - size // 2) / sigma) ** 2)
    return profile[:, None] * profile / profile.sum() ** 2


def field(n: int, padding: Any = 0, mode: str = "zeros", **options: Any) -> lsconv.VaryingConvolution:
    """A blur that grows across the field."""
    kernels = torch.stack([blur(0.7), blur(0.9), blur(0.9), blur(1.2)])
    positions = [(n / 4, n / 4), (n / 4, 3 * n / 4), (3 * n / 4, n / 4), (3 * n / 4, 3 * n / 4)]
    return lsconv.VaryingConvolution.from_grid(
        kernels, positions, (n, n), padding=padding, padding_mode=mode, **options
    )


def matrix(M: SchwarzInverse) -> torch.Tensor:
    """The matrix of the preconditioner."""
    n = M.A.in_numel
    rows = M(torch.eye(n, dtype=F64).reshape(n, *M.A.in_shape), 1e-8)
    return rows.reshape(n, n).mT
