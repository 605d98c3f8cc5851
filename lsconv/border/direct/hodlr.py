r"""The Schur complement of a crossed border by hierarchical low-rank blocks, for images whose dense factors are large.

The coupling between two pieces of the columns V' has low rank, nearly independently of their length. Ordered along the
columns and bisected recursively, a positive definite :math:`S = \begin{pmatrix} S_1 & B \\ B^H & S_2 \end{pmatrix}`
with :math:`S_i = W_i W_i^H` is factorised from the leaves up:

.. math:: K = W_1^{-1} B W_2^{-H} \approx U \operatorname{diag}(\rho) V^H, \qquad
          S \approx W W^H, \quad W = \begin{pmatrix} W_1 & \\ & W_2 \end{pmatrix}
          \begin{pmatrix} I & K \\ K^H & I \end{pmatrix}^{1/2} ,

the root being the identity but for the planes of :math:`(u_i, 0)` and :math:`(0, v_i)`. All :math:`\rho < 1`, so that
no truncation makes S indefinite, and a pass without those of :math:`\rho \le \epsilon` leaves about :math:`\epsilon` of
an error. The range of K is found by products with a few vectors, some more than the rank of the level below. Where the
singular vectors would take more memory than the blocks, dense factors are made, or none.

Ambikasaran, O'Neil and Singh, "Fast symmetric factorization of hierarchical matrices with applications",
arXiv:1405.0223 (2014); Halko, Martinsson and Tropp, SIAM Review 53 (2011), for the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lsconv.border.direct.crossed_border import CrossedBorder
from lsconv.border.direct.even_odd_basis import ReversalBasis, at_distances
from lsconv.fourier.batched_linalg import LEAST_FACTORED

__all__ = ["HodlrInverse", "HodlrSchur"]


class HodlrInverse:
    """The inverses of symmetric positive definite matrices whose off-diagonal blocks have low rank.

    Args:
        block: a function of a first row, a first column and a size: the square block ``(blocks, size, size)`` there.
            Rows and columns are multiples of the size; beyond the matrix it continues as an identity.
        size: of the matrices.
        unit: sizes of leaves are multiples of it.
        leaf: the least size of a leaf; there are eight at least.

    Attributes:
        low_rank: the ranks are small; if not, nothing else may be used.
    """

    def __init__(
        self, block: Callable[[int, int, int], Tensor], size: int, unit: int = 1, leaf: int = LEAST_FACTORED
    ) -> None:
        self._size, self.low_rank = size, False
        deepest = int(math.log2(max(size / leaf, 1)))
        for depth in range(deepest, max(deepest - 2, 2), -1):
            self._leaf = unit * math.ceil(size / 2**depth / unit)
            self._padded_size = 2**depth * self._leaf
            leaves = torch.stack([block(i, i, self._leaf) for i in range(0, self._padded_size, self._leaf)], 1)
            factors, info = torch.linalg.cholesky_ex(leaves)
            if bool((info > 0).any()):
                return
            self._log_diagonal = 2 * factors.diagonal(dim1=-2, dim2=-1).log().sum((-1, -2))
            eye = torch.eye(self._leaf, dtype=factors.dtype, device=factors.device)
            self._roots = torch.linalg.solve_triangular(factors, eye.expand_as(factors), upper=False)
            del leaves, factors
            self._levels: list[tuple[Tensor, Tensor]] = []
            for level in range(depth):
                half = self._leaf * 2**level
                starts = range(0, self._padded_size, 2 * half)
                self.low_rank = self._compress_level(torch.stack([block(i, i + half, half) for i in starts], 1))
                if not self.low_rank:
                    break
            if self.low_rank or self._levels:
                return  # larger leaves would lower the rank of the first level only

    def _compress_level(self, B: Tensor) -> bool:
        """Find the singular vectors of K between the halves of the next level, and add the level.

        Args:
            B: the blocks of S between the halves, ``(blocks, nodes, half, half)``.

        Returns:
            True where they take less memory than the blocks and S is definite; otherwise no level is added.
        """
        half = B.shape[-1]
        least = torch.finfo(B.dtype).eps ** 0.5  # rho enters the determinant as 1 - rho^2: below it rounds to one
        width = (9 * self._levels[-1][1].shape[-1]) // 8 + 1 if self._levels else half // 4
        while True:
            # vectors that are nearly independent, instead of random ones, which vmap refuses
            numbers = torch.arange(half * width, dtype=B.dtype, device=B.device)
            probe = torch.sin(numbers * numbers).view(width, half)
            first, second = _halves(self._inverse_root_adjoint(probe.expand(B.shape[0], 2 * B.shape[1], width, half)))
            Y = self._inverse_root(torch.stack([second @ B.mT, first @ B], 2).flatten(1, 2))
            Q = torch.linalg.qr(Y.mT)[0].mT
            first, second = _halves(self._inverse_root_adjoint(Q))
            left, rho, right = torch.linalg.svd((first @ B) @ second.mT)
            rank = int((rho > least).sum(-1).amax())
            if rank < width:
                break
            expected = width * math.log(least) / math.log(min(float(rho[..., -1].amax()), 1 - least))
            if 2 * expected > half:  # the rank that a geometric decay predicts
                return False
            width = int(9 / 8 * max(expected, width)) + 1
        if 2 * rank > half or bool((rho >= 1).any()):
            return False
        singular_vectors = torch.stack([left.mT[..., :rank, :], right[..., :rank, :]], 2).flatten(1, 2)
        self._levels.append((singular_vectors @ Q, rho[..., None, None, :rank]))
        return True

    def _inverse_root(self, x: Tensor) -> Tensor:
        """``W^-1`` times the rows of ``(blocks, nodes, rhs, half)``."""
        x = self._leaves(x, self._roots.mT)
        for level in self._levels:
            x = _node_inverse_root(x, *level)
        return x

    def _inverse_root_adjoint(self, x: Tensor) -> Tensor:
        """``W^-H`` times the rows of ``(blocks, nodes, rhs, half)``."""
        for level in reversed(self._levels):
            x = _node_inverse_root(x, *level)
        return self._leaves(x, self._roots)

    def _leaves(self, x: Tensor, matrices: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (-1, self._leaf)).transpose(2, 3).flatten(1, 2)
        return (pieces @ matrices).unflatten(1, (x.shape[1], -1)).transpose(2, 3).flatten(3)

    def __call__(self, r: Tensor) -> Tensor:
        """The inverses times ``r`` of shape ``(rhs, blocks, size)``."""
        padded = torch.nn.functional.pad(r, (0, self._padded_size - self._size))
        return (
            self._inverse_root_adjoint(self._inverse_root(padded.movedim(0, 1).unsqueeze(1)))
            .squeeze(1)
            .movedim(1, 0)[..., : self._size]
        )

    @property
    def logdet(self) -> Tensor:
        """``log det`` of the matrices, ``(blocks,)``."""
        return sum((torch.log1p(-rho.square()).flatten(1).sum(-1) for _, rho in self._levels), start=self._log_diagonal)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self._roots.nbytes + sum(factors.nbytes for level in self._levels for factors in level)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second halves of every node."""
    first, second = x.unflatten(1, (-1, 2)).unbind(2)
    return first, second


