r"""The border of a plane solved directly, in one pass over the spectrum.

The pass of :class:`DirectInverse` works on spectra, except for the columns of the border. The rows H are read, solved
and written frequency by frequency (:mod:`~lsconv.border.direct.strip`); the remaining columns V' take one transform
along them in each direction, and the factors of their Schur complement S. With D the block-circulant Q restricted to H,

.. math:: u \leftarrow f - D^{-1} (Q f)_H, \qquad
          u \leftarrow u - S^{-1} (Q u)_{V'}, \qquad u \leftarrow u - D^{-1} (Q u)_H ,

after which Q u vanishes on the border. It is computed in double precision, so that one pass replaces several steps of
an outer iteration; the certificate shows whether it was accurate enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder, crossed_border, is_even, one_channel_saddle
from lsconv.border.direct.dense_schur import DenseSchur
from lsconv.border.direct.hodlr import HodlrSchur
from lsconv.border.direct.schur_complement import column_blocks
from lsconv.border.direct.strip import Strip
from lsconv.border.normal_problem import NormalProblem
from lsconv.border.penalty import Penalty
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import product
from lsconv.operators.batch_layout import CACHE_BYTES
from lsconv.operators.fft_convolution import FEW_WAVES, plane_waves
from lsconv.operators.memory import allowed_bytes, check_fits

__all__ = ["DirectInverse"]


class DirectBorder:
    """The inverse of Q restricted to a border, applied to spectra.

    Args:
        Q: the block-circulant operator, Hermitian.
        border: the cells it is restricted to.
        definite: whether it is positive definite.
        condition: a bound of its condition: up to its rounding an even operator is taken for even.
        spare_bytes: bytes that dense factors may take where hierarchical ones do not serve; None: 60 % of what is free.

    Raises:
        PlanMemoryError: dense factors would take more.
    """

    def __init__(
        self, Q: FrequencyMatrices, border: CrossedBorder, *, definite: bool, condition: float, spare_bytes: int | None
    ) -> None:
        self._along, self._real = Grid(border.grid[1:], real=Q.grid.real), Q.grid.real
        self._Q = Q
        spectrum = Q.matrices
        row_kernels = torch.fft.ifft(spectrum, dim=1)
        self.strip = Strip(row_kernels, border, definite=definite) if border.depth else None
        self.schur: DenseSchur | HodlrSchur | None = None
        self._height, self._rows = border.height, border.grid[0]
        if not border.column_cells:
            return
        one = len(border.rows) == 1 or one_channel_saddle(border, definite=definite)
        even = one and Q.grid.real and is_even(spectrum, condition)
        entries = column_blocks(spectrum, row_kernels, self.strip, border, self._along, definite=definite, even=even)
        if HodlrSchur.serves(border, definite=definite, real=self._real, even=even):
            hierarchical = HodlrSchur(entries, border, even=even)
            if hierarchical.low_rank:
                self.schur = hierarchical
            else:  # matrices of half or a quarter of the cells, in the basis of the symmetries
                needed = 16 * entries.shape[0] * border.column_cells**2 // (4 if even else 2)
                check_fits(needed, allowed_bytes(spare_bytes, spectrum.device), "the border")
        if self.schur is None:
            self.schur = DenseSchur(entries, border, definite=definite, even=even)
        (n,), (f,) = self._along.sizes, self._along.frequencies
        self._before = n - border.width
        self._read: Tensor | None = None
        self._write: Tensor | None = None
        if border.width <= FEW_WAVES:
            waves = plane_waves(torch.arange(self._before, n), n, f).mT.to(spectrum)
            self._write = waves.mH.contiguous()
            self._read = (waves * (self._along.weights(spectrum.device, spectrum.dtype) / n)[:, None]).mT.contiguous()

    def eliminate(self, u: list[Tensor], t: Iterable[Tensor], *, woodbury: bool) -> None:
        """Add to the spectra u, in place, those of the border values for which ``Q u`` vanishes on the border.

        Args:
            u: spectra ``(rhs, blocks, channels, *frequencies)``, one for each group of right-hand sides.
            t: ``Q u`` of each.
            woodbury: the border is on the other side than the unknowns: u is zero, t are the spectra ``E P f``, and
                ``t + Q u`` has to vanish on the border.
        """

        def image(spectrum: Tensor, offset: Tensor) -> Tensor:
            return self._Q(spectrum).add_(offset) if woodbury else self._Q(spectrum)

        values = []
        for spectrum, offset in zip(u, t, strict=True):
            if self.strip is not None:
                self.strip.eliminate(spectrum, offset)
            if self.schur is not None:
                values.append(self._columns(offset if self.strip is None else image(spectrum, offset)))
        if self.schur is None or not values:
            return
        solved = self.schur(torch.cat(values)).split([part.shape[0] for part in u])
        for spectrum, offset, v in zip(u, t if woodbury else u, solved, strict=True):
            self._subtract_columns(spectrum, v)
            if self.strip is not None:
                self.strip.eliminate(spectrum, image(spectrum, offset))

    def _columns(self, t: Tensor) -> Tensor:
        """The values at the columns V' of the spectrum t: ``(rhs, blocks, channels, width, height)``."""
        if self._read is None:
            return self._along.inverse(torch.fft.ifft(t, dim=-2)[..., : self._height, :])[..., self._before :].mT
        values = torch.fft.ifft(self._read @ t.mT)[..., : self._height]
        return values.real if self._real else values

    def _subtract_columns(self, u: Tensor, v: Tensor) -> None:
        """Subtract from a spectrum, in place, that of the vector with the values v on V' and zeros elsewhere.

        Args:
            u: ``(rhs, blocks, channels, *frequencies)``.
            v: ``(rhs, blocks, channels, width, height)``.
        """
        if self._write is None:
            v = self._along.transform(torch.nn.functional.pad(v.mT, (self._before, 0)))
            u -= torch.fft.fft(v, n=self._rows, dim=-2)
        else:
            lines = torch.fft.fft(v, n=self._rows).mT.flatten(0, 2)
            u.view(-1, *u.shape[-2:]).baddbmm_(lines, self._write.expand(lines.shape[0], -1, -1), alpha=-1)

    def logdet(self) -> Tensor:
        """``log |det|`` of the operator on the border, by block."""
        total = torch.zeros((), dtype=torch.float64, device=self._Q.matrices.device)
        if self.strip is not None:
            weights = self._along.weights(total.device, torch.float64)
            total = total + (self.strip.logdet() * weights).sum(-1)
        return total if self.schur is None else total + self.schur.logdet()

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(part.nbytes for part in (self.strip, self.schur) if part is not None)


