"""The small singular values of a factorised capacitance matrix S, their vectors, and the null space these stand for."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lsconv.border.border_set import Border, between_borders
from lsconv.fourier.batched_linalg import lu_factor_in_place
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["Overlap", "nearest_null", "orthonormalised", "small_singular_vectors", "static_lu"]

_STEPS = 2
# Below so many eps of the largest an eigenvalue is taken for the rounding of zero.
_ROUNDING = 1e3
# Relative to the largest, the least singular value of S on the directions that no lift shows.
_LEAST_MOVED = 1e-10


class _Solve(Protocol):
    def __call__(self, b: Tensor, *, adjoint: bool) -> Tensor: ...


def static_lu(matrices: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The LU factors and pivots of matrices ``(blocks, size, size)``, which may be singular, in their storage.

    Pivots below the rounding of ``scale``, one per block, are raised to it (static pivoting), so that a solve with a
    singular matrix ends in large numbers along its null vectors, which is how these are found, and not in infinity.
    """
    factors, pivots, _ = lu_factor_in_place(matrices)
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


class Overlap:
    r"""The inner products of the lifts of border vectors, cropped nowhere: :math:`P = B C^{-H} C^{-1} B^T`.

    By Parseval those of few vectors V need one transform each and no picture,

    .. math:: V^H P V = \frac{1}{N} \sum_\omega \hat L(\omega)^H \hat L(\omega), \qquad
              \hat L(\omega) = S(\omega)^{-1} (F B^T V)(\omega) .

    For more of them than there are channels, whose kernel takes as many transforms, P itself is made. (32 channels,
    3x3, 96², 8 vectors, on one core: 0.15 s, and 2.6 s by P.)

    Args:
        inverse: C^-1.
        border: the cells lifted from.
    """

    def __init__(self, inverse: FrequencyMatrices, border: Border) -> None:
        self.inverse, self.border = inverse, border
        self._dense: Tensor | None = None

    def between(self, v: Tensor) -> Tensor:
        """``V^H P V`` for ``(blocks, size, k)``."""
        grid, k = self.inverse.grid, v.shape[-1]
        if k > self.border.channels:
            return v.mH @ self(v)
        spectra = self.inverse(grid.transform(self.border.scatter(v.movedim(-1, 0))))
        weights = grid.weights(v.device, v.real.dtype).div_(math.prod(grid.sizes)).sqrt_()
        lifts = (spectra * weights).movedim(0, 1).flatten(2)  # blocks, k, rows and frequencies
        if grid.real:  # the pairs of frequencies add up to twice the real part
            lifts = torch.view_as_real(lifts).flatten(2)
        return lifts.conj() @ lifts.mT

    def __call__(self, v: Tensor) -> Tensor:
        """``P V``."""
        if self._dense is None and v.shape[-1] > self.border.channels:
            kernel = self.inverse.map(lambda m: m.mH @ m).kernel()
            self._dense = between_borders(kernel, self.border, self.border)
        if self._dense is not None:
            return self._dense @ v
        lifts = self.inverse(self.inverse.grid.transform(self.border.scatter(v.movedim(-1, 0))))
        back = self.inverse.grid.inverse(self.inverse.H(lifts))
        return self.border.gather(back).movedim(0, -1)


def nearest_null(images: Tensor, v: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates of orthonormal lifts in the span of vectors, by falling nearness to the null space.

    Args:
        images: ``S v``, ``(blocks, rows, k)``. Not from singular values of S^-1: next to those of null vectors the
            others are rounding, and with them everything below.
        v: orthonormal vectors on the border, ``(blocks, size, k)``.
        overlap: the inner products of their lifts, cropped nowhere.

    Returns:
        For each a bound of ``||A x|| / (||C|| ||x||)``, smallest first, as A lift(v) = -R_out C B_in^T S v; and the
        coordinates.
    """
    values, vectors = torch.linalg.eigh(overlap - images.mH @ images)  # what the crop takes away is S v
    # of some directions the crop leaves nothing but rounding: added to others they change S v and no lift
    left = (values > _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1:]).unsqueeze(-2)
    whiten = vectors * torch.where(left, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt().unsqueeze(-2), 0)
    free = vectors * ~left
    moved = images @ free
    whiten = whiten - free @ (torch.linalg.pinv(moved, rtol=_LEAST_MOVED) @ (images @ whiten))
    cropped = images @ whiten
    far = (1 + torch.linalg.matrix_norm(cropped))[..., None, None] * ~left  # the free ones are no null vectors
    far = torch.diag_embed(far.squeeze(-2)).to(cropped)
    _, ratio, rows = torch.linalg.svd(torch.cat([cropped, far], dim=-2), full_matrices=False)
    return ratio.flip(-1), (v @ (whiten @ rows.mH)).flip(-1)


def orthonormalised(v: Tensor, gram: Tensor) -> Tensor:
    """Combinations of vectors whose inner products are the identity, and zero for those of length zero.

    Args:
        v: vectors, ``(blocks, size, k)``.
        gram: their inner products, ``(blocks, k, k)``.
    """
    values, vectors = torch.linalg.eigh(gram)
    left = values > _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1:]
    root = torch.where(left, torch.where(left, values, 1.0).rsqrt(), 0.0)
    return v @ (vectors * root.unsqueeze(-2)) @ vectors.mH
