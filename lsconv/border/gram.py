"""Gram matrices of a symbol, one per frequency: their products, shifts and largest eigenvalue."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier.symbol import frobenius
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["gram", "largest_eigenvalue", "product", "shifted"]

# The vectors that look for the frequencies of the largest singular values, and how many of these are looked at closely.
_PROBES = 4
_CANDIDATES = 64


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


def largest_eigenvalue(squared: Tensor, ndim: int) -> Tensor:
    """The largest eigenvalue over the frequencies, per block, from above within the fourth root of the size.

    Squaring every matrix would be a fifth of the setup: two products with a few vectors say which ones are worth it.
    """
    size, flat = squared.shape[-1], squared.flatten(1, -3)
    if size >= 4 * _PROBES and flat.shape[1] > 4 * _CANDIDATES:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(_PROBES, size, generator=generator, dtype=torch.float64).to(flat)
        once = probe @ flat.mT
        twice = once @ flat.mT
        growth = frobenius(twice) / frobenius(once).clamp_min(torch.finfo(flat.real.dtype).tiny)
        index = growth.topk(_CANDIDATES, dim=-1).indices
        flat = flat.gather(1, index[..., None, None].expand(-1, -1, size, size))
    square = flat @ flat if size > 1 else flat.abs() ** 2
    return frobenius(square).amax(-1).sqrt()
