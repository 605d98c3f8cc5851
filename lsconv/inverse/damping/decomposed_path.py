r"""Damp paths of problems whose operator and penalty are diagonalised by one decomposition: of matrices, or by axes.

With vectors X such that :math:`X^HA^HAX = \operatorname{diag}(w)` and :math:`X^HL^HLX = \operatorname{diag}(p)`, and
:math:`\beta = U^Hy` for the orthonormal U along AX, everything is a sum, and a scan of damps costs no solves:

.. math::
    \|r\|^2 = \|y - U\beta\|^2 + \sum (1 - f)^2 |\beta|^2, \quad \operatorname{tr} H = \sum f, \quad
    \|Lx\|^2 = \sum \frac{p w |\beta|^2}{(w + \mu p)^2}, \qquad f = \frac{w}{w + \mu p}.

Hansen, "Rank-Deficient and Discrete Ill-Posed Problems" (1998), section 4.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.factored.direct_plan import WORK_ARRAYS
from lsconv.factored.kronecker import Factors, along_axes, separable_svd
from lsconv.inverse.damping.paths import Evaluation
from lsconv.inverse.plans.small_matrices import separable_factors
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import ROUNDING, double
from lsconv.operators.memory import allowed_bytes

__all__ = ["DecomposedPath", "DensePath", "SeparablePath"]


class DecomposedPath:
    """A :class:`~lsconv.inverse.damping.paths.DampPath` of sums over the directions of a decomposition.

    Attributes:
        w: the squared singular values of the operator, ``(*batch, directions)``.
        p: the squared singular values of the penalty, ``(*batch, directions)``.
        energies: ``|beta|^2``, summed over the data that share a damp, ``(*batch, directions)``.
        outside: ``||y - U beta||^2``, ``batch``.
        rhs: the number of data vectors, such as channels, that share a damp.
        nullity: dimension of the part of the null space of the penalty on which A is not zero, ``batch``.
    """

    exact = True
    w: Tensor
    p: Tensor
    energies: Tensor
    outside: Tensor
    rhs: int
    nullity: Tensor
    data_count: int | Tensor
    batch: tuple[int, ...]
    scale: Tensor

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`~lsconv.inverse.damping.paths.DampPath`."""
        mu = damp.double().square().unsqueeze(-1)
        w, p = self.w, self.p
        both = w + mu * p
        nonzero = both > 0
        both = torch.where(nonzero, both, 1)
        f, fitted = w / both, p * w * self.energies / both.square()

        def total(values: Tensor) -> Tensor:
            return values.sum(-1).expand(self.batch)

        logdet = torch.where(nonzero, both.log(), 0) - torch.where(p > 0, mu.log(), 0)
        return Evaluation(
            self.outside.expand(self.batch) + total((1 - f).square() * self.energies),
            total(fitted),
            self.rhs * total(f),
            torch.zeros(self.batch, dtype=torch.float64, device=w.device),
            self.rhs * total(logdet),
            -2 * total(p * fitted / both),
            -self.rhs * total(f * (1 - f)),
        )


class DensePath(DecomposedPath):
    r"""The damp path of any operator and penalty with few unknowns, by decompositions of their matrices.

    With :math:`S = A^HA + c^2 L^HL = W \Sigma W^H`, :math:`T = W \Sigma^{-1/2}` and the singular value decomposition
    :math:`A T = U \operatorname{diag}(\sqrt w)\, Q^H`, the columns of :math:`X = T Q` are orthogonal for A and for L at
    once. The common null space of A and L is left out. Without L it is the singular value decomposition of A.

    Golub and Van Loan, "Matrix Computations" (2013), section 8.7.4, for the pair of matrices.

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


class SeparablePath(DecomposedPath):
    """The damp path of a separable convolution with one kernel for all batch items, L the identity.

    The singular value decomposition of A is the Kronecker product of those of its axes, for any padding mode, stride
    and dilation. A kernel that is separable up to rounding is replaced by the nearest separable one.

    Args:
        A: the convolution.
        y: data ``(rhs, *batch, *out_shape)``; those along the first dimension share a damp; zero where A has a zero
            row.
        count: number of measured data.
        factors: the factors of the kernel along the axes.
    """

    @torch.no_grad()
    def __init__(self, A: Convolution, y: Tensor, count: Tensor, factors: Factors | None = None) -> None:
        parts = separable_svd(A, factors)
        assert parts is not None
        left_vectors, values, _ = parts
        self.rhs, self.data_count = y.shape[0], count
        self.batch = tuple(y.shape[1 : y.ndim - len(A.out_shape)])
        y = y.to(double(A.dtype))
        beta = along_axes([U.mH for U in left_vectors], y)
        first = len(self.batch) + 1
        square = all(U.shape[-1] == U.shape[-2] for U in left_vectors)
        outside = 0 * y[..., :1] if square else y - along_axes(left_vectors, beta)
        self.outside = outside.abs().square().flatten(first).sum(-1).sum(0)
        self.energies = beta.abs().square().flatten(first).sum(0)
        self.w = values.square().flatten()
        self.p = torch.ones_like(self.w)
        largest = values.max()
        self.scale = torch.where(largest > 0, largest, 1).expand(self.batch)
        self.nullity = torch.zeros(self.batch, dtype=torch.int64, device=A.device)

    @classmethod
    def where_cheap(cls, A: LinearOperator, y: Tensor, L: LinearOperator | None, count: Tensor) -> SeparablePath | None:
        """Make the path; None where A is no such convolution, or decomposing its axes costs more than another path."""
        if not isinstance(A, Convolution) or A.batch_shape or L is not None:
            return None
        factors = separable_factors(A, damped=True)
        return None if factors is None else cls(A, y, count, factors)
