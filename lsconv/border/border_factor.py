"""The dense factor of an operator on the border, and spectral functions of the matrices per frequency."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier.batched_linalg import lu_factor

__all__ = ["BorderFactor", "spectral_function", "thin_svd"]


class BorderFactor:
    """Q on the border, factorised: ``sign * Q`` by Cholesky where it is definite, LU otherwise."""

    def __init__(self, dense: Tensor, *, definite: bool, sign: float) -> None:
        self.definite, self.sign = definite, sign
        if definite:
            self.cholesky = torch.linalg.cholesky(sign * dense)
            self.logdet = 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).real.log().sum(-1)
        else:
            self.LU, self.pivots, info = lu_factor(dense)
            if bool((info > 0).any()):
                raise torch.linalg.LinAlgError("the operator on the border is singular")  # type: ignore[attr-defined]
            self.logdet = self.LU.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    def solve(self, b: Tensor) -> Tensor:
        """``Q^-1 b`` for ``(rest, blocks, unknowns)``."""
        columns = b.movedim(0, -1)
        if self.definite:
            return self.sign * torch.cholesky_solve(columns, self.cholesky).movedim(-1, 0)
        return torch.linalg.lu_solve(self.LU, self.pivots, columns).movedim(-1, 0)

    def trace_of_solve(self, change: Tensor) -> Tensor:
        """``tr Q^-1 change``."""
        if self.definite:
            inverse = self.sign * torch.cholesky_inverse(self.cholesky)
        else:
            eye = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
            inverse = torch.linalg.lu_solve(self.LU, self.pivots, eye.expand_as(change))
        return (inverse.mT * change).sum((-2, -1)).real


def thin_svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U, sigma, Vh`` of ``(..., rows, columns)``; of a single row or column without a decomposition."""
    if min(S.shape[-2:]) > 1:
        U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
        return U, sigma, Vh
    sigma = torch.linalg.vector_norm(S, dim=(-2, -1)).unsqueeze(-1)
    first = torch.zeros_like(S)
    first[..., 0, 0] = 1
    unit = torch.where(sigma.unsqueeze(-1) > 0, S / sigma.unsqueeze(-1).clamp_min(torch.finfo(sigma.dtype).tiny), first)
    one = torch.ones_like(S[..., :1, :1])
    return (one, sigma, unit) if S.shape[-2] == 1 else (unit, sigma, one)


def spectral_function(U: Tensor, f: Tensor, *, complete: bool, difference: bool) -> Tensor:
    """``U f U^H``, with f = 1 (and its derivative zero) on the complement of an incomplete basis U."""
    if complete or difference:
        return (U * f.unsqueeze(-2)) @ U.mH
    result = -((U * (1 - f).unsqueeze(-2)) @ U.mH)
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result
