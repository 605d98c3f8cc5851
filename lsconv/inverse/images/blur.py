r"""blur_operator: the blur of an image by its PSF, or by PSFs that vary across it, as an operator.

The image is the true convolution of the field with the PSF, plus noise,

    y[i] = sum_j psf[j] x[i - j + c],

c being the PSF's centre, so that a PSF with a single one there is the identity. In torch's convention (a
cross-correlation) this is the flipped PSF of size k with padding k - 1 - c on the left and c on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ShapeError
from lsconv.inverse.images.image_layout import spatial_axes
from lsconv.inverse.images.point_spread import Origin, origin_of
from lsconv.operators.convolution import Convolution
from lsconv.operators.varying_convolution import VaryingConvolution

__all__ = ["blur_operator", "central_blur", "level_for_mean"]

_PADDING_MODES = {"unknown": "zeros", "zero": "zeros", "periodic": "circular", "reflect": "reflect"}


def blur_operator(
    psf: Tensor,
    size: tuple[int, ...],
    *,
    boundary: str = "unknown",
    channels: int = 1,
    ndim: int | None = None,
    origin: Origin = "center",
    positions: Tensor | Sequence[Sequence[float]] | None = None,
) -> Convolution | VaryingConvolution:
    r"""The blur of an image by a PSF as an operator, from the field to an image of the given size.

    .. math:: y[i] = \sum_j \mathrm{psf}[j]\, x[i - j + c]

    a true convolution, c being the PSF's centre, its pixel ``size // 2`` on every axis unless ``origin`` says another;
    channels are blurred separately.

    Args:
        psf: ``(*size)``, or with ``ndim`` given ``(*batch, 1 or channels, *size)``; its scale is the operator's.
        size: spatial size of the blurred image.
        boundary: what the field is beyond the image: "unknown" (the field is larger than the image by the PSF less
            one, and nothing is assumed), "zero", "periodic" or "reflect" (mirrored about the border pixels).
        channels: channels of image and field.
        ndim: number of spatial axes, the PSF's by default.
        origin: the PSF's centre c: "center" (``size // 2``, of an even size the pixel after the middle), "peak",
            "centroid", or an index with one entry per axis; ``(0, ...)`` for a causal response.
        positions: where the PSFs ``(K, *size)`` were measured, ``(K, ndim)`` pixels of the image that form a grid; the
            PSF is linear between them and constant beyond (:meth:`VaryingConvolution.from_grid`). None: one PSF for
            all of the image.

    Returns:
        A :class:`Convolution` from ``(channels, *field)`` to ``(channels, *size)``, or a :class:`VaryingConvolution`.

    Raises:
        ArgumentError: an unknown boundary or origin.
        ShapeError: shapes that do not fit, or a PSF larger than the image (which "zero" allows).

    Example:
        >>> psf = torch.tensor([[0.5, 0.5, 0.0]])
        >>> A = lsconv.blur_operator(psf, (1, 4), boundary="zero")
        >>> A(torch.tensor([[[1.0, 2.0, 4.0, 8.0]]]))
        tensor([[[1.5000, 3.0000, 6.0000, 4.0000]]])
    """
    if boundary not in _PADDING_MODES:
        raise ArgumentError(f"boundary: expected one of {', '.join(map(repr, _PADDING_MODES))}, got {boundary!r}")
    spatial = spatial_axes(psf.ndim if positions is None else psf.ndim - 1, ndim)
    if positions is not None and psf.ndim != spatial + 1:
        raise ShapeError(f"psf: expected (K, *size), a PSF for each position, got shape {tuple(psf.shape)}")
    size = tuple(size)
    if len(size) != spatial:
        raise ShapeError(f"size: expected {spatial} numbers for a PSF of {spatial} axes, got {size}")
    extent = tuple(psf.shape[-spatial:])
    if boundary != "zero" and any(k > n for k, n in zip(extent, size, strict=True)):
        raise ShapeError(f"psf: its size {extent} exceeds that of the image, {size}; only boundary='zero' serves that")
    centre = origin_of(psf, spatial, origin)
    known = boundary != "unknown"
    field = size if known else tuple(n + k - 1 for n, k in zip(size, extent, strict=True))
    padding = [(k - 1 - c, c) for k, c in zip(extent, centre, strict=True)] if known else 0
    flipped = psf.flip(tuple(range(-spatial, 0)))
    if positions is not None:
        return VaryingConvolution.from_grid(
            flipped, positions, field, padding=padding, padding_mode=_PADDING_MODES[boundary], channels=channels
        )
    kernels = psf.shape[-spatial - 1] if psf.ndim > spatial else 1
    if kernels not in (1, channels):
        raise ShapeError(
            f"psf: expected 1 or {channels} kernels before its {spatial} axes, got shape {tuple(psf.shape)}"
        )
    weight = flipped if psf.ndim > spatial else flipped[None]
    weight = weight.unsqueeze(-spatial - 1).expand(*psf.shape[: -spatial - 1], channels, 1, *extent).contiguous()
    return Convolution(weight, field, padding=padding, groups=channels, padding_mode=_PADDING_MODES[boundary])


def level_for_mean(A: Convolution | VaryingConvolution, mean: Tensor) -> Tensor:
    """Make the constant image, per channel, whose blurred image has a given mean; zero where the PSF has no sum.

    Args:
        A: the blur.
        mean: the mean of the blurred image, ``(*batch, channels, *ones)``.
    """
    axes = tuple(range(-A.ndim, 0))
    if isinstance(A, VaryingConvolution):
        total = A.apply(torch.ones(A.in_shape, dtype=A.dtype, device=A.device)).mean(axes, keepdim=True)
        size = A.kernels.abs().flatten(1).sum(-1).amax()
    else:
        total, size = (w.sum(axes, keepdim=True).squeeze(-A.ndim - 1) for w in (A.weight, A.weight.abs()))
    has_mean = total.abs() > 1e-3 * size
    level = torch.where(has_mean, mean / torch.where(has_mean, total, 1), 0)
    return level.expand(*level.shape[: -A.ndim], *A.spatial_in)


def central_blur(A: VaryingConvolution) -> tuple[Convolution, tuple[Any, ...]]:
    """Return the blur of the central half of every axis by the PSF in the centre, and the slices of that half."""
    at = tuple(n // 2 for n in A.spatial_out)
    place: tuple[Any, ...] = (slice(None), *at)
    kernel = torch.tensordot(A.weights[place], A.kernels, 1)
    lengths = [max(n // 2, min(n, 2 * k)) for n, k in zip(A.spatial_out, A.kernel_size, strict=True)]
    starts = [(n - length) // 2 for n, length in zip(A.spatial_out, lengths, strict=True)]
    channels = A.in_shape[0]
    weight = kernel.expand(channels, 1, *kernel.shape).contiguous()
    field = [length + k - 1 for length, k in zip(lengths, A.kernel_size, strict=True)]
    cells = (..., *(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)))
    return Convolution(weight, field, groups=channels), cells
