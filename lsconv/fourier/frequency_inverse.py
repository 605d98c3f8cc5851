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

from lsconv.errors import ArgumentError, MethodError, ShapeError
from lsconv.fourier.batched_linalg import chunks, frobenius, hermitian_inverse_, lu_factor_in_place
from lsconv.fourier.batched_linalg import inverse as lu_inverse
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.operators.dtypes import ROUNDING

__all__ = [
    "FactoredInverse",
    "FrequencyInverse",
    "invert",
    "invert_with_penalty",
    "singular_values_by_frequency",
    "symbol_norm_from_below",
]


class FactoredInverse:
    """The inverses of square matrices, one per block and frequency, by their LU factors.

    Args:
        grid: the periodic grid.
        factors: ``(blocks * frequencies, size, size)``.
        pivots: the pivots of the factors.
        at: indices of the matrices whose factors are not used, but ``inverses``; the factors are set to the identity.
        inverses: the inverses of the matrices ``at``.
        adjoint: the operator is the adjoint of the inverse.
    """

    def __init__(
        self, grid: Grid, factors: Tensor, pivots: Tensor, at: Tensor, inverses: Tensor, *, adjoint: bool = False
    ) -> None:
        self.grid, self.factors, self.pivots, self.at, self.inverses = grid, factors, pivots, at, inverses
        self._adjoint, self.dtype = adjoint, factors.dtype
        if not adjoint and len(at):
            factors[at] = torch.eye(factors.shape[-1]).to(factors)
            pivots[at] = torch.arange(1, factors.shape[-1] + 1).to(pivots)

    @property
    def H(self) -> FactoredInverse:  # noqa: N802 - the field's name for the adjoint
        """The adjoint operator."""
        return FactoredInverse(self.grid, self.factors, self.pivots, self.at, self.inverses.mH, adjoint=True)

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
        product = torch.linalg.lu_solve(self.factors, self.pivots, vectors, adjoint=self._adjoint)
        if len(self.at):
            product = product.index_copy(0, self.at, self.inverses @ vectors[self.at])
        return self.grid.inverse(product.reshape(spectra.shape).movedim((-1, -2), (0, 2)))


@dataclass(frozen=True)
class FrequencyInverse:
    """The inverses of a symbol, with its numerical rank.

    Attributes:
        inverse: the inverse as an operator.
        rank: the number of singular values above the threshold, per item; all of them where there is damping.
        undecided: the items with a singular value that equals the threshold up to rounding.
        norm: a lower bound of the largest singular value of each block; exact where the matrices are rows or columns.
        largest: the largest Frobenius norm of each block.
    """

    inverse: FrequencyMatrices | FactoredInverse
    rank: Tensor
    undecided: Tensor
    norm: Tensor
    largest: Tensor


def singular_values_by_frequency(matrices: Tensor) -> Tensor:
    """The singular values of matrices ``(..., rows, columns)``, descending: ``(..., min(rows, columns))``."""
    column = min(matrices.shape[-2:]) == 1
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1)) if column else torch.linalg.svdvals(matrices)
    return norms.unsqueeze(-1) if column else norms


