r"""The border of a grid whose frequencies several processes have: replicated, solved without large transforms.

The border cells lie in strips, one or more positions along an axis over the whole of the others. With Q block-circulant
the spectrum of a border vector is a sum over strips of a short transform along the strip times a plane wave across it,
and so is the way back,

.. math:: \hat u(k) = \sum_a \sum_{p} e^{-2\pi i k_a p / N_a}\, \hat u_{a,p}(k_{\ne a}), \qquad
          (Qu)_{a,p} = F^{-1} \frac{1}{N_a} \sum_{k_a} e^{2\pi i k_a p / N_a}\, Q(k)\, \hat u(k) .

Every process does so on its share of the frequencies, and one sum over the processes gives the product everywhere. The
preconditioner is that of :mod:`lsconv.border.system.border_system`, restricted: strips, whose frequencies are shared,
and in two dimensions the corner where they cross.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.system.krylov import Recycling, border_gmres
from lsconv.border.truncated_circulant import Positions
from lsconv.fourier.batched_linalg import DenseInverse, hermitian_inverse, indefinite_inverse
from lsconv.fourier.symbol import FrequencyMatrices
from lsconv.tiled.pencil_grid import PencilGrid

__all__ = ["PencilBorder", "PencilSystem", "strip_cells"]


@dataclass(frozen=True)
class Strip:
    """The border cells at some positions along one axis.

    Attributes:
        axis: the axis across.
        others: the axes along.
        channel: of each position.
        place: the position of each, on the CPU as the channels are.
        mask: ones for the cells that belong to no strip of an axis before, ``(positions, *along)``.
    """

    axis: int
    others: tuple[int, ...]
    channel: Tensor
    place: Tensor
    mask: Tensor


class PencilBorder:
    """The border cells, and vectors on them, ``(1, blocks, size)``, the same on every process.

    Args:
        grid: the grid.
        positions: border positions per channel and axis.
        device: of the vectors.

    Attributes:
        size: entries of a vector; cells in two strips have a second one that stays zero.
    """

    def __init__(self, grid: PencilGrid, positions: Positions, device: torch.device) -> None:
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

    def pieces(self, u: Tensor) -> list[Tensor]:
        """The part of every strip, ``(blocks, positions, *along)``."""
        parts = u[0].split(self._lengths, dim=-1)
        return [part.unflatten(-1, strip.mask.shape) for part, strip in zip(parts, self.strips, strict=True)]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The vector of such parts, without the cells that belong to another strip."""
        parts = [(piece * strip.mask).flatten(1) for piece, strip in zip(pieces, self.strips, strict=True)]
        return torch.cat(parts, dim=-1).unsqueeze(0)

    def along(self, strip: Strip, piece: Tensor) -> Tensor:
        """The transform along a strip, of its frequencies here."""
        if 1 in strip.others:
            d = 2 + strip.others.index(1)
            part = self.grid.part
            piece = torch.fft.rfft(piece, dim=d).narrow(d, part.start, part.stop - part.start)
        dims = [2 + d for d, b in enumerate(strip.others) if b != 1]
        return torch.fft.fftn(piece, dim=dims) if dims else piece

    def back(self, spectra: Sequence[Tensor], at: Sequence[tuple[int, slice]]) -> Tensor:
        """Return the vector of the strips' spectra, summed over the processes.

        Args:
            spectra: ``(blocks, positions, *frequencies here)`` of every strip.
            at: the dimension of each of which a process has some frequencies, and these.
        """
        padded = []
        for strip, s, (d, part) in zip(self.strips, spectra, at, strict=True):
            count = self.grid.frequencies[strip.others[d - 2]]
            full = s.new_zeros(*s.shape[:d], count, *s.shape[d + 1 :])
            full.narrow(d, part.start, part.stop - part.start).copy_(s)
            padded.append(full)
        flat = torch.cat([torch.view_as_real(s).flatten() for s in padded])
        parts = self.grid.ranks.total(flat).split([2 * s.numel() for s in padded])
        pieces = []
        for strip, s, part in zip(self.strips, padded, parts, strict=True):
            # of a sum over half of the second axis the real part is the sum over all
            t = torch.view_as_complex(part.view(*s.shape, 2))
            dims = [2 + d for d, b in enumerate(strip.others) if b != 1]
            t = torch.fft.ifftn(t, dim=dims) if dims else t
            if 1 in strip.others:
                t = torch.fft.irfft(t, n=self.grid.sizes[1], dim=2 + strip.others.index(1))
            pieces.append(t.real if t.is_complex() else t)
        return self.joined(pieces)

    def spectrum(self, u: Tensor) -> Tensor:
        """The spectrum of a vector on the share, ``(1, blocks, channels, *share)``."""
        grid, total = self.grid, None
        for strip, piece in zip(self.strips, self.pieces(u), strict=True):
            s = self.along(strip, piece)
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
        """The values on the border of a spectrum on the shares of all processes."""
        grid, spectra, at = self.grid, [], []
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
            # across the second axis every process has a part of each sum
            every = (2, slice(0, grid.frequencies[strip.others[0]]))
            at.append(every if strip.axis == 1 else (2 + strip.others.index(1), grid.part))
        return self.back(spectra, at)


