"""Factors, inverses and determinants of batches of dense matrices.

On a CPU torch factorises the matrices of a batch by LU in several threads at once, and MKL's row exchanges are not
safe there: from about 150 rows on, factors and pivots can be wrong without an error (pytorch issue 142815; torch 2.5 to
2.13). The functions here factorise such matrices one after the other, with all threads for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lsconv.operators.batch_layout import WORK_BYTES

__all__ = [
    "LEAST_FACTORED",
    "DenseInverse",
    "chunks",
    "frobenius",
    "hermitian_inverse_",
    "inverse",
    "inverse_of_hermitian",
    "lu_factor",
    "lu_factor_in_place",
    "slogdet",
    "solve",
]

# Smaller matrices are inverted instead of factorised, and all matrices on a GPU, where triangular solves are slow.
LEAST_FACTORED = 256

# Smaller matrices are factorised without blocking, which the error needs; it was seen from 151 rows on.
_LEAST_ROWS = 64


def _one_by_one(matrices: Tensor) -> bool:
    """Tell whether torch would factorise these matrices in several threads at once, and possibly wrongly."""
    on_cpu = matrices.device.type == "cpu" and torch.get_num_threads() > 1
    return on_cpu and matrices.shape[-1] >= _LEAST_ROWS and matrices.shape[:-2].numel() > 1


def lu_factor(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise by LU; return factors, pivots and info as ``torch.linalg.lu_factor_ex`` does."""
    if not _one_by_one(matrices):
        factors, pivots, info = torch.linalg.lu_factor_ex(matrices)
        return factors, pivots, info
    return lu_factor_in_place(matrices.mT.clone(memory_format=torch.contiguous_format).mT)


def lu_factor_in_place(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factorise as :func:`lu_factor` does, in the storage of the matrices if that is column-major."""
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
    """Invert; return the inverses and info as ``torch.linalg.inv_ex`` does."""
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
    return torch.stack([torch.linalg.solve(matrix, right) for matrix, right in flat]).reshape(columns.shape)


def frobenius(matrices: Tensor) -> Tensor:
    """The Frobenius norms of matrices, by one reduction over contiguous memory, which torch's own does not use."""
    if not matrices.is_contiguous():
        matrices = matrices.mT
    if matrices.is_complex():
        matrices = torch.view_as_real(matrices.resolve_conj()).flatten(-2)
    return torch.linalg.vector_norm(matrices.flatten(-2), dim=-1)


def chunks(matrices: Tensor) -> Iterator[slice]:
    """A bounded number of matrices at a time, for the work memory: four arrays of their size at once."""
    chunk_bytes = WORK_BYTES // 4 if matrices.device.type == "cpu" else 2**27
    step = max(1, chunk_bytes // (matrices.shape[1:].numel() * matrices.element_size()))
    return (slice(start, start + step) for start in range(0, len(matrices), step))


def hermitian_inverse_(matrices: Tensor) -> Tensor:
    """Invert Hermitian positive definite matrices, contiguous in memory, in place.

    Where the Cholesky factorisation breaks down they are NaN.
    """
    size = matrices.shape[-1]
    if size <= 1:
        return matrices.reciprocal_()
    flat = matrices.view(-1, size, size)
    for part in chunks(flat):
        factor, info = torch.linalg.cholesky_ex(flat[part])
        # cholesky_inverse raises for singular factors, so these are replaced first, and their inverses by NaN below.
        factor[info > 0] = torch.eye(size, dtype=factor.dtype, device=factor.device)
        # Hermitian, so this only undoes LAPACK's column-major order.
        flat[part] = torch.cholesky_inverse(factor).mT.conj()
        flat[part][info > 0] = math.nan
    return matrices


def inverse_of_hermitian(matrices: Tensor, *, definite: bool) -> Tensor:
    """Invert Hermitian matrices, which may be overwritten; singular ones that need not be definite are pseudo-inverted.

    Args:
        matrices: ``(..., size, size)``.
        definite: they are positive definite.
    """
    if definite:
        return hermitian_inverse_(matrices.contiguous())
    inverses, info = inverse(matrices)
    if bool((info > 0).any()):
        inverses[info > 0] = torch.linalg.pinv(matrices[info > 0], hermitian=True)
    return inverses


class DenseInverse:
    """Apply the inverses of Hermitian matrices, stored as inverses when small, else as Cholesky or LU factors.

    Args:
        matrices: ``(blocks, size, size)``; may be overwritten.
        definite: the matrices are positive definite.
    """

    def __init__(self, matrices: Tensor, *, definite: bool) -> None:
        size, on_gpu = matrices.shape[-1], matrices.device.type != "cpu"
        self.pivots: Tensor | None = None
        self.kind = "inverse"
        if size < LEAST_FACTORED or on_gpu:
            self.factors = inverse_of_hermitian(matrices, definite=definite)
            return
        if definite:
            self.factors, info = torch.linalg.cholesky_ex(matrices)
            if not bool((info > 0).any()):
                self.kind = "cholesky"
                return
        # a real symmetric matrix is its transpose, which stands in LAPACK's order
        in_place = not matrices.is_complex() and matrices.is_contiguous()
        self.factors, self.pivots, _ = lu_factor_in_place(matrices.mT) if in_place else lu_factor(matrices)
        self.kind = "lu"

    def __call__(self, r: Tensor) -> Tensor:
        """Multiply the inverses with ``r`` of shape ``(rhs, blocks, size)``."""
        b = r.movedim(0, -1).to(self.factors.dtype)
        if self.kind == "inverse":
            z = self.factors @ b
        elif self.kind == "cholesky":
            # not cholesky_solve, which copies the factor
            z = torch.linalg.solve_triangular(self.factors, b, upper=False)
            z = torch.linalg.solve_triangular(self.factors.mH, z, upper=True)
        else:
            assert self.pivots is not None
            z = torch.linalg.lu_solve(self.factors, self.pivots, b)
        return z.movedim(-1, 0).to(r.dtype)

    @property
    def logdet(self) -> Tensor:
        """``log |det|`` of the matrices, ``(blocks,)``."""
        if self.kind == "inverse":
            return -torch.linalg.slogdet(self.factors)[1]
        diagonal = self.factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return 2 * diagonal if self.kind == "cholesky" else diagonal

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.factors.numel() * self.factors.element_size()
