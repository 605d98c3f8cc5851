r"""The inverse of the saddle form of a damped convolution, one matrix per frequency.

.. math::
    \begin{pmatrix} -\sqrt\mu & S \\ S^H & \sqrt\mu \end{pmatrix}^{-1}
        = \begin{pmatrix} -\sqrt\mu\, W & W S \\ S^H W & \sqrt\mu\, V \end{pmatrix}, \qquad
    W = (S S^H + \mu)^{-1}, \quad V = (S^H S + \mu)^{-1}

Only the smaller of W and V is computed by a factorisation; the other follows from :math:`\mu V = I - S^H W S`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.border.gram import shifted
from lsconv.fourier.symbol import hermitian_inverse

__all__ = ["saddle_inverse"]


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
