r"""Models of point-spread functions: Gaussian, out of focus, motion, Moffat, Airy; differentiable by their parameters.

Every function gives an array of non-negative values with sum one, centred on its pixel ``size // 2``. Lengths are in
pixels; with ``spacing=``, the distance of neighbouring pixels, they are in its unit. Parameters that are numbers give a
PSF in float64; with a tensor the PSF has its dtype and device, and can be differentiated by it twice. Angles are in
degrees, counter-clockwise from the image's rows. The size follows from the parameters, without a gradient, unless
``size=`` gives it: an optimisation should give a size that holds every PSF it may try.

Signals and stacks have Gaussians only. The optics of a microscope's stack (Gibson-Lanni, vectorial) is left to
packages made for it, such as psfmodels, whose arrays :func:`lsconv.deconvolve` takes as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError

__all__ = ["airy", "box", "disk", "gaussian", "moffat", "motion"]

Parameter = float | Tensor
Spacing = float | Sequence[float]
Size = int | Sequence[int] | None


def gaussian(
    sigma: Parameter | Sequence[float], angle: Parameter = 0.0, *, size: Size = None, spacing: Spacing = 1.0
) -> Tensor:
    r"""The Gaussian :math:`\exp(-\tfrac12 t^T \Sigma^{-1} t)`, sampled at the pixels' centres.

    Args:
        sigma: standard deviation, one number for a round Gaussian in the plane; or one, two or three, one per axis (a
            sequence or a tensor), for a signal, an image or a stack.
        angle: turns an image's Gaussian counter-clockwise, in degrees.
        size: of the array, one number or one per axis; None: out to four standard deviations, odd.
        spacing: distance of neighbouring pixels in the unit of sigma, one number or one per axis.

    Returns:
        Tensor of one axis per standard deviation; of two for one number.

    Raises:
        ArgumentError: a standard deviation that is not positive; more than three; an angle beside one or three.

    Example:
        >>> lsconv.psf.gaussian(1.0).shape, lsconv.psf.gaussian([2.0, 1.0, 1.0], spacing=[2.0, 0.5, 0.5]).shape
        (torch.Size([9, 9]), torch.Size([9, 17, 17]))
    """
    given = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
    widths = given.expand(2) if given.ndim == 0 else given
    if widths.ndim != 1 or not 1 <= len(widths) <= 3:
        raise ArgumentError(f"sigma: expected one number, or one per axis up to three, got shape {tuple(given.shape)}")
    _positive("sigma", widths)
    turned = isinstance(angle, Tensor) or angle != 0
    if turned and len(widths) != 2:
        raise ArgumentError(f"angle: turns in the plane, got {len(widths)} standard deviations")
    if not turned:
        reach = [4 * float(s) for s in widths.detach()]
        squares = [(t / s).square() for t, s in zip(_axes(reach, size, spacing, widths), widths, strict=True)]
        return _normalised(torch.exp(-0.5 * _outer_sum(squares)))
    cosine, sine = _cosine_and_sine(angle, widths)
    down, right = (float(v.detach()) for v in (widths[0] * cosine, widths[1] * cosine))
    across, along = (float(v.detach()) for v in (widths[1] * sine, widths[0] * sine))
    reach = [4 * math.hypot(down, across), 4 * math.hypot(right, along)]
    y, x = _grid(_axes(reach, size, spacing, widths))
    # rows point down, so that a turn counter-clockwise takes (x, -y) to its coordinates along the Gaussian's own axes
    turned_x, turned_y = x * cosine - y * sine, x * sine + y * cosine
    return _normalised(torch.exp(-0.5 * ((turned_y / widths[0]).square() + (turned_x / widths[1]).square())))


def disk(radius: Parameter, *, size: Size = None, spacing: Spacing = 1.0) -> Tensor:
    r"""The PSF of a lens out of focus: a uniform disk, each pixel weighted by its area inside it, in closed form.

    With :math:`H(t) = \tfrac12 (t \sqrt{r^2 - t^2} + r^2 \arcsin(t / r))` the circle has the area
    :math:`H(x) - H(t_0) + y t_0`, :math:`t_0 = \sqrt{r^2 - y^2}`, in the rectangle from its centre to (x, y) outside of
    it, and a pixel has the difference of four of them.

    Args:
        radius: radius of the circle.
        size: of the array; None: odd, as large as the circle.
        spacing: distance of neighbouring pixels in the unit of the radius.

    Returns:
        Tensor of two axes.

    Raises:
        ArgumentError: the radius is not positive.

    Example:
        >>> lsconv.psf.disk(0.4)
        tensor([[1.]], dtype=torch.float64)
    """
    r = _number("radius", radius)
    _positive("radius", r)
    extent = float(r.detach())
    steps = _per_axis("spacing", spacing, 2)
    y, x = _axes([extent - step / 2 for step in steps], size, spacing, r)
    ends = [torch.cat([t - step / 2, t[-1:] + step / 2]) for t, step in zip((y, x), steps, strict=True)]
    rows, columns = _grid(ends)
    corner = _quarter_area(rows, columns, r)
    return _normalised((corner[1:, 1:] - corner[:-1, 1:] - corner[1:, :-1] + corner[:-1, :-1]).clamp_min(0))


def _quarter_area(y: Tensor, x: Tensor, r: Tensor) -> Tensor:
    """The circle's area in the rectangle from its centre to (x, y), negative where one of x and y is."""
    sign = y.sign() * x.sign()
    y, x = torch.minimum(y.abs(), r), torch.minimum(x.abs(), r)
    inside = x.square() + y.square() <= r.square()

    def half_chord(t: Tensor) -> Tensor:
        square = r.square() - t.square()
        return torch.where(square > 0, square.clamp_min(torch.finfo(r.dtype).tiny).sqrt(), 0)

    def integral(t: Tensor) -> Tensor:
        # arcsin has no derivative at one, where the area is a quarter of the circle
        full = t >= r
        ratio = torch.where(full, 0, t / r)
        part = 0.5 * (t * half_chord(t) + r.square() * ratio.asin())
        return torch.where(full, math.pi / 4 * r.square(), part)

    start = torch.where(inside, 0, half_chord(y))
    outside = y * start + integral(x) - integral(start)
    return sign * torch.where(inside, x * y, outside)


