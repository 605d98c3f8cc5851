r"""The inverses of a symbol, one small matrix per frequency: by elimination where that is accurate, else by SVD.

.. math:: X(\omega) = (S^H S + \mu)^{-1} S^H, \qquad X = S^+ \text{ where } \mu = 0.

A square S without damping keeps its LU factors; every other one is inverted by Cholesky factors of the smaller of
:math:`S^H S + \mu` and :math:`S S^H + \mu`. The loss of digits is then estimated from the norms of matrix and inverse.
Frequencies where it is too large, or where S may not have full rank, are inverted again by singular values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.fourier.batched_linalg import chunks, frobenius, hermitian_inverse_, lu_factor_in_place
from lsconv.fourier.batched_linalg import inverse as lu_inverse
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.operators.dtypes import ROUNDING

__all__ = [
    "FactoredInverse",
    "FrequencyInverse",
    "invert",
    "largest_matrices",
    "singular_values_by_frequency",
    "symbol_norm_from_below",
]


class FactoredInverse:
    """The inverses of square matrices, one per block and frequency, by their LU factors.

    Args:
        grid: the periodic grid.
        factors: ``(blocks * frequencies, size, size)``.
        pivots: the pivots of the factors.
        replaced: indices of the matrices that are inverted by ``inverses``; their factors become those of the identity.
        inverses: the inverses of the matrices ``replaced``.
        adjoint: the operator is the adjoint of the inverse.
    """

    def __init__(
        self, grid: Grid, factors: Tensor, pivots: Tensor, replaced: Tensor, inverses: Tensor, *, adjoint: bool = False
    ) -> None:
        self.grid, self.factors, self.pivots, self.replaced, self.inverses = grid, factors, pivots, replaced, inverses
        self._adjoint, self.dtype = adjoint, factors.dtype
        if not adjoint and len(replaced):
            factors[replaced] = torch.eye(factors.shape[-1]).to(factors)
            pivots[replaced] = torch.arange(1, factors.shape[-1] + 1).to(pivots)

    @property
    def H(self) -> FactoredInverse:  # noqa: N802 - the field's name for the adjoint
        """The adjoint operator."""
        return FactoredInverse(self.grid, self.factors, self.pivots, self.replaced, self.inverses.mH, adjoint=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors and inverses."""
        return sum(t.numel() * t.element_size() for t in (self.factors, self.pivots, self.inverses))

    def on_grid(self, tensor: Tensor) -> Tensor:
        """Apply the operator to a tensor ``(rhs, blocks, channels, *grid.sizes)``."""
        if tensor.numel() == 0:  # which some FFTs refuse
            return tensor
        spectra = self.grid.transform(tensor).movedim((0, 2), (-1, -2))  # blocks, *frequencies, channels, rhs
        vectors = spectra.flatten(0, -3)
        solved = torch.linalg.lu_solve(self.factors, self.pivots, vectors, adjoint=self._adjoint)
        if len(self.replaced):
            solved = solved.index_copy(0, self.replaced, self.inverses @ vectors[self.replaced])
        return self.grid.inverse(solved.reshape(spectra.shape).movedim((-1, -2), (0, 2)))


@dataclass(frozen=True)
class FrequencyInverse:
    """The inverses of a symbol, with its numerical rank.

    Attributes:
        inverse: the inverse as an operator.
        rank: the number of singular values above the threshold, per item; all of them where there is damping.
        undecided: the items with a singular value that equals the threshold up to rounding.
        norm: a lower bound of the largest singular value of each block; exact where the matrices are rows or columns.
        largest_norm: the largest Frobenius norm of each block.
    """

    inverse: FrequencyMatrices | FactoredInverse
    rank: Tensor
    undecided: Tensor
    norm: Tensor
    largest_norm: Tensor


def singular_values_by_frequency(matrices: Tensor) -> Tensor:
    """The singular values of matrices ``(..., rows, columns)``, descending: ``(..., min(rows, columns))``."""
    if min(matrices.shape[-2:]) == 1:  # a row or a column has one, its length
        length: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
        return length.unsqueeze(-1)
    values: Tensor = torch.linalg.svdvals(matrices)
    return values


