r"""The border of a grid whose frequencies are shared by ranks: replicated on all, solved without large transforms.

The border is made of strips: strip a has some positions p along axis a, and all cells of the other axes. For a vector u
on the border the spectrum, and the block-circulant Q applied to it and read on the border, need only transforms along
the strips,

.. math:: \hat u(k) = \sum_a \sum_{p} e^{-2\pi i k_a p / N_a}\, \hat u_{a,p}(k_{\ne a}), \qquad
          (Qu)_{a,p} = F^{-1} \frac{1}{N_a} \sum_{k_a} e^{2\pi i k_a p / N_a}\, Q(k)\, \hat u(k) .

where the inverse transform runs over the frequencies other than :math:`k_a`. Every rank computes its share of the
frequencies, and a sum over the ranks gives all of them the product. The preconditioner is the restricted additive
Schwarz one of :mod:`lsconv.border.system.border_system`: the inverse of Q on each strip, and in two dimensions on the
corner where the strips cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.system.border_krylov import Recycling, border_gmres
from lsconv.fourier.batched_linalg import DenseInverse, inverse_of_hermitian
from lsconv.fourier.embedding import BorderPositions
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.tiled.pencil_grid import PencilGrid

__all__ = ["PencilBorder", "PencilSystem", "strip_cells"]


@dataclass(frozen=True)
class Strip:
    """The border cells at some positions along one axis.

    Attributes:
        axis: the axis a across the strip, along which it has some positions only.
        others: the axes along the strip, of which it has all cells.
        channel: the channel of each position, on the CPU.
        place: each position, on the CPU.
        mask: ones for cells that are in no strip of an earlier axis, else zeros, ``(positions, *others)``.
    """

    axis: int
    others: tuple[int, ...]
    channel: Tensor
    place: Tensor
    mask: Tensor


class PencilBorder:
    """The border cells, and transforms of vectors on them, ``(1, blocks, size)``, which all ranks have.

    Args:
        grid: the grid.
        positions: border positions per channel and axis.
        device: the device of the vectors.

    Attributes:
        size: entries of a vector; a cell where two strips cross has one in each, and the second is always zero.
    """

    def __init__(self, grid: PencilGrid, positions: BorderPositions, device: torch.device) -> None:
        self.grid, self.positions, self.channels = grid, positions, len(positions)
        self.strips: list[Strip] = []
        for a in range(len(grid.sizes)):
            cells = strip_cells(positions, a)
            if not cells:
                continue
            others = tuple(b for b in range(len(grid.sizes)) if b != a)
            mask = torch.ones(len(cells), *(grid.sizes[b] for b in others), dtype=torch.float64)
            for row, (channel, _) in zip(mask, cells, strict=True):
                for d, b in enumerate(others):
                    if b < a:
                        row.index_fill_(d, torch.tensor(positions[channel][b], dtype=torch.int64), 0)
            channels, places = torch.tensor(cells).unbind(1)
            self.strips.append(Strip(a, others, channels, places, mask.to(device)))
        self._lengths = [strip.mask.numel() for strip in self.strips]
        self.size = sum(self._lengths)

    def strip_values(self, u: Tensor) -> list[Tensor]:
        """Split a vector into its values on each strip, ``(blocks, positions, *others)``."""
        parts = u[0].split(self._lengths, dim=-1)
        return [part.unflatten(-1, strip.mask.shape) for part, strip in zip(parts, self.strips, strict=True)]

    def vector(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join values on the strips to a vector, those outside of the masks dropped; undoes :meth:`strip_values`."""
        parts = [(piece * strip.mask).flatten(1) for piece, strip in zip(pieces, self.strips, strict=True)]
        return torch.cat(parts, dim=-1).unsqueeze(0)

    def transform_along(self, strip: Strip, piece: Tensor) -> Tensor:
        """Transform the values on a strip along it, and keep the frequencies of this rank."""
        if 1 in strip.others:
            d = 2 + strip.others.index(1)
            part = self.grid.part
            piece = torch.fft.rfft(piece, dim=d).narrow(d, part.start, part.stop - part.start)
        dims = [2 + d for d, b in enumerate(strip.others) if b != 1]
        return torch.fft.fftn(piece, dim=dims) if dims else piece

    def from_spectra(self, spectra: Sequence[Tensor], shares: Sequence[tuple[int, slice]]) -> Tensor:
        """Transform spectra along the strips back to a vector, summed over the ranks.

        Args:
            spectra: for every strip the frequencies of this rank, ``(blocks, positions, *frequencies)``.
            shares: for every strip the dimension along which the ranks share frequencies, and those of this rank.
        """
        padded = []
        for strip, s, (d, part) in zip(self.strips, spectra, shares, strict=True):
            count = self.grid.frequencies[strip.others[d - 2]]
            full = s.new_zeros(*s.shape[:d], count, *s.shape[d + 1 :])
            full.narrow(d, part.start, part.stop - part.start).copy_(s)
            padded.append(full)
        flat = torch.cat([torch.view_as_real(s).flatten() for s in padded])
        parts = self.grid.ranks.total(flat).split([2 * s.numel() for s in padded])
        pieces = []
        for strip, s, part in zip(self.strips, padded, parts, strict=True):
            # The sum over half of the frequencies of a real field has the real part of the sum over all.
            t = torch.view_as_complex(part.view(*s.shape, 2))
            dims = [2 + d for d, b in enumerate(strip.others) if b != 1]
            t = torch.fft.ifftn(t, dim=dims) if dims else t
            if 1 in strip.others:
                t = torch.fft.irfft(t, n=self.grid.sizes[1], dim=2 + strip.others.index(1))
            pieces.append(t.real if t.is_complex() else t)
        return self.vector(pieces)

    def spectrum(self, u: Tensor) -> Tensor:
        """The spectrum of a border vector at the frequencies of this rank, ``(1, blocks, channels, *share)``."""
        grid, total = self.grid, None
        for strip, piece in zip(self.strips, self.strip_values(u), strict=True):
            s = self.transform_along(strip, piece)
            waves = grid.waves(strip.axis, strip.place, s.dtype, s.device).conj()
            if total is None:
                share = (grid.sizes[0], grid.part.stop - grid.part.start, *grid.sizes[2:])
                total = s.new_zeros(len(s), self.channels, *share)
            for channel in strip.channel.unique().tolist():
                cells = (strip.channel == channel).nonzero().flatten().to(s.device)
                product = torch.tensordot(waves[cells], s[:, cells], ([0], [1]))
                total[:, channel] += product.movedim(0, 1 + strip.axis)
        assert total is not None
        return total.unsqueeze(0)

    def gather(self, share: Tensor) -> Tensor:
        """Read on the border the field whose spectrum the ranks share; all get the whole border vector."""
        grid, spectra, shares = self.grid, [], []
        for strip in self.strips:
            waves = grid.waves(strip.axis, strip.place, share.dtype, share.device) / grid.sizes[strip.axis]
            if strip.axis == 1:
                waves = waves * grid.weights(share.device)
            blocks, _, *freq = share.shape[1:]
            found = share.new_empty(blocks, len(strip.place), *(n for a, n in enumerate(freq) if a != strip.axis))
            for channel in strip.channel.unique().tolist():
                cells = (strip.channel == channel).nonzero().flatten().to(share.device)
                product = torch.tensordot(waves[cells], share[0, :, channel], ([1], [1 + strip.axis]))
                found[:, cells] = product.movedim(0, 1)
            spectra.append(found)
            # The sum over frequencies of the second axis is only partial on each rank.
            every = (2, slice(0, grid.frequencies[strip.others[0]]))
            shares.append(every if strip.axis == 1 else (2 + strip.others.index(1), grid.part))
        return self.from_spectra(spectra, shares)