def _node_inverse_root(x: Tensor, vectors: Tensor, rho: Tensor) -> Tensor:
    """Multiply the rows of x, node by node, with the inverse root of ``[[I, K], [K^H, I]]``.

    Args:
        x: ``(blocks, nodes, rhs, cells)``.
        vectors: the singular vectors of K of every half, ``(blocks, halves, rank, half)``.
        rho: its singular values.
    """
    shape, (_, halves, _, half) = x.shape, vectors.shape
    x = x.unflatten(-1, (-1, half)).transpose(2, 3).flatten(1, 2)
    t = (x @ vectors.mT).unflatten(1, (halves // 2, 2))
    plus, minus = (1 + rho).rsqrt(), (1 - rho).rsqrt()
    t = ((plus + minus) / 2 - 1) * t + (plus - minus) / 2 * t.flip(2)
    x = x + t.flatten(1, 2) @ vectors
    return x.unflatten(1, (shape[1], -1)).transpose(2, 3).reshape(shape)


class HodlrSchur:
    """The inverse of the Schur complement of an operator of one real channel, positive definite.

    It takes the place of :class:`~lsconv.border.direct.dense_schur.DenseSchur` on large borders. Cells are ordered row
    by row, so that halves of the unknowns are halves of the columns.

    Args:
        entries, border, even: as of :class:`~lsconv.border.direct.dense_schur.DenseSchur`, for one real channel.
        leaf: the least unknowns of a leaf; None: :meth:`leaf`.

    Attributes:
        low_rank: the ranks are small; if not, nothing else may be used.
        size: the number of unknowns, cells that pad the blocks included.
    """

    @classmethod
    def serves(cls, border: CrossedBorder, *, definite: bool, real: bool, even: bool) -> bool:
        """Tell whether compression is worth trying: S can be halved three times, and V' is 64 times as high as wide.

        The ranks are about ``width^2 / 2``, whatever the height is.
        """
        size = border.column_cells / (4 if even else 2)
        one = definite and real and len(border.rows) == 1 and bool(border.depth)
        return one and size >= 8 * LEAST_FACTORED and border.height >= 64 * border.width

    @classmethod
    def leaf(cls, border: CrossedBorder, *, even: bool) -> int:
        """The least unknowns of a leaf: twice as high as the border is wide, since lower ones have full rank."""
        return max(LEAST_FACTORED, border.width**2 * (1 if even else 2))

    def __init__(self, entries: Tensor, border: CrossedBorder, *, even: bool, leaf: int | None = None) -> None:
        self._entries: Tensor = entries[:, :, 0, :, 0]
        self._height, self._width, self._even = border.height, border.width, even
        self._basis = ReversalBasis(self._height, self._width, entries.device, even=even)
        self._columns = (self._width + 1) // 2 if even else self._width
        size = self._basis.absent.shape[-1]
        self._inverse = HodlrInverse(
            self._block, size, self._columns, self.leaf(border, even=even) if leaf is None else leaf
        )
        self.low_rank = self._inverse.low_rank
        self.size = len(self._basis.signs) * size
        del self._entries

    def _block(self, first: int, second: int, size: int) -> Tensor:
        """Form the dense block of S between two ranges of cells, in the even and odd basis.

        An entry is a sum of two of Q's: that between the two cells, and that between one and the mirror image of the
        other, with the sign of the basis. Cells that only pad the columns get rows and columns of the identity.

        Args:
            first, second: where the ranges begin.
            size: of both, a multiple of the number of columns.

        Returns:
            ``(blocks * signs, size, size)``.
        """
        entries, signs, width, half = self._entries, self._basis.signs.tolist(), self._width, (self._height + 1) // 2
        # both ranges as rows of V', of the first half, where those that only pad it are left out
        (top, bottom), (left, right) = (
            (min(start // self._columns, half), min((start + size) // self._columns, half)) for start in (first, second)
        )
        matrix = entries.new_zeros(
            len(entries), len(signs), size // self._columns, self._columns, size // self._columns, self._columns
        )
        rows, others = slice(top, bottom), torch.arange(self._columns, device=entries.device)
        columns, mirrored = slice(left, right), slice(self._height - right, self._height - left)
        direct, image = entries[:, :, rows, columns], entries[:, :, rows, mirrored].flip(-1)
        if self._even:
            sums = [torch.add(direct, image, alpha=sign) for sign in (1.0, -1.0)]
        else:
            back, back_image = entries[:, :, columns, rows].mT, entries[:, :, mirrored, rows].mT.flip(-1)
        for i in range(self._columns):
            into = matrix[:, :, : bottom - top, i, : right - left]
            distances, image_distances = i - others, i + others + 1 - width
            # s[1] is the sign of the reversal of the columns, s[2] that of the rows; s[1] is that of both at once where
            # S is not even
            if self._even:
                same, mirrored_part = ([part[:, d.abs()] for part in sums] for d in (distances, image_distances))
                by_sign = [torch.add(same[s[2] < 0], mirrored_part[s[2] < 0], alpha=s[1]) for s in signs]
            else:
                same_cells = at_distances(direct, distances, back)
                images = at_distances(image, image_distances, back_image)
                by_sign = [torch.add(same_cells, images, alpha=s[1]) for s in signs]
            for number, part in enumerate(by_sign):
                into[:, number] = part.permute(0, 2, 3, 1)
        matrix = matrix.view(len(entries), len(signs), size, size)
        absent = torch.nn.functional.pad(self._basis.absent, (0, max(first, second) + size), value=True)
        absent_rows, absent_columns = absent[:, first : first + size], absent[:, second : second + size]
        if bool(absent_rows.any()) or bool(absent_columns.any()):
            matrix *= ~absent_rows[:, :, None] & ~absent_columns[:, None]
        if first == second:
            matrix.diagonal(dim1=-2, dim2=-1).add_(absent_rows)
        return matrix.flatten(0, 1)

    def __call__(self, values: Tensor) -> Tensor:
        """``S^-1`` times ``values`` of shape ``(rhs, blocks, 1, width, height)``."""
        cells = values.squeeze(2).mT
        return self._basis.solve(self._inverse, cells.flatten(2)).view(cells.shape).mT.unsqueeze(2)

    def logdet(self) -> Tensor:
        """``log |det S|`` by block."""
        return self._basis.logdet(self._inverse.logdet)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self._inverse.nbytes
