r"""Exact traces, determinants and norms of a Tikhonov solution: by-products of the border, for every truncation.

:mod:`lsconv.border.determinant` has the determinant alone, for larger borders, masks and penalties, with derivatives.

With :math:`A = R_{out} C R_{in}^T`, :math:`\mu = damp^2`, C block-circulant with symbol :math:`S = U \Sigma V^H`, and

.. math::
    J = \begin{pmatrix} -\sqrt\mu & C \\ C^H & \sqrt\mu \end{pmatrix}, \qquad
    Q = \sqrt\mu\, J^{-1} = \begin{pmatrix} -U f U^H & U h V^H \\ V h U^H & V f V^H \end{pmatrix}, \qquad
    f = \frac{\mu}{\Sigma^2 + \mu}, \quad h = \frac{\sqrt\mu\, \Sigma}{\Sigma^2 + \mu},

the determinant of a principal submatrix of J is that of J times that of :math:`J^{-1}` on the cells B left out, so that

.. math::
    \log\det(I + AA^H/\mu) &= \sum \log(1 + \Sigma^2/\mu) + \log|\det Q_{BB}| \\
    \operatorname{tr} A(A^HA + \mu)^{-1}A^H &= \sum (1 - f)
        - \operatorname{tr}\bigl(Q_{BB}^{-1}\, \tfrac{\partial Q_{BB}}{\partial \log\mu}\bigr)

since the trace is minus the derivative of the determinant with respect to :math:`\log\mu`. B holds cropped outputs
("valid"), cropped inputs ("full") or both ("same"); where it is empty the sums alone are left. All powers of
:math:`\mu` have cancelled: every entry of Q is at most one. The dense factor of :math:`Q_{BB}` also solves for the
residual and the solution without any iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.border_set import Border, between_borders
from lsconv.errors import ArgumentError, MethodError, PlanMemoryError
from lsconv.fourier.batched_linalg import lu_factor
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import symbol
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import real_dtype

__all__ = ["EXACT_UNKNOWNS", "ExactInfluence", "Influence"]

# The most border unknowns of a block for a dense factor, which for 4096 takes 128 MiB in float64.
EXACT_UNKNOWNS = 4096


@dataclass(frozen=True, eq=False)
class Influence:
    """Trace, determinant and norms for one damping; all of shape ``batch``.

    Attributes:
        trace: the trace of the influence matrix ``A (A^H A + mu)^-1 A^H``.
        logdet: the log-determinant of ``I + A A^H / mu``.
        residual_norm_sq: ``||A x - y||^2``; NaN without data.
        penalty_norm_sq: ``||x||^2``; NaN without data.
        penalty_slope: the derivative of the latter by ``mu``; NaN unless requested.
    """

    trace: Tensor
    logdet: Tensor
    residual_norm_sq: Tensor
    penalty_norm_sq: Tensor
    penalty_slope: Tensor


class ExactInfluence:
    """Trace, determinant and norms of the Tikhonov solutions of a truncated convolution, for any damping.

    The singular values of the symbol are computed here, once, in double precision; every damping then costs one dense
    factorisation of the border per block (none where the border is empty).

    Args:
        A: a zero-padded convolution, or a circular one whose stride divides the sizes.
        max_unknowns: the most border unknowns of a block.
        work_bytes: blocks whose matrices take more are worked on one after the other.

    Attributes:
        unknowns: border unknowns of one block; 0 for a block-circulant A.
        scale: an upper bound of the norm of A, ``A.batch_shape``.

    Raises:
        MethodError: A is not a truncated block-circulant operator.
        PlanMemoryError: its border has more than ``max_unknowns`` unknowns.

    Example:
        >>> A = lsconv.Conv1d(torch.ones(1, 1, 3, dtype=torch.float64), in_size=8)
        >>> M = A.to_dense()
        >>> dense = torch.trace(M @ torch.linalg.solve(M.T @ M + 0.25 * torch.eye(8), M.T))
        >>> torch.allclose(ExactInfluence(A).at(torch.tensor(0.5)).trace, dense)
        True
    """

    @torch.no_grad()
    def __init__(self, A: LinearOperator, *, max_unknowns: int = EXACT_UNKNOWNS, work_bytes: int = 2**27) -> None:
        if not (isinstance(A, Convolution) and Embedding.serves(A)):
            raise MethodError(
                f"A: exact traces need a convolution with zero padding, or circular padding whose stride divides the "
                f"sizes, got {A!r}; stochastic ones serve every operator"
            )
        real_dtype(A.dtype)
        self._work_bytes = work_bytes
        self.A = A.to(dtype=torch.complex128 if A.is_complex else torch.float64)
        embedding = Embedding(self.A, tapped_phases_only=True)
        out_border, in_border = embedding.output_border(), embedding.input_border()
        self.has_out, self.has_in = (any(any(axes) for axes in border) for border in (out_border, in_border))
        # Q_BB has only the sides that are cropped
        positions = (out_border if self.has_out else []) + (in_border if self.has_in else [])
        self.border = Border(embedding.grid, positions, A.device) if positions else None
        self.unknowns = 0 if self.border is None else self.border.size
        if self.unknowns > max_unknowns:
            raise PlanMemoryError(
                f"A: the border has {self.unknowns} unknowns per block, and exact traces are computed up to "
                f"{max_unknowns}; use a stochastic trace"
            )
        S = symbol(self.A, embedding).matrices
        self.grid = Grid(embedding.grid, real=not A.is_complex)
        self.rows, self.columns = S.shape[-2:]
        self.U, self.sigma, self.Vh = _thin_svd(S)
        self.symbol_blocks = S.shape[0]
        largest = self.sigma.flatten(1).amax(1).reshape(-1, embedding.groups).amax(1)
        self.scale = (
            largest.reshape(A.batch_shape) if largest.numel() > 1 else largest.reshape(()).expand(A.batch_shape)
        )

    @torch.no_grad()
    def at(self, damp: Tensor, y: Tensor | None = None, *, slope: bool = False) -> Influence:
        """Compute trace, determinant and norms at ``damp``.

        Args:
            damp: positive; its shape broadcasts with the batch dimensions of A and of y. Dimensions of size one share
                their factors among the batch items.
            y: data ``(*batch, *out_shape)``.
            slope: compute also the derivative of the penalty norm.
        """
        damp = torch.as_tensor(damp, dtype=torch.float64, device=self.A.device)
        if not bool((damp > 0).all()) or not bool(torch.isfinite(damp).all()):
            raise ArgumentError(f"damp: expected positive numbers, got {damp.tolist()}")
        embedding = Embedding(self.A, self.grid.sizes, tuple(damp.shape), tapped_phases_only=True)
        blocks, groups = embedding.blocks, embedding.groups
        mu = (damp**2).expand(embedding.batch_shape).reshape(-1, 1).expand(-1, groups).reshape(-1)
        which = torch.arange(self.symbol_blocks, device=self.A.device)
        if self.symbol_blocks > groups:
            which = which.reshape(*self.A.batch_shape, groups)
        which = which.expand(*embedding.batch_shape, groups).reshape(-1)
        data, batch = None, embedding.batch_shape
        if y is not None:
            y = y.to(self.A.dtype)
            batch, _ = embedding.split_batch(tuple(y.shape[: y.ndim - len(self.A.out_shape)]))
            data = embedding.outputs_to_grid(y)
        chunk = max(1, self._work_bytes // self._bytes_per_block())
        parts = [
            self._blocks(mu[start : start + chunk], which[start : start + chunk],
                         None if data is None else data[:, start : start + chunk], slope)
            for start in range(0, blocks, chunk)
        ]  # fmt: skip
        trace = torch.cat([part[0] for part in parts]).unsqueeze(0)
        logdet = torch.cat([part[1] for part in parts]).unsqueeze(0)
        rhs = 1 if data is None else data.shape[0]
        values = [v.expand(rhs, blocks) for v in (trace, logdet)]
        if data is None:
            values += [torch.full_like(values[0], torch.nan)] * 3
        else:
            values += [torch.cat([part[2][k] for part in parts], dim=1) for k in range(3)]
        return Influence(*(embedding.per_item(v, batch).sum(-1) for v in values))

    def _bytes_per_block(self) -> int:
        size = self.rows + self.columns
        cells = math.prod(self.grid.sizes)
        return 16 * (2 * cells * size**2) + 16 * 3 * self.unknowns**2

    def _blocks(
        self, mu: Tensor, which: Tensor, data: Tensor | None, slope: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Trace, determinant and norms of some blocks."""
        sigma_sq = self.sigma[which] ** 2
        shaped = mu.reshape(-1, *(1 for _ in sigma_sq.shape[1:]))
        f = shaped / (sigma_sq + shaped)
        weights = self.grid.weights(mu.device, torch.float64).unsqueeze(-1)
        trace = ((1 - f) * weights).flatten(1).sum(1)
        logdet = (torch.log1p(sigma_sq / shaped) * weights).flatten(1).sum(1)
        factor = None
        if self.border is not None:
            h = (shaped * sigma_sq).sqrt() / (sigma_sq + shaped)
            dense = self._dense(self._matrices(which, f, h, cropped=True, difference=False))
            factor = _BorderFactor(
                dense, definite=not (self.has_out and self.has_in), sign=-1.0 if self.has_out else 1.0
            )
            change = self._dense(self._matrices(which, f * (1 - f), h * (0.5 - f), cropped=True, difference=True))
            trace = trace - factor.trace_of_solve(change)
            logdet = logdet + factor.logdet
        nothing = torch.full_like(trace, torch.nan).unsqueeze(0)
        if data is None:
            return trace, logdet, (nothing, nothing, nothing)
        h = (shaped * sigma_sq).sqrt() / (sigma_sq + shaped)
        Q = FrequencyMatrices(self.grid, self._matrices(which, f, h, cropped=False, difference=False))
        zero = data.new_zeros(*data.shape[:2], self.columns, *data.shape[3:])
        both = self._solve(Q, factor, torch.cat([data, zero], dim=2))
        root = mu.sqrt()
        residual_sq = _square(self._interior(both)[:, :, : self.rows])
        x = self._interior(both)[:, :, self.rows :] / root.reshape(1, -1, *(1 for _ in data.shape[2:]))
        derivative = nothing.expand(residual_sq.shape)
        if slope:  # d||x||^2/dmu = -2 x^H (A^H A + mu)^-1 x
            v = self._solve(Q, factor, torch.cat([torch.zeros_like(data), x], dim=2))[:, :, self.rows :]
            derivative = -2 * (x.conj() * v).real.flatten(2).sum(2) / mu
        return trace, logdet, (residual_sq, _square(x), derivative)

    def _interior(self, z: Tensor) -> Tensor:
        """Zero on the border, where the solution of the truncated system has no entries."""
        if self.border is None:
            return z
        cropped = torch.zeros(self.rows + self.columns, *self.grid.sizes, dtype=torch.bool)
        cropped[self._part()] = self.border.mask
        return z.masked_fill(cropped.to(z.device), 0)

    def _part(self) -> slice:
        """The channels of Q that have border cells."""
        return slice(0 if self.has_out else self.rows, self.rows + (self.columns if self.has_in else 0))

    def _solve(self, Q: FrequencyMatrices, factor: _BorderFactor | None, data: Tensor) -> Tensor:
        z = Q.on_grid(data)
        if factor is None or self.border is None:
            return z
        part = self._part()
        u = -factor.solve(self.border.gather(z[:, :, part]))
        correction = torch.zeros_like(data)
        correction[:, :, part] = self.border.scatter(u)
        return self._interior(z + Q.on_grid(correction))

    def _matrices(self, which: Tensor, f: Tensor, h: Tensor, *, cropped: bool, difference: bool) -> Tensor:
        """Q per frequency, or its derivative, from its factors f and h; ``cropped``: the sides with a border alone."""
        U, Vh = self.U[which], self.Vh[which]
        out, inside = not cropped or self.has_out, not cropped or self.has_in
        rows, columns = self.rows if out else 0, self.columns if inside else 0
        Q = U.new_empty(*U.shape[:-2], rows + columns, rows + columns)
        if out:
            Q[..., :rows, :rows] = -_spectral_function(U, f, complete=self.rows <= self.columns, difference=difference)
        if inside:
            Q[..., rows:, rows:] = _spectral_function(
                Vh.mH, f, complete=self.columns <= self.rows, difference=difference
            )
        if out and inside:
            off = (U * h.unsqueeze(-2)) @ Vh
            Q[..., :rows, rows:] = off
            Q[..., rows:, :rows] = off.mH
        return Q

    def _dense(self, matrices: Tensor) -> Tensor:
        """The block-circulant operator on the border cells: ``(blocks, unknowns, unknowns)``."""
        assert self.border is not None
        return between_borders(FrequencyMatrices(self.grid, matrices).kernel(), self.border, self.border)


def _square(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z.flatten(2), dim=2) ** 2


class _BorderFactor:
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
        """``Q^-1 b`` for ``(rhs, blocks, unknowns)``."""
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


def _thin_svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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


def _spectral_function(U: Tensor, f: Tensor, *, complete: bool, difference: bool) -> Tensor:
    """``U f U^H``, with f = 1 (and its derivative zero) on the complement of an incomplete basis U."""
    if complete or difference:
        return (U * f.unsqueeze(-2)) @ U.mH
    result = -((U * (1 - f).unsqueeze(-2)) @ U.mH)
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return result
