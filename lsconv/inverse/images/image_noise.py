r"""The noise of an image: the pixels that were measured, their standard deviations, and their photon counts.

For Gaussian noise ``y_i - b_i = (A x)_i + sigma_i n_i`` with n of variance one. Where sigma is a map, row i is
multiplied by ``sigma / sigma_i`` with a common sigma, so that all rows have the noise sigma. A camera of gain g (grey
levels per photon) and offset o whose electronics add noise of r photons gives

.. math:: y = g\,(\mathrm{Poisson}((A x + b)/g) + r\, n) + o ,

and ``(y - o)/g + r^2`` has mean and variance ``(A x + b)/g + r^2``, so that it is modelled as a Poisson variable.

Snyder, Helstrom, Lanterman, Faisal and White, "Compensation for readout noise in CCD images" (1995).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, NonFiniteError
from lsconv.inverse.images.image_layout import Layout
from lsconv.krylov.loop.entry import with_item_of
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Diagonal, Mask

__all__ = ["Measurement", "NoiseModel", "check_units"]


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """The arguments of :func:`lsconv.deconvolve` that describe the noise, under the same names and unchecked."""

    noise: str
    noise_std: Any
    observed: Any
    weights: Any
    saturated: Any
    one_sided: bool
    background: Any
    gain: Any
    offset: Any
    read_noise: Any


@dataclass(frozen=True, eq=False)
class Measurement:
    """The measurement of the blurred field: the image, with the noise of its pixels.

    Attributes:
        y: the image less background and offset, ``(*batch, channels, *size)``, zero where it is missing.
        rows: the factors of the rows of the least-squares problem, which broadcast with y; None: ones.
        noise_std: standard deviation of the noise in ``rows * y``; None: not known.
        counts: the photon counts; None: the noise is Gaussian.
        expected: the expected photon counts for x = 0.
        noise_is_map: ``rows`` come from a map of standard deviations.
        sensitivity: photons per grey level, zero where pixels are missing, which broadcasts with y; None: ones.
        at_least: True where y is a lower bound of the blurred field; None: nowhere.
    """

    y: Tensor
    rows: Tensor | None = None
    noise_std: float | Tensor | None = None
    counts: Tensor | None = None
    expected: Tensor | float = 0.0
    sensitivity: Tensor | None = None
    noise_is_map: bool = False
    at_least: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, image: Any, model: NoiseModel) -> Measurement:
        """Check the arguments, and make the measurement of an image.

        Args:
            layout: the layout of the image.
            image: the image of the user.
            model: the arguments about the noise.

        Raises:
            ArgumentError, NonFiniteError: the arguments contradict each other, or nothing was measured.
        """
        noise, noise_std, weights = model.noise, model.noise_std, model.weights
        if model.one_sided and (model.saturated is None or noise != "gaussian"):
            raise ArgumentError('one_sided: is about the pixels that saturated= names, and of noise="gaussian"')
        if noise not in ("gaussian", "poisson"):
            raise ArgumentError(f'noise: expected "gaussian" or "poisson", got {noise!r}')
        y, measured, bounded = layout.image(image, model.observed, model.saturated, one_sided=model.one_sided)
        camera = ("background", "gain", "offset", "read_noise")
        maps = {name: layout.map(name, getattr(model, name), image, y) for name in camera}
        for name, value in maps.items():
            low = 0 if name in ("gain", "read_noise") or (name == "background" and noise == "poisson") else -torch.inf
            if not bool(torch.isfinite(value).all()) or not bool(
                (value >= low).all() and not (name == "gain" and (value == 0).any())
            ):
                wanted = "> 0" if name == "gain" else ">= 0" if low == 0 else "that are finite"
                raise ArgumentError(f"{name}: expected numbers {wanted}")
        if noise == "gaussian":
            for name in ("gain", "read_noise"):
                if bool((maps[name] != (name == "gain")).any()):
                    raise ArgumentError(f'{name}: is of the photons of noise="poisson"; noise_std is in grey levels')
            y = _zero_where_missing(y - maps["background"] - maps["offset"], measured)
            rows, common_std, noise_is_map = cls._weights(layout, image, y, measured, noise_std)
            if weights is not None:
                if noise_is_map:
                    raise ArgumentError("weights: a map of noise_std gives them already; give one of the two")
                found = layout.map("weights", weights, image, y)
                if not bool((torch.isfinite(found) & (found >= 0)).all()):
                    raise ArgumentError("weights: expected finite numbers >= 0")
                root = torch.where(found > 0, torch.where(found > 0, found, 1).sqrt(), 0).expand(y.shape)
                rows = (root if rows is None else root * rows).contiguous()
            if rows is not None and not bool((rows > 0).flatten(-layout.ndim - 1).any(-1).all()):
                raise NonFiniteError("image: has no measured pixel, all are missing, of weight 0 or of infinite noise")
            measurement = cls(y, rows, common_std, noise_is_map=noise_is_map, at_least=bounded)
            kept = measurement.without_lower_bounds().rows
            if kept is not None and not bool((kept > 0).flatten(-layout.ndim - 1).any(-1).all()):
                raise NonFiniteError("image: has no measured pixel that is not saturated")
            return measurement
        if weights is not None:
            raise ArgumentError('weights: are of noise="gaussian"; photons have those of their likelihood')
        if noise_std is not None:
            raise ArgumentError('noise_std: is of noise="gaussian"; say read_noise= in photons')
        if y.is_complex():
            raise ArgumentError("image: counts are real, got complex numbers")
        photons = (y - maps["offset"]) / maps["gain"] + maps["read_noise"].square()
        if bool((maps["read_noise"] > 0).any()):
            photons = photons.clamp_min(0)
        if bool((_zero_where_missing(photons, measured) < 0).any()):
            raise ArgumentError("image: counts must be >= 0 for Poisson noise; add back what was subtracted, and give "
                                "it as background=")  # fmt: skip
        gain = maps["gain"]
        sensitivity = None if measured is None and bool((gain == 1).all()) else (1 / gain).expand(y.shape)
        if sensitivity is not None:
            sensitivity = _zero_where_missing(sensitivity, measured).contiguous()
        rows = None if measured is None else measured.to(y.dtype)
        expected = maps["background"] / gain + maps["read_noise"].square()
        y = _zero_where_missing(y - maps["offset"] - maps["background"], measured)
        return cls(y, rows, None, _zero_where_missing(photons, measured), expected, sensitivity)

    @staticmethod
    def _weights(
        layout: Layout, image: Any, y: Tensor, measured: Tensor | None, noise_std: Any
    ) -> tuple[Tensor | None, float | Tensor | None, bool]:
        """Return the factors of the rows, the common standard deviation, and whether ``noise_std`` is a map."""
        rows = None if measured is None else measured.to(y.real.dtype if y.is_complex() else y.dtype)
        if noise_std is None:
            return rows, None, False
        sigma = layout.map("noise_std", noise_std, image, y)
        if not bool((sigma >= 0).all()):
            raise ArgumentError("noise_std: expected numbers >= 0")
        items = y.ndim - layout.ndim - 1
        if sigma.ndim == 0:
            return rows, float(sigma), False
        if sigma.shape == (*y.shape[:items], *(1,) * (layout.ndim + 1)):
            return rows, sigma.reshape(y.shape[:items]), False
        if not bool((sigma > 0).all()):
            raise ArgumentError(
                "noise_std: a map must be > 0; pixels that do not count are NaN in the image, or infinite here"
            )
        common_std = sigma[torch.isfinite(sigma)].median()
        weights = (common_std / sigma).expand(y.shape)
        return (weights if rows is None else weights * rows).contiguous(), float(common_std), True

    def without_lower_bounds(self) -> Measurement:
        """Return the measurement with the pixels that are lower bounds treated as missing."""
        if self.at_least is None:
            return self
        rows = (~self.at_least).to(self.y.dtype)
        return replace(self, rows=rows if self.rows is None else rows * self.rows, at_least=None)

    def weighted(self, A: LinearOperator) -> tuple[LinearOperator, Tensor]:
        """The operator and the data of the least-squares problem: A and y with their rows multiplied."""
        return _with_rows(A, self.rows), self.y if self.rows is None else self.y * self.rows

    def photon_operator(self, A: LinearOperator) -> LinearOperator:
        """The operator from x in grey levels to photons."""
        return _with_rows(A, self.sensitivity)

    def mean(self, axes: tuple[int, ...]) -> Tensor:
        """The mean of y over the measured pixels."""
        if self.rows is None:
            return self.y.mean(axes, keepdim=True)
        measured = (self.rows > 0).to(self.rows.dtype).expand(self.y.shape)
        return (self.y * measured).sum(axes, keepdim=True) / measured.sum(axes, keepdim=True).clamp_min(1)

    @property
    def measured_pixels(self) -> Tensor | None:
        """True where pixels were measured, which broadcasts with y; None: everywhere."""
        return None if self.rows is None else self.rows > 0

    def with_item(self, batch_ndim: int) -> Measurement:
        """Return the measurement of an empty batch with one item of zeros added, of weight one everywhere."""
        y = with_item_of(self.y, batch_ndim)
        return Measurement(y, counts=None if self.counts is None else y)

    def measured_values(self) -> Tensor:
        """Return the measured pixels: y, or a vector where some are missing."""
        return self.y if self.rows is None else self.y[(self.rows > 0).expand(self.y.shape)]

    def variance(self, ndim: int) -> Tensor:
        """The variance of the noise, per item: the given one, or an estimate from differences of y; 1 for photons.

        The estimate is the median modulus of the mixed differences along all axes, in which a blurred image is small,
        over that of a normal variable, 0.6745.

        Raises:
            ArgumentError: the given standard deviation is zero.
        """
        y = self.y
        if self.counts is not None:
            return torch.ones((), dtype=y.dtype, device=y.device)
        if self.noise_std is not None:
            given = torch.as_tensor(self.noise_std, dtype=y.real.dtype, device=y.device)
            if not bool((given > 0).all()):
                raise ArgumentError(f"noise_std: expected positive numbers, got {self.noise_std}; or give weight=")
            return given**2
        differences = y if self.rows is None else torch.where(self.rows > 0, y, torch.nan)
        for axis in range(-ndim, 0):
            differences = differences.diff(dim=axis) if differences.shape[axis] > 1 else differences
        median = differences.abs().flatten(-ndim - 1).nanmedian(-1).values
        variance = (torch.nan_to_num(median) / 0.6745) ** 2
        return variance / 2 ** sum(size > 1 for size in y.shape[-ndim:])

    def curvature(self, ndim: int) -> Tensor:
        """The mean second derivative of the Poisson log-likelihood by the blurred field, per item."""
        assert self.counts is not None
        axes = tuple(range(-ndim - 1, 0))
        weights = torch.ones_like(self.counts) if self.rows is None else self.rows.expand(self.y.shape)
        number = weights.double().sum(axes).clamp_min(1)
        square = weights if self.sensitivity is None else self.sensitivity.double().square()
        photons = self.counts.double().sum(axes) / number
        return (square.sum(axes) / number) / torch.where(photons > 0, photons, 1)


def _zero_where_missing(values: Tensor, measured: Tensor | None) -> Tensor:
    return values if measured is None else torch.where(measured, values, 0)


def _with_rows(A: LinearOperator, rows: Tensor | None) -> LinearOperator:
    """The operator ``diag(rows) A``, with a mask where the rows are zeros and ones."""
    if rows is None:
        return A
    items = rows.ndim - len(A.out_shape)
    if bool(((rows == 0) | (rows == 1)).all()):
        return Mask(rows > 0, items, dtype=A.dtype) @ A
    return Diagonal(rows.to(A.dtype), items) @ A


def check_units(y: Tensor, bounds: Any, noise_std: Any, scale: float) -> None:
    """Refuse bounds and noise whose values show that they are not in the units of the image.

    Args:
        y: the image less background and offset.
        bounds: ``(lowest, highest)`` or None.
        noise_std: standard deviation of the noise, or None.
        scale: sum of the PSF, the factor from the mean of x to that of the image.

    Raises:
        ArgumentError: the noise is larger than the range of the data; the bounds leave out nearly all data and the
            median.
    """
    if y.is_complex() or y.numel() == 0:
        return
    data = y.detach().double().flatten()
    low, high = (float(value) for value in torch.aminmax(data))
    if isinstance(noise_std, float) and high > low and noise_std >= high - low:
        raise ArgumentError(
            f"noise_std: {noise_std:g} is no less than the range of the image, {low:g} to {high:g}; it is in the units "
            f"of the image (grey levels of an integer image)"
        )
    if bounds is None or scale <= 0:
        return
    low_end, high_end = (end if end is None else float(end) * scale for end in bounds)
    lowest, highest = (-torch.inf if low_end is None else low_end), (torch.inf if high_end is None else high_end)
    inside = ((data >= lowest) & (data <= highest)).double().mean()
    if not lowest <= float(data.median()) <= highest and float(inside) < 0.05:
        raise ArgumentError(
            f"bounds: {tuple(bounds)} hold {100 * float(inside):.0f} % of the image, whose values go from {low:g} to "
            f"{high:g} without background and offset; bounds are in the units of the image"
        )
