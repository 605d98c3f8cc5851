"""The inverse discrete Fourier transform of many or large arrays, and how many arrays are made at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WORK_BYTES", "inverse_transform", "work_groups"]

# The most bytes of arrays made together on a CPU. Beyond 32 MiB glibc's malloc takes every array from the system anew,
# a page fault for every 4 KiB, and a transform works on some copies of what it is given.
WORK_BYTES = 2**24


def work_groups(items: Tensor, bytes_each: int, dim: int = 0, *, work_bytes: int = WORK_BYTES) -> Sequence[Tensor]:
    """The items along a dimension in groups whose arrays a CPU's allocator uses again; all of them elsewhere.

    Args:
        items: the items.
        bytes_each: of the arrays that are made of one item.
        dim: the dimension.
        work_bytes: the most bytes of a group.
    """
    if items.device.type != "cpu" or items.shape[dim] * bytes_each <= work_bytes:
        return (items,)
    return items.split(max(1, work_bytes // bytes_each), dim)


def inverse_transform(spectra: Tensor, sizes: Sequence[int], *, real: bool, work_bytes: int = WORK_BYTES) -> Tensor:
    """From frequencies to a grid of ``sizes``, the last dimensions; what is large is done a part at a time.

    Args:
        spectra: ``(..., *frequencies)``, where ``real`` with half of the frequencies of the last axis.
        sizes: of the grid; none for scalars.
        real: True when the arrays on the grid are real.
        work_bytes: the most bytes of a part.
    """
    if not sizes:
        return spectra
    for dim, size in enumerate(spectra.shape[: spectra.ndim - len(sizes)]):
        if size > 1:
            one = spectra.element_size() * spectra.numel() // size
            parts = work_groups(spectra, one, dim, work_bytes=work_bytes)
            if len(parts) > 1:
                done = [inverse_transform(part, sizes, real=real, work_bytes=work_bytes) for part in parts]
                return torch.cat(done, dim)
            break
    dims = tuple(range(-len(sizes), 0))
    result: Tensor = (torch.fft.irfftn if real else torch.fft.ifftn)(spectra, s=tuple(sizes), dim=dims)
    return result
