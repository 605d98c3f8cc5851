"""Point spread functions by formula; each sums to one and is centred on its pixel ``size // 2``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["box", "disk", "gaussian", "motion"]


def gaussian(sigma: float) -> Tensor:
    r"""The Gaussian :math:`\exp(-|t|^2 / 2\sigma^2)` sampled at the pixels' centres out to four sigma.

    Args:
        sigma: standard deviation in pixels.

    Returns:
        float64, square, of odd size.

    Example:
        >>> gaussian(1.0).shape, round(gaussian(1.0).sum().item(), 12)
        (torch.Size([9, 9]), 1.0)
    """
    _positive("sigma", sigma)
    reach = math.ceil(4 * sigma)
    profile = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    psf = profile[:, None] * profile
    return psf / psf.sum()


def disk(radius: float) -> Tensor:
    r"""A lens out of focus: every pixel as bright as the part of it that lies inside the circle.

    The overlap is the integral of the circle's chord, clipped to the pixel, by the midpoint rule with 256 steps.

    Args:
        radius: radius in pixels.

    Returns:
        float64, square, of odd size.

    Example:
        >>> disk(0.4)
        tensor([[1.]], dtype=torch.float64)
    """
    _positive("radius", radius)
    reach = math.ceil(radius - 0.5)
    steps = 256
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    across = (place[:, None] - 0.5 + (torch.arange(steps, dtype=torch.float64) + 0.5) / steps).flatten()
    half_chord = (radius**2 - across**2).clamp_min(0).sqrt()
    covered = half_chord.minimum(place[:, None] + 0.5) - (-half_chord).maximum(place[:, None] - 0.5)
    psf = covered.clamp_min(0).reshape(len(place), len(place), steps).sum(-1)
    psf = 0.5 * (psf + psf.T)  # the rule is exact along one axis only
    return psf / psf.sum()


def motion(length: float, angle: float = 0.0) -> Tensor:
    """A camera that moves evenly along a straight line, the light of every moment shared among four pixels.

    Args:
        length: the way travelled, in pixels; 0 is no blur.
        angle: direction in degrees, counter-clockwise from the picture's rows (0 is horizontal, 90 vertical).

    Returns:
        float64, of odd sizes.

    Example:
        >>> motion(2)
        tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    if not (math.isfinite(length) and length >= 0 and math.isfinite(angle)):
        raise ValueError(f"length, angle: expected a length >= 0 and an angle in degrees, got {length}, {angle}")
    steps = 1 << max(12, math.ceil(math.log2(length + 1)) + 7)
    moment = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps - 0.5
    turn = math.radians(angle)
    # A way of 1e-9 pixels that rounding makes of the cosine of 90 degrees is none.
    ways = [round(-length * math.sin(turn), 9), round(length * math.cos(turn), 9)]
    reach = [math.ceil(abs(way) / 2) for way in ways]
    places = [way * moment + r for way, r in zip(ways, reach, strict=True)]
    corners = [place.floor().long() for place in places]
    sizes = [2 * r + 1 for r in reach]
    psf = torch.zeros(sizes[0] + 1, sizes[1] + 1, dtype=torch.float64)
    for down in (0, 1):
        for right in (0, 1):
            light = torch.ones(steps, dtype=torch.float64)
            for place, corner, step in zip(places, corners, (down, right), strict=True):
                light = light * (place - corner if step else 1 - (place - corner))
            psf.index_put_((corners[0] + down, corners[1] + right), light, accumulate=True)
    psf = psf[: sizes[0], : sizes[1]]
    return psf / psf.sum()


def box(size: int) -> Tensor:
    """The mean over ``size`` by ``size`` pixels, of which an even number has its centre right and below of the middle.

    Example:
        >>> box(2)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]], dtype=torch.float64)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size: expected an integer >= 1, got {size!r}")
    return torch.full((size, size), 1.0 / size**2, dtype=torch.float64)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a number > 0, got {value}")
