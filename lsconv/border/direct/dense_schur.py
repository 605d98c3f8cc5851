r"""The Schur complement of a crossed border as dense matrices, factorised: Cholesky where it is definite, LU elsewhere.

Real operators of one channel are split by their symmetries (:mod:`~lsconv.border.direct.even_odd_basis`). In the saddle
operator of one channel, :math:`((-a, b), (b^H, a))`, the two components exchange places: with :math:`\varphi` the
reversal from the cells of the first component to those of the second, and :math:`\xi_p = x_{\varphi(p)}`,

.. math:: (-a + i h)\, \overline{(r + i \xi)} = f + i\, g_{\varphi}, \qquad h_{pq} = b(p - \varphi(q)) = h_{qp},

a complex symmetric system of half the size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder, one_channel_saddle
from lsconv.border.direct.even_odd_basis import ReversalBasis, at_distances, block_matrix
from lsconv.fourier.batched_linalg import DenseInverse

__all__ = ["DenseSchur"]


class DenseSchur:
    """The inverse of the Schur complement on the columns V'.

    Args:
        entries: the entries between two columns at the distances 0, 1, ...: ``(blocks, distances, channels, height,
            channels, height)``, or half of the first rows where ``even``; as :func:`column_blocks` gives them.
        border: the border of which V' is a part.
        definite: the operator is positive definite.
        even: it is even along both axes; only for one channel, or the saddle operator of one.
    """

    def __init__(self, entries: Tensor, border: CrossedBorder, *, definite: bool, even: bool) -> None:
        channels, self._width = entries.shape[2], border.width
        self._exchanged = one_channel_saddle(border, definite=definite) and not entries.is_complex()
        alone = channels == 1 and not entries.is_complex()
        self._present = None if alone or self._exchanged else _present(border, entries.device)
        self._symmetry: ReversalBasis | None = None
        if even or alone:
            self._symmetry = ReversalBasis(border.width, border.height, entries.device, even=even)
        self._inverse = DenseInverse(self._matrices(entries), definite=definite)

    def _matrices(self, entries: Tensor) -> Tensor:
        """The dense blocks of S, ``(blocks * signs, size, size)``, from its entries by distance; one per sign."""
        symmetry, width = self._symmetry, self._width
        if self._exchanged:
            same, other = entries[:, :, 0, :, 0], entries[:, :, 0, :, 1]
            if symmetry is not None:
                products = symmetry.signs[:, -1].reshape(-1, 1, 1)
                return torch.complex(symmetry.matrices(same), products * symmetry.matrices(other)).flatten(0, 1)
            back = entries[:, :, 1, :, 0].mT
            return torch.complex(
                block_matrix(width, lambda i, j: at_distances(same, i - j), same.device),
                block_matrix(width, lambda i, j: at_distances(other, i + j + 1 - width, back).flip(-1), same.device),
            )
        if symmetry is not None:
            return symmetry.matrices(entries[:, :, 0, :, 0]).flatten(0, 1)
        # (blocks, distances, channels * rows, the same) to cells in the order of columns, channels, rows
        flat = entries.flatten(-2).flatten(2, 3)
        matrix = block_matrix(width, lambda i, j: at_distances(flat, i - j), flat.device)
        assert self._present is not None
        if len(self._present) < matrix.shape[-1]:
            matrix = matrix[:, self._present[:, None], self._present]
        return matrix

    def __call__(self, values: Tensor) -> Tensor:
        """``S^-1`` times ``values`` of shape ``(rhs, blocks, channels, width, height)``."""
        if self._exchanged:
            first, second = values.unbind(2)
            z = self._in_basis(torch.complex(first, second.flip(-1, -2))).conj()
            return torch.stack([z.real, z.imag.flip(-1, -2)], dim=2)
        if self._present is None:
            return self._in_basis(values.squeeze(2)).unsqueeze(2)
        flat = values.movedim(-2, 2)  # of shape (columns, channels, rows)
        vectors = flat.flatten(2).index_select(-1, self._present)
        solved = self._inverse(vectors)
        if solved.shape[-1] < math.prod(flat.shape[2:]):
            padded = solved.new_zeros(*solved.shape[:2], math.prod(flat.shape[2:]))
            solved = padded.index_copy_(-1, self._present, solved)
        return solved.reshape(flat.shape).movedim(2, -2)

    def _in_basis(self, v: Tensor) -> Tensor:
        """The solution for ``v`` of shape ``(rhs, blocks, width, height)``."""
        cells = v.flatten(2)
        solved = self._inverse(cells) if self._symmetry is None else self._symmetry.solve(self._inverse, cells)
        return solved.reshape(v.shape)

    def logdet(self) -> Tensor:
        """``log |det S|`` by block."""
        total = self._inverse.logdet if self._symmetry is None else self._symmetry.logdet(self._inverse.logdet)
        # as a real matrix of twice the size a complex one has the determinant |det|^2
        return total * (2 if self._exchanged else 1)

    @property
    def size(self) -> int:
        """The number of unknowns of S: of its even and odd blocks together, cells that pad them included."""
        signs = 1 if self._symmetry is None else len(self._symmetry.signs)
        return signs * self._inverse.factors.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self._inverse.nbytes


def _present(border: CrossedBorder, device: torch.device) -> Tensor:
    """Index the cells of V' that belong to the border, in the order of columns, channels and rows."""
    first = border.grid[1] - border.width
    columns = torch.arange(first, border.grid[1])[:, None] >= torch.tensor(border.columns)
    rows = torch.arange(border.height) < torch.tensor(border.rows)[:, None]
    return (columns[..., None] & rows).flatten().nonzero().flatten().to(device)