def motion(length: Parameter, angle: Parameter = 0.0, *, size: Size = None, spacing: Spacing = 1.0) -> Tensor:
    r"""The PSF of uniform motion along a straight line, each point of it distributed bilinearly over four pixels.

    .. math:: k[i, j] = \int_{-1/2}^{1/2} \Lambda(t\, d_1 - i)\, \Lambda(t\, d_2 - j)\, dt, \qquad
              \Lambda(u) = \max(0, 1 - |u|)

    with d the path in pixels. The integrand is quadratic between its kinks, so that two Gauss points between neighbours
    integrate it exactly.

    Args:
        length: length of the path; 0 is no blur.
        angle: its direction in degrees, counter-clockwise: 0 is horizontal, 90 vertical.
        size: of the array, one number or one per axis; None: odd, as large as the path.
        spacing: distance of neighbouring pixels in the unit of the length.

    Returns:
        Tensor of two axes.

    Raises:
        ArgumentError: a length below zero, or an angle that is not finite.

    Example:
        >>> lsconv.psf.motion(2)
        tensor([[0.2500, 0.5000, 0.2500]], dtype=torch.float64)
    """
    path = _number("length", length, like=angle)
    direction = _number("angle", angle, like=path)
    if not (bool(torch.isfinite(path) & torch.isfinite(direction)) and float(path.detach()) >= 0):
        raise ArgumentError(f"length, angle: expected a length >= 0 and an angle in degrees, got {length}, {angle}")
    cosine, sine = _cosine_and_sine(direction, path)
    steps = _per_axis("spacing", spacing, 2)
    path_pixels = (-path * sine / steps[0], path * cosine / steps[1])
    # cos(90 degrees) is about 1e-16 instead of 0, and must not widen the array
    half_lengths = [abs(round(float(d.detach()), 9)) / 2 for d in path_pixels]
    pixels = _grid(_axes(half_lengths, size, 1.0, path))
    kinks = [path.new_full(pixels[0].shape, end) for end in (-0.5, 0.5)]
    for pixel, d, half_length in zip(pixels, path_pixels, half_lengths, strict=True):
        if half_length > 0:
            kinks += [((pixel + shift) / d).clamp(-0.5, 0.5) for shift in (-1, 0, 1)]
    ends = torch.stack(kinks).sort(0).values
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    total = torch.zeros_like(pixels[0])
    for node in (-(3**-0.5), 3**-0.5):
        time = middle + node * half
        weight = half
        for pixel, d in zip(pixels, path_pixels, strict=True):
            weight = weight * (1 - (time * d - pixel).abs()).clamp_min(0)
        total = total + weight.sum(0)
    return _normalised(total)


