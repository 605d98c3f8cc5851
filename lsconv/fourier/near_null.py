"""The small singular values of a matrix that has been factorised, and their singular vectors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["small_singular_vectors", "static_lu"]

_STEPS = 2


class _Solve(Protocol):
    def __call__(self, b: Tensor, *, adjoint: bool) -> Tensor: ...


def static_lu(matrices: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The LU factors and pivots of matrices ``(blocks, size, size)``, which may be singular.

    Pivots below the rounding of ``scale``, one per block, are raised to it (static pivoting), so that a solve with a
    singular matrix ends in large numbers along its null vectors, which is how these are found, and not in infinity.
    """
    factors, pivots, _ = torch.linalg.lu_factor_ex(matrices)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    size = diagonal.abs()
    least = torch.finfo(factors.dtype).eps * scale[:, None]
    diagonal.copy_(torch.where(size < least, least.to(diagonal.dtype), diagonal))
    return factors, pivots


def small_singular_vectors(solve: _Solve, factors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` smallest singular values, by block inverse iteration with :math:`(S^H S)^{-1}`.

    Args:
        solve: :math:`S^{-1} b`, or :math:`S^{-H} b`, for ``b`` of shape ``(blocks, size, count)``.
        factors: a tensor ``(blocks, size, size)`` of the dtype and device of S.
        count: how many; those at the end are the least accurate.

    Returns:
        The singular values ``(blocks, count)``, smallest first, and left and right vectors ``(blocks, size, count)``.

    Source:
        Golub and Van Loan, Matrix Computations, 4th ed., section 8.2 (orthogonal iteration), on the inverse.
    """
    blocks, size = factors.shape[:2]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(blocks, size, count, generator=generator, dtype=factors.dtype).to(factors.device)
    for _ in range(_STEPS):
        for adjoint in (True, False):
            v = torch.linalg.qr(solve(v, adjoint=adjoint)).Q
    left, inverse, rows = torch.linalg.svd(solve(v, adjoint=True), full_matrices=False)
    return inverse.reciprocal(), left, v @ rows.mH
