"""Spectra: white noise is flat at its variance, a wave is a peak at its frequency, and gaps count as the mean."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.figure import Figure

from lsconv.app.spectra import draw_spectra, radial_spectrum


@pytest.mark.parametrize("shape", [(1, 200, 220), (3, 150, 120), (1, 1, 20000)])
def test_white_noise_is_flat_at_its_variance(shape: tuple[int, ...]) -> None:
    frequency, power = radial_spectrum(10 + 3 * torch.randn(shape, dtype=torch.float64))
    assert bool((frequency.diff() > 0).all())
    assert 0 < float(frequency[0]) < 0.02
    assert 0.48 < float(frequency[-1]) <= 0.5
    assert float((power / 9).log().abs().mean()) < 0.15
    assert float(power.mean()) == pytest.approx(9, rel=0.05)


@pytest.mark.parametrize(("down", "across"), [(0.0, 0.2), (0.15, 0.0), (0.21, 0.28)])
def test_a_wave_is_a_peak_at_its_frequency(down: float, across: float) -> None:
    rows, columns = torch.meshgrid(torch.arange(160.0), torch.arange(180.0), indexing="ij")
    wave = torch.cos(2 * math.pi * (down * rows + across * columns))
    frequency, power = radial_spectrum(wave[None])
    assert float(frequency[power.argmax()]) == pytest.approx(math.hypot(down, across), abs=0.01)
    assert float(power.max()) > 100 * float(power.median())


def test_missing_pixels_count_as_the_mean_and_tiny_images_have_no_spectrum() -> None:
    image = torch.full((1, 40, 40), 7.0)
    image[0, 3, 4] = torch.nan
    assert float(radial_spectrum(image)[1].max()) == 0
    assert radial_spectrum(torch.ones(1, 1, 1))[0].numel() == 0


def test_the_noise_is_a_line_at_its_variance() -> None:
    axes = Figure().add_subplot()
    draw_spectra(axes, torch.randn(1, 50, 50), torch.zeros(1, 50, 50), 2.0)
    data, restored, noise = axes.lines
    assert [line.get_label() for line in (data, restored, noise)] == ["data", "restoration", "noise (residual)"]
    assert list(noise.get_ydata()) == [4, 4]
    assert axes.get_ylim()[0] == pytest.approx(4e-4)
