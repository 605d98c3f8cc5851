r"""Damp paths: residual, penalty and influence trace of the Tikhonov solutions of one problem, for any damp.

.. math:: x(\mu) = \arg\min_x \|Ax - y\|^2 + \mu \|Lx\|^2, \qquad \mu = \mathrm{damp}^2, \qquad
          H(\mu) = A(A^HA + \mu L^HL)^{-1}A^H

The rules of :mod:`lsconv.inverse.damping.rules` need of a problem the residual ``||A x - y||^2``, the
penalty ``||L x||^2``, the trace of the influence matrix H and, for some, a determinant or a derivative. A path computes
them:

======================  ===============================================  =============================================
path                    serves                                          trace
======================  ===============================================  =============================================
:class:`ExactPath`      convolutions with a small border or none        exact, from the border
:class:`FilterPath`     circular convolution with a circular L          exact, from the symbols
:class:`DensePath`      everything with few unknowns                    exact, from the matrices
:class:`SeparablePath`  separable convolutions                          exact, from the axes
:class:`BorderPath`     convolutions with any border, windows of them   stochastic, all probes in one border solve
:class:`SolverPath`     everything else                                 stochastic, all probes in one solve
======================  ===============================================  =============================================

The third and fourth are in :mod:`lsconv.inverse.damping.decomposed_path`, the last two in
:mod:`lsconv.inverse.damping.stochastic_paths`. A surrogate of large data, for finding where to look, is
:class:`~lsconv.inverse.damping.surrogate.TaperedPath`.

All data have one dimension in front of the batch: channels or windows that share a damp, which is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lsconv.border.influence import ExactInfluence
from lsconv.border.penalty import Penalty, as_convolutions
from lsconv.fourier.batched_linalg import frobenius, hermitian_inverse_
from lsconv.fourier.circulant import block_circulant, circulant_embedding, double_symbol
from lsconv.fourier.frequency_matrices import FrequencyMatrices, repeat_for_items
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double

__all__ = ["TOLERANCE", "DampPath", "Evaluation", "ExactPath", "FilterPath"]

# The relative accuracy of stochastic traces, and of the solves for them.
TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The quantities of a Tikhonov solution that the rules use, at one damp; tensors of shape ``batch``, float64.

    Attributes:
        residual_norm_sq: ``||A x - y||^2``.
        penalty_norm_sq: ``||L x||^2``.
        trace: the trace of the influence matrix H.
        trace_error: standard error of the trace; 0 where it is exact.
        logdet: ``log det(A^H A + mu L^H L) - rank(L) log mu`` up to a constant; NaN where it is not known.
        penalty_slope: derivative of the penalty with respect to mu; NaN unless requested. The derivative of the
            residual is ``-mu`` times this.
        trace_slope: derivative of the trace with respect to log mu; NaN where it is not known.
    """

    residual_norm_sq: Tensor
    penalty_norm_sq: Tensor
    trace: Tensor
    trace_error: Tensor
    logdet: Tensor
    penalty_slope: Tensor
    trace_slope: Tensor


class DampPath(Protocol):
    """The interface of a damp path: the quantities of the rules as functions of damp, for one problem.

    Attributes:
        data_count: number m of measured data, a number or ``batch``; zero rows of A are not measured.
        batch: batch dimensions.
        scale: norm of A over that of L, up to a small factor: the unit of damp, ``batch``.
        exact: the traces are exact.
    """

    data_count: int | Tensor
    batch: tuple[int, ...]
    scale: Tensor
    exact: bool

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``, of shape ``batch`` or, for one of all items, ``(1,) *
        len(batch)``.

        Args:
            damp: positive.
            slope: compute the derivative of the penalty.
            trace: compute the trace; False: a stochastic one is NaN, which saves its probes.
        """


class ExactPath:
    """The path of a convolution with a small border or none, L the identity, by :class:`ExactInfluence`."""

    exact = True

    def __init__(self, influence: ExactInfluence, y: Tensor, count: Tensor) -> None:
        self.influence, self.y = influence, y
        self.data_count: int | Tensor = count
        A = influence.A
        self.rhs = y.shape[0]
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - len(A.out_shape)], A.batch_shape))
        self.scale = influence.scale.expand(self.batch)

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`DampPath`."""
        found = self.influence.at(damp, self.y, slope=slope)
        all_data = (self.rhs, *self.batch)
        return Evaluation(
            found.residual_norm_sq.expand(all_data).sum(0),
            found.penalty_norm_sq.expand(all_data).sum(0),
            found.trace.expand(all_data).sum(0),
            torch.zeros_like(self.scale),
            found.logdet.expand(all_data).sum(0),
            found.penalty_slope.expand(all_data).sum(0),
            torch.full_like(self.scale, torch.nan),
        )


