"""A block-circulant operator restricted to a border, as one dense matrix, and its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.fourier.border_cells import Border

__all__ = ["WholeBorder", "restricted"]


class WholeBorder:
    """The inverse of a Hermitian block-circulant operator restricted to a border, by its factors.

    Args:
        kernel: the first block column of the operator, ``(blocks, channels, channels, *grid)``.
        border: the border.
        definite: whether it is positive definite there.
    """

    def __init__(self, kernel: Tensor, border: Border, *, definite: bool) -> None:
        matrix = restricted(kernel, border, border)
        self.pivots: Tensor | None = None
        if definite:
            self.factors, info = torch.linalg.cholesky_ex(matrix)
            if not bool((info > 0).any()):
                return
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(matrix)

    def __call__(self, r: Tensor) -> Tensor:
        """The inverse times ``r`` of shape ``(rest, blocks, size)``."""
        b = r.movedim(0, -1)
        if self.pivots is None:
            return torch.cholesky_solve(b, self.factors).movedim(-1, 0)
        return torch.linalg.lu_solve(self.factors, self.pivots, b).movedim(-1, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return self.factors.numel() * self.factors.element_size()


def restricted(kernel: Tensor, inner: Border, outer: Border) -> Tensor:
    """A block-circulant operator between two borders, ``(blocks, inner.size, outer.size)``.

    Channels with the same border positions (all, unless a stride splits them) read the kernel at the same lags.

    Args:
        kernel: its first block column, ``(blocks, rows, columns, *grid)``.
        inner: the border in its range.
        outer: the border in its domain.
    """
    transposed = kernel.new_empty(len(kernel), outer.size, inner.size)
    for columns, q, to in _alike(outer):
        for rows, p, at in _alike(inner):
            lags = torch.zeros((), dtype=torch.int64)
            for a, n in enumerate(inner.grid):
                lags = lags * n + (p[:, a] - q[:, a, None]) % n
            lags = lags.flatten().to(kernel.device)
            for column, start in zip(columns.tolist(), to.tolist(), strict=True):
                part = kernel[:, rows.to(kernel.device), column].flatten(2)[..., lags]
                part = part.unflatten(-1, (len(q), len(p))).transpose(1, 2)  # blocks, q, rows, p
                target = transposed[:, start : start + len(q)]
                if len(rows) == inner.channels:
                    target.unflatten(-1, (len(rows), len(p))).copy_(part)
                else:
                    where = (at[:, None] + torch.arange(len(p))).flatten().to(kernel.device)
                    target.index_copy_(-1, where, part.flatten(2))
    return transposed.mT


def _alike(border: Border) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Channels with the same border: their numbers, the positions ``(cells, axes)``, the numbers of the first cells."""
    flat = border.mask.flatten(1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), flat.sum(1).cumsum(0)[:-1]])
    kinds, kind = torch.unique(flat, dim=0, return_inverse=True)
    groups = []
    for number, mask in enumerate(kinds):
        channels = (kind == number).nonzero().flatten()
        groups.append((channels, mask.reshape(border.grid).nonzero(), starts[channels]))
    return groups
