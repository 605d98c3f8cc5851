r"""Local spectra: the periodograms of an image in windows, and their likelihood under a blurred power law.

In window p the image y is modelled as a stationary process with a contrast :math:`a_p`; blur and noise are the same in
all windows. With w the taper, whose squares sum to one, :math:`w \star w` its autocorrelation, c the autocovariance of
the blurred scene at contrast one, and :math:`\sigma^2` the variance of the noise, the periodogram

.. math:: P_p(\omega) = \Bigl| \sum_i w_i\, y_i\, e^{-i\omega \cdot i} \Bigr|^2 \quad\text{has the mean}\quad
          M_p(\omega) = a_p \sum_t (w \star w)(t)\, c(t)\, e^{-i\omega \cdot t} + \sigma^2

This is exact although the blur carries light across the edges of the window, because c is the covariance of the
infinite scene. In Whittle's approximation the logarithm of the likelihood is :math:`-\sum_{p, \omega} (\log M_p + P_p /
M_p)`. For every value of the other parameters each contrast is set to the one of the highest likelihood.

Whittle, "Estimation and information in stationary time series" (1953); Sykulski, Olhede, Guillaumin, Lilly and Early,
"The debiased Whittle likelihood", Biometrika 106 (2019).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lsconv.errors import ArgumentError

__all__ = ["Fit", "LocalSpectra", "PowerLaw"]


@dataclass(frozen=True)
class PowerLaw:
    r"""The spectrum of a sharp image, :math:`|\omega|^{-\alpha} e^{-\rho |\omega|^2}`.

    Attributes:
        exponent: mean and standard deviation of :math:`\alpha` among images.
        softness: mean and standard deviation of :math:`\rho`, in square pixels: the lens and the pixels of the camera
            blur even a sharp image, like a Gaussian of standard deviation :math:`\sqrt\rho`.
    """

    exponent: tuple[float, float]
    softness: tuple[float, float]

    def __post_init__(self) -> None:
        for name, (mean, deviation) in (("exponent", self.exponent), ("softness", self.softness)):
            if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
                raise ArgumentError(f"{name}: expected a mean and a standard deviation > 0, got {mean}, {deviation}")


@dataclass(frozen=True)
class Fit:
    """The likelihood and its derivatives at one point of the parameters.

    Attributes:
        x: the point: parameters of the PSF, then exponent, softness and the logarithm of the noise variance.
        value: minus the logarithm of likelihood times prior.
        scores: the derivatives of the log-likelihood of every window, ``(windows, parameters)``.
        information: the Fisher information of the likelihood, with the contrasts eliminated.
    """

    x: Tensor
    value: float
    scores: Tensor
    information: Tensor


class LocalSpectra:
    """The periodograms of an image in windows, and the likelihood of a blur and a scene given them.

    Args:
        image: ``(planes, height, width)``, float64; NaN where it is not measured. Windows with a NaN are left out.
        window: side of the windows, even; they overlap by half unless there would be more than 400 in a plane.
        kernel: maps the PSF's parameters to the PSF.
        law: the power law of the sharp image, with the priors of its two parameters.
        bounds: lowest and highest values of the PSF's parameters, ``(2, parameters)``.

    Attributes:
        periodograms: ``(windows, window, window // 2 + 1)``.
        places: row and column of every window in the lattice of windows, ``(windows, 2)``.
        lower: the lowest value of every parameter.
        upper: the highest value of every parameter.

    Raises:
        ArgumentError: fewer than four windows are measured.
    """

    def __init__(
        self,
        image: Tensor,
        window: int,
        kernel: Callable[[Tensor], Tensor],
        law: PowerLaw,
        bounds: Tensor,
    ) -> None:
        self.window, self.kernel, self.law = window, kernel, law
        step = max(window // 2, math.ceil(math.sqrt(image.shape[-2] * image.shape[-1] / 400)))
        patches = image.unfold(-2, window, step).unfold(-2, window, step)
        indices = torch.meshgrid(*(torch.arange(n, device=image.device) for n in patches.shape[1:3]), indexing="ij")
        places = torch.stack(indices, -1).expand(*patches.shape[:3], 2).reshape(-1, 2)
        windows = patches.reshape(-1, window, window)
        measured = torch.isfinite(windows).all(-1).all(-1)
        self.places, windows = places[measured], windows[measured]
        if len(windows) < 4:
            raise ArgumentError(
                f"image: {len(windows)} windows of {window}×{window} pixels are measured whole, expected at least 4; "
                "give a larger image or a smaller window="
            )
        profile = torch.hann_window(window + 2, periodic=False, dtype=image.dtype, device=image.device)[1:-1]
        taper = profile[:, None] * profile
        taper = taper / taper.square().sum().sqrt()
        means = (windows * taper.square()).sum((-2, -1), keepdim=True)
        self.periodograms = torch.fft.rfft2((windows - means) * taper).abs().square()
        double = (2 * window, 2 * window)
        self._taper_correlation = torch.fft.irfft2(torch.fft.rfft2(taper, double).abs().square(), double)
        # The scene is periodic for the transforms; its period holds two windows and the PSF.
        self._period = 4 * window
        rows = 2 * math.pi * torch.fft.fftfreq(self._period, dtype=image.dtype, device=image.device)
        columns = 2 * math.pi * torch.fft.rfftfreq(self._period, dtype=image.dtype, device=image.device)
        self._squared_frequency = rows[:, None].square() + columns.square()
        # The mean is subtracted in every window, so the power at frequency zero is arbitrary.
        self._squared_frequency[0, 0] = self._squared_frequency[0, 1]
        distance = torch.fft.fftfreq(window, 1 / window, dtype=image.dtype, device=image.device)
        distance = distance[:, None].square() + distance[: window // 2 + 1].square()
        pairs = torch.ones(window // 2 + 1, dtype=image.dtype, device=image.device)
        pairs[0] = pairs[-1] = 0.5  # the other columns stand for their conjugates as well
        self._weights = pairs * (distance > 4)  # subtracting the mean distorts the lowest frequencies
        # The windows of least power at high frequencies show the noise alone.
        noise_power = self.periodograms[:, distance > 0.16 * window**2].mean(-1).quantile(0.05).clamp_min(1e-20)
        noise = float(noise_power.log())
        of_scene = image.new_tensor([[0.5, 0.0, noise - 12], [5.0, 2.0, noise + 12]])
        self.lower, self.upper = torch.cat([bounds, of_scene], -1)
        self._prior_mean = image.new_tensor([law.exponent[0], law.softness[0], noise])
        self._prior_std = image.new_tensor([law.exponent[1], law.softness[1]])

    def start(self, parameters: Tensor) -> Tensor:
        """Complete parameters of a PSF by the prior means of the scene and an estimate of the noise."""
        return torch.cat([parameters, self._prior_mean])

    def scene(self, x: Tensor) -> Tensor:
        """The power spectrum of the sharp scene, ``(period, period // 2 + 1)``, a power law.

        Args:
            x: the parameters of the PSF, then the law's exponent and softness, and the logarithm of the noise's power.
        """
        exponent, softness = x[-3], x[-2]
        spectrum: Tensor = self._squared_frequency ** (-exponent / 2) * torch.exp(-softness * self._squared_frequency)
        return spectrum

    def expected(self, x: Tensor) -> Tensor:
        """The mean periodogram of a window of contrast one without noise."""
        size = (self._period, self._period)
        blurred = self.scene(x) * torch.fft.rfft2(self.kernel(x[:-3]), size).abs().square()
        covariance = torch.fft.irfft2(blurred, size)
        n = self.window
        lags = torch.cat([torch.arange(n), torch.arange(-n, 0)]).to(x.device)
        return torch.fft.rfft2(covariance[lags][:, lags] * self._taper_correlation).real[::2, ::2].clamp_min(1e-14)

    def damp(self, x: Tensor) -> float:
        r"""The damping of the gradient prior whose answer has the least expected mean square error.

        It is the least of :math:`\sum_\omega (1 - |\hat k|^2 / D)^2 a S + \sigma^2 |\hat k|^2 / D^2` with
        :math:`D = |\hat k|^2 + \mathrm{damp}^2 |\hat L|^2`, S the spectrum of the scene and a the mean contrast.
        """
        size = (self._period, self._period)
        transfer = torch.fft.rfft2(self.kernel(x[:-3]), size).abs().square()
        frequencies = 2 * math.pi * torch.fft.fftfreq(self._period, dtype=x.dtype, device=x.device)
        difference = 2 - 2 * frequencies.cos()
        penalty = difference[:, None] + difference[: self._period // 2 + 1]
        noise = x[-1].exp()
        power = self.contrasts(self.expected(x), noise).mean() * self.scene(x)
        errors, candidates = [], torch.logspace(-5, 2, 141, dtype=x.dtype, device=x.device)
        for damp in candidates:
            filtered = transfer + damp.square() * penalty
            filtered[0, 0] = 1.0  # the penalty vanishes at the mean, which is left out below
            bias = (1 - transfer / filtered).square() * power
            errors.append((bias + noise * transfer / filtered.square()).flatten()[1:].sum())
        return float(candidates[torch.stack(errors).argmin()])

    @torch.no_grad()
    def contrasts(self, mean: Tensor, noise: Tensor) -> Tensor:
        """The contrasts of largest likelihood, ``(windows,)``, by Fisher scoring of their logarithms.

        Args:
            mean: the mean periodogram at contrast one, without noise.
            noise: the variance of the noise.
        """
        lowest = 1e-4 * noise / mean.max()
        excess = ((self.periodograms - noise) * self._weights).sum((-2, -1)) / (mean * self._weights).sum()
        contrast = excess.clamp_min(1000 * lowest)
        for _ in range(12):
            M = contrast[:, None, None] * mean + noise
            signal = 1 - noise / M
            slope = (self._weights * signal * (self.periodograms / M - 1)).sum((-2, -1))
            curvature = (self._weights * signal.square()).sum((-2, -1))
            contrast = (contrast * torch.exp((slope / curvature.clamp_min(1e-12)).clamp(-2, 2))).clamp_min(lowest)
        return contrast

    def value(self, x: Tensor) -> float:
        """Minus the logarithm of likelihood times prior, up to a constant."""
        mean, noise = self.expected(x), x[-1].exp()
        M = self.contrasts(mean, noise)[:, None, None] * mean + noise
        return float((self._weights * (M.log() + self.periodograms / M)).sum() + self._prior(x)[0])

    def fit(self, x: Tensor) -> Fit:
        """The likelihood at x with its derivatives, by forward-mode differentiation of :meth:`expected`."""
        slopes = []
        for index in range(len(x) - 1):
            with forward_ad.dual_level(), warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of its own code when it is first used
                direction = torch.zeros_like(x)
                direction[index] = 1
                mean, slope = forward_ad.unpack_dual(self.expected(forward_ad.make_dual(x, direction)))
                slopes.append(torch.zeros_like(mean) if slope is None else slope)
        noise = x[-1].exp()
        contrasts = self.contrasts(mean, noise)[:, None, None]
        M = contrasts * mean + noise
        ratio = self.periodograms / M
        value = float((self._weights * (M.log() + ratio)).sum() + self._prior(x)[0])
        relative = [contrasts * slope / M for slope in slopes] + [noise / M]
        scores = torch.stack([(self._weights * (ratio - 1) * r).sum((-2, -1)) for r in relative], -1)
        by_contrast = contrasts * mean / M
        curvature = (self._weights * by_contrast.square()).sum((-2, -1)).clamp_min(1e-12)
        mixed = torch.stack([(self._weights * r * by_contrast).sum((-2, -1)) for r in relative], -1)
        information = torch.stack([torch.stack([(self._weights * r * s).sum() for r in relative]) for s in relative])
        return Fit(x, value, scores, information - (mixed / curvature[:, None]).T @ mixed)

    def maximise(self, x: Tensor, *, fixed_count: int = 0, iterations: int = 40) -> Fit:
        """The maximum near x, by Fisher scoring with Levenberg and Marquardt's damping, within the bounds.

        Args:
            x: the start.
            fixed_count: the number of parameters, from the first on, that keep their values.
            iterations: limit on the iterations.
        """
        best, damping = self.fit(x), 1e-3
        for _ in range(iterations):
            normal = best.information + self.precision()
            slope = best.scores.sum(0) - self._prior(best.x)[1]
            fixed = ((best.x <= self.lower) & (slope < 0)) | ((best.x >= self.upper) & (slope > 0))
            fixed[:fixed_count] = True
            normal[fixed], normal[:, fixed], slope[fixed] = 0, 0, 0
            normal.diagonal()[fixed] = 1
            # The information on a PSF far smaller than a pixel is zero: the clamp keeps the matrix regular.
            scale = torch.diag(normal.diagonal().clamp_min(1e-12 * float(normal.diagonal().max())))
            while damping < 1e6:
                step = torch.linalg.solve(normal + damping * scale, slope).clamp(-0.5, 0.5)
                trial = torch.minimum(torch.maximum(best.x + step, self.lower), self.upper)
                value = self.value(trial)
                if value < best.value:
                    break
                damping *= 8
            else:
                break
            gain = best.value - value
            best, damping = self.fit(trial), max(damping / 10, 1e-6)
            if gain < 1e-2:
                break
        return best

    def precision(self) -> Tensor:
        """The information matrix of the prior, times the tempering of the likelihood."""
        diagonal = torch.zeros_like(self.lower)
        diagonal[-3:-1] = self._tempering / self._prior_std.square()
        return torch.diag(diagonal)

    def covariance(self, fit: Fit) -> Tensor:
        r"""The covariance of the parameters, by the sandwich estimate.

        It is :math:`H^{-1} (J + K) H^{-1}` with H the information of likelihood and prior, J the covariance of the
        score measured between 4 by 4 blocks of windows, and K the covariance of the score of the prior, or its
        square where that is larger. The likelihood treats overlapping windows as independent and Gaussian, J does not.
        A parameter on which the image has no information, such as the radius of a disk within one pixel, has infinite
        variance.
        """
        blocks = []
        for axis in (0, 1):
            place = self.places[:, axis]
            blocks.append((4 * place).div(int(place.max()) + 1, rounding_mode="floor"))
        totals = fit.scores.new_zeros(16, fit.scores.shape[1]).index_add(0, 4 * blocks[0] + blocks[1], fit.scores)
        totals = totals[(totals != 0).any(-1)]
        scatter = totals.T @ totals * len(totals) / max(1, len(totals) - 1)
        information = fit.information + self.precision()
        inverse = torch.linalg.pinv(information, hermitian=True)
        prior_scatter = self._tempering * self.precision().diagonal()
        found = inverse @ (scatter + torch.diag(prior_scatter.maximum(self._prior(fit.x)[1].square()))) @ inverse
        undetermined = information.diagonal() <= 1e-12 * information.diagonal().max()
        return found + torch.diag(torch.where(undetermined, torch.inf, 0.0))

    # The prior is multiplied by this factor, because the likelihood overstates its information by about as much: four
    # windows cover every pixel, and scores of photographs scatter more than those of Gaussian processes.
    _tempering = 16.0

    # Standard errors are multiplied by this factor, because photographs are no Gaussian processes: with it the 90 %
    # intervals hold in 9 of 10 cases of benchmarks/semi_blind.
    model_error = 2.0

    def _prior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The contribution of the prior to :meth:`value`, and its derivatives."""
        deviation = x[-3:-1] - self._prior_mean[:2]
        slope = self.precision().diagonal().clone()
        slope[-3:-1] *= deviation
        slope[:-3], slope[-1] = 0, 0
        return 0.5 * (slope[-3:-1] * deviation).sum(), slope
