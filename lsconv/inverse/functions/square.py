"""The determinant of a square convolution: of a circulant, times that of the capacitance matrix of its border."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.border.determinant import PrincipalMinor, twisted
from lsconv.border.influence import EXACT_UNKNOWNS
from lsconv.errors import MethodError
from lsconv.fourier.batched_linalg import slogdet
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol
from lsconv.operators.convolution import Convolution
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["square_slogdet"]


def square_slogdet(A: Convolution) -> tuple[Tensor, Tensor] | None:
    """Sign and logarithm of the absolute value of det A for a square convolution of stride 1; None for other A.

    A zero-padded A is a principal submatrix of a circulant C, so ``det A = det C det (C^-1)_BB`` with B the border.
    Where the symbol of C has zeros at the sampled frequencies, A is replaced by a similar convolution, which has the
    same determinant and shifted frequencies (:func:`lsconv.border.determinant.twisted`).

    Raises:
        MethodError: the circulant is too badly conditioned, or the border has too many unknowns.
    """
    if set(A.stride) != {1} or A.c_in != A.c_out or A.spatial_in != A.spatial_out or not Embedding.serves(A):
        return None
    embedding = Embedding(A, (1,) * A.ndim)
    S = symbol(A, embedding)
    if embedding.is_circulant:
        return _per_item(*_symbol_slogdet(S), A, embedding)
    condition = _condition(S)
    # Three shifts are enough: a zero at a sampled frequency is avoided by any, a nearly singular kernel by none.
    for shift in (0.5, 0.25, 0.382) if condition > 1e4 else ():
        other = symbol(twisted(A, embedding.grid, shift), embedding)
        found = _condition(other)
        if found < condition:
            S, condition = other, found
    if not condition < torch.finfo(torch.float64).eps ** -0.5:
        raise MethodError(
            f"A: the periodic convolution that it is a crop of has a condition of {condition:.0e} at the best of the "
            f"frequencies tried, which leaves less than half of the digits; logdet(A, damp) has them at any damp > 0"
        )
    mask = Border(embedding.grid, embedding.input_border(), torch.device("cpu")).mask
    minor = PrincipalMinor(mask)
    if minor.size > EXACT_UNKNOWNS:
        raise MethodError(
            f"A: its border has {minor.size} unknowns that no frequency separates, and determinants are computed up to "
            f"{EXACT_UNKNOWNS}; exact ones of logdet have the same limit, its estimates have none"
        )
    inverse = FrequencyMatrices(S.grid, torch.linalg.inv(S.matrices))
    sign, logabs = _symbol_slogdet(S)
    minor_sign, minor_logabs = minor.slogdet(inverse.kernel())
    return _per_item(sign * minor_sign, logabs + minor_logabs, A, embedding)


def _condition(S: FrequencyMatrices) -> float:
    """The condition number of C; 1 under vmap, where values cannot be read."""
    if hidden_by_vmap(S.matrices):
        return 1.0
    values = torch.linalg.svdvals(S.matrices.detach())
    return float(values.amax() / values.amin())


def _symbol_slogdet(S: FrequencyMatrices) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the determinant of the circulant of a symbol, for every block."""
    sign, logabs = slogdet(S.matrices)
    weights = S.grid.weights(logabs.device, logabs.dtype)
    if S.grid.real:  # the phases of a conjugate pair of frequencies multiply to one
        sign = torch.where(weights == 1, sign, 1)
    return sign.flatten(1).prod(-1), (logabs * weights).flatten(1).sum(-1)


def _per_item(sign: Tensor, logabs: Tensor, A: Convolution, embedding: Embedding) -> tuple[Tensor, Tensor]:
    """Multiply the determinants of the groups of every batch item."""
    batch = (*embedding.batch_shape, -1)
    sign = sign if A.is_complex else sign.real.sgn()  # real up to the rounding of a product of phases
    return sign.reshape(batch).prod(-1), logabs.reshape(batch).sum(-1)
