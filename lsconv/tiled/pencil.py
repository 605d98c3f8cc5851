r"""The inverse of the whole normal operator on several ranks: frequencies are shared, the border is replicated.

The formulas are those of :mod:`lsconv.border.normal_inverse`. In the pencil decomposition of the Fourier transform
(:mod:`lsconv.tiled.pencil_grid`) every rank has some of the frequencies; every rank has all unknowns of the border
(:mod:`lsconv.tiled.pencil_border`). A solve then takes one distributed transform and its inverse, however many
iterations the border takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.border.normal_problem import NormalProblem, Request, least_shift
from lsconv.border.penalty import Filter, Penalty
from lsconv.border.truncated_circulant import TruncatedCirculant, truncated_circulant
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.operators.convolution import Convolution
from lsconv.tiled.pencil_border import PencilBorder, PencilSystem, strip_cells
from lsconv.tiled.pencil_grid import PencilGrid, share_size
from lsconv.tiled.ranks import Ranks

__all__ = ["PencilInverse", "pencil_bytes"]


class PencilInverse:
    """The inverse of ``A^H A + damp^2 L^H L``; all ranks make and call it together.

    Args:
        A: the convolution, in double precision, of two axes or more.
        terms: the penalty L as convolutions; empty: the identity.
        damp: the damping.
        ranks: the processes.

    Attributes:
        iterations: iterations on the border in the last call.
        residual: the relative residual of the border's equations in the last call.
    """

    def __init__(self, A: Convolution, terms: Sequence[Filter], damp: float, ranks: Ranks) -> None:
        truncated = _structure(A, terms, damp)
        self.grid = PencilGrid(truncated.embedding.grid, A.spatial_in, ranks)
        shift = torch.tensor(0.0 if terms else damp, dtype=torch.float64, device=A.device)
        floor = least_shift(torch.float64, damped=True)
        request = Request(A, shift, floor, side="solution", penalty=Penalty.of_terms(A, terms, damp))
        problem = NormalProblem(request, symbol_of=self.grid.symbol)
        problem.mu = ranks.maximum(problem.mu)  # the least shift depends on all frequencies, and so on all ranks
        parts, truncated = problem.circulant_parts, problem.truncated
        self.form, self.groups, self.inverse, self.to_border = problem.form, A.groups, parts.inverse, parts.to_border
        self.iterations, self.residual = 0, 0.0
        self._rows, self._root = problem.symbol.rows, problem.mu_for_matrices.sqrt()[..., 0]
        self.system: PencilSystem | None = None
        if self.form != "circulant":
            self.border = PencilBorder(self.grid, _positions(truncated), A.device)
            self.system = PencilSystem(parts.Q, self.border, definite=self.form != "saddle")

    def __call__(self, g: Tensor, tolerance: float, max_iter: int = 300) -> Tensor:
        """Apply the inverse to a field of which this rank has the rows ``g``, ``(channels, rows, *inputs)``.

        Args:
            g: the rows of this rank.
            tolerance: relative, to which the border's equations are solved.
            max_iter: limit on the iterations on the border.
        """
        spectrum = self.grid.transform(g.unflatten(0, (self.groups, -1))).unsqueeze(0)
        z = self._solve(spectrum, tolerance, max_iter)
        return self.grid.inverse(z[0]).flatten(0, 1)

    def _solve(self, spectrum: Tensor, tolerance: float, max_iter: int) -> Tensor:
        """Solve, through the border, for data given by the frequencies of this rank; the solution has the same form."""
        if self.system is None:
            return self.inverse(spectrum)
        border = self.border
        if self.form == "saddle":
            every, rows = slice(None), slice(self._rows, None)
            t = self.inverse.block(every, rows)(spectrum)
            u, self.iterations, self.residual = self.system.solve(-border.gather(t), tolerance, max_iter)
            z = self.inverse.block(rows, every)(border.spectrum(u)).add_(t[:, :, rows])
            return z.div_(self._root)
        t = self.inverse(spectrum)
        b = border.gather(t if self.to_border is None else self.to_border(t))
        b = b.neg() if self.to_border is None else b
        u, self.iterations, self.residual = self.system.solve(b, tolerance, max_iter)
        correction = border.spectrum(u)
        if self.to_border is not None:
            correction = self.to_border.H(correction)
        return t.add_(self.inverse(correction))


def pencil_bytes(A: Convolution, terms: Sequence[Filter], damp: float, ranks: int) -> int | None:
    """Estimate the bytes on a rank, with the vectors of a solve; None where the inverse cannot be made."""
    if A.ndim < 2 or not Embedding.serves(A):
        return None
    truncated = _structure(A, terms, damp)
    grid, columns, rows = truncated.embedding.grid, truncated.symbol.columns, truncated.symbol.rows
    if grid[1] // 2 + 1 < ranks or A.spatial_in[0] < ranks:
        return None
    across = rows**2 + rows * columns if truncated.form == "valid" else 0
    matrices = A.groups * ((rows + columns) ** 2 if truncated.form == "saddle" else columns**2 + across)
    spectra = A.groups * (rows + 6 * columns)
    border, positions = 0, _positions(truncated)
    for a, n in enumerate(grid):
        cells = len(strip_cells(positions, a))
        along = A.groups * math.prod(grid) // n
        # GMRES and the subspace that it recycles have up to two bases of a hundred vectors each.
        border += 8 * along * cells * 410 + 16 * along * cells**2 // ranks
    return 16 * (2 * matrices + spectra) * share_size(grid, ranks) + border


def _structure(A: Convolution, terms: Sequence[Filter], damp: float) -> TruncatedCirculant:
    """The truncated circulant without its symbol, which its grid, form and border do not depend on."""

    def symbol(convolution: Convolution, embedding: Embedding) -> FrequencyMatrices:
        shape = (convolution.groups, *(1 for _ in embedding.grid), embedding.out_channels, embedding.in_channels)
        grid = Grid(tuple(1 for _ in embedding.grid), real=True)
        return FrequencyMatrices(grid, torch.zeros(shape, dtype=torch.complex128, device=A.device))

    return truncated_circulant(A, (), Penalty.of_terms(A, terms, damp), symbol_of=symbol)


def _positions(truncated: TruncatedCirculant) -> Any:
    """The border positions, per channel and axis, of the unknowns that the truncated circulant's form has."""
    both = {"valid": truncated.out_border, "full": truncated.in_border, "circulant": []}
    return both.get(truncated.form, truncated.out_border + truncated.in_border)
