"""estimate_psf: the parameters of a point-spread function from the blurred image alone, with their standard errors."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ConvergenceWarning, DtypeError, ShapeError, warn
from lsconv.inverse.uncertainty.local_spectra import Fit, PowerLaw
from lsconv.inverse.uncertainty.psf_search import PsfModel, PsfSearch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PsfEstimate", "PsfStatus", "estimate_psf"]


class PsfStatus(enum.Enum):
    """Verdict on a point-spread function found in an image; ``status.sentence`` says it in words."""

    FOUND = "The likelihood has one maximum, and it is narrow."
    FLAT = "The likelihood is flat: the image does not tell the parameters to within a third."
    MULTIMODAL = "Other parameters explain the image nearly as well; they are in alternatives."
    UNUSUAL_SCENE = "The scene's spectrum is far from the prior's, exponent=, and blur and scene may be confused."
    NOT_THIS_BLUR = "A Gaussian blur explains the image as well as this model."
    AT_BOUND = "The likelihood rises up to the least or the largest PSF that the windows can tell; try another window=."

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        return self.value


@dataclass(frozen=True)
class PsfEstimate:
    r"""A point-spread function found in an image.

    Attributes:
        parameters: by their names, in pixels and degrees.
        std: their standard errors.
        psf: the point-spread function, float64.
        status: the verdict on it.
        noise_std: standard deviation of the noise, in the units of the image.
        damp: the damping of the gradient prior with the least mean square error that the likelihood expects, for
            :func:`lsconv.deconvolve`.
        exponent: the one of the sharp image's spectrum, see :func:`estimate_psf`.
        softness: that of its spectrum.
        alternatives: parameters of the other maxima, the better first.
        log_likelihood: at the maximum, with the priors, up to a constant of the image.
    """

    parameters: dict[str, float]
    std: dict[str, float]
    psf: Tensor
    status: PsfStatus
    noise_std: float
    damp: float
    exponent: float
    softness: float
    alternatives: list[dict[str, float]]
    log_likelihood: float
    _search: PsfSearch = field(repr=False, compare=False)
    _fit: Fit = field(repr=False, compare=False)

    @property
    def converged(self) -> bool:
        """True where the status is FOUND."""
        return self.status is PsfStatus.FOUND

    def __str__(self) -> str:
        units = {"angle": "°", "beta": ""}
        parts = []
        for name, value in self.parameters.items():
            std = self.std[name]
            digits = max(0, min(6, 1 - math.floor(math.log10(std)))) if 0 < std < math.inf else 2
            unit = units.get(name, " px")
            parts.append(f"{name} = {value:.{digits}f} ± {std:.{digits}f}{unit}")
        return ", ".join(parts)

    def curve(self, count: int = 25) -> tuple[Tensor, Tensor]:
        """The likelihood along the first parameter.

        Args:
            count: number of values, from half to twice the one found.

        Returns:
            The values of the parameter, and the logarithm of the likelihood less that of the maximum, the spectrum of
            the scene and the noise fitted anew at every value, other parameters of the PSF held.
        """
        values = torch.logspace(-1, 1, count, base=2.0, dtype=torch.float64) * next(iter(self.parameters.values()))
        heights = [self._search.profile(self._fit.x, float(value)) for value in values]
        return values, self._fit.value - torch.tensor(heights, dtype=torch.float64)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the likelihood along the first parameter with the value found and its standard error."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.gca()
        name, value = next(iter(self.parameters.items()))
        values, heights = self.curve()
        ax.plot(values.numpy(), heights.numpy(), color="C0")
        ax.axvspan(value - self.std[name], value + self.std[name], color="C0", alpha=0.25, label=str(self))
        ax.set_xlabel(name)
        ax.set_ylabel("log likelihood")
        ax.legend()
        return ax


def estimate_psf(
    image: Tensor | np.ndarray[Any, Any],
    model: str | Callable[..., Tensor],
    *,
    start: float | Sequence[float] | Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
    observed: Tensor | np.ndarray[Any, Any] | None = None,
    channels: str | None = None,
    window: int | None = None,
    exponent: tuple[float, float] = (2.5, 0.2),
    softness: tuple[float, float] = (0.25, 0.1),
) -> PsfEstimate:
    r"""Estimate the parameters of the blur from the blurred image.

    In windows that overlap, the image is a sample of a Gaussian process whose spectrum is

    .. math:: a_p\, |\omega|^{-\alpha} e^{-\rho |\omega|^2}\, |\hat k_\theta(\omega)|^2 + \sigma^2 ,

    with a contrast :math:`a_p` of its own in every window, and one exponent, softness, noise and PSF for all. The
    likelihood of the windows' periodograms, their means exact for the crop
    (:mod:`lsconv.inverse.uncertainty.local_spectra`), is maximised over all of them from several starts.

    A Gaussian blur and the spectrum of a sharp image fall off alike, so that only what is known of sharp images keeps
    them apart: :math:`\alpha` and :math:`\rho` have normal priors, whose defaults are those of photographs. The PSF is
    then relative to such an image: a photograph shown at half its size is sharper, with a smaller ``softness``. Zeros
    of the transfer function, which disks and motions have, need no such knowledge.

    The standard errors come from the information matrix, widened by the scatter of the scores of blocks of windows, by
    the spread of the priors, and by two for what photographs differ from the model (samples of it have half of them).
    An image that does not tell the parameters has another :class:`PsfStatus` than FOUND, with a
    :class:`~lsconv.errors.ConvergenceWarning`. A scene that is out of focus itself is not told from the blur: the PSF
    found is then that of both.

    Free-form kernels are out of scope: a Gaussian likelihood sees :math:`|\hat k|^2` alone, so it determines a kernel
    up to the phase of its transfer function. For the same reason a model and its mirror image are one.

    Args:
        image: ``(*planes, height, width)``, real; all planes have one PSF and one noise, as the colours of a photograph
            do. For a PSF of each, call it on each. Masked entries and NaN are not measured.
        model: "gaussian" (sigma), "disk" (radius), "motion" (length, angle) or "moffat" (fwhm, beta), as in
            :mod:`lsconv.psf`; or a function of positive parameters, a 0-d tensor each, that returns a PSF of sum one
            and of fixed size in differentiable torch code, with ``start=``.
        start: parameters to start from instead of the model's own grid: a number or a sequence; of a function a
            mapping of names to values, or several.
        observed: True where pixels were measured, ``(height, width)`` or like the image; windows with others are left
            out.
        channels: "last" where the image is ``(height, width, channels)``.
        window: side of the windows in pixels, even; None: 64, or 32 for images under 160 pixels. It limits the PSF: a
            sigma of an eighth, a radius of a quarter, a length of half of it.
        exponent: mean and standard deviation of :math:`\alpha`.
        softness: mean and standard deviation of :math:`\rho`, in square pixels.

    Returns:
        A :class:`PsfEstimate`: ``parameters``, ``std``, ``psf``, ``damp``, ``noise_std``, ``status``.

    Raises:
        ArgumentError: an unknown model, a function without ``start``, or an image with too few windows.
        ShapeError: the image has fewer than two axes, or ``observed`` does not fit.

    Source:
        Whittle (1953) and Sykulski and others (2019) for the likelihood; Field, "Relations between the statistics of
        natural images and the response properties of cortical cells" (1987) for the power law.

    Example:
        >>> noise = torch.fft.rfft2(torch.randn(256, 256, dtype=torch.float64))
        >>> f = torch.fft.fftfreq(256)[:, None] ** 2 + torch.fft.rfftfreq(256) ** 2
        >>> power = (39.5 * f.double().clamp_min(1e-6)) ** -1.25 * torch.exp(-0.25 * 39.5 * f)
        >>> scene = torch.fft.irfft2(noise * power.sqrt())
        >>> image = lsconv.blur_operator(lsconv.psf.disk(3.0), (250, 250))(scene[None])[0]
        >>> found = lsconv.estimate_psf(image + 0.01 * torch.randn(250, 250), "disk")
        >>> abs(found.parameters["radius"] - 3) < 4 * found.std["radius"], found.status.name
        (True, 'FOUND')
    """
    planes = _planes(image, observed, channels)
    side = min(planes.shape[-2:])
    n = (64 if side >= 160 else 32) if window is None else window
    if isinstance(n, bool) or not isinstance(n, int) or n < 16 or n % 2 or n > side:
        raise ArgumentError(f"window: expected an even number from 16 to the image's {side} pixels, got {n}")
    search = PsfSearch.of(planes, PsfModel.of(model, start, n), n, PowerLaw(exponent, softness))
    rival = None
    if model in ("disk", "motion"):
        rival = PsfSearch.of(planes, PsfModel.of("gaussian", None, n), n, PowerLaw(exponent, softness)).maxima(1)[0]
    estimate = _estimate(search, search.maxima(), n, rival)
    if not estimate.converged:
        warn(f"estimate_psf: {estimate}. {estimate.status.sentence}", ConvergenceWarning)
    return estimate


def _planes(image: Any, observed: Any, channels: str | None) -> Tensor:
    """Bring the image to ``(planes, height, width)`` in double precision, NaN where it is not measured."""
    if channels not in (None, "first", "last"):
        raise ArgumentError(f'channels: expected "first", "last" or None, got {channels!r}')
    missing = np.ma.getmaskarray(image) if isinstance(image, np.ma.MaskedArray) else None
    values = torch.as_tensor(np.ma.getdata(image) if missing is not None else image)
    if values.is_complex():
        raise DtypeError("image: expected real values, got complex ones; a spectrum of intensities is what is modelled")
    values = values.detach().double()
    mask = None if observed is None else torch.as_tensor(observed).to(values.device)
    if missing is not None:
        values = values.masked_fill(torch.as_tensor(missing), math.nan)
    if channels == "last" and values.ndim > 2:
        values = values.movedim(-1, 0)
        mask = mask.movedim(-1, 0) if mask is not None and mask.ndim == values.ndim else mask
    if values.ndim < 2:
        raise ShapeError(f"image: expected (*planes, height, width), got {tuple(values.shape)}")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise DtypeError(f"observed: expected bool, True where pixels were measured, got {mask.dtype}")
        try:
            values = values.masked_fill(~mask, math.nan)
        except RuntimeError:
            raise ShapeError(
                f"observed: {tuple(mask.shape)} does not broadcast with the image, {tuple(values.shape)}"
            ) from None
    return values.reshape(-1, *values.shape[-2:])


def _estimate(search: PsfSearch, fits: list[Fit], window: int, gaussian: Fit | None) -> PsfEstimate:
    """Make the estimate of the maxima of the likelihood, the highest first, and judge it.

    Args:
        search: the search that found them.
        fits: the maxima.
        window: side of the windows.
        gaussian: the highest maximum under a Gaussian PSF, with which the model is compared; None: no comparison.
    """
    best, model, spectra = fits[0], search.model, search.spectra
    covariance = spectra.covariance(best)
    std = model.errors(best.x, spectra.model_error**2 * covariance)
    count = len(model.names)
    ideal_variance = torch.linalg.pinv(best.information + spectra.precision(), hermitian=True).diagonal()[0]
    misfit = max(1.0, float(covariance[0, 0] / ideal_variance))

    def rivals(others: list[Fit]) -> bool:
        return any((fit.value - best.value) / misfit < 3 for fit in others)  # exp(3) is a likelihood ratio of 20

    exponent_mean, exponent_std = spectra.law.exponent
    # The search has logarithms and radians: a standard error of 1/3 is a third of a length, or of a radian.
    wide = bool((covariance.diagonal()[:count].sqrt() > 1 / 3).any()) or not bool(torch.isfinite(covariance).all())
    verdicts = {
        PsfStatus.AT_BOUND: search.at_bound(best.x),
        PsfStatus.FLAT: wide,
        PsfStatus.UNUSUAL_SCENE: abs(float(best.x[-3]) - exponent_mean) > 5 * exponent_std,
        PsfStatus.MULTIMODAL: rivals(fits[1:]),
        PsfStatus.NOT_THIS_BLUR: gaussian is not None and rivals([gaussian]),
    }
    status = next((verdict for verdict, holds in verdicts.items() if holds), PsfStatus.FOUND)
    kernel = model.kernel(best.x[:count], None)
    if model.sized and max(kernel.shape) > window + 1:
        kernel = model.kernel(best.x[:count], window + 1)
    exponent, softness, noise = best.x[count:].tolist()
    noise_std = math.exp(noise / 2)
    return PsfEstimate(
        model.values(best.x), std, kernel, status, noise_std, spectra.damp(best.x), exponent, softness,
        [model.values(fit.x) for fit in fits[1:]], -best.value, search, best,
    )  # fmt: skip
