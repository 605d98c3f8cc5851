"""The triangular factor of the normal operator of a small problem, by QR of the stacked matrix ``[A; damp L]``."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.operators.base import LinearOperator
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["triangular_factor"]


def triangular_factor(A: LinearOperator, L: LinearOperator | None, damp: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Compute R with ``R^H R = A^H A + damp^2 L^H L``, in double precision, ``(*batch, in_numel, in_numel)``.

    QR of ``[A; damp L]`` does not square its condition, as a Cholesky factorisation of the normal operator would.

    Args:
        A: the operator.
        L: the penalty; None: the identity.
        damp: the damping, which broadcasts to ``batch``.
        batch: the batch dimensions of A, L and damp together.

    Raises:
        LinAlgError: the normal operator is singular to working precision.
    """
    A_dense = A.to_dense()
    L_dense = torch.eye(A.in_numel, dtype=A_dense.dtype, device=A_dense.device) if L is None else L.to_dense()
    dtype = torch.complex128 if A_dense.is_complex() or L_dense.is_complex() else torch.float64
    parts = [A_dense.to(dtype), damp[..., None, None] * L_dense.to(dtype)]
    R = torch.linalg.qr(torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)).R
    pivots = R.detach().diagonal(dim1=-2, dim2=-1).abs()
    smallest = A.in_numel * torch.finfo(pivots.dtype).eps * pivots.amax(-1, keepdim=True)
    if not hidden_by_vmap(R) and not bool((pivots > smallest).all()):
        raise torch.linalg.LinAlgError("a pivot is zero")  # type: ignore[attr-defined]
    return R
