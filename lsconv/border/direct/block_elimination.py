r"""The exact inverse of a block-circulant operator on a border of rows and columns, one strip eliminated.

The border of a two-dimensional grid is a horizontal strip H and the rest V of a vertical one. On H the operator is
block-circulant along the strip, a small matrix :math:`D_\omega` for each frequency of it, and what H and V say to each
other depends on the column only by a phase. With :math:`X_\omega` the entries between the rows of V and those of H,
transformed along the strip, the Schur complement of H is block-Toeplitz along the columns,

.. math:: S_{(k,l),(k',l')} = q(k - k', l - l')
             - \frac1N \sum_\omega e^{i \omega (l - l')} (X_\omega D_\omega^{-1} X_\omega^H)_{kk'} ,

so that only a few of its blocks, one for each distance of two columns, have to be formed. S has half of the unknowns:
its factors cost an eighth of those of the whole border, and a quarter of their memory. Reflections that leave the
operator and the border as they are (:mod:`lsconv.border.direct.reflection_symmetry`) split S once or twice more, as the
symmetric kernels of most lenses allow. (Disk of radius 5, "same" padding, 512²: of 10290 unknowns four matrices are
left, complex and of 512 and 768 rows; they and their factors take 0.2 s on two CPU cores.)

Golub and Van Loan, "Matrix Computations", section 4.5, for block elimination; the saddle operator is quasi-definite, so
that all its principal blocks can be inverted (Vanderbei, SIAM J. Optim. 5 (1995)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lsconv.border.border_set import Border, gathered
from lsconv.border.direct.dense_inverse import DenseInverse, indefinite_inverse
from lsconv.border.direct.reflection_symmetry import Folding, reflection_sums, run_ends
from lsconv.fourier.dtypes import single as single_precision
from lsconv.fourier.symbol import FrequencyMatrices, Grid, hermitian_inverse, plane_waves

__all__ = ["Elimination", "Layout"]


class Layout:
    """A border as the strip that is eliminated and the rows and columns that are left.

    Args:
        border: cells in rows and columns of a plane.
        sums: the reflections along its axes.

    Attributes:
        turned: whether the strip, which is the one of more cells and runs along the last axis, is of columns.
        strip: the rows of the strip.
        rows: all others.
        columns: the columns of the rest.
        even: whether there is a reflection along the strip.
        twice_from: twice the positions from which places along the strip are counted, for each channel: the middle of
            its columns where there is a reflection, else the first of them.
    """

    def __init__(self, border: Border, sums: list[Tensor | None]) -> None:
        by_rows, by_columns = (float(m.sum()) / m.shape[1] for m in border.members)
        self.turned = by_columns > by_rows
        step = -1 if self.turned else 1
        (across, along), (over, at) = sums[::step], border.members[::step]
        self.strip, self.rows, self.columns = Folding(over, across), Folding(~over, across), Folding(at, along)
        self.even = along is not None
        first = torch.tensor([run_ends(marked)[0] if bool(marked.any()) else 0 for marked in at])
        self.twice_from = 2 * first if along is None else along


class Elimination:
    """``Q^-1`` on the border.

    Args:
        matrices: the block-circulant operator Q, Hermitian.
        border: the cells it is restricted to.
        kernel: the first block column of Q.
        definite: whether it is positive definite.
        single: keep the factors of the Schur complement in single precision.
        exchange: the sums of the reflection that takes the first component of a saddle operator to the second.
    """

    def __init__(
        self,
        matrices: FrequencyMatrices,
        border: Border,
        kernel: Tensor,
        *,
        definite: bool,
        single: bool = False,
        exchange: list[int] | None = None,
    ) -> None:
        self._real, device = matrices.grid.real, kernel.device
        layout = Layout(border, reflection_sums(matrices, border))
        self._strip, self._rows, self._columns = layout.strip, layout.rows, layout.columns
        numbers = border.numbering()
        if layout.turned:
            numbers, kernel, exchange = numbers.mT, kernel.mT, None if exchange is None else exchange[::-1]
        self._along, self._even = Grid(tuple(kernel.shape[-1:]), real=self._real), layout.even
        twice_from = layout.twice_from
        self._exchange = None if exchange is None else _Exchange(self._rows, self._columns, exchange, kernel)
        self._number(numbers, device)
        self._wave(twice_from, kernel)

        spectrum = self._along.transform(kernel)
        spectrum *= (self._shift[:, None] * self._shift.conj()).unsqueeze(-2)
        if self._even:
            spectrum = spectrum.real
        D = _between(spectrum, self._strip, self._strip)
        D.diagonal(dim1=-2, dim2=-1).add_((1 - self._strip.present).flatten(1).to(D)[:, None])
        self._inverse = hermitian_inverse(D.contiguous()) if definite else indefinite_inverse(D)
        X = _between(spectrum, self._rows, self._strip)
        self._coupling = X @ self._inverse
        self._toward = [t.to(kernel) for t in (self._strip.toward(), self._rows.toward(), self._columns.toward())]
        self._back = [t.to(kernel) for t in (self._strip.back(), self._rows.back(), self._columns.back())]
        complements = self._complements(kernel, X, twice_from, single=single)
        self._schur = [DenseInverse(S, definite=definite, single=single) for S in complements]

    # ------------------------------------------------------------------ setup

    def _number(self, numbers: Tensor, device: torch.device) -> None:
        """Where the cells of strip and rest are among the border vectors, and where the border's are among these."""
        strip, rows, columns = self._strip, self._rows, self._columns
        channel = torch.arange(len(numbers))[:, None]
        of_strip = torch.stack([numbers[channel, places] for places in (strip.places, strip.mirrored)])
        of_rest = torch.stack(
            [
                torch.stack([numbers[channel[..., None], k[:, None, :], j[:, :, None]] for j in _both(columns)])
                for k in _both(rows)
            ]
        )  # places or mirrored of the rows, of the columns, channels, columns, rows
        size = int(numbers.amax()) + 1
        there = torch.stack([strip.there, strip.twice])[..., None].expand_as(of_strip)
        there_in_rest = _there(rows)[:, None, :, None, :] & _there(columns)[None, :, :, :, None]
        cells = torch.cat([of_strip.flatten(), of_rest.flatten()])
        valid = torch.cat([there.flatten(), there_in_rest.flatten()]).nonzero().flatten()
        place = torch.empty(size, dtype=torch.int64)
        place[cells[valid]] = valid
        self._place = place.to(device)
        cells[cells < 0] = size
        self._cells = cells.to(device)
        self._shapes = tuple(of_strip.shape), tuple(of_rest.shape)

    def _wave(self, twice_from: Tensor, kernel: Tensor) -> None:
        """The waves along the strip, at the columns and by which channels are shifted."""
        (n,), (f,) = self._along.sizes, self._along.frequencies
        dtype = kernel.dtype.to_complex()
        self._shift = plane_waves(twice_from, 2 * n, f).to(kernel.device, dtype)  # channels, frequencies
        twice = torch.stack([2 * places - twice_from[:, None] for places in _both(self._columns)], dim=1)
        waves = plane_waves(twice.flatten(), 2 * n, f).unflatten(0, twice.shape)
        weights = self._along.weights(kernel.device, dtype) / n
        # channels, places or mirrored times columns, frequencies
        self._at_columns = waves.flatten(1, 2).to(kernel.device, dtype) * weights
        self._from_columns = waves.flatten(1, 2).to(kernel.device, dtype).conj()

    def _complements(self, kernel: Tensor, X: Tensor, twice_from: Tensor, *, single: bool) -> Iterator[Tensor]:
        """The Schur complement for every sign of the columns, ``(blocks * signs, size, size)``."""
        rows, columns, (n,) = self._rows, self._columns, self._along.sizes
        channels = kernel.shape[1]
        # of an operator with an exchange the entries in the range of the first channel say everything
        outer = 1 if self._exchange is not None else channels
        # twice the distance of columns (channel, place) and (channel, place or mirrored)
        twice = [2 * places - twice_from[:, None] for places in _both(columns)]
        distances = torch.stack([(twice[0][:outer, :, None, None] - t) % (2 * n) for t in twice])
        absolute = torch.minimum(distances, 2 * n - distances)
        adjoint = not self._even and outer == channels  # T at the opposite distance
        lags, index = (absolute if self._even or adjoint else distances).unique(return_inverse=True)
        T = self._lagged(X, lags, outer * rows.pairs, single=single)
        self._add_kernel(T, kernel, lags, twice_from)
        if adjoint:
            T = torch.cat([T, T.mH], dim=1)
            index = torch.where(distances == absolute, index, index + len(lags))
        T = T.unflatten(-1, (channels, -1)).unflatten(-3, (outer, -1))
        c, index = torch.arange(channels).to(T.device), index.to(T.device)
        for s, sign in enumerate(columns.signs):
            pairs = columns.pairs_of(s)
            own, image = (i[:, :pairs, :, :pairs] for i in index)
            S = T[
                :, own, c[:outer, None, None, None], :, c[:, None], :
            ]  # channels, columns, the same, lead, rows, rows
            if sign:
                S.add_(T[:, image, c[:outer, None, None, None], :, c[:, None], :], alpha=sign)
            scale = columns.scale[s, :, :pairs].to(T)
            S *= (scale[:outer, :, None, None] * scale)[..., None, None, None]
            S = S.permute(4, 0, 1, 5, 2, 3, 6).flatten(4, 6).flatten(1, 3)
            if self._exchange is not None:
                S = self._exchange.merged(S, s)
            present = rows.present[:, :outer, None, :] * columns.present[s, :outer, :pairs, None]
            absent = (1 - present).flatten(1).to(S)
            S.diagonal(dim1=-2, dim2=-1).add_(absent.repeat(len(S) // len(absent), 1))
            yield S

    def _lagged(self, X: Tensor, lags: Tensor, outer: int, *, single: bool) -> Tensor:
        """Minus the sum over the frequencies: ``(blocks * signs, lags, channels * rows, the same)``.

        In the range the first ``outer`` rows.
        """
        (n,), (f,) = self._along.sizes, self._along.frequencies
        dtype = single_precision(X.dtype) if single else X.dtype
        Y, X = (
            t.flatten(0, 1).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)
            for t in (self._coupling[..., :outer, :], X)
        )
        waves = plane_waves(lags, 2 * n, f) * self._along.weights(torch.device("cpu"), torch.float64) / -n
        waves = (waves.real if self._even else waves).to(Y)
        # of a complex product of real functions the real part, that of the vectors of real and imaginary parts
        apart = self._real and not self._even
        X = (torch.view_as_real(X) if apart else X).flatten(2)
        T = X.new_empty(len(X), len(lags), outer, X.shape[1])
        for number, wave in enumerate(waves):
            shifted = Y * wave[:, None]
            torch.matmul((torch.view_as_real(shifted) if apart else shifted).flatten(2), X.mH, out=T[:, number])
        return T

    def _add_kernel(self, T: Tensor, kernel: Tensor, lags: Tensor, twice_from: Tensor) -> None:
        """Add the entries between the rows themselves to ``T``."""
        rows, device = self._rows, kernel.device
        n0, (n,) = kernel.shape[-2], self._along.sizes
        # between channels whose columns are half a cell apart half of the lags are none: whatever is there is not read
        along = ((lags[:, None, None] + twice_from[:, None] - twice_from) // 2 % n).to(device)
        c = torch.arange(kernel.shape[1], device=device)
        outer = T.shape[-2] // rows.pairs
        T = T.view(-1, len(rows.signs), *T.shape[1:]).unflatten(-1, (len(c), -1)).unflatten(-3, (outer, -1))
        across = [(rows.places[:outer, :, None, None] - places).to(device) % n0 for places in _both(rows)]
        along = along[:, :outer]
        # blocks, lags, channels, rows, channels, rows
        parts = [
            kernel[:, c[:outer, None, None, None], c[:, None], lag, along[:, :, None, :, None]]
            for lag in across[: len(rows.signs)]
        ]
        for s, sign in enumerate(rows.signs):
            scale = rows.scale[s].to(T)
            part = torch.add(*parts, alpha=sign) if sign else parts[0]
            T[:, s] += (part * (scale[:outer, :, None, None] * scale)).to(T.dtype)

    # ------------------------------------------------------------------ use

    def __call__(self, r: Tensor) -> Tensor:
        """``Q^-1 r`` for border vectors ``(rest, blocks, size)``."""
        if len(self._coupling) < r.shape[1]:  # one block serves all
            return self(r.flatten(0, 1).unsqueeze(1)).reshape(r.shape)
        rest = r.shape[0]
        cells = gathered(torch.nn.functional.pad(r, (0, 1)), self._cells)
        of_strip, of_rest = cells.split([math.prod(shape) for shape in self._shapes], dim=-1)
        strip_to, rows_to, columns_to = self._toward
        f = (of_strip.unflatten(-1, self._shapes[0]).unsqueeze(3) * strip_to[..., None]).sum(2)
        f = (self._along.transform(f) * self._shift[:, None]).permute(1, 2, 5, 3, 4, 0).flatten(3, 4)
        g = (of_rest.unflatten(-1, self._shapes[1]).unsqueeze(3) * rows_to[:, :, None, :, None]).sum(2)
        # blocks, signs, channels, frequencies, rows * rest
        coupled = _times(self._coupling, f).unflatten(3, (-1, self._rows.pairs)).transpose(2, 3).flatten(4)
        g = g - self._columns_of(coupled, rest)
        g = (g.unsqueeze(4) * columns_to[..., None]).sum(3)
        u = torch.zeros_like(g)
        for s, schur in enumerate(self._schur):
            part = g[:, :, :, s, :, : self._columns.pairs_of(s)]
            if self._exchange is None:
                solved = schur(part.flatten(1, 2).flatten(2)).reshape(part.shape)
            else:
                z = self._exchange.toward(part, s)
                solved = self._exchange.back(schur(z.flatten(1, 2).flatten(2)).reshape(z.shape), s)
            u[:, :, :, s, :, : part.shape[-2]] = solved
        strip_back, rows_back, columns_back = self._back
        u = (u.unsqueeze(3) * columns_back[..., None]).sum(4)  # rest, blocks, signs, 2, channels, columns, rows
        across = u.movedim((0, 4), (-1, 2)).flatten(3, 4).flatten(4).to(self._from_columns.dtype)
        across = (self._from_columns.mT @ across).unflatten(-1, (-1, rest)).transpose(2, 3).flatten(3, 4)
        f = _times(self._inverse, f) - _times(self._coupling.mH, across)
        f = f.unflatten(3, (-1, self._strip.pairs)).permute(5, 0, 1, 3, 4, 2) * self._shift.conj()[:, None]
        f = (self._along.inverse(f).unsqueeze(2) * strip_back[..., None]).sum(3)
        u = (u.unsqueeze(2) * rows_back[:, :, None, :, None]).sum(3)
        return gathered(torch.cat([f.flatten(2), u.flatten(2)], dim=-1), self._place)

    def _columns_of(self, spectrum: Tensor, rest: int) -> Tensor:
        """The values at the columns, of ``(blocks, signs, channels, frequencies, rows * rest)``."""
        values = self._at_columns @ spectrum
        values = values.real if self._real else values
        values = values.unflatten(-1, (-1, rest)).unflatten(3, (2, -1))  # blocks, signs, channels, 2, columns, rows
        return values.movedim((-1, 2), (0, 4))

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(schur.nbytes for schur in self._schur) + self._coupling.nbytes + self._inverse.nbytes


class _Exchange:
    """The second component of a saddle operator as the imaginary part of the first.

    Args:
        rows: the pairs of rows.
        columns: those of columns.
        sums: of a place and its image in the other channel, across the strip and along it.
        like: a tensor whose dtype and device the signs get.
    """

    def __init__(self, rows: Folding, columns: Folding, sums: list[int], like: Tensor) -> None:
        self._columns = columns
        (row, row_signs), (column, column_signs) = rows.exchanged(sums[0]), columns.exchanged(sums[1])
        self._row, self._column, self._inverse_row, self._inverse_column = (
            number.to(like.device) for number in (row, column, row.argsort(), column.argsort())
        )
        # of the columns, signs of the rows, columns, rows
        self._signs = (column_signs[:, None, :, None] * row_signs[:, None]).to(like)

    def _reversed(self, x: Tensor, s: int) -> Tensor:
        """What is over the pairs of the second channel, ``(..., signs, columns, rows)``, over those of the first."""
        pairs = x.shape[-2]
        x = x.index_select(-2, self._column[:pairs]).index_select(-1, self._row)
        return x * self._signs[s, :, :pairs].to(x.dtype)

    def merged(self, S: Tensor, s: int) -> Tensor:
        """The complex matrices ``(blocks * signs, size, size)`` of ``(blocks * signs, size, 2 * size)``."""
        pairs, signs = self._columns.pairs_of(s), self._signs.shape[1]
        parts = S.unflatten(-1, (2, pairs, -1)).unflatten(0, (-1, signs)).movedim(1, -3)
        other = self._reversed(parts[:, :, 1], s).movedim(-3, 1).flatten(-2).flatten(0, 1)
        return torch.complex(S[..., : S.shape[-2]].contiguous(), other.contiguous())

    def toward(self, u: Tensor, s: int) -> Tensor:
        """``r + i xi`` of ``(rest, blocks, signs, channels, columns, rows)``."""
        first, second = u.unbind(-3)
        return torch.complex(first, self._reversed(second, s))

    def back(self, z: Tensor, s: int) -> Tensor:
        """The two components of the conjugate, as :meth:`toward` takes them."""
        pairs = z.shape[-2]
        xi = -z.imag * self._signs[s, :, :pairs]
        second = xi.index_select(-2, self._inverse_column[:pairs]).index_select(-1, self._inverse_row)
        return torch.stack([z.real, second], dim=-3)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """The product of matrices with complex vectors, in real numbers where the matrices are."""
    if matrices.is_complex():
        return matrices @ vectors
    parts = torch.view_as_real(vectors.contiguous())
    return torch.view_as_complex((matrices @ parts.flatten(-2)).unflatten(-1, parts.shape[-2:]).contiguous())


def _both(folding: Folding) -> tuple[Tensor, Tensor]:
    return folding.places, folding.mirrored


def _there(folding: Folding) -> Tensor:
    """Which of the places, and which of their images elsewhere: ``(2, channels, pairs)``."""
    return torch.stack([folding.there, folding.twice])


def _between(spectrum: Tensor, outer: Folding, inner: Folding) -> Tensor:
    """The entries between pairs of positions, ``(blocks, signs, frequencies, channels * outer, channels * inner)``.

    Args:
        spectrum: the kernel along the folded axis, ``(blocks, channels, channels, positions, frequencies)``.
        outer: the pairs in the range.
        inner: those in the domain.
    """
    device, n = spectrum.device, spectrum.shape[-2]
    c, spectrum = torch.arange(spectrum.shape[1], device=device), spectrum.contiguous()
    lags = [(outer.places[:, :, None, None] - places).to(device) % n for places in _both(inner)[: len(outer.signs)]]
    parts = [spectrum[:, c[:, None, None, None], c[:, None], lag] for lag in lags]  # frequencies last
    signs = []
    for s, sign in enumerate(outer.signs):
        part = torch.add(*parts, alpha=sign) if sign else parts[0]
        scale = outer.scale[s][:, :, None, None] * inner.scale[s]
        signs.append(part * scale.to(part)[..., None])
    return torch.stack(signs, dim=1).movedim(-1, 2).flatten(3, 4).flatten(4).contiguous()