def moffat(fwhm: Parameter, beta: Parameter, *, size: Size = None, spacing: Spacing = 1.0) -> Tensor:
    r"""The Moffat profile of stars seen through the atmosphere, :math:`(1 + |t|^2 / \alpha^2)^{-\beta}`, sampled at the
    pixels' centres.

    Args:
        fwhm: full width at half maximum, :math:`2 \alpha \sqrt{2^{1/\beta} - 1}`.
        beta: the exponent, over one; 2.5 to 4.8 in astronomy.
        size: of the array; None: odd, as large as the circle that holds 99 % of the light.
        spacing: distance of neighbouring pixels in the unit of the width.

    Returns:
        Tensor of two axes.

    Raises:
        ArgumentError: a width that is not positive, or an exponent that is not over one.

    Source:
        Moffat, "A theoretical investigation of focal stellar images", Astronomy and Astrophysics 3 (1969).

    Example:
        >>> psf = lsconv.psf.moffat(4.0, 3.0)
        >>> centre = len(psf) // 2
        >>> round(float(psf[centre, centre + 2] / psf[centre, centre]), 12)  # two pixels out, half as bright
        0.5
    """
    width = _number("fwhm", fwhm, like=beta)
    exponent = _number("beta", beta, like=width)
    _positive("fwhm", width)
    if not float(exponent.detach()) > 1:
        raise ArgumentError(f"beta: expected an exponent > 1, below which the light is infinite, got {beta}")
    alpha = width / (2 * (2 ** (1 / exponent) - 1).sqrt())
    outermost = math.sqrt(0.01 ** (1 / (1 - float(exponent.detach()))) - 1) * float(alpha.detach())
    y, x = _axes([outermost] * 2, size, spacing, width)
    return _normalised((1 + _outer_sum([y.square(), x.square()]) / alpha.square()) ** -exponent)


def airy(wavelength: Parameter, na: Parameter, spacing: Spacing, *, size: Size = None) -> Tensor:
    r"""The diffraction of an ideal lens in focus, :math:`(2 J_1(v) / v)^2` with :math:`v = 2\pi\, NA\, |t| / \lambda`,
    sampled at the pixels' centres.

    :math:`J_1(v) / v = \frac1\pi \int_{-1}^{1} \sqrt{1 - u^2} \cos(vu)\, du` is found by Gauss-Chebyshev quadrature,
    with as many points as make it exact to rounding. Its dark rings lie at 0.61, 1.12, 1.62 ... :math:`\lambda / NA`.

    Args:
        wavelength: of the light, in the unit of ``spacing``.
        na: numerical aperture; of a camera with f-number N it is 1 / 2N.
        spacing: distance of neighbouring pixels in the scene, one number or one per axis; above a quarter of
            :math:`\lambda / NA` the samples miss detail of the PSF.
        size: of the array; None: odd, out to the fifth dark ring, within which 96 % of the light lies.

    Returns:
        Tensor of two axes.

    Raises:
        ArgumentError: an argument that is not positive.

    Source:
        Born and Wolf, "Principles of Optics" (1999), section 8.5.2.

    Example:
        >>> lsconv.psf.airy(wavelength=0.52, na=1.4, spacing=0.065).shape  # micrometres
        torch.Size([31, 31])
    """
    length = _number("wavelength", wavelength, like=na)
    aperture = _number("na", na, like=length)
    _positive("wavelength", length)
    _positive("na", aperture)
    scale = 2 * math.pi * aperture / length
    y, x = _axes([16.4706 / float(scale.detach())] * 2, size, spacing, length)
    square = _outer_sum([y.square(), x.square()])
    # the root has no derivative at the centre, where v = 0 whatever the parameters are
    v = scale * torch.where(square > 0, square, 1).sqrt() * (square > 0)
    points = 32 + math.ceil(float(v.detach().max()) / 2)
    angles = math.pi * torch.arange(1, points + 1, dtype=length.dtype, device=length.device) / (points + 1)
    amplitude = (angles.sin().square() * (v[..., None] * angles.cos()).cos()).sum(-1)
    return _normalised(amplitude.square())