def symbol_norm_from_below(S: FrequencyMatrices, size: Tensor | None = None) -> Tensor:
    """A lower bound of the largest singular value of each block; exact where the matrices are rows or columns.

    Args:
        S: the symbol.
        size: the Frobenius norms of its matrices, ``(blocks, frequencies)``, where they are known.
    """
    size = frobenius(S.matrices).flatten(1) if size is None else size
    if min(S.rows, S.columns) > 1:
        # Among the matrices of the largest Frobenius norms a smooth symbol has its maximum, and random matrices differ
        # by a few percent; the root of their number costs less than the norms did.
        flat, at = S.matrices.flatten(1, -3), size.topk(math.isqrt(size.shape[1])).indices
        some = flat[torch.arange(len(flat), device=at.device).unsqueeze(1), at]
        size = singular_values_by_frequency(some).flatten(1)
    return size.amax(1)


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
    size = frobenius(S.matrices).flatten(1)
    largest, norm_from_below = size.amax(1), symbol_norm_from_below(S, size)
    per_item, eps = size.numel() // items, torch.finfo(size.dtype).eps

    def per_matrix(per_block: Tensor) -> Tensor:
        """The largest value of each item, for each of its matrices."""
        return per_block.reshape(items, -1).amax(1).repeat_interleave(per_item)

    matrices, mu = S.matrices.reshape(-1, S.rows, S.columns), mu.repeat_interleave(size.shape[1])
    norm_bound = per_matrix(largest)
    rank, undecided = torch.full_like(mu, min(S.rows, S.columns)), torch.zeros_like(mu, dtype=torch.bool)
    factored, at = None, torch.arange(len(mu), device=mu.device)
    unstable = torch.zeros_like(undecided)
    if S.rows == S.columns and not S.elementwise and not bool(mu.any()):
        factored = _lu_factors(matrices, size.flatten(), 2 * rcond * norm_bound)
        at, matrices, unstable = factored.at, factored.matrices, factored.unstable
        mu, norm_bound = mu[at], norm_bound[at]
    some = torch.arange(len(mu), device=mu.device)
    if min(S.rows, S.columns) == 1 or not len(matrices):
        inverse = matrices.mT.new_empty(matrices.mT.shape)
    else:  # square ones are overwritten
        inverse = matrices if S.rows == S.columns else matrices.mT.new_empty(matrices.mT.shape)
        refused = []
        for part in chunks(matrices):
            found, amplification = _inverse_by_elimination(matrices[part], mu[part])
            smallest = 1 / frobenius(found)  # a lower bound of the smallest singular value
            accepted = (amplification * eps <= rtol) & ((mu[part] > 0) | (smallest > 2 * rcond * norm_bound[part]))
            others = (~accepted | unstable[part]).nonzero().flatten()
            refused.append((others + part.start, matrices[part][others]))
            inverse[part] = found
        some, matrices = map(torch.cat, zip(*refused, strict=True))
        mu, norm_bound = mu[some], norm_bound[some]
    if len(matrices):
        todo = at[some]
        zero, norm, exact = (mu == 0).unsqueeze(-1), per_matrix(norm_from_below)[todo], False
        while True:
            cutoff, margin = rcond * norm.unsqueeze(-1), ROUNDING * eps * norm_bound.unsqueeze(-1)
            found, values = _inverse_by_svd(matrices, mu, torch.where(zero, cutoff, -1.0))
            near = (
                zero
                & (cutoff > 0)
                & (values >= cutoff - margin)
                & (values <= rcond * norm_bound.unsqueeze(-1) + margin)
            )
            if exact or not bool(near.any()):
                break
            norm = norm_bound = per_matrix(singular_values_by_frequency(symbol().matrices))[todo]
            exact = True
        inverse[some], undecided[todo] = found, near.any(-1)
        rank[todo] = (values > torch.where(zero, cutoff, -1.0)).sum(-1).to(rank)
    weights = S.grid.weights(rank.device, rank.dtype).flatten()
    return FrequencyInverse(
        FrequencyMatrices(S.grid, inverse.reshape(*S.matrices.shape[:-2], S.columns, S.rows))
        if factored is None
        else FactoredInverse(S.grid, factored.factors, factored.pivots, at, inverse),
        (rank.reshape(items, -1, len(weights)) * weights).sum((-2, -1)).long(),
        undecided.reshape(items, -1).any(-1),
        norm_from_below,
        largest,
    )


@dataclass(frozen=True)
class _Factors:
    """LU factors of square matrices, and those matrices for which the factors will not do.

    Attributes:
        factors: the factors.
        pivots: their row exchanges.
        at: the indices of the matrices that may have a smaller singular value, or whose factors are inaccurate.
        matrices: these matrices.
        unstable: which of them have inaccurate factors.
    """

    factors: Tensor
    pivots: Tensor
    at: Tensor
    matrices: Tensor
    unstable: Tensor


