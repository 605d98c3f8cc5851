r"""deconvolve: the one call for images, from a blurred image and its PSF to the restored one."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.factored.batch_axes import Reduction
from lsconv.inverse.images.blur import blur_operator, level_for_mean
from lsconv.inverse.images.image_layout import Layout
from lsconv.inverse.images.image_noise import Measurement, NoiseModel, check_units
from lsconv.inverse.images.point_spread import Origin, normalised, origin_of
from lsconv.inverse.images.restoration import Bounds, Denoiser, Regularisation, Restoration
from lsconv.krylov.gradients.parameters import any_requires_grad
from lsconv.krylov.loop.entry import checks_numbers, without_item
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.convolution import Convolution
from lsconv.operators.transforms import untraced

__all__ = ["deconvolve"]

Values = float | Tensor | np.ndarray[Any, Any]


@untraced
@checks_numbers
def deconvolve(
    image: Tensor | np.ndarray[Any, Any],
    psf: Tensor | np.ndarray[Any, Any],
    *,
    boundary: str = "unknown",
    damp: float | Tensor | str = "auto",
    prior: str | Denoiser = "gradient",
    weight: float | Tensor | None = None,
    bounds: Bounds | None = None,
    channels: str | None = None,
    ndim: int | None = None,
    noise: str = "gaussian",
    noise_std: Values | None = None,
    observed: Tensor | np.ndarray[Any, Any] | None = None,
    weights: Values | None = None,
    saturated: float | str | None = None,
    one_sided: bool = False,
    background: Values = 0.0,
    gain: Values = 1.0,
    offset: Values = 0.0,
    read_noise: Values = 0.0,
    origin: Origin = "center",
    psf_positions: Tensor | np.ndarray[Any, Any] | None = None,
    normalize_psf: bool = True,
    crop: bool = True,
    error_bars: bool | int = False,
    **options: Any,
) -> Solution:
    r"""Restore a blurred image.

    .. math:: \min_x \|A x + b - y\|^2 + \mathrm{damp}^2 \|L (x - m)\|^2

    with A the blur (:func:`blur_operator`), b the background and m the constant that blurs to the mean of the image.
    ``prior`` says what L is: "gradient" the forward differences, "tikhonov" the identity. "tv" is
    :func:`lsconv.total_variation`. A function is taken for a denoiser and given to :func:`lsconv.plug_and_play`; it
    gets and returns ``(*batch, channels, *field)``.

    With ``noise="poisson"`` the image is ``gain`` times photons, plus ``offset``, and the likelihood of the photons
    takes the place of half the squares (:mod:`lsconv.inverse.poisson`):

    .. math:: \min_{lo \le x \le hi}\; \sum_i t_i - c_i \log t_i + \tfrac12 \mathrm{damp}^2 \|L(x - m)\|^2
              \quad\text{or}\quad \dots + \mathrm{weight}\, \|\nabla x\|_{2,1},
              \qquad c = \frac{y - o}{g} + r^2,\; t = \frac{Ax + b}{g} + r^2 .

    Everything that has the image's unit (bounds, noise_std, background, offset) is in the image's own units, which the
    answer has too: grey levels of integers, values of floating point. Integers are answered in their type, rounded and
    cut off, bools as float32. Images of 32 and more bits are solved in float64 (except float32, complex64), others in
    float32.

    NaN, and masked entries of a ``numpy.ma`` array, are missing pixels: they do not enter the misfit, the restored
    image has values there, and an :class:`~lsconv.errors.InputWarning` counts them. ``(..., H, W, 3)`` under a PSF of
    two axes, with neither ``channels`` nor ``ndim`` given, is taken for colours; other shapes that can be read in two
    ways are refused.

    The differences of natural images are closer to white than their values are, which the rules for damp assume: with
    "gradient" the damp of "gcv" comes within 0.2 dB of the best one on the benchmark's scenes, with "tikhonov" it is
    too small and loses 1 to 5 dB (``python -m benchmarks restoration``).

    With "tikhonov" and "gradient" x is differentiable with respect to image, psf and a damp given as a tensor (one that
    a rule chose is held fixed); with the other priors, with bounds and with Poisson noise it is not.

    Args:
        image: a tensor or array of any number type, ``(*batch, *size)``, or with ``channels`` set
            ``(*batch, C, *size)`` or ``(*batch, *size, C)``. Every batch item is restored separately, the channels of
            an item together.
        psf: the point spread function, ``(*size)``, as many axes as the image has spatial ones. With ``ndim`` given
            it may have more in front: ``(*batch, *size)``, or ``(*batch, 1 or C, *size)`` where there are channels.
        boundary: "unknown" (the image shows a part of a larger scene), "zero", "periodic" or "reflect".
        damp: the damping in units of the PSF's transfer function (a PSF of sum one passes the mean with factor one): a
            number, a tensor with one per batch item, or the name of a rule for it (see :func:`lsconv.tikhonov`);
            "auto" is "upre" where ``noise_std`` is a number (or one per batch item) and "gcv" elsewhere. Given a
            denoiser, the square root of ADMM's penalty. With Poisson noise in the units of its objective, per grey
            level; "discrepancy" is then the rule of :mod:`lsconv.inverse.poisson`, and the other rules look at the
            least-squares problem and divide by the mean variance.
        prior: "gradient", "tikhonov", "tv", or a denoiser.
        weight: of the total variation, for ``prior="tv"``, a number or one per batch item; None: the variance of the
            noise (``noise_std``, or measured on the image) over the mean slope of the gradient prior's answer, halved;
            for photons by the discrepancy rule.
        bounds: lowest and highest value of x, None for none; with Poisson noise ``(0, None)`` unless given.
        channels: "first", "last", or None where the image has none.
        ndim: number of spatial axes; those of the PSF by default.
        noise: "gaussian" or "poisson".
        noise_std: standard deviation of Gaussian noise, a number, for damp or weight, or a map like the image (or
            of its spatial size), by which every pixel is weighted.
        observed: True where pixels were measured, bool, of the image's shape or its spatial size. Other pixels are
            missing, as NaN and masked ones are.
        weights: the weights of the squares, >= 0, a map like the image or of its spatial size; pixels of weight 0 are
            missing. Only with Gaussian noise, and without a map of ``noise_std``.
        saturated: the grey level from which pixels are saturated, and missing; "auto" for the largest value of an image
            of integers, where so many pixels have it that it is a plateau, with an InputWarning that says so.
        one_sided: saturated pixels are not missing: the blurred scene is at least as bright as that level there
            (``at_least`` of :func:`lsconv.tikhonov`). Not with Poisson noise or a denoiser.
        background: the light b that does not come from the scene, a number or a map; it is part of the model, so do not
            subtract it from the image.
        gain: grey levels per photon, of Poisson noise; a number or a map.
        offset: the grey level that the camera gives without light; a number or a map.
        read_noise: standard deviation of the camera's noise beside the photons' own, in photons; a number or a map.
        origin: the PSF's centre: "center" (its pixel ``size // 2``), "peak", "centroid", or an index with one entry per
            axis; ``(0, ...)`` for a causal response, which may be as long as the record.
        psf_positions: where the PSFs ``(K, *size)`` were measured, if the blur varies: ``(K, ndim)`` pixels of the
            image that form a grid; the PSF is linear between them (:func:`blur_operator`).
        normalize_psf: divide every PSF by its sum, with an :class:`~lsconv.errors.InputWarning` where that is off one
            by over 1 %. False: take it as it is.
        crop: give back the image's own pixels; False gives all of the field, which with boundary "unknown" is larger
            by the PSF less one, ``size - 1 - origin`` of it before the image's first pixel.
        error_bars: put the standard deviation of every pixel into ``Solution.std``, in floating point and the image's
            units, for the noise and the prior that damp stands for (:func:`lsconv.posterior_std`): exact up to 4096
            unknowns, else from 64 samples, or as many as are asked for. Only with prior "tikhonov" or "gradient".
        options: further options of the solver behind it (rtol, max_iter, ...).

    Returns:
        A :class:`Solution`. ``x`` has the kind, the number type and the layout of the image; the certificates are those
        of the problem as solved.

    Raises:
        ArgumentError, ArgumentTypeError, DtypeError, ShapeError, NonFiniteError: what was given does not fit together.
        MethodError: this combination of prior and bounds or options is not served, or has no gradient.

    Source:
        Hansen, Nagy and O'Leary, "Deblurring Images" (2006), for the boundary conditions; Venkatakrishnan, Bouman and
        Wohlberg, "Plug-and-play priors for model based reconstruction" (2013), for denoisers as priors.

    Example:
        >>> scene = torch.rand(40, 40, dtype=torch.float64)
        >>> psf = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.7, 0.1], [0.0, 0.0, 0.0]], dtype=torch.float64)
        >>> image = lsconv.blur_operator(psf, (38, 38))(scene[None])[0]
        >>> solution = lsconv.deconvolve(image, psf, damp=1e-6)
        >>> solution.x.shape, bool((solution.x - scene[1:-1, 1:-1])[8:-8, 8:-8].abs().max() < 1e-2)
        (torch.Size([38, 38]), True)
    """
    regularisation = Regularisation(prior, damp, weight, bounds, options)
    regularisation.check(noise, list(inspect.signature(deconvolve).parameters)[2:-1])
    model = NoiseModel(noise, noise_std, observed, weights, saturated, one_sided, background, gain, offset, read_noise)
    positions = None if psf_positions is None else torch.as_tensor(psf_positions)
    layout = Layout.of(image, psf[0] if positions is not None and getattr(psf, "ndim", 0) > 1 else psf, channels, ndim)
    measured, kernel = Measurement.of(layout, image, model), layout.kernel(psf, image)
    batch = measured.y.shape[: -layout.ndim - 1]
    if 0 in batch:  # solved for one item of zeros, which is removed at the end
        measured, regularisation = measured.with_item(len(batch)), regularisation.with_item()
    if positions is not None:
        if noise == "poisson":
            raise MethodError('psf_positions: a blur that varies is served with noise="gaussian"')
        kernel = kernel.squeeze(-layout.ndim - 1) if layout.channels is None else kernel
    if normalize_psf:
        kernel = normalised(kernel, layout.ndim)
    centre = origin_of(kernel, layout.ndim, origin)
    size = layout.size(measured.y)
    A = blur_operator(kernel, size, boundary=boundary, channels=measured.y.shape[-layout.ndim - 1], ndim=layout.ndim,
                      origin=centre, positions=positions)  # fmt: skip
    if not regularisation.is_quadratic(model):
        if error_bars:
            raise MethodError('error_bars: are those of prior "gradient" or "tikhonov" without bounds or one_sided, '
                              "and Gaussian noise")  # fmt: skip
        if any_requires_grad(measured.y, kernel):
            raise MethodError(
                f"prior: {prior!r} with noise={noise!r}, bounds={bounds!r} and one_sided={one_sided} has no gradient "
                f'by image or psf; use "gradient" or "tikhonov" without bounds, or torch.no_grad()'
            )
    regularisation = regularisation.resolved(A, measured)
    scale = float(kernel.detach().flatten(-layout.ndim).sum(-1).mean())
    check_units(measured.measured_values(), regularisation.bounds, noise_std, scale)
    crop = crop or boundary != "unknown"  # the field has the size of the image
    # the first pixel of the image, in the field
    first = [k - 1 - c if boundary == "unknown" else 0 for k, c in zip(A.kernel_size, centre, strict=True)]
    if crop and isinstance(A, Convolution) and not any_requires_grad(kernel):
        A, first = _without_margins(A, first, size)
    mean = measured.without_lower_bounds().mean(tuple(range(-A.ndim, 0)))
    restoration = Restoration(A, measured, level_for_mean(A, mean), regularisation)
    solution = restoration.solve()
    x, std = solution.x, None
    if error_bars:
        std = restoration.error_bars(solution, 64 if error_bars is True else error_bars)
    if crop:
        window: Any = (..., *(slice(start, start + n) for n, start in zip(size, first, strict=True)))
        x, std = x[window], None if std is None else std[window]
    std = None if std is None else layout.floating(std, image)
    solution = replace(solution, x=layout.answer(x, image), std=std)
    return without_item(solution, batch) if 0 in batch else solution


def _without_margins(A: Convolution, first: list[int], size: tuple[int, ...]) -> tuple[Convolution, list[int]]:
    """Crop the zeros around the PSF; return the blur, and the first pixel of the image in its smaller field.

    Args:
        A: the blur.
        first: the image's first pixel in its field.
        size: the size of the image.

    Returns:
        Both unchanged where no margin is zero, or the smaller field would not contain the image.
    """
    trimmed = Reduction.trimmed(A)
    if trimmed is None:
        return A, first
    moved = [start - cells.start for start, cells in zip(first, trimmed.inputs, strict=True)]
    inside = all(m >= 0 and m + n <= field for m, n, field in zip(moved, size, trimmed.B.spatial_in, strict=True))
    return (trimmed.B, moved) if inside else (A, first)