def box(size: int) -> Tensor:
    """The PSF of a mean over ``size`` by ``size`` pixels; with an even size the centre is pixel ``size // 2``.

    Args:
        size: an integer >= 1.

    Returns:
        Tensor of two axes, in float64.

    Raises:
        ArgumentError: the size is no integer >= 1.

    Example:
        >>> lsconv.psf.box(2)
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]], dtype=torch.float64)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ArgumentError(f"size: expected an integer >= 1, got {size!r}")
    return torch.full((size, size), 1.0 / size**2, dtype=torch.float64)


# ------------------------------------------------------------------ arguments and grids


def _number(name: str, value: Parameter, like: Parameter | None = None) -> Tensor:
    """Convert a parameter to a tensor without axes, of the type of another parameter where that is a tensor."""
    if isinstance(value, Tensor):
        if value.ndim or not value.is_floating_point():
            raise ArgumentError(
                f"{name}: expected a number or a real tensor without axes, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        return value
    if not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
    if isinstance(like, Tensor) and like.is_floating_point():
        return torch.tensor(value, dtype=like.dtype, device=like.device)
    return torch.tensor(value, dtype=torch.float64)


def _positive(name: str, value: Tensor) -> None:
    """Refuse values that are not positive and finite."""
    if not bool(((value > 0) & torch.isfinite(value)).all()):
        said = ", ".join(f"{number:g}" for number in value.detach().reshape(-1).tolist())
        raise ArgumentError(f"{name}: expected a number > 0, got {said}")


def _per_axis(name: str, value: Spacing, ndim: int) -> list[float]:
    """Take one number for all axes, or one per axis, as a list."""
    values = [float(value)] * ndim if isinstance(value, (int, float)) else [float(v) for v in value]
    if len(values) != ndim or not all(math.isfinite(v) and v > 0 for v in values):
        raise ArgumentError(f"{name}: expected a number > 0 or {ndim} of them, got {value}")
    return values


def _axes(reach: Sequence[float], size: Size, spacing: Spacing, like: Tensor) -> list[Tensor]:
    """The coordinates of pixels along every axis, 0 at pixel ``size // 2``; without a size they extend to ``reach``."""
    steps = _per_axis("spacing", spacing, len(reach))
    if size is None:
        sizes = [2 * max(0, math.ceil(r / step - 1e-9)) + 1 for r, step in zip(reach, steps, strict=True)]
    else:
        sizes = [size] * len(reach) if isinstance(size, int) else [int(n) for n in size]
        if len(sizes) != len(reach) or min(sizes) < 1:
            raise ArgumentError(f"size: expected a number >= 1 or {len(reach)} of them, got {size}")
    return [
        step * (torch.arange(n, dtype=like.dtype, device=like.device) - n // 2)
        for n, step in zip(sizes, steps, strict=True)
    ]


def _grid(axes: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.meshgrid(*axes, indexing="ij"))


def _outer_sum(terms: Sequence[Tensor]) -> Tensor:
    """``terms[0][i] + terms[1][j] + ...``."""
    total = terms[0]
    for term in terms[1:]:
        total = total[..., None] + term
    return total


def _cosine_and_sine(angle: Parameter, like: Tensor) -> tuple[Tensor, Tensor]:
    """The cosine and the sine of an angle in degrees."""
    radians = torch.deg2rad(_number("angle", angle, like=like))
    return radians.cos(), radians.sin()


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum()
