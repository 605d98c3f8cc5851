r"""The Schur complement of the strip H of a crossed border, formed by its displacement.

Eliminating H leaves, for every frequency :math:`\omega` along the rows, the rows above it of a block-circulant
operator of which the others are eliminated. That is the inverse of a block Toeplitz matrix, and with Z the shift by
one row its displacement has a rank of twice the number of channels,

.. math:: T^{-1} - Z T^{-1} Z^H = x\, x_0^{-1} x^H - (Zz)\, z_n^{-1} (Zz)^H ,

x and z the block columns of the first and of the last row of every channel, :math:`x_0` and :math:`z_n` their
blocks on the diagonal. (Each is the difference that the inverse of a principal submatrix makes, and leaving out the
first rows of a Toeplitz matrix gives the same as leaving out the last.) The entries between two columns at distance d,

.. math:: S_d = \frac1{N} \sum_\omega e^{i \omega d}\, T_\omega^{-1} ,

are therefore one matrix product for the displacement, and a running sum along its diagonals. Of an indefinite operator
the two terms are much larger than their difference; there the products of all rows of H are formed.

Gohberg and Semencul, Mat. Issled. 7 (1972), and Gohberg and Heinig, Rev. Roum. Math. Pures Appl. 19 (1974), for the
inverses of Toeplitz and block Toeplitz matrices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder
from lsconv.border.direct.strip import Strip
from lsconv.fourier.frequency_matrices import Grid
from lsconv.operators.batch_layout import WORK_BYTES
from lsconv.operators.fft_convolution import plane_waves

__all__ = ["column_blocks"]


def column_blocks(
    spectrum: Tensor,
    row_kernels: Tensor,
    strip: Strip | None,
    border: CrossedBorder,
    along: Grid,
    *,
    definite: bool,
    even: bool = False,
) -> Tensor:
    r"""The entries of the Schur complement between columns at the distances 0, 1, ...

    Args:
        spectrum: the block-circulant operator, ``(blocks, rows, frequencies, channels, channels)``.
        row_kernels: the operator transformed back along the first axis: a kernel over the rows for each frequency
            along them, ``(blocks, rows, frequencies, channels, channels)``.
        strip: the rows H; None where there are none.
        border: where they are.
        along: the transform along the rows.
        definite: whether the operator is positive definite.
        even: the operator of one channel, or the saddle operator of one, is even along both axes; then the rows are
            those of the first channel, and half of them.

    Returns:
        ``(blocks, distances, channels, height, channels, height)``, zero where a channel has no such row; those at
        distance -d are the adjoints.
    """
    (n,), (f,), device = along.sizes, along.frequencies, spectrum.device
    channels, height = spectrum.shape[-1], border.height
    row_channels, top = (1, (height + 1) // 2) if even else (channels, height)
    entries = torch.zeros((), dtype=torch.float64, device=device)
    if strip is None or not definite:
        # blocks, rows, channels, channels, columns
        kernel = along.inverse(row_kernels.movedim(2, -1))[..., : border.width]
        rows_above = torch.arange(height, device=device)
        present = rows_above < torch.tensor(border.rows, device=device)[:, None]
        lags = (rows_above[:top, None] - rows_above) % border.grid[0]
        entries = kernel[:, lags, :row_channels].permute(0, 5, 3, 1, 4, 2).contiguous()
        entries.mul_(present[:row_channels, :top, None, None]).mul_(present)
    if strip is None:
        return entries
    if definite:
        left, right = _generators(spectrum, row_kernels, strip, border)
        dtype = row_kernels.real.dtype if even or along.real else row_kernels.dtype
        S = torch.empty(len(left), border.width, row_channels * top, channels * height, dtype=dtype, device=device)
        products: Iterable[tuple[slice, Tensor, Tensor]] = [(slice(None), left, right)]
    else:
        S = entries.flatten(-2).flatten(2, 3)
        # the factors of some frequencies at a time, because those of all take more memory than S
        each = 3 * 16 * len(row_kernels) * border.depth * channels**2 * height
        step = max(1, WORK_BYTES // each) if device.type == "cpu" else f
        parts = (slice(first, first + step) for first in range(0, f, step))
        products = ((part, *_coupling(row_kernels[:, :, part], strip.inverse[:, part], border)) for part in parts)
    distances, weights = torch.arange(border.width), along.weights(device, torch.float64) / n
    for part, left, right in products:
        waves = plane_waves(distances, n, f)[:, part].to(device, left.dtype) * weights[part].to(left.dtype)
        # (blocks, channels * rows, frequencies, generators)
        left = left[:, :, :row_channels, :top].permute(0, 2, 3, 1, 4).flatten(1, 2)
        right = right.permute(0, 2, 3, 1, 4).flatten(1, 2)
        if even:
            left, right, waves = left.real.contiguous(), right.real.contiguous(), waves.real
        # of a real operator only Re(left right^H) is needed: one real product, real and imaginary parts as columns
        split_complex = along.real and not even
        right = (torch.view_as_real(right.contiguous()) if split_complex else right).flatten(2).mH
        for number, wave in enumerate(waves):
            shifted = left * wave[:, None]
            shifted = (torch.view_as_real(shifted) if split_complex else shifted).flatten(2)
            S[:, number].baddbmm_(shifted, right, beta=0 if definite else 1, alpha=1 if definite else -1)
    S = S.unflatten(-1, (channels, height)).unflatten(2, (row_channels, top))
    if not definite:
        return S
    before, after = (S.narrow(-1, first, height - 1).unbind(3) for first in (0, 1))
    for row in range(1, top):
        after[row].add_(before[row - 1])
    return S


def _coupling(row_kernels: Tensor, inverse: Tensor, border: CrossedBorder) -> tuple[Tensor, Tensor]:
    r"""The factors of what H takes away, :math:`X_\omega D_\omega^{-1} X_\omega^H`.

    They cost as much as the displacement times half of the rows of H; the displacement of an indefinite operator is a
    difference of large numbers.

    Returns:
        ``(blocks, frequencies, channels, height, channels * rows of H)`` each.
    """
    (n, _), device = border.grid, row_kernels.device
    rows_above, rows = torch.arange(border.height, device=device), torch.arange(n - border.depth, n, device=device)
    present = (rows_above < torch.tensor(border.rows, device=device)[:, None])[..., None]
    X = row_kernels[:, (rows_above[:, None] - rows) % n].permute(0, 3, 4, 1, 5, 2).flatten(4) * present
    return (X.flatten(2, 3) @ inverse).reshape(X.shape), X


def _generators(spectrum: Tensor, row_kernels: Tensor, strip: Strip, border: CrossedBorder) -> tuple[Tensor, Tensor]:
    """The factors of the displacement, ``(blocks, frequencies, channels, height, 2 * channels)`` each."""
    (n, _), device = border.grid, spectrum.device
    blocks, _, f, channels, _ = spectrum.shape
    every, first = torch.arange(channels, device=device), torch.zeros(channels, dtype=torch.int64, device=device)
    last = torch.tensor(border.rows, device=device) - 1
    sources = spectrum.new_zeros(blocks, n, f, channels, 2 * channels)
    at_sources = torch.cat([first, last])
    twice = every.repeat(2)
    empty = last < 0  # a phase without inputs has no rows
    sources[:, at_sources, :, twice, torch.arange(2 * channels, device=device)] = 1
    rows = torch.arange(n - border.depth, n, device=device)
    lags = (rows[:, None] - at_sources) % n
    at_rows = _entries(row_kernels, lags, twice)
    h = strip.inverse @ at_rows
    sources[:, rows] -= h.unflatten(2, (channels, len(rows))).permute(0, 3, 1, 2, 4)
    solved = torch.fft.ifft(spectrum @ torch.fft.fft(sources, dim=1), dim=1)
    del sources
    rows_above = torch.arange(border.height, device=device)
    present = (rows_above < torch.tensor(border.rows, device=device)[:, None])[..., None]  # channels, rows, 1
    solved = solved[:, : border.height].permute(0, 2, 3, 1, 4) * present  # blocks, frequencies, channels, rows, sources
    x, z = solved[..., :channels], solved[..., channels:]
    x0, zn = x[:, :, :, 0], z[:, :, every, last]
    x0, zn = (torch.where(empty[:, None] & empty, torch.eye(channels, device=device).to(d), d) for d in (x0, zn))
    z = torch.nn.functional.pad(z[:, :, :, :-1], (0, 0, 1, 0)) * present
    left = torch.cat([_right_divided(x, x0), -_right_divided(z, zn)], dim=-1)
    return left, torch.cat([x, z], dim=-1)


def _entries(row_kernels: Tensor, lags: Tensor, channel: Tensor) -> Tensor:
    """The operator from the unit block columns' cells to the rows of H, ``(blocks, frequencies, rows, cells)``."""
    # advanced indices at dimensions 1 and 4 bring (rows, sources) to the front
    entries = row_kernels[:, lags, :, :, channel]
    return entries.permute(2, 3, 4, 0, 1).flatten(2, 3)


def _right_divided(x: Tensor, block: Tensor) -> Tensor:
    """``x block^-1``, along the last axis of x.

    Args:
        x: ``(..., channels, rows, channels)``.
        block: ``(..., channels, channels)``.
    """
    if block.shape[-1] == 1:
        return x / block.unsqueeze(-3)
    flat = x.flatten(-3, -2)
    return torch.linalg.solve_ex(block, flat, left=False)[0].unflatten(-2, x.shape[-3:-1])