@dataclass(frozen=True)
class _Pass:
    """The operators before and after the border solve in one pass: data -> before -> f; f + u -> after -> answer.

    Attributes:
        after: the operators from f + u to the spectrum of the answer, in the order in which they are applied.
        data_on_outputs: the data are outputs of A; else inputs.
        answer_on_outputs: the answer is one of outputs of A; else of inputs.
        before: the operator from the spectrum of the data to f; None: the identity.
        components: the components of the saddle operator that f has; None for a definite system.
        divisor: the divisor of the answer; None: one.
    """

    after: tuple[FrequencyMatrices, ...]
    data_on_outputs: bool
    answer_on_outputs: bool
    before: FrequencyMatrices | None = None
    components: slice | None = None
    divisor: Tensor | None = None


class DirectInverse:
    r"""The inverse of the normal operator of a truncated circulant A, and the solution of the problem, by factors.

    It computes what :class:`~lsconv.border.normal_inverse.NormalInverse` does, without its iteration.

    Args:
        problem: the normal operator of a convolution of one or two dimensions with zeros, or nothing, around the
            inputs; in double precision.

    Attributes:
        mu: the shift of the normal operator, per block.
        exact: the shift is ``damp^2`` everywhere, or negligible beside the penalty.
    """

    def __init__(self, problem: NormalProblem) -> None:
        self.embedding, self.form, self.side = problem.embedding, problem.form, problem.side
        self.mu, self.exact = problem.mu, problem.exact
        penalty = problem.request.penalty
        border = None if self.form == "circulant" else crossed_border(self.form, self.embedding, penalty)
        self._transposed = border is not None and border.oriented is not border
        if border is not None:
            self._plane, self._interior = border.grid, border.interior
            border = border.oriented
            problem = problem.on_plane(transposed=self._transposed)
        self._S = S = problem.symbol
        self._grid = S.grid
        self._root = self.mu.sqrt().reshape(1, -1, 1, *(1 for _ in S.grid.sizes))
        parts = problem.circulant_parts
        self._P, self._to_border = parts.inverse, parts.to_border
        self._from_border = None if self._to_border is None else self._to_border.H.map(Tensor.resolve_conj)
        self._border: DirectBorder | None = None
        if border is not None:
            condition = problem.condition(self._P)
            spare = problem.request.limits.spare_bytes
            self._border = DirectBorder(
                parts.Q, border, definite=self.form != "saddle", condition=condition, spare_bytes=spare
            )
        self._solution, self._dual, self._normal = self._passes(self.side, penalty)

    def _passes(self, side: str, penalty: Penalty | None) -> tuple[_Pass, _Pass | None, _Pass]:
        """Make the passes for the solution, its adjoint, and the inverse of the normal operator."""
        S, P, residual = self._S, self._P, side == "residual"
        # of the stacked rows, those of the penalty have data of zero
        adjoint = FrequencyMatrices(S.grid, S.matrices[..., : self.embedding.out_channels, :].mH.resolve_conj())
        solution = functools.partial(_Pass, data_on_outputs=True, answer_on_outputs=False)
        dual = functools.partial(_Pass, data_on_outputs=False, answer_on_outputs=True)
        normal = functools.partial(_Pass, data_on_outputs=residual, answer_on_outputs=residual)
        if self.form == "saddle":
            first, second = slice(0, S.rows), slice(S.rows, None)
            to_first, to_second = (P.block(rows, slice(None)) for rows in (first, second))
            inverse = normal((to_second,), components=second, divisor=self._root)
            if penalty is not None:
                return solution((to_second,), before=adjoint, components=second, divisor=self._root), None, inverse
            if residual:
                inverse = normal((to_first,), components=first, divisor=-self._root)
            return solution((to_second,), components=first), dual((to_first,), components=second), inverse
        if not residual:
            return solution((P,), before=adjoint), None if penalty is not None else dual((P, S)), normal((P,))
        fused = self._to_border is None
        after = (FrequencyMatrices(S.grid, product(S.matrices.mH, P.matrices)),) if fused else (P, adjoint)
        return solution(after), dual((P,), before=S), normal((P,))

    # ------------------------------------------------------------------ use

    def solution(self, y: Tensor) -> Tensor:
        """``(A^H A + mu)^-1 A^H y`` for ``y`` of shape ``(*batch, *out_shape)``."""
        return self._run(self._solution, y)

    def dual(self, v: Tensor) -> Tensor:
        """``A (A^H A + mu)^-1 v`` for ``v`` of shape ``(*batch, *in_shape)``: the adjoint of :meth:`solution`."""
        assert self._dual is not None
        return self._run(self._dual, v)

    def normal(self, f: Tensor) -> Tensor:
        """Apply the inverse of the normal operator to ``f``, outputs or inputs by the side."""
        return self._run(self._normal, f)

    def logdet(self) -> Tensor:
        r"""The logarithm of the determinant of the normal operator, of shape ``(*batch)``.

        .. math:: \log\det M_{II} = \log\det M + \log\det (M^{-1})_{BB}, \qquad
                  \log |\det J_{II}| = \log\det(AA^H + \mu) + \frac{n - m}{2} \log\mu ,

        for principal submatrices, and for the saddle operator J of m outputs and n inputs.
        """
        embedding, grid = self.embedding, self._grid
        P = self._P.matrices
        weights = grid.weights(P.device, torch.float64)
        total = -(torch.linalg.slogdet(P)[1] * weights).flatten(1).sum(-1)
        if self._border is not None:
            total = total + self._border.logdet()
        outputs = math.prod(axis.n_out for axis in embedding.axes) * embedding.out_channels
        inputs = math.prod(embedding.in_shape) // embedding.groups
        log_mu = 2 * self._root.flatten().log()
        residual = self.side == "residual"
        # An unknown of A that has no cell on the grid contributes log mu, and a retained cell that is no unknown has
        # contributed it too often.
        if self.form == "saddle":
            rows, columns = self._interior[: embedding.out_channels], self._interior[embedding.out_channels :]
            total = total - (sum(columns) - sum(rows)) / 2 * (log_mu if residual else -log_mu)
            extra_unknowns = outputs - sum(rows) if residual else inputs - sum(columns)
        else:
            grid_cells = (embedding.out_channels if residual else embedding.in_channels) * math.prod(embedding.grid)
            is_minor = self._border is not None and self._to_border is None
            retained_cells = sum(self._interior) if is_minor else grid_cells
            extra_unknowns = (outputs if residual else inputs) - retained_cells
        total = (total + extra_unknowns * log_mu if extra_unknowns else total).expand(embedding.blocks)
        return total.reshape(*embedding.batch_shape, embedding.groups).sum(-1)

    def solve_from(
        self, f: Tensor, tolerance: Tensor | float, max_iter: int = 1000, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor, None]:
        """Apply the inverse, as ``NormalInverse.solve_from`` does by iteration."""
        z = self.normal(f.to(self._S.matrices.dtype if f.is_complex() else self._root.dtype)).to(f.dtype)
        batch, _ = self.embedding.split_batch(tuple(f.shape[: f.ndim - self.embedding.ndim - 1]))
        return z, torch.zeros(batch, dtype=torch.int64, device=f.device), None

    def describe(self) -> str:
        """Grid, border and memory, for the ``repr`` of a plan."""
        unknowns = 0 if self._border is None or self._border.schur is None else self._border.schur.size
        return (
            f"form={self.form!r}, side={self.side!r}, grid={self.embedding.grid}, direct, {unknowns} unknowns x "
            f"{self.embedding.blocks} block(s), factors={self._S.matrices.dtype} {self.nbytes / 2**20:.1f} MiB on "
            f"{self._S.matrices.device}"
        )

    def _run(self, steps: _Pass, tensor: Tensor) -> Tensor:
        """Run a pass on ``tensor``, outputs or inputs."""
        embedding, grid = self.embedding, self._grid
        batch, _ = embedding.split_batch(tuple(tensor.shape[: tensor.ndim - embedding.ndim - 1]))
        to_grid = embedding.outputs_to_grid if steps.data_on_outputs else embedding.inputs_to_grid
        t = to_grid(tensor)
        if self._border is not None:
            t = t.reshape(*t.shape[:3], *self._plane)
            t = t.mT if self._transposed else t
        parts = [grid.transform(part) for part in t.split(self._group_size(t))] if t.shape[0] else []
        if steps.before is not None:
            parts = [steps.before(part).contiguous() for part in parts]
        if self._border is not None:
            parts = self._with_border(parts, steps.components)
        for matrices in steps.after:
            parts = [matrices(part) for part in parts]
        nothing = t.new_empty(0, t.shape[1], steps.after[-1].rows, *grid.sizes)
        z = torch.cat([nothing, *map(grid.inverse, parts)]) if len(parts) != 1 else grid.inverse(parts[0])
        if steps.divisor is not None:
            z = z.div_(steps.divisor)
        z = (z.mT if self._transposed else z).reshape(*z.shape[:3], *embedding.grid)
        from_grid = embedding.outputs_from_grid if steps.answer_on_outputs else embedding.inputs_from_grid
        return from_grid(z, batch)

    def _with_border(self, f: list[Tensor], components: slice | None) -> list[Tensor]:
        """Add the border's unknowns u to the spectra f, and return f + u.

        Args:
            f: spectra, one for each group of right-hand sides; overwritten.
            components: those of the saddle operator that f has; None for a definite system.
        """
        assert self._border is not None
        if components is not None:
            columns = self._P.block(slice(None), components)
            u = [part.new_zeros(*part.shape[:2], columns.rows, *part.shape[3:]) for part in f]
            for part, spectrum in zip(f, u, strict=True):
                spectrum[:, :, components] = part
            self._border.eliminate(u, map(columns, f), woodbury=False)
            return u
        if self._to_border is None:
            self._border.eliminate(f, map(self._P, f), woodbury=False)
            return f
        t = [self._to_border(self._P(part)) for part in f]
        u = [torch.zeros_like(part, memory_format=torch.contiguous_format) for part in t]
        self._border.eliminate(u, t, woodbury=True)
        assert self._from_border is not None
        return [part.sub_(self._from_border(spectrum)) for part, spectrum in zip(f, u, strict=True)]

    def _group_size(self, t: Tensor) -> int:
        """The number of right-hand sides of a group, whose spectra stay in the cache of a CPU."""
        if t.device.type != "cpu":
            return max(1, t.shape[0])
        one = math.prod(t.shape[1:]) * t.element_size()
        return max(1, 2 * CACHE_BYTES // max(one, 1))  # spectra are complex

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        passes = [p for p in (self._solution, self._dual, self._normal) if p is not None]
        used = [m for p in passes for m in (*p.after, p.before) if m is not None]
        used += [m for m in (self._P, self._to_border, self._from_border) if m is not None]
        distinct = {m.matrices.data_ptr(): m.nbytes for m in used}
        return sum(distinct.values()) + (0 if self._border is None else self._border.nbytes)
