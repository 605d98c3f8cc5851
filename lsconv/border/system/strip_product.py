r"""A block-circulant operator restricted to a border of strips, applied without a transform of the whole grid.

In two dimensions the border is a horizontal strip H and a vertical one V. Within a strip :math:`Q` is block-circulant
along it: one-dimensional transforms and one small matrix per frequency, those that the Schwarz preconditioner inverts.
Between the strips it acts through entries :math:`q(i - i', j - j')` with i in the few rows of H and j' in the few
columns of V. Where q, the kernel of Q, dies off with the distance, only the cells near the corner take part, and one
small two-dimensional transform does it:

.. math::
    (Q u)_H = Q_{HH} u_H + (\tilde Q\, u_{V \setminus H})_H, \qquad
    (Q u)_{V \setminus H} = (Q_{VV} u_V + \tilde Q\, u_{H \setminus V})_{V \setminus H}

with :math:`\tilde Q` the circulant of q cut out around the corner. What is left out is below the rounding of the
transforms it replaces, or else there are no strips. Inverses of damped operators have kernels like that: they are as
long as what the damping leaves of the blur (Demko, Moss and Smith, "Decay rates for inverses of band matrices", Math.
Comp. 43 (1984)).

The search for a damp on a large image, whose dampings are strong, takes two thirds of the time with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.border.border_set import gathered
from lsconv.fourier.symbol import FrequencyMatrices, Grid
from lsconv.operators.dtypes import ROUNDING, default_rcond
from lsconv.operators.fft_convolution import good_fft_length

__all__ = ["StripOperator", "Strips"]


class StripOperator:
    """The cells of one strip and Q on them.

    Args:
        index: numbers of the border cells, ``(cells, length of the strip)``.
        matrices: Q along the strip, ``(blocks, *frequencies, cells, cells)``.
    """

    def __init__(self, index: Tensor, matrices: FrequencyMatrices) -> None:
        self.index, self.matrices = index, matrices

    def __call__(self, u: Tensor) -> Tensor:
        """Q on the cells, of ``(rhs, blocks, size)``."""
        cells = gathered(u, self.index.flatten()).reshape(*u.shape[:2], *self.index.shape)
        return self.matrices.on_grid(cells).flatten(2)


class Strips:
    """The product with Q on the border; made by :meth:`of`.

    Args:
        strips: the strips of all axes that have border cells.
        corner: where two strips cross; None where there is one strip.
        work: of a product, in cells transformed there and back.
    """

    def __init__(self, strips: Sequence[StripOperator], corner: _Corner | None, work: int) -> None:
        self.strips, self.corner, self.work = list(strips), corner, work

    @classmethod
    def of(
        cls,
        kernel: Tensor,
        numbering: Tensor,
        members: Sequence[Tensor],
        strips: Sequence[StripOperator],
        *,
        real: bool,
    ) -> Strips | None:
        """The strips, or None where they would not be exact or not be cheaper than the whole grid.

        Args:
            kernel: of Q, its first block column, ``(blocks, channels, channels, *grid)``.
            numbering: the number of every border cell, -1 elsewhere, ``(channels, *grid)``.
            members: per axis, whether a position makes a cell a border cell, ``(channels, positions)``.
            strips: Q along the strips, in the order of the axes.
            real: True when border vectors are.
        """
        grid = tuple(kernel.shape[3:])
        if len(grid) != 2:
            return None
        work = sum(strip.index.numel() for strip in strips)
        if len(strips) == 1:
            return cls(strips, None, work)
        windows, squares = [], _squared_entries(kernel)
        for a in range(2):
            decay_length = _decay_length(squares.sum(2 - a, dtype=torch.float64), kernel.dtype)
            window = None if decay_length is None else _window(members[a].any(0), decay_length)
            if window is None:
                return None
            windows.append(window)
        sizes = tuple(good_fft_length(len(window)) for window in windows)
        if any(size > n for size, n in zip(sizes, grid, strict=True)):
            return None
        work += 2 * kernel.shape[1] * math.prod(sizes)
        if 2 * work > kernel.shape[1] * math.prod(grid):
            return None
        return cls(strips, _Corner(kernel, numbering, members, windows, Grid(sizes, real=real)), work)

    def __call__(self, u: Tensor) -> Tensor:
        """``(Q u)`` on the border, ``(rhs, blocks, size)``."""
        out = torch.empty_like(u)
        for strip in reversed(self.strips):  # a cell of both strips has the whole product of the first one
            out.index_copy_(-1, strip.index.flatten(), strip(u))
        return out if self.corner is None else self.corner.add(u, out)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices."""
        strips = sum(strip.matrices.nbytes for strip in self.strips)
        return strips + (0 if self.corner is None else self.corner.matrices.nbytes)


