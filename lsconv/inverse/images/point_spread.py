"""The PSF of an image: its sum, and the pixel that is its centre."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, InputWarning, ShapeError, warn

__all__ = ["Origin", "normalised", "origin_of"]

# The centre of a PSF: a word, or an index with one entry per spatial axis.
Origin = str | Sequence[int]


def normalised(psf: Tensor, ndim: int) -> Tensor:
    """Divide every kernel by its sum, with gradients; warn where that changes one by more than 1 %.

    Args:
        psf: ``(..., *size)``.
        ndim: number of spatial axes.

    Raises:
        ArgumentError: a sum is negative, or nearly zero compared with the values.

    Example:
        >>> from lsconv.inverse.images.point_spread import normalised
        >>> normalised(torch.tensor([0.5, 0.505]), 1)
        tensor([0.4975, 0.5025])
    """
    axes = tuple(range(-ndim, 0))
    total = psf.sum(axes, keepdim=True)
    with torch.no_grad():
        size = psf.abs().sum(axes, keepdim=True)
        worst = total.flatten()[(total / size).flatten().argmin()]
        if not bool((total > 1e-3 * size).all()):
            raise ArgumentError(
                f"psf: its values sum to {float(worst):.3g}, expected a sum > 0 to divide by; normalize_psf=False "
                f"takes the PSF as it is"
            )
        worst_total = total.flatten()[(total - 1).abs().flatten().argmax()]
        if abs(float(worst_total) - 1) > 0.01:
            warn(
                f"psf: its values sum to {float(worst_total):.6g} and are divided by that; normalize_psf=False takes "
                "them as they are",
                InputWarning,
            )
    return psf / total


def origin_of(psf: Tensor, ndim: int, origin: Origin) -> tuple[int, ...]:
    """The index of the PSF's centre, one for all its kernels.

    Args:
        psf: ``(..., *size)``.
        ndim: number of spatial axes.
        origin: "center" (pixel ``size // 2``), "peak" (the largest value of the kernels' sum), "centroid" (the pixel
            nearest to their centre of mass), or an index.

    Raises:
        ArgumentError, ShapeError: an unknown word, or no index of the PSF.

    Example:
        >>> from lsconv.inverse.images.point_spread import origin_of
        >>> origin_of(torch.tensor([0.0, 3.0, 1.0, 1.0]), 1, "peak")
        (1,)
    """
    size = tuple(psf.shape[-ndim:])
    if isinstance(origin, str):
        if origin == "center":
            return tuple(k // 2 for k in size)
        if origin not in ("peak", "centroid"):
            raise ArgumentError(f'origin: expected "center", "peak", "centroid" or an index, got {origin!r}')
        plane = psf.detach().double().reshape(-1, *size).sum(0)
        if origin == "peak":
            return tuple(int(i) for i in torch.unravel_index(plane.argmax(), size))
        mass = plane.sum()
        found = []
        for axis, k in enumerate(size):
            profile = plane.sum([a for a in range(ndim) if a != axis])
            places = torch.arange(k, dtype=torch.float64, device=psf.device)
            found.append(round(float((profile * places).sum() / mass)))
        if not all(0 <= place < k for place, k in zip(found, size, strict=True)):
            raise ArgumentError(f"origin: the centroid {tuple(found)} lies outside the PSF of size {size}")
        return tuple(found)
    try:
        index = tuple(operator.index(i) for i in origin)
    except TypeError:
        index = ()
    if len(index) != ndim:
        raise ShapeError(f"origin: expected {ndim} integers, one per axis of the PSF, got {origin!r}")
    if not all(0 <= i < k for i, k in zip(index, size, strict=True)):
        raise ArgumentError(f"origin: {index} is no pixel of a PSF of size {size}")
    return index
