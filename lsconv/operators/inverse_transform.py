"""The inverse discrete Fourier transform of many or large arrays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inverse_transform"]

# On a CPU torch copies the whole spectrum before it inverts it. Beyond some 32 MiB malloc maps fresh memory for that, a
# page fault for every 4 KiB (32 arrays of 520², float64, one core: 210 ms at once, 83 ms one at a time; 8 of 1040²: 207
# and 91; up to 8 MiB it makes no difference).
_MOST_BYTES = 2**24
_CHUNK_BYTES = 2**23


def inverse_transform(spectra: Tensor, sizes: Sequence[int], *, real: bool) -> Tensor:
    """From frequencies to a grid of ``sizes``, the last dimensions; what is large is done a part at a time.

    Args:
        spectra: ``(..., *frequencies)``, where ``real`` with half of the frequencies of the last axis.
        sizes: of the grid; none for scalars.
        real: True when the arrays on the grid are real.
    """
    if not sizes:
        return spectra
    if spectra.device.type == "cpu":
        lead = spectra.shape[: -len(sizes)]
        size = spectra.numel() * spectra.element_size()
        if size > _MOST_BYTES and max(lead, default=1) > 1:
            dim = max(range(len(lead)), key=lambda d: lead[d])
            parts = spectra.chunk(-(-size // _CHUNK_BYTES), dim)
            return torch.cat([inverse_transform(part, sizes, real=real) for part in parts], dim)
    dims = tuple(range(-len(sizes), 0))
    result: Tensor = (torch.fft.irfftn if real else torch.fft.ifftn)(spectra, s=tuple(sizes), dim=dims)
    return result
