"""The small singular values of a factorised capacitance matrix S, their vectors, and the null space these stand for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["nearest_null", "small_singular_vectors", "static_lu"]

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


def nearest_null(sigma: Tensor, v: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of orthonormal lifts in the span of singular vectors of S, by falling nearness to the null space.

    Args:
        sigma: singular values of S, ``(blocks, k)``.
        v: their right (or left) vectors, ``(blocks, size, k)``.
        overlap: the inner products of their lifts, cropped nowhere.

    Returns:
        For each a bound of ``||A x|| / (||C|| ||x||)``, smallest first, as A lift(v) = -R_out C B_in^T S v; and the
        coordinates.
    """
    squares = overlap - torch.diag_embed(sigma**2).to(overlap.dtype)  # what the crop takes away is S v
    values, vectors = torch.linalg.eigh(squares)
    whiten = vectors * values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt().unsqueeze(-2)
    _, ratio, rows = torch.linalg.svd(sigma.unsqueeze(-1) * whiten)
    return ratio.flip(-1), (v @ (whiten @ rows.mH)).flip(-1)
