r"""Symmetries of the Schur complement of a crossed border, which split it into smaller systems.

A reversal :math:`\sigma` of the order of the cells that leaves a matrix M as it is splits it: with
:math:`(F_\pm v)_x = v_x \pm v_{\sigma x}` for the first half of the cells, and the middle one with +,

.. math:: M^{-1} = \tfrac12 \sum_\pm F_\pm^T N_\pm^{-1} F_\pm, \qquad (N_\pm)_{xy} = M_{xy} \pm M_{x, \sigma y} .

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
        channels, self._width = entries.shape[2], border.width
        self._exchanged = one_channel_saddle(border, definite=definite) and not entries.is_complex()
        alone = channels == 1 and not entries.is_complex()
        self._present = None if alone or self._exchanged else _present(border, entries.device)
        self._basis: _Basis = _Natural()
        if even:
            self._basis = _Even(border.width, border.height)
        elif alone:
            self._basis = _Central(border.width, border.height)
        self._inverses = [DenseInverse(matrix, definite=definite) for matrix in self._matrices(entries)]

    def _matrices(self, entries: Tensor) -> Iterator[Tensor]:
        basis = self._basis
        if self._exchanged:
            own, other = entries[:, :, 0, :, 0], entries[:, :, 0, :, 1]
            if isinstance(basis, _Even):
                for (sign, real), (_, imaginary) in zip(basis.matrices(own), basis.matrices(other), strict=True):
                    yield torch.complex(real, sign * imaginary)
                return
            back = entries[:, :, 1, :, 0].mT
            yield torch.complex(
                _assembled(self._width, lambda i, j: _at(own, i - j), own.device),
                _assembled(self._width, lambda i, j: _at(other, i + j + 1 - self._width, back).flip(-1), own.device),
            )
        elif isinstance(basis, _Central):
            yield from basis.matrices(entries[:, :, 0, :, 0])
        elif isinstance(basis, _Even):
            yield from (matrix for _, matrix in basis.matrices(entries[:, :, 0, :, 0]))
        else:
            # (blocks, distances, channels * rows, the same) to cells in the order of columns, channels, rows
            flat = entries.flatten(-2).flatten(2, 3)
            matrix = _assembled(self._width, lambda i, j: _at(flat, i - j), flat.device)
            assert self._present is not None
            if len(self._present) < flat.shape[-1] * self._width:
                matrix = matrix.index_select(-1, self._present).index_select(-2, self._present)
            yield matrix

    def __call__(self, values: Tensor) -> Tensor:
        """``S^-1`` times ``values`` of shape ``(rhs, blocks, channels, width, height)``."""
        if self._exchanged:
            first, second = values.unbind(2)
            z = self._in_basis(torch.complex(first, second.flip(-1, -2))).conj()
            return torch.stack([z.real, z.imag.flip(-1, -2)], dim=2)
        if self._present is None:
            return self._in_basis(values.squeeze(2)).unsqueeze(2)
        flat = values.movedim(-2, 2)  # columns, channels, rows
        vectors = flat.flatten(2).index_select(-1, self._present)
        solved = self._inverses[0](vectors)
        if solved.shape[-1] < math.prod(flat.shape[2:]):
            whole = solved.new_zeros(*solved.shape[:2], math.prod(flat.shape[2:]))
            solved = whole.index_copy_(-1, self._present, solved)
        return solved.reshape(flat.shape).movedim(2, -2)

    def _in_basis(self, v: Tensor) -> Tensor:
        """The solution for ``v`` of shape ``(rhs, blocks, width, height)``."""
        parts = zip(self._inverses, self._basis.parts(v * self._basis.scale), strict=True)
        return self._basis.joined([inverse(part.flatten(2)).reshape(part.shape) for inverse, part in parts])

    def logdet(self) -> Tensor:
        """``log |det S|`` by block."""
        total = torch.stack([inverse.logdet for inverse in self._inverses]).sum(0) - self._basis.middle * math.log(2)
        # as a real matrix of twice the size a complex one has the determinant |det|^2
        return total * (2 if self._exchanged else 1)

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
    """Coordinates in which a symmetry is a sign.

    Attributes:
        scale: what the sum of the solutions is divided into, 1/2 for each reversal.
        middle: how many coordinates a reversal leaves where they are, those of two counted twice.
    """

    scale: float
    middle: int

    def parts(self, v: Tensor) -> list[Tensor]:
        """The coordinates of ``(rhs, blocks, width, height)`` for every sign."""
        ...

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The adjoint of :meth:`parts`."""
        ...


