"""The triangular factor of the normal operator of a small problem, from its stacked matrix and not from its square."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.base import LinearOperator
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["triangular_factor"]


def triangular_factor(A: LinearOperator, L: LinearOperator | None, damp: Tensor, batch: tuple[int, ...]) -> Tensor:
    """R with ``R^H R = A^H A + damp^2 L^H L`` in double precision, ``(*batch, in_numel, in_numel)``.

    Args:
        A: the operator.
        L: the penalty; None: the identity.
        damp: the damping, which broadcasts to ``batch``.
        batch: the batch dimensions of all three.

    Raises:
        LinAlgError: the normal operator is singular to working precision.
    """
    M = A.to_dense()
    below = torch.eye(A.in_numel, dtype=M.dtype, device=M.device) if L is None else L.to_dense()
    wide = torch.complex128 if M.is_complex() or below.is_complex() else torch.float64
    parts = [M.to(wide), damp[..., None, None] * below.to(wide)]
    R = torch.linalg.qr(torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)).R
    pivots = R.detach().diagonal(dim1=-2, dim2=-1).abs()
    smallest = A.in_numel * torch.finfo(pivots.dtype).eps * pivots.amax(-1, keepdim=True)
    if not hidden_by_vmap(R) and not bool((pivots > smallest).all()):
        raise torch.linalg.LinAlgError("a pivot is zero")  # type: ignore[attr-defined]
    return R
