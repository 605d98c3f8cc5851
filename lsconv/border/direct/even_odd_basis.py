r"""Symmetries of the Schur complement of a crossed border, which split it into smaller systems.

A reversal :math:`\sigma` of the order of the cells that leaves a matrix as it is splits it, in the coordinates
:math:`(v_x \pm v_{\sigma x}) / \sqrt 2` (and :math:`v_x` where :math:`\sigma x = x`), into two blocks.

- *Central*: for every real kernel of one channel the operator between cells is even, q(-d) = q(d), so that reversing
  the order of all cells leaves the matrix as it is: two blocks of half the size.
- *Even* along both axes: rows and columns may be reversed separately: four blocks of a quarter.
- *Exchange*: in the saddle operator of one channel, :math:`((-a, b), (b^H, a))`, with :math:`\varphi` that reversal
  from the cells of the first component to those of the second and :math:`\xi_p = x_{\varphi(p)}`,

  .. math:: (-a + i h)\, \overline{(r + i \xi)} = f + i\, g_{\varphi}, \qquad h_{pq} = b(p - \varphi(q)) = h_{qp},

  a complex symmetric system of half the size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder, one_channel_saddle
from lsconv.fourier.batched_linalg import DenseInverse

__all__ = ["SchurInverse"]


class SchurInverse:
    """The inverse of the Schur complement on the columns V'.

    Args:
        entries: between two columns at the distances 0, 1, ...: ``(blocks, distances, channels, height, channels,
            height)``, or half of the first rows where ``even``; as :func:`column_blocks` gives them.
        border: where V' is.
        definite: whether the operator is positive definite.
        even: whether it is even along both axes, for one channel or the saddle operator of one.
    """

    def __init__(self, entries: Tensor, border: CrossedBorder, *, definite: bool, even: bool) -> None:
        channels, self._width, self._height = entries.shape[2], border.width, border.height
        self._exchanged = one_channel_saddle(border, definite=definite) and not entries.is_complex()
        alone = channels == 1 and not entries.is_complex()
        self._present = None if alone or self._exchanged else _present(border, entries.device)
        self._basis: _Basis = _Natural()
        if even:
            self._basis = _Even(self._width, self._height)
        elif alone:
            self._basis = _Central(self._width, self._height)
        matrices = self._matrices(entries, even=even)
        self._inverses = [DenseInverse(matrix, definite=definite) for matrix in matrices]

    def _matrices(self, entries: Tensor, *, even: bool) -> Iterator[Tensor]:
        basis = self._basis
        if self._exchanged:
            own, other = entries[:, :, 0, :, 0], entries[:, :, 0, :, 1]
            if isinstance(basis, _Even):
                for (s, t, real), (_, _, imaginary) in zip(basis.matrices(own), basis.matrices(other), strict=True):
                    yield torch.complex(real, s * t * imaginary)
                return
            back = entries[:, :, 1, :, 0].mT
            yield torch.complex(
                _assembled(self._width, lambda i, j: _at(own, i - j), own.device),
                _assembled(self._width, lambda i, j: _at(other, i + j + 1 - self._width, back).flip(-1), own.device),
            )
        elif isinstance(basis, _Even | _Central):
            for *_, matrix in basis.matrices(entries[:, :, 0, :, 0]):
                yield matrix
        else:
            channels = entries.shape[2]
            # (blocks, distances, channels * rows, the same) to cells in the order of columns, channels, rows
            flat = entries.flatten(-2).flatten(2, 3)
            matrix = _assembled(self._width, lambda i, j: _at(flat, i - j), flat.device)
            assert self._present is not None
            if len(self._present) < channels * self._width * self._height:
                matrix = matrix.index_select(-1, self._present).index_select(-2, self._present)
            yield matrix

    def __call__(self, values: Tensor) -> Tensor:
        """``S^-1`` times ``values`` of shape ``(rhs, blocks, channels, height, width)``."""
        if self._exchanged:
            first, second = values.unbind(2)
            z = torch.complex(first, second.flip(-1, -2)).mT
            z = self._in_basis(z).mT.conj()
            return torch.stack([z.real, z.imag.flip(-1, -2)], dim=2)
        if self._present is None:
            return self._in_basis(values.squeeze(2).mT).mT.unsqueeze(2)
        flat = values.movedim(-1, 2)  # columns, channels, rows
        vectors = flat.flatten(2).index_select(-1, self._present)
        solved = self._inverses[0](vectors)
        if solved.shape[-1] < math.prod(flat.shape[2:]):
            whole = solved.new_zeros(*solved.shape[:2], math.prod(flat.shape[2:]))
            solved = whole.index_copy_(-1, self._present, solved)
        return solved.reshape(flat.shape).movedim(2, -1)

    def _in_basis(self, v: Tensor) -> Tensor:
        """The solution for ``v`` of shape ``(rhs, blocks, width, height)``."""
        parts = [inverse(part) for inverse, part in zip(self._inverses, self._basis.parts(v), strict=True)]
        return self._basis.joined(parts).reshape(v.shape)

    def logdet(self) -> Tensor:
        """``log |det S|`` by block."""
        # the determinant of a complex matrix as a map of pairs of real numbers is the square of its absolute value
        return torch.stack([inverse.logdet for inverse in self._inverses]).sum(0) * (2 if self._exchanged else 1)

    @property
    def size(self) -> int:
        """The unknowns, of all signs."""
        return sum(inverse.factors.shape[-1] for inverse in self._inverses)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(inverse.nbytes for inverse in self._inverses)


def _present(border: CrossedBorder, device: torch.device) -> Tensor:
    """The cells of V', numbered by columns, channels and rows, that there are."""
    first = border.grid[1] - border.width
    columns = torch.arange(first, border.grid[1])[:, None] >= torch.tensor(border.columns)
    rows = torch.arange(border.height) < torch.tensor(border.rows)[:, None]
    return (columns[..., None] & rows).flatten().nonzero().flatten().to(device)