class PencilSystem:
    """The equations ``Q_BB u = b`` of a block-circulant Q restricted to a border B, solved by preconditioned GMRES.

    Args:
        Q: the matrices of Q at the frequencies of this rank.
        border: the border.
        definite: Q is positive definite on the border.
    """

    def __init__(self, Q: FrequencyMatrices, border: PencilBorder, *, definite: bool) -> None:
        self.Q, self.border, self.definite = Q, border, definite
        self._shares = [self._share(strip) for strip in border.strips]
        self._inverses = [self._inverse(strip, share) for strip, share in zip(border.strips, self._shares, strict=True)]
        self._corner: tuple[Tensor, Tensor, DenseInverse] | None = None
        if len(border.strips) == len(border.grid.sizes) == 2:
            self._corner = self._corner_block(max_unknowns=2048)  # every rank has the inverse of this block
        self._restart = 100  # basis vectors, for which pencil_bytes counts
        self._recycling = Recycling(self._restart)

    def solve(self, b: Tensor, tolerance: float, max_iter: int) -> tuple[Tensor, int, float]:
        """Solve to a relative residual; return the unknowns, the iterations, and the residual that was reached."""
        u, count = border_gmres(
            self.product, self.precondition, b, tolerance, max_iter, 1, self._restart, self._recycling
        )
        residual = torch.linalg.vector_norm(b - self.product(u)) / torch.linalg.vector_norm(b)
        return u, int(count.max()), float(residual.nan_to_num(0.0))

    def product(self, u: Tensor) -> Tensor:
        """``Q_BB u``."""
        return self.border.gather(self.Q(self.border.spectrum(u)))

    def precondition(self, r: Tensor) -> Tensor:
        """Apply the inverse of every strip to its cells, and that of the corner block to those near the corner."""
        border, spectra = self.border, []
        for strip, piece, (d, part), inverse in zip(
            border.strips, border.strip_values(r), self._shares, self._inverses, strict=True
        ):
            s = border.transform_along(strip, piece)
            if strip.axis == 1:
                s = s.narrow(d, part.start, part.stop - part.start)
            spectra.append((inverse @ s.movedim(1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, 1))
        z = border.from_spectra(spectra, self._shares)
        if self._corner is not None:
            near, inner, dense = self._corner
            z[..., near[inner]] = dense(r[..., near])[..., inner]
        return z

    def _share(self, strip: Strip) -> tuple[int, slice]:
        """The dimension of a strip's spectrum along which the ranks share frequencies, and those of this rank."""
        grid = self.border.grid
        if strip.axis != 1:
            return 2 + strip.others.index(1), grid.part
        return 2, grid.ranks.rows(grid.sizes[strip.others[0]])

    def _inverse(self, strip: Strip, share: tuple[int, slice]) -> Tensor:
        """The inverses of Q restricted to a strip, ``(blocks, *frequencies of this rank, positions, positions)``."""
        grid, place, channel = self.border.grid, strip.place, strip.channel
        lags, which = (place[:, None] - place[None, :]).unique(return_inverse=True)
        m = self.Q.matrices
        waves = grid.waves(strip.axis, lags, m.dtype, m.device) / grid.sizes[strip.axis]
        if strip.axis == 1:
            waves = waves * (grid.weights(m.device) / 2)
        found = torch.tensordot(waves, m, ([1], [1 + strip.axis]))  # lags, blocks, *others, rows, columns
        if strip.axis == 1:
            dims = list(range(2, 2 + len(strip.others)))
            found = found + found.flip(dims).roll([1] * len(dims), dims).conj()
            found = torch.view_as_complex(grid.ranks.total(torch.view_as_real(found.resolve_conj()).contiguous()))
            found = found.narrow(share[0], share[1].start, share[1].stop - share[1].start)
        found = found.movedim((-2, -1), (1, 2))
        pairs = found[which.to(m.device), channel[:, None], channel[None, :]].movedim((0, 1), (-2, -1)).contiguous()
        return inverse_of_hermitian(pairs, definite=self.definite)

    def _corner_block(self, max_unknowns: int) -> tuple[Tensor, Tensor, DenseInverse]:
        """The corner block: its unknowns, those of them that are corrected (restricted Schwarz), and its inverse."""
        border, grid = self.border, self.border.grid
        overlap = min(grid.sizes) // 4
        while overlap > 0 and self._corner_size(overlap) > max_unknowns:
            overlap -= max(1, overlap // 8)
        windows = [self._window(a, overlap) for a in range(2)]
        indices, places, channels = [], [], []
        offset = 0
        for strip, other in ((border.strips[0], 1), (border.strips[1], 0)):
            flags = torch.zeros(strip.mask.shape, dtype=torch.bool)
            near = torch.isin(strip.place, windows[strip.axis])
            flags[near.nonzero(), windows[other]] = True
            cells = (flags & (strip.mask.cpu() > 0)).nonzero()
            indices.append(offset + cells[:, 0] * grid.sizes[other] + cells[:, 1])
            across, along = strip.place[cells[:, 0]], cells[:, 1]
            places.append(torch.stack([across, along] if strip.axis == 0 else [along, across], dim=1))
            channels.append(strip.channel[cells[:, 0]])
            offset += strip.mask.numel()
        index, place, channel = torch.cat(indices), torch.cat(places), torch.cat(channels)
        inner = [self._window(a, overlap // 2) for a in range(2)]
        within = torch.isin(place[:, 0], inner[0]) & torch.isin(place[:, 1], inner[1])
        m = self.Q.matrices
        kernel, at = m, []
        for a in range(2):
            # Positions relative to the beginning of the window have fewer distinct lags than those that wrap around.
            offset_place = (place[:, a] - windows[a][0]) % grid.sizes[a]
            lags, which = (offset_place[:, None] - offset_place[None, :]).unique(return_inverse=True)
            waves = grid.waves(a, lags, m.dtype, m.device) / grid.sizes[a]
            if a == 1:
                waves = waves * grid.weights(m.device)
            kernel = torch.tensordot(waves, kernel, ([1], [1 + a]))
            at.append(which.to(m.device))
        entries = grid.ranks.total(kernel.real.contiguous())  # lags of 1, lags of 0, blocks, rows, columns
        rows = channel.to(m.device)
        dense = entries.movedim(2, -1)[at[1], at[0], rows[:, None], rows[None, :]].movedim(-1, 0).contiguous()
        return index.to(m.device), within.nonzero().flatten().to(m.device), DenseInverse(dense, definite=self.definite)

    def _window(self, a: int, overlap: int) -> Tensor:
        """The positions along an axis within ``overlap`` of the border, in cyclic order from the widest gap on."""
        n = self.border.grid.sizes[a]
        places = torch.tensor(sorted({p for axes in self.border.positions for p in axes[a]}))
        near = ((places[:, None] + torch.arange(-overlap, overlap + 1)) % n).unique()
        gaps = torch.diff(near, prepend=near[-1:] - n)
        return near.roll(-int(gaps.argmax()))

    def _corner_size(self, overlap: int) -> int:
        """Estimate the number of unknowns of the corner block for an overlap."""
        lengths = [len(self._window(a, overlap)) for a in range(2)]
        return sum(len(axes[0]) * lengths[1] + len(axes[1]) * lengths[0] for axes in self.border.positions)


def strip_cells(positions: BorderPositions, a: int) -> list[tuple[int, int]]:
    """The border positions along an axis, as (channel, position)."""
    return [(channel, place) for channel, axes in enumerate(positions) for place in axes[a]]
