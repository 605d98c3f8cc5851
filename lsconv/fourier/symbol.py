r"""The symbol of a convolution: one small matrix per frequency, with stride and groups folded in.

A block-circulant operator is diagonal in Fourier, :math:`C = F^{-1} \operatorname{diag}(S(\omega)) F`. For torch's
cross-correlation the symbol is :math:`S(\omega) = \sum_\tau K[\tau] e^{i \omega \tau}`, of shape
``(out_channels, in_channels)`` with the polyphase input channels of :mod:`lsconv.fourier.embedding` for strides.
Real kernels keep half of the frequencies (the other half is the conjugate).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.fourier.batched_linalg import frobenius, hermitian_inverse_
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import ELEMENTWISE_ENTRIES, FrequencyMatrices, Grid
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.fft_convolution import FEW_WAVES, plane_waves

__all__ = [
    "from_taps",
    "gram",
    "largest_eigenvalue",
    "product",
    "saddle_inverse",
    "shifted",
    "symbol",
]


def symbol(convolution: Convolution, embedding: Embedding | None = None) -> FrequencyMatrices:
    r"""The symbol of a convolution on its periodic grid.

    Args:
        convolution: padding mode "zeros" (embedded in a larger periodic grid) or "circular".
        embedding: the grid to use; by default the convolution's own.

    Returns:
        FrequencyMatrices of ``out_channels/groups`` rows and ``in_channels/groups * prod(stride)`` columns, one block
        per group and per kernel of a batch.

    Raises:
        MethodError: the convolution is not a truncated block-circulant operator.

    Source:
        Sedghi, Gupta, Long, "The singular values of convolutional layers", ICLR 2019, for stride 1.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0, 1.0]]]), in_size=(4,), padding=1, padding_mode="circular")
        >>> lsconv.fourier.symbol.symbol(A).matrices.flatten().abs()
        tensor([4., 2., 0.])
    """
    if embedding is None:
        if not Embedding.serves(convolution):
            raise MethodError(
                f"symbol: padding_mode={convolution.padding_mode!r} with stride {convolution.stride} on "
                f"{convolution.spatial_in} is not block-circulant"
            )
        embedding = Embedding(convolution)
    grid = Grid(embedding.grid, real=not convolution.is_complex)
    entries = embedding.out_channels * embedding.in_channels
    if entries > ELEMENTWISE_ENTRIES and set(embedding.stride) == {1} and max(embedding.kernel_size) <= FEW_WAVES:
        k = embedding.weight_blocks(convolution.weight).movedim((1, 2), (-2, -1))
        return FrequencyMatrices(
            grid, from_taps(k, [torch.tensor([tau for _, tau in a.taps]) for a in embedding.axes], grid)
        )
    kernel = embedding.kernel_to_grid(convolution.weight)
    # cross-correlation: the conjugate of the transform of the conjugate kernel
    matrices = grid.transform(kernel.conj().resolve_conj()).conj().resolve_conj()
    return FrequencyMatrices(grid, matrices.movedim((1, 2), (-2, -1)))


def from_taps(k: Tensor, positions: list[Tensor], grid: Grid) -> Tensor:
    """The symbol of a kernel of few taps, by a sum over the taps of one axis after the other.

    Args:
        k: ``(blocks, *taps, rows, columns)``.
        positions: along every axis those of the taps.
        grid: the periodic grid.
    """
    k = k.to(k.dtype.to_complex()).contiguous()
    shape = list(k.shape)
    for a in reversed(range(len(positions))):
        waves = plane_waves(positions[a], grid.sizes[a], grid.frequencies[a]).mT.to(k)
        k = waves @ k.reshape(math.prod(shape[: 1 + a]), shape[1 + a], -1)
        shape[1 + a] = grid.frequencies[a]
    return k.reshape(shape)


def gram(S: Tensor, side: str) -> Tensor:
    """``S S^H`` ("residual") or ``S^H S`` ("solution") per frequency."""
    return S @ S.mH if side == "residual" else S.mH @ S


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` per frequency; without a batched product where that only scales."""
    return a * b if a.shape[-1] == 1 else a @ b


def shifted(matrices: Tensor, mu: Tensor) -> Tensor:
    """``matrices + mu I``, as a copy."""
    result = matrices.expand(broadcast_shapes(matrices.shape, (mu.shape[0], *matrices.shape[1:]))).clone()
    result.diagonal(dim1=-2, dim2=-1).add_(mu[..., 0])
    return result


def largest_eigenvalue(gram_matrices: Tensor) -> Tensor:
    """Bound the largest eigenvalue of each block from above, to a factor of the fourth root of the matrix size."""
    flat = gram_matrices.flatten(1, -3)
    square = flat @ flat if gram_matrices.shape[-1] > 1 else flat.abs() ** 2
    return frobenius(square).amax(-1).sqrt()


def saddle_inverse(S: Tensor, gram_matrices: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    r"""Invert the saddle-point form; return the inverse, and the smaller of W and V.

    .. math::
        \begin{pmatrix} -\sqrt\mu & S \\ S^H & \sqrt\mu \end{pmatrix}^{-1}
            = \begin{pmatrix} -\sqrt\mu\, W & W S \\ S^H W & \sqrt\mu\, V \end{pmatrix}, \qquad
        W = (S S^H + \mu)^{-1}, \quad V = (S^H S + \mu)^{-1}

    Only the smaller of W and V is factorised; the other follows from :math:`\mu V = I - S^H W S`.

    Args:
        S: the symbol, ``(blocks, *frequencies, rows, columns)``.
        gram_matrices: the smaller Gram matrices of S.
        mu: the damping squared, positive, of a shape that broadcasts with ``gram_matrices``.
    """
    rows, columns = S.shape[-2:]
    smaller = hermitian_inverse_(shifted(gram_matrices, mu).contiguous())
    if rows <= columns:
        W = smaller
        WS = W @ S
        V = _complement_over_mu(S.mH @ WS, mu)
    else:
        V = smaller
        WS = S @ V
        W = _complement_over_mu(WS @ S.mH, mu)
    root = mu.sqrt()
    inverse = S.new_empty(*W.shape[:-2], rows + columns, rows + columns)
    torch.mul(W, -root, out=inverse[..., :rows, :rows])
    inverse[..., :rows, rows:] = WS
    inverse[..., rows:, :rows] = WS.mH
    torch.mul(V, root, out=inverse[..., rows:, rows:])
    return inverse, smaller


def _complement_over_mu(projected: Tensor, mu: Tensor) -> Tensor:
    """``(I - projected) / mu``; overwrites ``projected``."""
    projected.neg_().diagonal(dim1=-2, dim2=-1).add_(1)
    return projected.div_(mu)
