"""The sum over the patches of a Schwarz preconditioner, with one gather and one scatter for all of them.

On a small image the calls take as long as what is computed in them. Two slabs of the same shape, as a square image has,
are therefore also one: the matrices of both side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lsconv.border.border_set import gathered
from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["Correction", "PatchSum"]

# Entries of the matrices of a slab that are kept a second time, side by side with those of another.
_MOST_ENTRIES = 2**18


class Correction:
    """The inverse on the cells of a patch.

    Args:
        index: the numbers of its border cells.
        shape: of the cells: those across the patch, and the other axes, along which it is block-circulant.
        inverse: the inverse there.
    """

    def __init__(self, index: Tensor, shape: tuple[int, ...], inverse: DenseInverse | FrequencyMatrices) -> None:
        self.index, self.shape, self.inverse = index, shape, inverse

    def __call__(self, cells: Tensor) -> Tensor:
        """Of the cells ``(rest, blocks, size)``."""
        if isinstance(self.inverse, FrequencyMatrices):
            return self.inverse.on_grid(cells.unflatten(-1, self.shape)).flatten(2)
        return self.inverse(cells)


class PatchSum:
    """The sum of the corrections of patches.

    Args:
        patches: the corrections.
        size: of the border.
        owner: for every border cell the number of the patch whose correction it takes; None: it takes all.
    """

    def __init__(self, patches: Sequence[Correction], size: int, owner: Tensor | None) -> None:
        self._index = torch.cat([patch.index for patch in patches])
        self._places: Tensor | None = None  # where the correction of a cell is among those of all
        if owner is not None:
            number = torch.repeat_interleave(torch.tensor([len(patch.index) for patch in patches]))
            index = self._index.cpu()
            own = (owner[index] == number).nonzero().flatten()
            self._places = torch.empty(size, dtype=torch.int64).index_copy_(0, index[own], own).to(self._index.device)
        self._parts: list[Callable[[Tensor], Tensor]] = list(patches)
        self._lengths = [len(patch.index) for patch in patches]
        if len(patches) > 1 and _alike(patches[0], patches[1]):
            self._parts[:2] = [_Pair(patches[0], patches[1])]
            self._lengths[:2] = [sum(self._lengths[:2])]

    @property
    def nbytes(self) -> int:
        """Bytes of its indices, and of slabs that it keeps a second time."""
        pairs = sum(part.inverse.nbytes for part in self._parts if isinstance(part, _Pair))
        return pairs + self._index.nbytes + (0 if self._places is None else self._places.nbytes)

    def __call__(self, r: Tensor) -> Tensor:
        """The sum for border vectors ``(rest, blocks, size)``."""
        cells = gathered(r, self._index).split(self._lengths, dim=-1)
        z = torch.cat([part(own) for part, own in zip(self._parts, cells, strict=True)], dim=-1)
        if self._places is not None:
            return gathered(z, self._places)
        return torch.zeros_like(r).index_add_(-1, self._index, z)


def _alike(first: Correction, second: Correction) -> bool:
    """Whether two patches are slabs of one shape, and short."""
    a, b = first.inverse, second.inverse
    if not (isinstance(a, FrequencyMatrices) and isinstance(b, FrequencyMatrices)):
        return False
    return a.grid.sizes == b.grid.sizes and a.matrices.shape == b.matrices.shape and a.matrices.numel() <= _MOST_ENTRIES


class _Pair:
    """Two slabs of one shape, as blocks of one operator."""

    def __init__(self, *slabs: Correction) -> None:
        self.shape = (len(slabs), *slabs[0].shape)
        inverses = [slab.inverse for slab in slabs if isinstance(slab.inverse, FrequencyMatrices)]
        self.blocks = len(inverses[0].matrices)
        matrices = torch.stack([inverse.matrices for inverse in inverses], dim=1)
        self.inverse = FrequencyMatrices(inverses[0].grid, matrices.flatten(0, 1))

    def __call__(self, cells: Tensor) -> Tensor:
        """The corrections of both, of the cells ``(rest, blocks, size)`` of both."""
        lead = cells.shape[:2]
        if lead[1] != self.blocks:  # one block of matrices serves all
            cells = cells.reshape(lead.numel(), 1, -1)
        z = self.inverse.on_grid(cells.unflatten(-1, self.shape).flatten(1, 2))
        return z.reshape(*lead, -1)
