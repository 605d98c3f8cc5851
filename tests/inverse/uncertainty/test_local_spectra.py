"""The likelihood of local spectra against dense covariances, and its derivatives against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lsconv import psf
from lsconv.errors import ArgumentError
from lsconv.inverse.uncertainty.local_spectra import LocalSpectra, PowerLaw

DOUBLE = torch.float64
LAW = PowerLaw((2.5, 0.2), (0.25, 0.1))


def spectra_of(image: Tensor, window: int = 16) -> LocalSpectra:
    bounds = torch.tensor([[-1.0, -100.0], [2.0, 100.0]], dtype=DOUBLE)
    return LocalSpectra(image, window, lambda x: psf.motion(x[0].exp(), torch.rad2deg(x[1]), size=9), LAW, bounds)


@pytest.fixture
def spectra() -> LocalSpectra:
    """Of two periodic samples of the law, blurred as in X, with noise."""
    omega = 2 * math.pi * torch.fft.fftfreq(48, dtype=DOUBLE)
    square = (omega[:, None] ** 2 + omega[:25] ** 2).clamp_min(0.01)
    transfer = torch.fft.rfft2(psf.motion(4.0, math.degrees(0.35)), (48, 48)) * square**-0.575
    images = torch.fft.irfft2(torch.fft.rfft2(torch.randn(2, 48, 48, dtype=DOUBLE)) * transfer, (48, 48))
    return spectra_of(images + 0.3 * torch.randn(2, 48, 48, dtype=DOUBLE))


# length 4, 20 degrees, exponent, softness, log noise
X = torch.tensor([math.log(4.0), 0.35, 2.3, 0.3, -2.0], dtype=DOUBLE)


def test_the_mean_periodogram_is_that_of_the_dense_covariance_of_a_window(spectra: LocalSpectra) -> None:
    n, period = 16, 64
    kernel = psf.motion(4.0, math.degrees(0.35), size=9)
    omega = 2 * math.pi * torch.fft.fftfreq(period, dtype=DOUBLE)
    square = omega[:, None] ** 2 + omega**2
    square[0, 0] = square[0, 1]
    shift = torch.arange(9, dtype=DOUBLE) - 4
    waves = torch.exp(-1j * omega[:, None] * shift)
    transfer = (waves @ kernel.to(torch.complex128) @ waves.T).abs() ** 2
    power = square**-1.15 * torch.exp(-0.3 * square) * transfer
    place = torch.arange(n, dtype=DOUBLE)
    rays = torch.exp(1j * omega[:, None] * (place[:, None] - place).flatten())  # exp(i omega (i - j)), one axis
    covariance = torch.einsum("ka,kl,lb->ab", rays, power.to(torch.complex128), rays).real / period**2
    covariance = covariance.reshape(n, n, n, n).permute(0, 2, 1, 3)  # row, column; row, column
    line = torch.sin(math.pi * (place + 1) / (n + 1)) ** 2
    taper = line[:, None] * line / (line**2).sum()
    weighted = taper[:, :, None, None] * covariance * taper
    dft = torch.exp(-2j * math.pi * place[:, None] * place / n)
    expected = torch.einsum("ka,lb,abcd,kc,ld->kl", dft, dft, weighted.to(torch.complex128), dft.conj(), dft.conj())
    assert torch.allclose(spectra.expected(X), expected.real[:, : n // 2 + 1], rtol=1e-10)


def test_the_scores_are_the_derivatives_of_the_value(spectra: LocalSpectra) -> None:
    fit = spectra.fit(X)
    assert fit.value == pytest.approx(spectra.value(X), rel=1e-12)
    away = torch.tensor([0, 0, 16 * (2.3 - 2.5) / 0.2**2, 16 * (0.3 - 0.25) / 0.1**2, 0], dtype=DOUBLE)
    for index, step in enumerate(1e-4 * torch.eye(5, dtype=DOUBLE)):
        slope = (spectra.value(X + step) - spectra.value(X - step)) / 2e-4
        assert slope == pytest.approx(float(away[index] - fit.scores.sum(0)[index]), rel=1e-4, abs=1e-3)


def test_the_information_is_the_curvature_where_the_data_are_as_expected(spectra: LocalSpectra) -> None:
    contrasts = torch.logspace(-1, 2, len(spectra.periodograms), dtype=DOUBLE)[:, None, None]
    spectra.periodograms = contrasts * spectra.expected(X) + X[-1].exp()
    fit = spectra.fit(X)
    curved = torch.empty(5, 5, dtype=DOUBLE)
    for index, step in enumerate(1e-3 * torch.eye(5, dtype=DOUBLE)):
        ends = [spectra.fit(X + sign * step) for sign in (1, -1)]
        curved[index] = -(ends[0].scores.sum(0) - ends[1].scores.sum(0)) / 2e-3
    assert torch.allclose(curved, fit.information, rtol=1e-3, atol=1e-4 * float(fit.information.diagonal().max()))


def test_the_contrasts_are_the_maxima_of_every_windows_likelihood(spectra: LocalSpectra) -> None:
    mean, noise = spectra.expected(X), X[-1].exp()
    found = spectra.contrasts(mean, noise)

    def value(contrasts: Tensor) -> Tensor:
        M = contrasts[:, None, None] * mean + noise
        return (spectra._weights * (M.log() + spectra.periodograms / M)).sum((1, 2))

    assert (value(found) <= value(found * 1.01)).all()
    least = 1e-4 * noise / mean.max()  # where a window shows nothing
    assert ((value(found) <= value(found / 1.01)) | (found <= least)).all()


def test_a_maximum_is_reached_within_the_bounds_with_what_is_held(spectra: LocalSpectra) -> None:
    whole = spectra.maximise(X)
    held = spectra.maximise(X, fixed_count=2)
    assert torch.equal(held.x[:2], X[:2])
    assert whole.value <= held.value <= spectra.value(X)
    assert (whole.x >= spectra.lower).all() and (whole.x <= spectra.upper).all()  # noqa: PT018
    inner = (whole.x > spectra.lower) & (whole.x < spectra.upper)
    normal = (whole.information + spectra.precision())[inner][:, inner]
    slope = (whole.scores.sum(0) - spectra._prior(whole.x)[1])[inner]
    assert inner.sum() >= 4
    assert (torch.linalg.solve(normal, slope).abs() < 0.1 * torch.linalg.inv(normal).diagonal().sqrt()).all()


def test_windows_with_a_missing_pixel_are_left_out(spectra: LocalSpectra) -> None:
    image = torch.randn(1, 48, 48, dtype=DOUBLE)
    holed = image.clone()
    holed[0, 3, 3] = math.nan
    whole, cut = spectra_of(image), spectra_of(holed)
    assert len(cut.periodograms) == len(whole.periodograms) - 1
    assert torch.equal(cut.periodograms, whole.periodograms[1:])
    with pytest.raises(ArgumentError, match="expected at least 4"):
        spectra_of(torch.full((1, 48, 48), math.nan, dtype=DOUBLE))


def test_white_noise_has_periodograms_of_its_variance() -> None:
    spectra = spectra_of(0.3 * torch.randn(1, 320, 320, dtype=DOUBLE), 32)
    inner = spectra._weights > 0
    assert float(spectra.periodograms[:, inner].mean()) == pytest.approx(0.09, rel=0.02)


def test_a_law_without_a_spread_is_refused() -> None:
    with pytest.raises(ArgumentError, match="softness: expected"):
        PowerLaw((2.5, 0.2), (0.25, 0.0))
