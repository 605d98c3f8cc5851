"""The small singular values of a factorised capacitance matrix G, their vectors, and the null spaces they show."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.border.border_set import Border, between_borders
from lsconv.border.capacitance import FEW_VECTORS, Capacitance
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.krylov.loop.null_space import LOST_SHARE
from lsconv.operators.dtypes import ROUNDING

__all__ = ["ExtensionGram", "NullSpaces"]

# Eigenvalues below this many eps of the largest count as zero, because sums of some thousand terms round as much.
_ROUNDING = 1e3
# The relative cutoff of the pseudo-inverse of G on directions whose extensions vanish.
_LEAST_MOVED = 1e-10


class NullSpaces:
    """The null spaces of A and A^H to ``rcond``, as coordinates on the border.

    Candidates are the singular vectors of G with the smallest singular values. Then random vectors w are compared with
    the solution for A w: their differences outside of the known null space are further candidates, until there are
    none.

    Args:
        capacitance: the capacitance matrix, on whose directions no null vector is known.
        symbol: the symbol of C.
        inverse_norm: a bound of ``||C^-1||``, one per block.
        condition: a bound of the condition number of C, one per block.
        rcond: singular values up to this part of ``||C||`` count as zero, one per block.
        user_rcond: rcond is the user's, so that it may lie among other singular values. As the bounds are right to a
            factor of two, values from half of it to one and a half times it are undecided.

    Attributes:
        capacitance: the capacitance matrix, with the null vectors found on its directions.
        nullity: how many singular values of each block count as zero.
        undecided: the blocks one of whose singular values stands on the threshold, up to rounding.
        largest: the largest singular value that counts as zero, as a part of ``||C||``.
        resolved: whether those just above the threshold stand out of the rounding that C^-1 amplifies.
    """

    def __init__(
        self,
        capacitance: Capacitance,
        symbol: FrequencyMatrices,
        inverse_norm: Tensor,
        condition: Tensor,
        rcond: Tensor,
        *,
        user_rcond: bool,
    ) -> None:
        self.capacitance, self.rcond, self._user_rcond = capacitance, rcond.unsqueeze(-1), user_rcond
        # The rounding error of a computed singular value.
        self._noise = torch.finfo(torch.float64).eps * condition.unsqueeze(-1)
        self.resolved = True
        size, limit = capacitance.size, 10 * rcond
        count = min(FEW_VECTORS, size)  # it is quadrupled while all of them count as zero
        sigma, *vectors = small_singular_vectors(capacitance, count)
        self.nullity = torch.zeros(len(sigma), dtype=torch.int64, device=sigma.device)
        self.undecided = torch.zeros_like(self.nullity, dtype=torch.bool)
        self._counts = torch.zeros(2, len(sigma), dtype=torch.int64, device=sigma.device)
        self.largest = 0.0
        if bool((sigma[:, 0] > limit * inverse_norm).all()):
            # A null vector of A is at most ||C^-1|| times as long as its border values, so larger singular values of G
            # exclude one.
            return
        grams = [ExtensionGram(direction.inverse, direction.free) for direction in self.capacitance.directions]
        while True:
            parts = zip(self.capacitance.directions, grams, reversed(vectors), strict=True)
            found = [nearest_null(direction.restrict(v), v, gram.between(v)) for direction, gram, v in parts]
            if count == size or all(bool((ratio.amax(-1) > limit).all()) for ratio, _ in found):
                break
            count = min(4 * count, size)
            _, *vectors = small_singular_vectors(capacitance, count)
        candidates = list(reversed(vectors))
        while self._add_null_vectors(found, grams) and candidates[0].shape[-1] < size:
            lost = [self._lost_part(C, adjoint) for C, adjoint in ((symbol, False), (symbol.H, True))]
            if not any(bool(v.any()) for v in lost):
                break
            candidates = [
                torch.linalg.qr(torch.cat([v, more], dim=-1)).Q for v, more in zip(candidates, lost, strict=True)
            ]
            parts = zip(self.capacitance.directions, grams, candidates, strict=True)
            found = [nearest_null(direction.restrict(v), v, gram.between(v)) for direction, gram, v in parts]

    def _add_null_vectors(self, found: list[tuple[Tensor, Tensor]], grams: list[ExtensionGram]) -> bool:
        """Add the vectors that belong to the null spaces; tell whether these have grown.

        Args:
            found: for A and for A^H, the ratios of :func:`nearest_null` and the vectors.
            grams: the Gram matrices of the extensions, likewise.
        """
        counted = [ratio < self.rcond for ratio, _ in found]
        self.resolved = not any(bool((~k & (r < self._noise)).any()) for (r, _), k in zip(found, counted, strict=True))
        half_width = self.rcond / 2 if self._user_rcond else 0 * self.rcond
        band = half_width.clamp_min(ROUNDING * torch.finfo(torch.float64).eps)
        near = [((r - self.rcond).abs() <= band) & (self.rcond > 0) for r, _ in found]
        self.undecided = sum((n.any(-1) for n in near), self.undecided)
        counts = torch.stack([k.sum(-1) for k in counted])
        nullity = counts.amax(0)
        self.largest = max(float(torch.where(k, r, 0).amax()) for (r, _), k in zip(found, counted, strict=True))
        if not bool((counts > self._counts).any()):  # of A or of A^H, because that of A^H may be found first
            return False
        self._counts = counts
        self.nullity, most = nullity, int(nullity.max())
        null = [(v * k.unsqueeze(-2))[..., :most] for (_, v), k in zip(found, counted, strict=True)]
        # Orthonormalised again without the rejected candidates: their extensions are much longer, and the accepted
        # vectors have lost digits beside them.
        null = [orthonormalised(v, gram.between(v)) for v, gram in zip(null, grams, strict=True)]
        # the coupling B C^-1 R^T R C^-H B^T is P - G G^H, with P of ExtensionGram; G^H v = 0 on null
        # vectors v, where it is P
        coupling = [gram(v) for gram, v in zip(grams, null, strict=True)]
        forward, adjoint = self.capacitance.directions
        directions = (
            forward.with_null_space(null[0], coupling[1]),
            adjoint.with_null_space(null[1], coupling[0]),
        )
        self.capacitance = replace(self.capacitance, directions=directions)
        return True

    def _lost_part(self, C: FrequencyMatrices, adjoint: bool) -> Tensor:
        """The differences between random w and the solutions for A w, without the known null space, on the border.

        Args:
            C: the circulant that A, or A^H, is a part of.
            adjoint: the direction of A^H.
        """
        direction, back = reversed(self.capacitance.directions) if adjoint else self.capacitance.directions
        factors = self.capacitance.factors
        generator = torch.Generator().manual_seed(int(self.nullity.max()))
        # two, because one has a part below LOST_SHARE of the expected along a null vector once in a thousand times
        shape = (min(2, self.capacitance.size), len(factors), *direction.zero.shape)
        w = torch.randn(shape, generator=generator, dtype=factors.dtype).to(factors.device)
        w = w.masked_fill_(direction.zero, 0)
        d = w - self.capacitance.on_grid(C.on_grid(w).masked_fill_(back.zero, 0), adjoint)
        d = d - direction.null_part(d, back)
        lengths = [torch.linalg.vector_norm(u.flatten(2), dim=-1) for u in (d, w)]
        lost = lengths[0] > LOST_SHARE / math.sqrt(direction.zero.numel()) * lengths[1]
        v = direction.free.gather(C.on_grid(d)) * lost.unsqueeze(-1)
        return torch.nn.functional.normalize(v, dim=-1).movedim(0, -1)


def small_singular_vectors(capacitance: Capacitance, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` smallest singular values, by block inverse iteration with :math:`(G^H G)^{-1}`.

    Args:
        capacitance: G, factorised.
        count: the number of singular values; the last ones are the least accurate.

    Returns:
        The singular values ``(blocks, count)``, smallest first, and left and right vectors ``(blocks, size, count)``.

    Source:
        Golub and Van Loan, Matrix Computations, 4th ed., section 8.2 (orthogonal iteration), on the inverse.
    """
    factors = capacitance.factors
    blocks, size = factors.shape[:2]
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(blocks, size, count, generator=generator, dtype=factors.dtype).to(factors.device)
    for _ in range(2):  # random vectors find what they miss
        for adjoint in (True, False):
            v = torch.linalg.qr(capacitance.solve(v, adjoint=adjoint)).Q
    left_vectors, inverse, rows = torch.linalg.svd(capacitance.solve(v, adjoint=True), full_matrices=False)
    return inverse.reciprocal(), left_vectors, v @ rows.mH