def symbol_norm_from_below(S: FrequencyMatrices, norms: Tensor | None = None) -> Tensor:
    """A lower bound of the largest singular value of each block; exact where the matrices are rows or columns.

    Args:
        S: the symbol.
        norms: the Frobenius norms of its matrices, ``(blocks, frequencies)``, where they are known.
    """
    norms = frobenius(S.matrices).flatten(1) if norms is None else norms
    if min(S.rows, S.columns) == 1:
        return norms.amax(1)
    return singular_values_by_frequency(largest_matrices(S.matrices.flatten(1, -3), norms)).amax((1, 2))


def largest_matrices(matrices: Tensor, sizes: Tensor) -> Tensor:
    """Some matrices of the largest sizes in each block, among which one has nearly the largest norm of all.

    A smooth symbol has its maximum among them, and the norms of random matrices differ by a few percent. They are as
    many as the root of the number of frequencies, so that their singular values cost less than all ``sizes`` did.

    Args:
        matrices: ``(blocks, frequencies, rows, columns)``.
        sizes: a norm of each, or a function of it that increases, ``(blocks, frequencies)``.
    """
    at = sizes.topk(math.isqrt(sizes.shape[1])).indices
    return matrices[torch.arange(len(matrices), device=at.device).unsqueeze(1), at]


def invert(
    symbol: Callable[[], FrequencyMatrices], mu: Tensor, rcond: float, *, items: int, rtol: float
) -> FrequencyInverse:
    """Invert a symbol, frequency by frequency.

    Args:
        symbol: makes the symbol, in double precision; it is overwritten, and made anew where it is needed again.
        mu: ``damp^2``, one per block.
        rcond: where mu is 0, singular values up to ``rcond`` times the largest of the same item count as zero.
        items: the number of batch items; each has the same number of consecutive blocks.
        rtol: the relative error of the gradient that the answer may have by rounding.
    """
    S = symbol()
    norms = frobenius(S.matrices).flatten(1)
    largest_norm, norm_from_below = norms.amax(1), symbol_norm_from_below(S, norms)
    per_item = norms.numel() // items

    def per_matrix(per_block: Tensor) -> Tensor:
        """The largest value of each item, for each of its matrices."""
        return per_block.reshape(items, -1).amax(1).repeat_interleave(per_item)

    matrices, mu = S.matrices.reshape(-1, S.rows, S.columns), mu.repeat_interleave(norms.shape[1])
    norm_bound = per_matrix(largest_norm)
    rank, undecided = torch.full_like(mu, min(S.rows, S.columns)), torch.zeros_like(mu, dtype=torch.bool)
    # the matrices that are not inverted yet, as indices among all
    remaining, unstable, factored = torch.arange(len(mu), device=mu.device), torch.zeros_like(undecided), None
    if S.rows == S.columns and not S.elementwise and not bool(mu.any()):
        factored = _lu_factors(matrices, norms.flatten(), 2 * rcond * norm_bound)
        remaining, matrices, unstable = factored.remaining, factored.matrices, factored.unstable
        mu, norm_bound = mu[remaining], norm_bound[remaining]
    if min(S.rows, S.columns) == 1 or not len(matrices):
        inverse, needs_svd = matrices.mT.new_empty(matrices.mT.shape), torch.arange(len(mu), device=mu.device)
    else:
        inverse, needs_svd, matrices = _eliminate(matrices, mu, 2 * rcond * norm_bound, unstable, rtol)
        mu, norm_bound = mu[needs_svd], norm_bound[needs_svd]
    if len(matrices):
        decided = remaining[needs_svd]
        inverse[needs_svd], rank[decided], undecided[decided] = _decompose(
            matrices,
            mu,
            rcond,
            (per_matrix(norm_from_below)[decided], norm_bound),
            lambda: per_matrix(singular_values_by_frequency(symbol().matrices))[decided],
        )
    weights = S.grid.weights(rank.device, rank.dtype).flatten()
    return FrequencyInverse(
        FrequencyMatrices(S.grid, inverse.reshape(*S.matrices.shape[:-2], S.columns, S.rows))
        if factored is None
        else FactoredInverse(S.grid, factored.factors, factored.pivots, remaining, inverse),
        (rank.reshape(items, -1, len(weights)) * weights).sum((-2, -1)).long(),
        undecided.reshape(items, -1).any(-1),
        norm_from_below,
        largest_norm,
    )