class FilterPath:
    r"""The path of a circular convolution with a circular L: a small matrix :math:`S^HS + \mu P^HP` per frequency."""

    exact = True

    def __init__(self, A: Convolution, y: Tensor, penalty: Tensor, count: Tensor) -> None:
        self.A = A.to(dtype=double(A.dtype))
        self.y, self.P = y.to(self.A.dtype), penalty
        self.data_count: int | Tensor = count
        self.batch = tuple(broadcast_shapes(y.shape[1 : y.ndim - len(A.out_shape)], A.batch_shape))
        S, P = double_symbol(self.A, block_circulant(self.A)).matrices, self.P
        norms = frobenius(S).flatten(1).amax(1) / frobenius(P).flatten(1).amax(1)
        self.scale = norms.reshape(*A.batch_shape, -1).amax(-1).expand(self.batch)

    @staticmethod
    def penalty(A: LinearOperator, L: LinearOperator) -> Tensor | None:
        """The symbol of L on the grid of A; None where A or L is not circular."""
        terms = as_convolutions(L, A.ndim) if isinstance(A, Convolution) else None
        if not isinstance(A, Convolution) or terms is None or not Penalty.serves(A, terms):
            return None
        embedding = circulant_embedding(A)
        penalty = Penalty(A, terms, torch.ones((), dtype=torch.float64, device=A.device))
        if embedding is None or penalty.grid != embedding.grid or any(map(any, penalty.border(embedding))):
            return None
        return penalty.rows(embedding).to(torch.complex128)

    def evaluate(self, damp: Tensor, *, slope: bool = False, trace: bool = True) -> Evaluation:
        """Return residual, penalty and trace at ``damp``; see :class:`DampPath`."""
        embedding = block_circulant(self.A, tuple(damp.shape))
        S = double_symbol(self.A, embedding)
        P = self.P if len(self.P) == 1 else repeat_for_items(self.P, embedding.blocks)
        mu = embedding.per_block(damp.double().square()).reshape(-1, *(1 for _ in S.matrices.shape[1:]))
        normal = S.matrices.mH @ S.matrices + mu * (P.mH @ P)
        factor, _ = torch.linalg.cholesky_ex(normal)
        inverse = hermitian_inverse_(normal.contiguous())
        influence = S.matrices @ inverse @ S.matrices.mH
        weights = S.grid.weights(self.A.device, torch.float64)
        freedom = (influence.diagonal(dim1=-2, dim2=-1).real.sum(-1) * weights).flatten(1).sum(1)
        logdet = (2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum(-1) * weights).flatten(1).sum(1)
        ranked = (torch.linalg.matrix_rank(P, hermitian=False, rtol=1e-10) * weights).flatten(1).sum(1)
        logdet = logdet - ranked * mu.flatten().log()
        y = embedding.outputs_to_grid(self.y)
        spectrum = S.grid.transform(y)
        x = FrequencyMatrices(S.grid, inverse @ S.matrices.mH)(spectrum)
        penalty = S.grid.inverse(FrequencyMatrices(S.grid, P.expand(embedding.blocks, *P.shape[1:]))(x))
        predicted = FrequencyMatrices(S.grid, influence)
        r = y - S.grid.inverse(predicted(spectrum))
        pen, rss = _square(penalty.flatten(2)), _square(r.flatten(2))
        derivative = torch.full_like(pen, torch.nan)
        if slope:
            derivative = -2 * _inner(r.flatten(2), predicted.on_grid(r).flatten(2)) / mu.flatten() ** 2
        rhs = rss.shape[0]
        values = [rss, pen, *(v.expand(rhs, -1) for v in (freedom, logdet)), derivative]
        all_data = (self.y.shape[0], *self.batch)
        rss, pen, freedom, logdet, derivative = (embedding.per_item(v, all_data).sum(-1).sum(0) for v in values)
        unknown = torch.full_like(freedom, torch.nan)
        return Evaluation(rss, pen, freedom, torch.zeros_like(freedom), logdet, derivative, unknown)


def _square(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=-1).square()


def _inner(u: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(u, v, dim=-1).real