class ExtensionGram:
    r"""The inner products of uncropped extensions of border vectors: :math:`P = B C^{-H} C^{-1} B^T`.

    By Parseval those of few vectors V need one transform each and no image,

    .. math:: V^H P V = \frac{1}{N} \sum_\omega \hat L(\omega)^H \hat L(\omega), \qquad
              \hat L(\omega) = S(\omega)^{-1} (F B^T V)(\omega) .

    For more vectors than channels P itself is made, because its kernel takes one transform per channel.

    Args:
        inverse: C^-1.
        border: the cells of the vectors.
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
        extensions = (spectra * weights).movedim(0, 1).flatten(2)  # blocks, k, rows and frequencies
        if grid.real:  # conjugate pairs of frequencies sum to twice the real part
            extensions = torch.view_as_real(extensions).flatten(2)
        return extensions.conj() @ extensions.mT

    def __call__(self, v: Tensor) -> Tensor:
        """``P V``."""
        if self._dense is None and v.shape[-1] > self.border.channels:
            kernel = self.inverse.map(lambda m: m.mH @ m).kernel()
            self._dense = between_borders(kernel, self.border, self.border)
        if self._dense is not None:
            return self._dense @ v
        extensions = self.inverse(self.inverse.grid.transform(self.border.scatter(v.movedim(-1, 0))))
        back = self.inverse.grid.inverse(self.inverse.H(extensions))
        return self.border.gather(back).movedim(0, -1)


def nearest_null(images: Tensor, v: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormalise the extensions of vectors, ordered by how nearly they are null vectors of A.

    Args:
        images: ``G v``, ``(blocks, rows, k)``. Not from singular values of G^-1: next to those of null vectors the
            others are rounding, and with them everything below.
        v: orthonormal vectors on the border, ``(blocks, size, k)``.
        gram: the inner products of their extensions before the crop, ``(blocks, k, k)``.

    Returns:
        For each a bound of ``||A x|| / (||C|| ||x||)``, smallest first, as A extend(v) = -R_out C B_in^T G v; and the
        coordinates.
    """
    values, vectors = torch.linalg.eigh(gram - images.mH @ images)  # the crop removes G v
    # Directions whose extension is only rounding are arbitrary: adding them changes G v, but no extension.
    nonzero = (values > _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1:]).unsqueeze(-2)
    whiten = vectors * torch.where(nonzero, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt().unsqueeze(-2), 0)
    free = vectors * ~nonzero
    moved = images @ free
    whiten = whiten - free @ (torch.linalg.pinv(moved, rtol=_LEAST_MOVED) @ (images @ whiten))
    cropped = images @ whiten
    # the arbitrary directions are no null vectors
    excluded = (1 + torch.linalg.matrix_norm(cropped)).unsqueeze(-1) * ~nonzero.squeeze(-2)
    excluded = torch.diag_embed(excluded).to(cropped)
    _, ratio, rows = torch.linalg.svd(torch.cat([cropped, excluded], dim=-2), full_matrices=False)
    return ratio.flip(-1), (v @ (whiten @ rows.mH)).flip(-1)


def orthonormalised(v: Tensor, gram: Tensor) -> Tensor:
    """Combine vectors so that they are orthonormal in given inner products; those of length zero become zero.

    Args:
        v: vectors, ``(blocks, size, k)``.
        gram: their inner products, ``(blocks, k, k)``.
    """
    values, vectors = torch.linalg.eigh(gram)
    nonzero = values > _ROUNDING * torch.finfo(values.dtype).eps * values[..., -1:]
    root = torch.where(nonzero, torch.where(nonzero, values, 1.0).rsqrt(), 0.0)
    return v @ (vectors * root.unsqueeze(-2)) @ vectors.mH