def _at(entries: Tensor, distances: Tensor, back: Tensor | None = None) -> Tensor:
    """The entries at distances; ``back``, by default their adjoints, are those at the opposite ones."""
    back = entries.mH if back is None else back
    ahead = (distances >= 0)[:, None, None]
    return torch.where(ahead, entries[:, distances.clamp(min=0)], back[:, distances.neg().clamp(min=0)])


class _Block(Protocol):
    def __call__(self, i: int, j: Tensor, /) -> Tensor:
        """The blocks of a column and others, ``(blocks, others, rows, rows)``."""
        ...


def _assembled(width: int, block: _Block, device: torch.device) -> Tensor:
    """The matrix ``(blocks, size, size)`` of the blocks of all pairs of columns."""
    others = torch.arange(width, device=device)
    first = block(0, others)
    blocks, _, rows, columns = first.shape
    matrix = first.new_empty(blocks, width, rows, width, columns)
    for i in range(width):
        matrix[:, i] = block(i, others).transpose(1, 2)
    return matrix.view(blocks, width * rows, width * columns)


class _Basis(Protocol):
    """Coordinates in which a symmetry is a sign."""

    def parts(self, v: Tensor) -> list[Tensor]:
        """The coordinates of ``(rhs, blocks, width, height)`` for every sign, ``(rhs, blocks, size)``."""
        ...

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The vector of these coordinates."""
        ...


class _Natural:
    """No symmetry."""

    def parts(self, v: Tensor) -> list[Tensor]:
        return [v.flatten(2)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


class _Reversal:
    """A reversal of n places and one of its signs.

    Attributes:
        size: how many coordinates have this sign: the first half of the places, and for the sign + the middle one.
    """

    def __init__(self, n: int, sign: int) -> None:
        self.n, self.sign = n, sign
        self.size = (n + 1) // 2 if sign > 0 else n // 2
        self._middle = self.size - 1 if sign > 0 and n % 2 else None

    def vector(self, v: Tensor, dim: int) -> Tensor:
        """The coordinates of ``v`` along a dimension."""
        v = (v + self.sign * v.flip(dim)).narrow(dim, 0, self.size) * math.sqrt(0.5)
        return self._scaled(v, dim)

    def back(self, u: Tensor, dim: int) -> Tensor:
        """The adjoint of :meth:`vector`."""
        u = self._scaled(u * math.sqrt(0.5), dim)
        shape = list(u.shape)
        shape[dim] = self.n - self.size
        u = torch.cat([u, u.new_zeros(shape)], dim)
        return u + self.sign * u.flip(dim)

    def matrix(self, m: Tensor, dims: tuple[int, int]) -> Tensor:
        """The coordinates of a matrix that the reversal leaves as it is, of which the first half of the rows do."""
        rows, columns = dims
        m = m.narrow(rows, 0, self.size)
        m = (m + self.sign * m.flip(columns)).narrow(columns, 0, self.size)
        return self._scaled(self._scaled(m, rows), columns)

    def _scaled(self, v: Tensor, dim: int) -> Tensor:
        if self._middle is not None:
            v.select(dim, self._middle).mul_(math.sqrt(0.5))
        return v


class _Central:
    """The reversal of all cells."""

    def __init__(self, width: int, height: int) -> None:
        self._width, self._height = width, height
        self._reversals = [_Reversal(width * height, sign) for sign in (1, -1) if width * height > 1 or sign > 0]

    def matrices(self, entries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks of ``(blocks, distances, height, height)``."""
        columns = (self._width + 1) // 2
        for reversal in self._reversals:

            def block(i: int, j: Tensor, sign: int = reversal.sign) -> Tensor:
                reversed_ = _at(entries, i + j + 1 - self._width).flip(-1)
                return torch.add(_at(entries, i - j), reversed_, alpha=sign)

            size = reversal.size
            matrix = _assembled(columns, block, entries.device)[:, :size, :size].contiguous()
            yield reversal.sign, reversal._scaled(reversal._scaled(matrix, 1), 2)

    def parts(self, v: Tensor) -> list[Tensor]:
        return [reversal.vector(v.flatten(2), 2) for reversal in self._reversals]

    def joined(self, parts: list[Tensor]) -> Tensor:
        return sum(
            (reversal.back(part, 2) for reversal, part in zip(self._reversals[1:], parts[1:], strict=True)),
            self._reversals[0].back(parts[0], 2),
        )