def _lu_factors(S: Tensor, size: Tensor, least: Tensor, *, chance: float = 1e-8) -> _Factors:
    """Factorise square matrices by LU, and find those that need an SVD.

    The inverses times two random vectors estimate the norms of the inverses, and the residuals show whether the
    elimination was stable.

    Args:
        S: ``(matrices, size, size)``; the factors take its memory.
        size: the Frobenius norms of the matrices.
        least: the bound that the smallest singular value of each has to exceed.
        chance: the probability that a matrix with a smaller one is not found.

    Source:
        Dixon, "Estimating extremal eigenvalues and condition numbers of matrices", SIAM J. Numer. Anal. 20 (1983).
    """
    factors, pivots = S.mT, torch.empty(S.shape[:-1], dtype=torch.int32, device=S.device)  # LAPACK's order
    probes = torch.randn(S.shape[-1], 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)).to(S)
    rounding = ROUNDING * S.shape[-1] * torch.finfo(size.dtype).eps
    doubted = []
    for part in chunks(S):
        matrices = S[part].clone()
        _, pivots[part], _ = lu_factor_in_place(factors[part].copy_(matrices))
        found = torch.linalg.lu_solve(factors[part], pivots[part], probes.expand(len(matrices), -1, -1))
        lengths = torch.linalg.vector_norm(found, dim=-2)
        # For a unit vector v and a probe z, |v^H z| < d has probability d^2; for both probes d^4.
        safe = chance**0.25 / lengths.amax(-1) > least[part]
        residual = torch.linalg.vector_norm((matrices @ found).sub_(probes), dim=-2)
        accurate = (residual <= rounding * size[part].unsqueeze(-1) * lengths).all(-1)
        at = (~(safe & accurate)).nonzero().flatten()
        doubted.append((at + part.start, matrices[at], ~accurate[at]))
    return _Factors(factors, pivots, *map(torch.cat, zip(*doubted, strict=True)))


def _inverse_by_elimination(S: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """Invert by LU or Cholesky factors; return the inverses, and bounds of how much these amplify rounding."""
    rows, columns = S.shape[-2:]
    if rows == columns and not bool(mu.any()):
        inverse, info = lu_inverse(S)
        inverse[info > 0] = math.nan
        return inverse, frobenius(S) * frobenius(inverse)
    gram = S @ S.mH if rows < columns else S.mH @ S
    gram.diagonal(dim1=-2, dim2=-1).add_(mu.unsqueeze(-1))
    size = frobenius(gram)
    inverse = hermitian_inverse_(gram.contiguous())
    # Where S is rank-deficient, rounding in the gradient is amplified by the square of this condition number.
    amplification = (size * frobenius(inverse)).square()
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


def invert_with_penalty(S: FrequencyMatrices, mu: Tensor, penalty: FrequencyMatrices) -> Tensor:
    """``(S^H S + mu P^H P)^-1 S^H`` with the symbol P of a penalty.

    Raises:
        ShapeError: a penalty on another grid.
        ArgumentError: mu is 0 somewhere.
        MethodError: S and P vanish on a common subspace.
    """
    if penalty.grid.sizes != S.grid.sizes or penalty.grid.real != S.grid.real or penalty.columns != S.columns:
        raise ShapeError(
            f"penalty: {penalty.columns} columns on grid {penalty.grid.sizes} do not fit the symbol of A, "
            f"{S.columns} columns on grid {S.grid.sizes} ({'real' if S.grid.real else 'complex'})"
        )
    if bool((mu == 0).any()):
        raise ArgumentError("damp: a penalty needs damp > 0; without damping the answer does not depend on it")
    P = penalty.matrices.to(S.matrices.dtype)
    mu = mu.reshape(-1, *(1 for _ in S.matrices.shape[1:]))
    normal = S.matrices.mH @ S.matrices + mu * (P.mH @ P)
    scale = normal.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    inverse = hermitian_inverse_(normal.contiguous())
    condition = scale * inverse.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    if not bool((condition * torch.finfo(scale.dtype).eps < 1e-2).all()):
        raise MethodError(
            "penalty: A and L vanish on a common subspace (at some frequency both symbols do), so the minimiser is not "
            "unique; add damping of the identity or use a Krylov method (lsqr), which gives the minimum-norm one"
        )
    return inverse @ S.matrices.mH