@dataclass(frozen=True)
class _Factors:
    """LU factors of square matrices, and those matrices for which the factors will not do.

    Attributes:
        factors: the factors.
        pivots: their row exchanges.
        remaining: the indices of the matrices that may have a smaller singular value, or whose factors are inaccurate.
        matrices: these matrices.
        unstable: which of them have inaccurate factors.
    """

    factors: Tensor
    pivots: Tensor
    remaining: Tensor
    matrices: Tensor
    unstable: Tensor


def _lu_factors(S: Tensor, norms: Tensor, least: Tensor) -> _Factors:
    """Factorise square matrices by LU, and find those that need an SVD.

    The inverses times two random vectors estimate the norms of the inverses, so that a matrix with a smaller singular
    value is overlooked with a probability of 1e-8, and the residuals show whether the elimination was stable.

    Args:
        S: ``(matrices, size, size)``; the factors take its memory.
        norms: the Frobenius norms of the matrices.
        least: the bound that the smallest singular value of each has to exceed.

    Source:
        Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 20 (1983).
    """
    factors, pivots = S.mT, torch.empty(S.shape[:-1], dtype=torch.int32, device=S.device)  # LAPACK's order
    probes = torch.randn(S.shape[-1], 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).to(S)
    rounding = ROUNDING * S.shape[-1] * torch.finfo(norms.dtype).eps
    rejected = []
    for part in chunks(S):
        matrices = S[part].clone()
        _, pivots[part], _ = lu_factor_in_place(factors[part].copy_(matrices))
        found = torch.linalg.lu_solve(factors[part], pivots[part], probes.expand(len(matrices), -1, -1))
        lengths = torch.linalg.vector_norm(found, dim=-2)
        # For a unit vector v and a probe z, |v^H z| < d has probability d^2; for both probes d^4, here 1e-8.
        regular = 0.01 / lengths.amax(-1) > least[part]
        residual = torch.linalg.vector_norm((matrices @ found).sub_(probes), dim=-2)
        accurate = (residual <= rounding * norms[part].unsqueeze(-1) * lengths).all(-1)
        rejected_here = (~(regular & accurate)).nonzero().flatten()
        rejected.append((rejected_here + part.start, matrices[rejected_here], ~accurate[rejected_here]))
    return _Factors(factors, pivots, *map(torch.cat, zip(*rejected, strict=True)))