class _Even:
    """The reversals of rows and of columns."""

    def __init__(self, width: int, height: int) -> None:
        self._pairs = [
            (columns, rows)
            for columns in (_Reversal(width, sign) for sign in (1, -1))
            for rows in (_Reversal(height, sign) for sign in (1, -1))
            if columns.size and rows.size
        ]

    def matrices(self, entries: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """The blocks of ``(blocks, distances, half of the height, height)``."""
        for columns, rows in self._pairs:
            folded = rows.matrix(entries, (2, 3))
            last = columns.n - 1

            def block(i: int, j: Tensor, folded: Tensor = folded, sign: int = columns.sign, last: int = last) -> Tensor:
                return torch.add(folded[:, (i - j).abs()], folded[:, (i + j - last).abs()], alpha=sign)

            matrix = _assembled(columns.size, block, entries.device).unflatten(2, (columns.size, rows.size))
            matrix = matrix.unflatten(1, (columns.size, rows.size))
            matrix = columns._scaled(columns._scaled(matrix, 1), 3)
            yield columns.sign, rows.sign, matrix.flatten(3).flatten(1, 2)

    def parts(self, v: Tensor) -> list[Tensor]:
        return [rows.vector(columns.vector(v, 2), 3).flatten(2) for columns, rows in self._pairs]

    def joined(self, parts: list[Tensor]) -> Tensor:
        whole = [
            columns.back(rows.back(part.unflatten(2, (columns.size, rows.size)), 3), 2)
            for (columns, rows), part in zip(self._pairs, parts, strict=True)
        ]
        return sum(whole[1:], whole[0])
