r"""The matrices per frequency that a border method inverts: Gram matrices of a symbol, and the saddle form of both.

.. math::
    \begin{pmatrix} -\sqrt\mu & S \\ S^H & \sqrt\mu \end{pmatrix}^{-1}
        = \begin{pmatrix} -\sqrt\mu\, W & W S \\ S^H W & \sqrt\mu\, V \end{pmatrix}, \qquad
    W = (S S^H + \mu)^{-1}, \quad V = (S^H S + \mu)^{-1}

Only the smaller of W and V is computed by a factorisation; the other follows from :math:`\mu V = I - S^H W S`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier.symbol import frobenius, hermitian_inverse
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["gram", "largest_eigenvalue", "product", "saddle_inverse", "shifted"]


def gram(S: Tensor, side: str) -> Tensor:
    """``S S^H`` ("residual") or ``S^H S`` ("solution") per frequency."""
    return S @ S.mH if side == "residual" else S.mH @ S


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` per frequency; without a batched product where that only scales."""
    return a * b if a.shape[-1] == 1 else a @ b


def shifted(matrices: Tensor, mu: Tensor) -> Tensor:
    """``matrices + mu I``, as a copy."""
    shifted = matrices.expand(broadcast_shapes(matrices.shape, (mu.shape[0], *matrices.shape[1:]))).clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(mu[..., 0])
    return shifted


def largest_eigenvalue(squared: Tensor) -> Tensor:
    """The largest eigenvalue over the frequencies, per block, from above within the fourth root of the size."""
    flat = squared.flatten(1, -3)
    square = flat @ flat if squared.shape[-1] > 1 else flat.abs() ** 2
    return frobenius(square).amax(-1).sqrt()


def saddle_inverse(S: Tensor, squared: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse and its smaller part, W or V.

    Args:
        S: the symbol, ``(blocks, *frequencies, rows, columns)``.
        squared: the smaller Gram matrix of S.
        mu: shaped to broadcast with that, not zero.
    """
    rows, columns = S.shape[-2:]
    smaller = hermitian_inverse(shifted(squared, mu).contiguous())
    if rows <= columns:
        W = smaller
        WS = W @ S
        V = _other(S.mH @ WS, mu)
    else:
        V = smaller
        WS = S @ V
        W = _other(WS @ S.mH, mu)
    root = mu.sqrt()
    inverse = S.new_empty(*W.shape[:-2], rows + columns, rows + columns)
    torch.mul(W, -root, out=inverse[..., :rows, :rows])
    inverse[..., :rows, rows:] = WS
    inverse[..., rows:, :rows] = WS.mH
    torch.mul(V, root, out=inverse[..., rows:, rows:])
    return inverse, smaller


def _other(projected: Tensor, mu: Tensor) -> Tensor:
    """``(I - projected) / mu``; overwrites ``projected``."""
    projected.neg_().diagonal(dim1=-2, dim2=-1).add_(1)
    return projected.div_(mu)
