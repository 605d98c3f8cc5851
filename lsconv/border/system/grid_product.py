"""The product of a block-circulant operator, restricted to a border, over the whole grid.

On a CPU the arrays of a large grid are kept from one product to the next: malloc maps them afresh each time, and the
page faults take as long as the transforms (one channel, float64, one core: 141 and 87 ms at 2048², 21 and 14 at 1024²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.border_set import Border
from lsconv.fourier.symbol import FrequencyMatrices

__all__ = ["BorderProduct"]

# Grids of at least so many bytes have their arrays kept; parts of at most so many are transformed at a time.
_KEPT_BYTES = 2**23
_PART_BYTES = 2**22


@dataclass
class _Arrays:
    grid: Tensor  # zero off the border
    spectra: Tensor
    product: Tensor
    result: Tensor


class BorderProduct:
    """``u -> (Q u)`` on the border for border vectors ``(rest, blocks, size)``.

    Args:
        matrices: the block-circulant operator Q.
        border: the cells.
    """

    def __init__(self, matrices: FrequencyMatrices, border: Border) -> None:
        self.matrices, self.border = matrices, border
        self._kept: dict[tuple[int, ...], _Arrays] = {}

    def __call__(self, u: Tensor) -> Tensor:
        """The product."""
        product = self._product(u)
        return product if self.border.diagonal is None else product.addcmul_(self.border.diagonal, u)

    def _product(self, u: Tensor) -> Tensor:
        grid, channels = self.matrices.grid, self.border.channels
        lead = (*u.shape[:2], channels)
        cells = u.shape[0] * u.shape[1] * channels * self.border.mask[0].numel()
        large = (
            u.device.type == "cpu" and not torch.is_inference_mode_enabled() and cells * u.element_size() >= _KEPT_BYTES
        )
        if not (large and self.border.cellwise and self.matrices.elementwise and len(grid.sizes) == 2):
            return self.border.gather(self.matrices.on_grid(self.border.scatter(u)))
        # taken out while in use: another thread makes its own
        arrays = self._kept.pop(lead, None) or self._arrays(u, lead)
        arrays.grid.flatten(2).index_copy_(-1, self.border.index, u)
        grid.transform(arrays.grid, out=arrays.spectra)
        self.matrices.multiply(arrays.spectra, out=arrays.product)
        _invert(arrays.product, arrays.result)
        product = self.border.gather(arrays.result)  # before the arrays are there for another thread
        self._kept = {lead: arrays}  # one shape at a time
        return product

    def _arrays(self, u: Tensor, lead: tuple[int, ...]) -> _Arrays:
        grid = self.matrices.grid
        spectra = u.new_empty(*lead, *grid.frequencies, dtype=u.dtype.to_complex())
        zeros = u.new_zeros(*lead, *grid.sizes)
        return _Arrays(zeros, spectra, torch.empty_like(spectra), torch.empty_like(zeros))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays kept."""
        return sum(t.nbytes for arrays in list(self._kept.values()) for t in vars(arrays).values())


def _invert(spectra: Tensor, result: Tensor) -> None:
    """The inverse transform along the last two axes, a few columns and then a few rows at a time; overwrites both."""
    planes, out = spectra.flatten(0, -3), result.flatten(0, -3)
    n, m = out.shape[-2:]
    columns = max(8, _PART_BYTES // (n * spectra.element_size()))
    rows = max(8, _PART_BYTES // (m * spectra.element_size()))
    for plane, target in zip(planes, out, strict=True):
        for part in plane.split(columns, 1):
            part.copy_(torch.fft.ifft(part, dim=0))
        for part, to in zip(plane.split(rows), target.split(rows), strict=True):
            if target.is_complex():
                torch.fft.ifft(part, dim=1, out=to)
            else:
                torch.fft.irfft(part, n=m, dim=1, out=to)