class _Natural:
    """No symmetry."""

    scale, middle = 1.0, 0

    def parts(self, v: Tensor) -> list[Tensor]:
        return [v]

    def joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0]


def _halves(v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of ``v`` and its reversal along a dimension, the middle among the sums."""
    n = v.shape[dim]
    first, other = (u.narrow(dim, 0, (n + 1) // 2) for u in (v, v.flip(dim)))
    return first + other, (first - other).narrow(dim, 0, n // 2)


def _joined(plus: Tensor, minus: Tensor, dim: int) -> Tensor:
    """The adjoint of :func:`_halves`."""
    half = minus.shape[dim]
    odd = plus.shape[dim] - half
    if odd:
        minus = torch.nn.functional.pad(minus, (0, 0) * (-1 - dim) + (0, 1))
    whole = torch.cat([plus + minus, (plus - minus).flip(dim).narrow(dim, odd, half)], dim)
    if odd:
        whole.select(dim, half).mul_(2)
    return whole


class _Central:
    """The reversal of all cells."""

    scale = 0.5

    def __init__(self, width: int, height: int) -> None:
        self._shape, self.middle = (width, height), width * height % 2

    def matrices(self, entries: Tensor) -> Iterator[Tensor]:
        """The blocks of ``(blocks, distances, height, height)``."""
        width, height = self._shape
        for sign in (1, -1):

            def block(i: int, j: Tensor, sign: int = sign) -> Tensor:
                reversed_ = _at(entries, i + j + 1 - width).flip(-1)
                return torch.add(_at(entries, i - j), reversed_, alpha=sign)

            size = (width * height + (sign > 0)) // 2
            yield _assembled((width + 1) // 2, block, entries.device)[:, :size, :size].contiguous()

    def parts(self, v: Tensor) -> list[Tensor]:
        return list(_halves(v.flatten(2), -1))

    def joined(self, parts: list[Tensor]) -> Tensor:
        plus, minus = parts
        return _joined(plus, minus, -1).unflatten(-1, self._shape)


class _Even:
    """The reversals of rows and of columns."""

    scale = 0.25

    def __init__(self, width: int, height: int) -> None:
        self._shape, self.middle = (width, height), width % 2 * height + height % 2 * width

    def matrices(self, entries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The blocks of ``(blocks, distances, half of the height, height)``, and the products of their signs."""
        width, height = self._shape
        for sign in (1, -1):
            for sign_of_rows in (1, -1):
                rows = (height + (sign_of_rows > 0)) // 2
                folded = torch.add(entries, entries.flip(3), alpha=sign_of_rows)[:, :, :rows, :rows]

                def block(i: int, j: Tensor, folded: Tensor = folded, sign: int = sign) -> Tensor:
                    return torch.add(folded[:, (i - j).abs()], folded[:, (i + j + 1 - width).abs()], alpha=sign)

                yield sign * sign_of_rows, _assembled((width + (sign > 0)) // 2, block, entries.device)

    def parts(self, v: Tensor) -> list[Tensor]:
        return [part for half in _halves(v, -2) for part in _halves(half, -1)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        even, odd = (_joined(parts[k], parts[k + 1], -1) for k in (0, 2))
        return _joined(even, odd, -2)
