r"""Symmetries of the Schur complement of a crossed border, which split it into smaller systems.

If a matrix M does not change when the order :math:`\sigma` of the cells is reversed, it splits into two blocks: with
:math:`(F_\pm v)_x = v_x \pm v_{\sigma x}` for the first half of the cells, and the middle one with +,

.. math:: M^{-1} = \tfrac12 \sum_\pm F_\pm^T N_\pm^{-1} F_\pm, \qquad (N_\pm)_{xy} = M_{xy} \pm M_{x, \sigma y} .

- *Central*: for every real kernel of one channel the operator between cells is even, q(-d) = q(d), so that reversing
  the order of all cells leaves the matrix as it is: two blocks of half the size.
- *Even* along both axes: rows and columns may be reversed separately: four blocks of a quarter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["ReversalBasis", "at_distances", "block_matrix"]


def at_distances(entries: Tensor, distances: Tensor, back: Tensor | None = None) -> Tensor:
    """Select the entries at distances, which may be negative: those are ``back``, by default the adjoints."""
    back = entries.mH if back is None else back
    selected = entries.new_empty(len(entries), len(distances), *entries.shape[2:])
    for source, ahead in ((entries, distances >= 0), (back, distances < 0)):
        selected[:, ahead] = source[:, distances[ahead].abs()]
    return selected


class _Block(Protocol):
    def __call__(self, i: int, j: Tensor, /) -> Tensor:
        """The blocks of a column and others, ``(blocks, others, rows, rows)``."""
        ...


def block_matrix(width: int, block: _Block, device: torch.device) -> Tensor:
    """Put the blocks of all pairs of columns into one matrix, ``(blocks, width * rows, width * rows)``.

    Args:
        width: the number of columns.
        block: the blocks ``(blocks, others, rows, rows)`` between one column and others, given by their numbers.
        device: the device of the matrix.
    """
    others = torch.arange(width, device=device)
    column = block(0, others)
    blocks, _, rows, columns = column.shape
    matrix = column.new_empty(blocks, width, rows, width, columns)
    for i in range(width):
        matrix[:, i] = column.transpose(1, 2)
        if i + 1 < width:
            column = block(i + 1, others)
    return matrix.view(blocks, width * rows, width * columns)


class ReversalBasis:
    """The basis of even and odd parts of vectors on a rectangle: sums and differences with their mirror images.

    A matrix that is invariant under reversals of the cells is block-diagonal in this basis, with one block for each
    choice of signs: even (+) or odd (-) under each reversal. The coordinates of a block belong to the cells of the
    first half, or quarter. A cell that is its own image has no odd part: the block has a one on the diagonal there
    instead.

    Args:
        width, height: the sizes of the rectangle.
        device: the device of the index tensors.
        even: reversals of rows and of columns separately (four blocks); False: of the order of all cells (two blocks).

    Attributes:
        signs: the sign of each image in each block, ``(blocks of the matrix, images)``.
        absent: True for cells without a part of that sign, ``(blocks of the matrix, cells)``.
        log_multiplicity: the sum of the blocks' log-determinants less that of the matrix.
    """

    def __init__(self, width: int, height: int, device: torch.device, *, even: bool) -> None:
        cells = torch.arange(width * height, device=device)
        self._shape, self._even = (width, height), even
        hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=device)
        images, self.signs = [cells.view(width, height), cells.flip(0).view(width, height)], hadamard
        if even:
            images = [image for half in (images[0], images[0].flip(0)) for image in (half, half.flip(1))]
            self.signs = torch.kron(hadamard, hadamard)
            images = [image[: (width + 1) // 2, : (height + 1) // 2] for image in images]
        size = images[0].numel() if even else (len(cells) + 1) // 2
        self._images = torch.stack([image.flatten()[:size] for image in images])
        fixed = self._images == self._images[:1]
        self.absent = ((self.signs < 0)[..., None] & fixed).any(1)
        multiplicity = fixed.sum(0).double()
        self.log_multiplicity = float((multiplicity.log() * ~self.absent).sum())
        self._source = torch.empty_like(cells)
        self._source[self._images.flatten()] = torch.arange(self._images.numel(), device=device)
        self._weights = multiplicity[self._source % len(multiplicity)] / len(images)

    def to_coordinates(self, v: Tensor) -> Tensor:
        """The coordinates ``(rhs, blocks, signs, size)`` of vectors ``(rhs, blocks, cells)``: sums of signed images."""
        return self.signs.to(v) @ v[..., self._images]

    def from_coordinates(self, coordinates: Tensor) -> Tensor:
        """The vectors ``(rhs, blocks, cells)`` of coordinates ``(rhs, blocks, signs, size)``: the inverse map."""
        return (self.signs.to(coordinates) @ coordinates).flatten(2)[..., self._source] * self._weights

    def solve(self, inverse: Callable[[Tensor], Tensor], cells: Tensor) -> Tensor:
        """Apply the inverse of the diagonal blocks to vectors ``(rhs, blocks, cells)``."""
        coordinates = self.to_coordinates(cells)
        return self.from_coordinates(inverse(coordinates.flatten(1, 2)).view(coordinates.shape))

    def logdet(self, of_blocks: Tensor) -> Tensor:
        """The log-determinant of every matrix, from those of its diagonal blocks, ``(blocks * signs,)``."""
        return of_blocks.unflatten(0, (-1, len(self.signs))).sum(1) - self.log_multiplicity

    def matrices(self, entries: Tensor) -> Tensor:
        """The diagonal blocks of a matrix in this basis, ``(blocks, signs, size, size)``.

        Args:
            entries: of the matrix between columns at the distances 0, 1, ...: ``(blocks, distances, height, height)``;
                where even the first half of the rows.
        """
        height, size = (self._shape[1] + 1) // 2, self._images.shape[1]
        halves = [entries]
        if self._even:
            halves = [torch.add(entries, entries.flip(3), alpha=sign)[..., :height, :height] for sign in (1, -1)]
        matrices = entries.new_empty(len(entries), len(self.signs), size, size)
        for k, half in enumerate(halves):
            same, image = (matrix[:, :size, :size] for matrix in self._between_columns(half))
            torch.add(same, image, out=matrices[:, k])
            torch.sub(same, image, out=matrices[:, len(halves) + k])
        if bool(self.absent.any()):
            present = ~self.absent
            matrices *= present[:, None] & present[..., None]
            matrices.diagonal(dim1=-2, dim2=-1).add_(self.absent)
        return matrices

    def _between_columns(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of S between the columns of the first half, and between these and the others' images."""
        width, last = (self._shape[0] + 1) // 2, self._shape[0] - 1
        if self._even:
            return (
                block_matrix(width, lambda i, j: entries[:, (i - j).abs()], entries.device),
                block_matrix(width, lambda i, j: entries[:, (i + j - last).abs()], entries.device),
            )
        return (
            block_matrix(width, lambda i, j: at_distances(entries, i - j), entries.device),
            block_matrix(width, lambda i, j: at_distances(entries, i + j - last).flip(-1), entries.device),
        )
