r"""Power spectra of images, averaged over rings of spatial frequency.

.. math:: P(f) = \operatorname{mean}_{|k| \approx f} \frac{|\mathcal F(w\, (x - \bar x))(k)|^2}{\sum w^2}

with a Hann window w, which suppresses the jumps at the edges. White noise of variance :math:`\sigma^2` has the flat
spectrum :math:`\sigma^2`; power above that line is signal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["draw_spectra", "radial_spectrum"]

_MOST_RINGS = 64  # more would be noisy, and no clearer in a small panel
_RANGE_BELOW_NOISE = 1e4  # the factor by which the axis of power extends below the noise


def radial_spectrum(image: Tensor) -> tuple[Tensor, Tensor]:
    """Measure the power spectrum of an image over the spatial frequency, the mean of its channels.

    Args:
        image: ``(channels, height, width)``; NaN counts as the mean. A height of 1 for signals.

    Returns:
        The frequencies of the rings in cycles per pixel, up to a half, and the power there, in squared units of the
        image.

    Example:
        >>> f, power = radial_spectrum(3 * torch.randn(1, 128, 128))
        >>> bool((f <= 0.5).all()), bool(abs(power.mean() / 9 - 1) < 0.1)
        (True, True)
    """
    values = image.detach().double().cpu()
    values = torch.nan_to_num(values - values.nanmean((-2, -1), keepdim=True))
    windows = [torch.hann_window(n + 2, periodic=False, dtype=torch.float64)[1:-1] for n in values.shape[-2:]]
    window = windows[0][:, None] * windows[1]
    power = torch.fft.fft2(window * values).abs().square().mean(0) / window.square().sum()
    down, across = (torch.fft.fftfreq(n, dtype=torch.float64) for n in values.shape[-2:])
    frequency = torch.hypot(down[:, None], across)
    longest = max(values.shape[-2:])
    rings = max(1, min(_MOST_RINGS, longest // 2))
    ring = (2 * rings * frequency).long()
    inside = (frequency <= 0.5) & (frequency > 0)
    count = torch.bincount(ring[inside].clamp_max(rings - 1), minlength=rings)
    sums = [torch.bincount(ring[inside].clamp_max(rings - 1), weights=each[inside], minlength=rings)
            for each in (frequency, power)]  # fmt: skip
    filled = count > 0
    return sums[0][filled] / count[filled], sums[1][filled] / count[filled]


def draw_spectra(axes: Any, data: Tensor, restored: Tensor, noise: float) -> None:
    """Draw the spectra of an image and its restoration, and that of white noise as a line.

    Args:
        axes: matplotlib's axes.
        data: the image, ``(channels, height, width)``.
        restored: the restoration, likewise.
        noise: standard deviation of the noise, in the units of the image; 0 draws no line.
    """
    for name, image in (("data", data), ("restoration", restored)):
        frequency, power = radial_spectrum(image)
        axes.plot(frequency.numpy(), power.clamp_min(1e-300).numpy(), linewidth=1, label=name)
    if noise > 0:
        axes.axhline(noise**2, color="0.4", linestyle="--", linewidth=1, label="noise (residual)")
        axes.set_ylim(bottom=noise**2 / _RANGE_BELOW_NOISE)
    axes.set_yscale("log")
    axes.set_xlim(0, 0.5)
    axes.set_xlabel("cycles per pixel\nwhere the data meet the noise,\nthe prior takes over")
    axes.set_ylabel("power")
    axes.legend()
