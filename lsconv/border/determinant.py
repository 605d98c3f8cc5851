r"""Determinants of truncated block-circulant operators in ordinary torch code, so with derivatives of every kind.

:mod:`lsconv.border.influence` has traces and norms too, for dense borders and without derivatives.

A principal minor of a matrix is its determinant times the complementary minor of its inverse (Jacobi). With
:math:`A = R_{out} C R_{in}^T`, S the symbol of C, :math:`N = S^H S + s` and B the cells that the truncation removes,

.. math:: J = \begin{pmatrix} -1 & C \\ C^H & s \end{pmatrix}, \qquad
          J^{-1} = \begin{pmatrix} -(1 - S N^{-1} S^H) & S N^{-1} \\ N^{-1} S^H & N^{-1} \end{pmatrix}, \qquad
          \log\det(A^H A + s) = \sum_\omega \log\det N(\omega) + \log |\det (J^{-1})_{BB}| .

Rows of A that a mask removes are cells of B like any other. :math:`(J^{-1})_{BB}` is eliminated in two steps: lines of
the grid that lie in B as a whole decouple by frequency along themselves, and what is left is a dense matrix, the Schur
complement. Rows ``damp L`` below A are further rows of S, and s is then zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.border_set import Border, circulant_entries
from lsconv.border.influence import EXACT_UNKNOWNS
from lsconv.border.penalty import Filter, Penalty
from lsconv.errors import PlanMemoryError
from lsconv.fourier.batched_linalg import frobenius, slogdet, solve
from lsconv.fourier.embedding import BorderPositions, Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import symbol
from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.transforms import hidden_by_vmap

__all__ = ["PrincipalMinor", "TruncatedNormal", "truncated_normal", "twisted"]


class PrincipalMinor:
    """The determinant of a block-circulant operator restricted to some cells of its grid.

    Args:
        mask: the cells, ``(channels, *grid)`` on the CPU.

    Attributes:
        size: the unknowns of the largest dense matrix.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.grid = mask, tuple(mask.shape[1:])
        splits = [self._split(axis) for axis in range(len(self.grid))]
        sizes = [max(len(lines), len(other_cells)) for lines, other_cells in splits]
        self.axis = min(range(len(self.grid)), key=sizes.__getitem__)
        self.size = sizes[self.axis]
        self.lines, self.other_cells = splits[self.axis]

    def _split(self, axis: int) -> tuple[Tensor, Tensor]:
        """Split the cells into lines that lie in the set as a whole and the other cells.

        Args:
            axis: the axis that the lines are perpendicular to.

        Returns:
            The lines, rows of (channel, position along the axis), and the other cells, rows of (channel, *positions).
        """
        mask = self.mask.movedim(1 + axis, 1)
        full = mask.flatten(2).all(-1) if mask.ndim > 2 else mask
        others = mask & ~over_items(full, len(mask.shape[2:]))
        return full.nonzero(), others.nonzero()

    def slogdet(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Sign and logarithm of the absolute value of the determinant, of shape ``(blocks,)``.

        Args:
            kernel: the operator's first block column, ``(blocks, channels, channels, *grid)``.
        """
        kernel = kernel.movedim(3 + self.axis, 3)
        n, others = kernel.shape[3], kernel.shape[4:]
        real = not kernel.is_complex()
        along = Grid(tuple(others), real=real)
        G = along.transform(kernel).flatten(4) if others else kernel.unsqueeze(-1)
        weights = along.weights(kernel.device, kernel.real.dtype).flatten() if others else kernel.real.new_ones(1)

        def between(rows: Tensor, columns: Tensor) -> Tensor:
            lags = (rows[:, 1, None] - columns[None, :, 1]) % n
            return G[:, rows[:, 0, None], columns[None, :, 0], lags].movedim(-1, 1)  # blocks, frequencies, r, c

        lines, other_cells = self.lines.to(kernel.device), self.other_cells.to(kernel.device)
        sign, logabs = kernel.new_ones(len(kernel)), kernel.real.new_zeros(len(kernel))
        D = between(lines, lines)
        if len(lines):
            line_sign, line_logabs = slogdet(D)
            if real:  # those of a conjugate pair multiply to one
                line_sign = line_sign[:, weights == 1]
            line_sign = line_sign.prod(-1)
            sign, logabs = sign * (line_sign.real if real else line_sign), logabs + (line_logabs * weights).sum(-1)
        if not len(other_cells):
            return sign, logabs
        S = circulant_entries(kernel, other_cells)
        if len(lines):
            S = S - self._through_lines(D, between, lines, other_cells, along, weights)
        schur_sign, schur_logabs = slogdet(S)
        return sign * schur_sign, logabs + schur_logabs

    @staticmethod
    def _through_lines(
        D: Tensor,
        between: Callable[[Tensor, Tensor], Tensor],
        lines: Tensor,
        other_cells: Tensor,
        along: Grid,
        weights: Tensor,
    ) -> Tensor:
        """The part that eliminating the lines subtracts from the entries between the other cells.

        Args:
            D: the operator between the lines, one matrix per frequency along them.
            between: the operator between any rows of (channel, position), likewise.
            lines: the lines.
            other_cells: the other cells.
            along: the transform along the lines.
            weights: of its frequencies.
        """
        rows, which = other_cells[:, :2].unique(dim=0, return_inverse=True)
        to_lines, from_lines = between(rows, lines), solve(D, between(lines, rows))
        phases = torch.zeros(*along.frequencies, len(other_cells), dtype=torch.float64, device=other_cells.device)
        for a, (size, count) in enumerate(zip(along.sizes, along.frequencies, strict=True)):
            steps = torch.arange(count, device=other_cells.device)[:, None] * other_cells[None, :, 2 + a] % size
            phases += (steps.double() / size).reshape(count, *(1 for _ in along.sizes[a + 1 :]), -1)
        waves = torch.polar(torch.ones_like(phases), 2 * math.pi * phases).flatten(0, -2).to(D)  # frequencies, cells
        scale = weights / math.prod(along.sizes)
        to_lines = to_lines[:, :, which] * (waves * scale[:, None]).unsqueeze(-1)
        from_lines = from_lines[..., which] * waves.conj().unsqueeze(-2)
        to_lines, from_lines = to_lines.movedim(2, 1).flatten(2), from_lines.flatten(1, 2)
        if not along.real:
            return to_lines @ from_lines
        return torch.cat([to_lines.real, -to_lines.imag], -1) @ torch.cat([from_lines.real, from_lines.imag], -2)


@dataclass(frozen=True)
class TruncatedNormal:
    """``A^H A + s``, or ``A^H A + damp^2 L^H L + s``, for a truncated block-circulant A.

    Attributes:
        embedding: the grid.
        S: the symbol of A, and of what is stacked below it.
        penalised: s may be zero, for the rows below A make the operator regular.
        minor: the determinant on the cells removed; None where there are none.
        removed: outputs and inputs removed, per block.
        extra: grid cells per block that are no inputs and that nothing reads.
    """

    embedding: Embedding
    S: FrequencyMatrices
    penalised: bool
    minor: PrincipalMinor | None
    removed: tuple[int, int]
    extra: int

    def logdet(self, shift: Tensor) -> Tensor:
        """The logarithm of the determinant.

        Args:
            shift: s, broadcasting with the batch dimensions of the embedding; positive without a penalty.

        Returns:
            float64 tensor of the batch dimensions of the embedding.
        """
        value, inverse = self.parts(shift)
        if self.minor is not None:
            value = value + self.minor.slogdet(inverse.kernel())[1]
        return value.reshape(*self.embedding.batch_shape, -1).sum(-1)

    def parts(self, shift: Tensor) -> tuple[Tensor, FrequencyMatrices]:
        """The log-determinant of J per block, without that of the removed cells, and ``J^-1`` rescaled.

        Powers of the shift keep its entries in range where the shift is small.
        """
        grid, S = self.S.grid, self.S.matrices
        s = self.embedding.per_block(shift)
        rows, columns = S.shape[-2:]
        s_each = s.reshape(-1, *(1 for _ in range(S.ndim - 1)))
        weights = grid.weights(S.device, torch.float64)
        if self.penalised:
            inner, logs = _inverse_and_logdet(_shifted(S.mH @ S, s_each))
            cross = S @ inner
            minus_outer = _shifted(cross @ S.mH, -torch.ones_like(s_each))
            total = (logs * weights).flatten(1).sum(1)
        else:  # every block times powers of s^1/2, so that no entry exceeds one
            if rows <= columns:
                outer, logs = _inverse_and_logdet(_shifted(S @ S.mH, s_each))
                inner, cross = outer, outer @ S
                if self.removed[1]:
                    inner, _ = _inverse_and_logdet(_shifted(S.mH @ S, s_each))
            else:
                inner, logs = _inverse_and_logdet(_shifted(S.mH @ S, s_each))
                outer, cross = inner, S @ inner
                if self.removed[0]:
                    outer, _ = _inverse_and_logdet(_shifted(S @ S.mH, s_each))
            minus_outer, inner, cross = -s_each * outer, s_each * inner, s_each.sqrt() * cross
            idle = math.prod(grid.sizes) * max(columns - rows, 0)
            total = (logs * weights).flatten(1).sum(1) + (idle - self.removed[1] - self.extra) * s.log()
        if all(self.removed):
            K = torch.cat([torch.cat([minus_outer, cross], -1), torch.cat([cross.mH, inner], -1)], -2)
        else:
            K = minus_outer if self.removed[0] else inner
        return total, FrequencyMatrices(grid, K)


def _shifted(matrices: Tensor, shift: Tensor) -> Tensor:
    return matrices + shift * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def _inverse_and_logdet(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of Hermitian positive definite matrices, and the logarithms of their determinants."""
    if matrices.shape[-1] == 1:
        return matrices.reciprocal(), matrices[..., 0, 0].real.log()
    factor = torch.linalg.cholesky(matrices)
    logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum(-1)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.cholesky_solve(eye.expand_as(matrices), factor), logdet


def twisted(convolution: Convolution, grid: tuple[int, ...], shift: float = 0.5) -> Convolution:
    """Make a similar convolution, of stride 1 and with zero padding, whose symbol is A's at shifted frequencies.

    ``D^H A D`` with a diagonal D of phases has the kernel of A times phases, and the determinant of A; the symbol of A
    may have a zero at a frequency of the grid, such as the mean, without A being singular.

    Args:
        convolution: A.
        grid: the grid sizes.
        shift: the shift of the frequencies along every axis, as a part of their spacing.
    """
    phase = torch.zeros((), dtype=torch.float64, device=convolution.device)
    for a, (n, k) in enumerate(zip(grid, convolution.kernel_size, strict=True)):
        places = convolution.dilation[a] * torch.arange(k, device=phase.device) - convolution.padding[a][0]
        phase = phase.unsqueeze(-1) + places.double() * (2 * math.pi * shift / n)
    weight = convolution.weight * torch.polar(torch.ones_like(phase), phase)
    return Convolution(
        weight, convolution.spatial_in, 1, convolution.padding, convolution.dilation, convolution.groups,
        convolution.padding_mode, check_finite=False,
    )  # fmt: skip


def _stacked(
    A: Convolution, terms: list[Filter], damp: Tensor, batch_shape: tuple[int, ...]
) -> tuple[FrequencyMatrices, Embedding, BorderPositions]:
    """The symbol of ``[A; damp L]``, its grid and the border of its outputs."""
    stacked = Penalty(A, terms, damp, tight=True)
    embedding = stacked.embedding(batch_shape)
    S = symbol(stacked.convolution, embedding)
    parts = [S.matrices, stacked.rows(embedding).to(S.matrices.dtype)]
    blocks = max(map(len, parts))
    parts = [part.repeat(blocks // len(part), *(1 for _ in part.shape[1:])) for part in parts]
    return FrequencyMatrices(S.grid, torch.cat(parts, dim=-2)), embedding, stacked.border(embedding)


def _regular(S: Tensor) -> bool:
    """Tell whether S has full column rank, up to a condition, at all frequencies; no, where its values are hidden."""
    if hidden_by_vmap(S):
        return False
    values = torch.linalg.svdvals(S.detach()) if min(S.shape[-2:]) > 1 else frobenius(S.detach()).unsqueeze(-1)
    return S.shape[-2] >= S.shape[-1] and bool(values.amin() * 1e4 > values.amax())


def truncated_normal(
    A: Convolution,
    batch_shape: tuple[int, ...],
    penalty: tuple[list[Filter], Tensor] | None = None,
    dropped: Tensor | None = None,
    *,
    max_unknowns: int | None = EXACT_UNKNOWNS,
) -> TruncatedNormal:
    """Put ``A^H A`` and the like onto a grid.

    Args:
        A: the convolution, in double precision.
        batch_shape: of the damping.
        penalty: L as convolutions, and damp; they have one grid with A.
        dropped: outputs, ``(c_out / groups, *spatial_out)``, that are not measured.
        max_unknowns: of the largest dense matrix; None: any number.

    Raises:
        PlanMemoryError: the dense matrix has more.
    """
    if penalty is None:
        embedding = Embedding(A, (1,) * A.ndim, batch_shape)
        S = symbol(A, embedding)
        out_border = embedding.output_border()
    else:
        S, embedding, out_border = _stacked(A, *penalty, batch_shape)
        if embedding.axes[0].constrained and not _regular(S.matrices):
            grid = embedding.grid
            terms = [Filter(twisted(term.convolution, grid), term.factor) for term in penalty[0]]
            S, embedding, out_border = _stacked(twisted(A, grid), terms, penalty[1], batch_shape)
    outputs = Border(embedding.grid, out_border, torch.device("cpu")).mask
    inputs = Border(embedding.grid, embedding.input_border(), torch.device("cpu")).mask
    if dropped is not None:
        window = (slice(0, embedding.out_channels), *(slice(0, axis.n_out) for axis in embedding.axes))
        outputs[window] |= dropped.cpu()
    removed = int(outputs.sum()), int(inputs.sum())
    extra = inputs.numel() - removed[1] - math.prod(embedding.in_shape) // embedding.groups
    sides = [mask for mask, count in zip((outputs, inputs), removed, strict=True) if count]
    minor = PrincipalMinor(torch.cat(sides)) if sides else None
    if minor is not None and max_unknowns is not None and minor.size > max_unknowns:
        raise PlanMemoryError(
            f"A: its border has {minor.size} unknowns that no frequency separates, and determinants are exact up to "
            f"{max_unknowns}; exact=False estimates them"
        )
    return TruncatedNormal(embedding, S.repeated(embedding.blocks), penalty is not None, minor, removed, extra)