class _Corner:
    """The product from the cells of one strip alone to the other strip, near the corner."""

    def __init__(
        self, kernel: Tensor, numbering: Tensor, members: Sequence[Tensor], windows: list[Tensor], grid: Grid
    ) -> None:
        device = kernel.device
        lags = [
            torch.arange(-(m // 2), m - m // 2).roll(-(m // 2)) % n
            for m, n in zip(grid.sizes, kernel.shape[3:], strict=True)
        ]
        near = kernel.index_select(3, lags[0].to(device)).index_select(4, lags[1].to(device))
        self.matrices = FrequencyMatrices(grid, grid.transform(near).movedim((1, 2), (-2, -1)))
        channels = kernel.shape[1]
        numbers = numbering[:, windows[0][:, None], windows[1][None, :]]
        first = members[0][:, windows[0], None].expand_as(numbers)  # in H
        second = members[1][:, None, windows[1]].expand_as(numbers)  # in V
        places = torch.arange(channels * math.prod(grid.sizes)).reshape(channels, *grid.sizes)
        places = places[:, : len(windows[0]), : len(windows[1])]
        self.shape = (channels, *grid.sizes)
        self.sources = [
            (numbers[cells].to(device), places[cells].to(device)) for cells in (second & ~first, first & ~second)
        ]
        self.targets = [(numbers[cells].to(device), places[cells].to(device)) for cells in (first, second & ~first)]

    def add(self, u: Tensor, out: Tensor) -> Tensor:
        """Add it to the product ``out``."""
        rhs = u.shape[0]
        z = u.new_zeros(2 * rhs, u.shape[1], math.prod(self.shape))
        for half, (numbers, places) in enumerate(self.sources):
            z[half * rhs : (half + 1) * rhs].index_copy_(-1, places, gathered(u, numbers))
        z = self.matrices.on_grid(z.unflatten(-1, self.shape)).flatten(2)
        for half, (numbers, places) in enumerate(self.targets):
            out.index_add_(-1, numbers, gathered(z[half * rhs : (half + 1) * rhs], places))
        return out


def _squared_entries(kernel: Tensor) -> Tensor:
    """The squares of the kernel summed over its entries, ``(blocks, *grid)``; one by one is a tenth of a reduction."""
    parts = torch.view_as_real(kernel).unbind(-1) if kernel.is_complex() else (kernel,)
    first, *others = [entry for part in parts for row in part.unbind(1) for entry in row.unbind(1)]
    total = first.square()
    for entry in others:
        total.addcmul_(entry, entry)
    return total


def _decay_length(profile: Tensor, dtype: torch.dtype) -> int | None:
    """The distance beyond which a kernel is rounding; None where it reaches half way round.

    Args:
        profile: the kernel's sum of squares along an axis, ``(blocks, positions)``.
        dtype: of the kernel.
    """
    n = profile.shape[1]
    total = profile.sum(1, keepdim=True)
    eps = torch.finfo(dtype).eps
    floor = profile.amin(1, keepdim=True)
    if bool((floor * n > (ROUNDING * eps) ** 2 * total).any()):
        return None
    distance = torch.minimum(torch.arange(n), n - torch.arange(n)).to(profile.device)
    folded = profile.new_zeros(profile.shape[0], n // 2 + 1).index_add_(1, distance, (profile - 4 * floor).clamp_min(0))
    beyond = folded.flip(1).cumsum(1).flip(1)  # at the distance or farther
    far = beyond > default_rcond(dtype) ** 2 * total
    decay_length = int(far.sum(1).amax())
    return decay_length if decay_length < n // 2 else None


def _window(border: Tensor, decay_length: int) -> Tensor | None:
    """The positions within ``reach`` of those of the border, around the circle; None if scattered."""
    n, places = len(border), border.nonzero().flatten()
    gaps = torch.cat([places[1:], places[:1] + n]) - places
    last = int(gaps.argmax())
    first, span = int(places[(last + 1) % len(places)]), n - int(gaps[last]) + 1
    if span + 2 * decay_length >= n:
        return None
    return (first - decay_length + torch.arange(span + 2 * decay_length)) % n
