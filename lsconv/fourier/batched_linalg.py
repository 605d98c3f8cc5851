"""LU factors of batches of matrices, one matrix at a time where torch's are wrong.

On a CPU torch factorises the matrices of a batch on several threads at once, and MKL's row exchanges do not bear that:
the factors of two matrices of 160 rows are off by orders of magnitude, or the pivots are zero and what follows raises
(pytorch issue 142815; torch 2.5 to 2.13). One after the other they are right, and MKL has all the threads for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse", "log_abs_det", "lu_factor", "lu_factor_in_place", "slogdet", "solve"]

# Matrices of fewer rows are factorised without the blocks on which it goes wrong (seen from 151 rows on).
_LEAST_ROWS = 64


def _one_by_one(matrices: Tensor) -> bool:
    on_cpu = matrices.device.type == "cpu" and torch.get_num_threads() > 1
    return on_cpu and matrices.shape[-1] >= _LEAST_ROWS and matrices.shape[:-2].numel() > 1


def lu_factor(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, pivots and info, as ``torch.linalg.lu_factor_ex`` gives them."""
    if not _one_by_one(matrices):
        factors, pivots, info = torch.linalg.lu_factor_ex(matrices)
        return factors, pivots, info
    return lu_factor_in_place(matrices.mT.clone(memory_format=torch.contiguous_format).mT)


def lu_factor_in_place(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise as :func:`lu_factor`, in the storage of the matrices where they lie column by column."""
    lead, rows = matrices.shape[:-2], matrices.shape[-1]
    if not _one_by_one(matrices):
        pivots, info = (torch.empty(0, dtype=torch.int32, device=matrices.device) for _ in range(2))
        factors, pivots, info = torch.linalg.lu_factor_ex(matrices, out=(matrices, pivots, info))
        return factors, pivots, info
    pivots, info = matrices.new_empty(*lead, rows, dtype=torch.int32), matrices.new_empty(lead, dtype=torch.int32)
    flat = matrices if len(lead) == 1 else matrices.view(-1, *matrices.shape[-2:])
    for matrix, its_pivots, its_info in zip(flat, pivots.view(-1, rows), info.view(-1), strict=True):
        factors, p, i = torch.linalg.lu_factor_ex(matrix)
        matrix.copy_(factors)
        its_pivots.copy_(p)
        its_info.copy_(i)
    return matrices, pivots, info


def inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses and info, as ``torch.linalg.inv_ex`` gives them."""
    if not _one_by_one(matrices):
        inverses, info = torch.linalg.inv_ex(matrices)
        return inverses, info
    inverses, info = matrices.new_empty(matrices.shape), matrices.new_empty(matrices.shape[:-2], dtype=torch.int32)
    flat = zip(matrices.flatten(0, -3), inverses.view(-1, *matrices.shape[-2:]), info.view(-1), strict=True)
    for matrix, its_inverse, its_info in flat:
        found, i = torch.linalg.inv_ex(matrix)
        its_inverse.copy_(found)
        its_info.copy_(i)
    return inverses, info


def log_abs_det(matrices: Tensor) -> Tensor:
    """The logarithms of the absolute values of the determinants."""
    factors, _, _ = lu_factor(matrices)
    return factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def slogdet(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the absolute value of the determinants, with derivatives."""
    if not _one_by_one(matrices):
        sign, logabs = torch.linalg.slogdet(matrices)
        return sign, logabs
    found = [torch.linalg.slogdet(matrix) for matrix in matrices.flatten(0, -3)]
    signs, logs = (torch.stack([part[k] for part in found]).reshape(matrices.shape[:-2]) for k in range(2))
    return signs, logs


def solve(matrices: Tensor, columns: Tensor) -> Tensor:
    """The inverses times ``columns``, with derivatives."""
    if not _one_by_one(matrices):
        return torch.linalg.solve(matrices, columns)
    flat = zip(matrices.flatten(0, -3), columns.flatten(0, -3), strict=True)
    return torch.stack([torch.linalg.solve(matrix, own) for matrix, own in flat]).reshape(columns.shape)
