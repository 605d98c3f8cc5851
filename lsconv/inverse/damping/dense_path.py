r"""The damp path of a small problem, from one decomposition of its matrices.

With :math:`S = A^HA + c^2 L^HL = W \Sigma W^H`, :math:`T = W \Sigma^{-1/2}` and the singular value decomposition
:math:`A T = U \operatorname{diag}(\sqrt w)\, Q^H`, the columns of :math:`X = T Q` are orthogonal for A and for L at
once: :math:`X^HA^HAX = \operatorname{diag}(w)` and :math:`X^HL^HLX = \operatorname{diag}(p)`, which with
:math:`\beta = U^Hy` is the form of :class:`~lsconv.inverse.damping.decomposed_path.DecomposedPath`.
The common null space of A and L is left out. Without L it is the singular value decomposition of A.

Golub and Van Loan, "Matrix Computations" (2013), section 8.7.4, for the pair of matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.factored.direct_plan import WORK_ARRAYS
from lsconv.inverse.damping.decomposed_path import DecomposedPath
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.dtypes import ROUNDING, double
from lsconv.operators.memory import allowed_bytes

__all__ = ["DensePath"]


class DensePath(DecomposedPath):
    """The damp path of any operator and penalty with few unknowns, by decompositions.

    Args:
        A: the operator.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp; zero where A has a zero
            row.
        L: the penalty; None: the identity.
        scale: norm of A over that of L, the constant c above.
        count: number of measured data.

    Attributes:
        nullity: dimension of the part of the null space of L on which A is not zero, ``batch``.
    """

    @torch.no_grad()
    def __init__(self, A: LinearOperator, y: Tensor, L: LinearOperator | None, scale: Tensor, count: Tensor) -> None:
        self.rhs = y.shape[0]
        self.data_count: int | Tensor = count
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - len(A.out_shape)], A.batch_shape))
        self.scale = scale.expand(self.batch)
        M = A.to_dense().to(double(A.dtype))
        if L is None:
            U, s, _ = torch.linalg.svd(M, full_matrices=False)
            self.p = torch.ones_like(s)
        else:
            P = L.to_dense().to(double(A.dtype))
            c = scale.double().reshape(*scale.shape, 1, 1)
            sigma, W = torch.linalg.eigh(M.mH @ M + c.square() * (P.mH @ P))
            seen = sigma > sigma.shape[-1] * torch.finfo(sigma.dtype).eps * sigma[..., -1:]
            T = W * torch.where(seen, sigma, torch.inf).rsqrt().unsqueeze(-2)
            U, s, Qh = torch.linalg.svd(M @ T, full_matrices=False)
            p = torch.linalg.vector_norm(P @ (T @ Qh.mH), dim=-2).square()
            weighted = c.squeeze(-1).square() * p
            rounding = ROUNDING * torch.finfo(weighted.dtype).eps  # a smaller value belongs to the null space of L
            directions = s.square() + weighted > 0.5  # 1, and 0 for directions that are left out
            s = torch.where(directions, s, 0)
            self.p = torch.where(directions & (weighted > rounding), p, 0)
        self.w = s.square()
        items = y.reshape(self.rhs, *y.shape[1 : y.ndim - len(A.out_shape)], -1, 1).to(double(A.dtype))
        beta = U.mH @ items
        outside = torch.linalg.vector_norm(items - U @ beta, dim=-2).square()
        self.outside = outside.squeeze(-1).sum(0)
        self.energies = beta.squeeze(-1).abs().square().sum(0)
        self.nullity = self.rhs * ((self.p == 0) & (self.w > 0)).sum(-1).expand(self.batch)

    @staticmethod
    def serves(A: LinearOperator, L: LinearOperator | None, unknowns: int) -> bool:
        """Tell whether decomposing the matrices of all batch items costs no more than one of ``unknowns`` unknowns."""
        items, m, n = math.prod(A.batch_shape), A.out_numel, A.in_numel
        rows = m if L is None else max(m, n, L.out_numel // 8)  # only products with L, which are fast
        smaller = min(m, n) if L is None else n
        fits = 8 * WORK_ARRAYS * items * n * rows <= allowed_bytes(None, A.device)
        return items * n * smaller * rows <= unknowns**3 and fits
