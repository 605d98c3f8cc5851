"""The cost of factors of a whole border."""

from __future__ import annotations

from dataclasses import dataclass

from lsconv.border.direct.crossed_border import CrossedBorder
from lsconv.border.direct.even_odd_basis import one_channel_saddle

__all__ = ["Cost", "crossed_cost", "dense_cost"]


@dataclass(frozen=True)
class Cost:
    """The cost of factors.

    Attributes:
        setup: flops of making them.
        entries: numbers that are kept.
        peak: numbers that there are at a time while they are made.
    """

    setup: float
    entries: float
    peak: float


def dense_cost(size: int, *, definite: bool) -> Cost:
    """The cost of factorising one matrix of so many unknowns."""
    return Cost((1 if definite else 2) / 3 * size**3, size**2, 3 * size**2)


def crossed_cost(border: CrossedBorder, *, definite: bool, real: bool, even: bool) -> Cost:
    """The cost of :class:`~lsconv.border.direct.direct_pass.DirectBorder`, for each block."""
    channels, grid = len(border.rows), border.grid
    frequencies = grid[0] * (grid[1] // 2 + 1 if real else grid[1])
    saddle = real and one_channel_saddle(border, definite=definite)
    unknowns, copies, multiplications = border.rest / (2 if saddle else 1), 1, 1.0 if real and not saddle else 4.0
    if real and even:
        copies = 4
    elif real and channels == 1:
        copies = 2
    size = unknowns / copies
    factors = (1 if definite else 2) / 3 * multiplications * copies * size**3
    between = border.width * (channels * border.height) ** 2
    # of real functions real and imaginary parts, of even ones the real part of half of the rows
    products = 4.0 * channels * (grid[1] // 2 + 1) * between * (0.5 if even else 2.0) if border.depth else 0.0
    entries = copies * size**2 * (1 if real and not saddle else 2)
    strip = (channels * border.depth) ** 2 * frequencies / grid[0] * 2
    spectra = 2 * frequencies * (channels**2 + 4 * channels**2)
    return Cost(factors + products, entries + strip, 2 * entries + 2 * between + strip + spectra)