class PencilSystem:
    """The system of a block-circulant Q on a border.

    Args:
        Q: its matrices on the share.
        border: the border.
        definite: whether it is positive definite there.
        corner: unknowns of the corner of the preconditioner, about, whose inverse every process has.
        restart: basis vectors of GMRES.
    """

    def __init__(
        self, Q: FrequencyMatrices, border: PencilBorder, *, definite: bool, corner: int = 2048, restart: int = 100
    ) -> None:
        self.Q, self.border, self.definite = Q, border, definite
        self._shares = [self._share(strip) for strip in border.strips]
        self._inverses = [self._inverse(strip, share) for strip, share in zip(border.strips, self._shares, strict=True)]
        self._corner: tuple[Tensor, Tensor, DenseInverse] | None = None
        if len(border.strips) == len(border.grid.sizes) == 2:
            self._corner = self._crossed(corner)
        self._restart, self._recycling = restart, Recycling(restart)

    def solve(self, b: Tensor, tolerance: float, max_iter: int) -> tuple[Tensor, int, float]:
        """The unknowns to a relative residual, the iterations, and the residual that was reached."""
        u, count = border_gmres(
            self.product, self.precondition, b, tolerance, max_iter, 1, self._restart, self._recycling
        )
        residual = torch.linalg.vector_norm(b - self.product(u)) / torch.linalg.vector_norm(b)
        return u, int(count.max()), float(residual.nan_to_num(0.0))

    def product(self, u: Tensor) -> Tensor:
        """``Q u`` on the border."""
        return self.border.gather(self.Q(self.border.spectrum(u)))

    def precondition(self, r: Tensor) -> Tensor:
        """The strips' inverses, each for its own cells, and that of the corner for those near it."""
        border, spectra = self.border, []
        for strip, piece, (d, part), inverse in zip(
            border.strips, border.pieces(r), self._shares, self._inverses, strict=True
        ):
            s = border.along(strip, piece)
            if strip.axis == 1:
                s = s.narrow(d, part.start, part.stop - part.start)
            spectra.append((inverse @ s.movedim(1, -1).unsqueeze(-1)).squeeze(-1).movedim(-1, 1))
        z = border.back(spectra, self._shares)
        if self._corner is not None:
            near, inner, dense = self._corner
            z[..., near[inner]] = dense(r[..., near])[..., inner]
        return z

    def _share(self, strip: Strip) -> tuple[int, slice]:
        """The dimension of a strip's spectrum that is shared, and the frequencies here."""
        grid = self.border.grid
        if strip.axis != 1:
            return 2 + strip.others.index(1), grid.part
        return 2, grid.ranks.rows(grid.sizes[strip.others[0]])

    def _inverse(self, strip: Strip, share: tuple[int, slice]) -> Tensor:
        """The inverses of Q between the positions of a strip, ``(blocks, *frequencies here, positions, positions)``."""
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
        return hermitian_inverse(pairs) if self.definite else indefinite_inverse(pairs)

    def _crossed(self, most: int) -> tuple[Tensor, Tensor, DenseInverse]:
        """Return the unknowns near the corner, those among them that the correction goes to, and the inverse there."""
        border, grid = self.border, self.border.grid
        overlap = min(grid.sizes) // 4
        while overlap > 0 and self._count(overlap) > most:
            overlap -= max(1, overlap // 8)
        windows = [self._window(a, overlap) for a in range(2)]
        numbers, places, firsts = [], [], []
        offset = 0
        for strip, other in ((border.strips[0], 1), (border.strips[1], 0)):
            flags = torch.zeros(strip.mask.shape, dtype=torch.bool)
            near = torch.isin(strip.place, windows[strip.axis])
            flags[near.nonzero(), windows[other]] = True
            cells = (flags & (strip.mask.cpu() > 0)).nonzero()
            numbers.append(offset + cells[:, 0] * grid.sizes[other] + cells[:, 1])
            across, along = strip.place[cells[:, 0]], cells[:, 1]
            places.append(torch.stack([across, along] if strip.axis == 0 else [along, across], dim=1))
            firsts.append(strip.channel[cells[:, 0]])
            offset += strip.mask.numel()
        index, place, channel = torch.cat(numbers), torch.cat(places), torch.cat(firsts)
        inner = [self._window(a, overlap // 2) for a in range(2)]
        within = torch.isin(place[:, 0], inner[0]) & torch.isin(place[:, 1], inner[1])
        m = self.Q.matrices
        kernel, at = m, []
        for a in range(2):
            # counted from the beginning of the window, so that few lags occur
            turned = (place[:, a] - windows[a][0]) % grid.sizes[a]
            lags, which = (turned[:, None] - turned[None, :]).unique(return_inverse=True)
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
        """The positions along an axis within ``overlap`` of the border's, from the end of their widest gap on."""
        n = self.border.grid.sizes[a]
        places = torch.tensor(sorted({p for axes in self.border.positions for p in axes[a]}))
        near = ((places[:, None] + torch.arange(-overlap, overlap + 1)) % n).unique()
        gaps = torch.diff(near, prepend=near[-1:] - n)
        return near.roll(-int(gaps.argmax()))

    def _count(self, overlap: int) -> int:
        """The unknowns near the corner, about."""
        lengths = [len(self._window(a, overlap)) for a in range(2)]
        return sum(len(axes[0]) * lengths[1] + len(axes[1]) * lengths[0] for axes in self.border.positions)


def strip_cells(positions: Positions, a: int) -> list[tuple[int, int]]:
    """The (channel, position) of the strip of an axis."""
    return [(channel, place) for channel, axes in enumerate(positions) for place in axes[a]]