def _eliminate(S: Tensor, mu: Tensor, least: Tensor, unstable: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Invert matrices by elimination, and find those whose inverses are inaccurate or that may lack full rank.

    Args:
        S: ``(matrices, rows, columns)``; square ones are overwritten.
        mu: the damping of each.
        least: the bound that the smallest singular value of each has to exceed where mu is 0.
        unstable: the matrices that are rejected in any case.
        rtol: the relative error of the gradient that the answer may have by rounding.

    Returns:
        The inverses ``(matrices, columns, rows)``, the indices of the rejected matrices, and these matrices.
    """
    inverse = S if S.shape[-2] == S.shape[-1] else S.mT.new_empty(S.mT.shape)
    eps = torch.finfo(mu.dtype).eps
    rejected = []
    for part in chunks(S):
        found, amplification = _inverse_by_elimination(S[part], mu[part])
        smallest = 1 / frobenius(found)  # a lower bound of the smallest singular value
        accepted = (amplification * eps <= rtol) & ((mu[part] > 0) | (smallest > least[part])) & ~unstable[part]
        rejected_here = (~accepted).nonzero().flatten()
        rejected.append((rejected_here + part.start, S[part][rejected_here]))
        inverse[part] = found
    indices, matrices = map(torch.cat, zip(*rejected, strict=True))
    return inverse, indices, matrices


def _decompose(
    S: Tensor, mu: Tensor, rcond: float, norms: tuple[Tensor, Tensor], exact_norm: Callable[[], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Invert matrices by singular values, and decide their ranks.

    The norm of A, to which rcond is relative, is computed only if some singular value lies between its two bounds.

    Args:
        S: ``(matrices, rows, columns)``.
        mu: the damping of each.
        rcond: where mu is 0, singular values up to ``rcond`` times the norm of A count as zero.
        norms: bounds of the norm of A, from below and from above, for each matrix.
        exact_norm: computes the norm.

    Returns:
        The inverses ``(matrices, columns, rows)``, the rank of each, and whether rounding decides that.
    """
    undamped, eps = (mu == 0).unsqueeze(-1), torch.finfo(mu.dtype).eps
    lower, upper = (norm.unsqueeze(-1) for norm in norms)
    for exact in (False, True):
        if exact:
            lower = upper = exact_norm().unsqueeze(-1)
        cutoff = torch.where(undamped, rcond * lower, -1.0)
        inverse, values = _inverse_by_svd(S, mu, cutoff)
        margin = ROUNDING * eps * upper
        near = (cutoff > 0) & (values >= cutoff - margin) & (values <= rcond * upper + margin)
        if not bool(near.any()):
            break
    return inverse, (values > cutoff).sum(-1).to(mu), near.any(-1)


def _inverse_by_elimination(S: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Invert by LU or Cholesky factors; return the inverses, and bounds of how much these amplify rounding."""
    rows, columns = S.shape[-2:]
    if rows == columns and not bool(mu.any()):
        inverse, info = lu_inverse(S)
        inverse[info > 0] = math.nan
        return inverse, frobenius(S) * frobenius(inverse)
    gram = S @ S.mH if rows < columns else S.mH @ S
    gram.diagonal(dim1=-2, dim2=-1).add_(mu.unsqueeze(-1))
    norm = frobenius(gram)
    inverse = hermitian_inverse_(gram.contiguous())
    # Where S is rank-deficient, rounding in the gradient is amplified by the square of this condition number.
    amplification = (norm * frobenius(inverse)).square()
    return (S.mH @ inverse if rows < columns else inverse @ S.mH), amplification


def _inverse_by_svd(S: Tensor, mu: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Invert by singular values: ``V f(s) U^H`` with ``f(s) = s / (s^2 + mu)`` above the cutoff, and 0 up to it.

    Args:
        S: ``(matrices, rows, columns)``.
        mu: ``(matrices,)``.
        cutoff: ``(matrices, 1)``, absolute.

    Returns:
        ``(matrices, columns, rows)``, and the singular values ``(matrices, min(rows, columns))``.
    """
    inverse, values = S.mT.new_empty(S.mT.shape), mu.new_empty(len(S), min(S.shape[-2:]))
    for part in chunks(S):
        inverse[part], values[part] = _inverse_by_svd_at_once(S[part], mu[part].unsqueeze(-1), cutoff[part])
    return inverse, values


def _inverse_by_svd_at_once(S: Tensor, mu: Tensor, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Do as :func:`_inverse_by_svd`, without chunks."""
    if min(S.shape[-2:]) == 1:  # rows and columns are their own singular vectors
        s = singular_values_by_frequency(S)
        return S.mH * _inverse_or_zero(s * s + mu, s > cutoff).unsqueeze(-1), s
    U, s, Vh = torch.linalg.svd(S, full_matrices=False)
    factors = s * _inverse_or_zero(s * s + mu, s > cutoff)
    return (Vh.mH * factors.unsqueeze(-2)) @ U.mH, s


def _inverse_or_zero(values: Tensor, keep: Tensor) -> Tensor:
    """``1 / values`` where ``keep`` is true and the value is positive, else 0."""
    keep = keep & (values > 0)
    return torch.where(keep, values, 1).reciprocal() * keep
