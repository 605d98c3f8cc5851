r"""deconvolve: the one call for images, from a blurred image and its PSF to the restored one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError
from lsconv.factored.batch_axes import Reduction
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.damping.rules import RULES
from lsconv.inverse.images.blur import blur_operator, level_for_mean, middle_of
from lsconv.inverse.images.image_layout import Layout
from lsconv.inverse.images.image_noise import Measurement, check_meaning
from lsconv.inverse.images.image_tikhonov import image_tikhonov
from lsconv.inverse.images.point_spread import Origin, normalised, origin_of
from lsconv.inverse.plug_and_play import plug_and_play
from lsconv.inverse.poisson import by_discrepancy, penalised_poisson
from lsconv.inverse.total_variation import check_bounds, check_options, total_variation
from lsconv.inverse.uncertainty.error_bars import error_bars as standard_deviations
from lsconv.krylov.gradients.parameters import any_requires_grad
from lsconv.krylov.loop.entry import checks_numbers, with_item_of, without_item
from lsconv.krylov.loop.problem import check_damp
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.padding_modes import MODES
from lsconv.operators.transforms import untraced
from lsconv.operators.varying_convolution import VaryingConvolution

__all__ = ["deconvolve"]

Denoiser = Callable[[Tensor], Tensor]
Bounds = tuple[float | None, float | None]
Values = float | Tensor | np.ndarray[Any, Any]

_WEIGHT_SHARE = 0.5  # see _variation_weight
_ANY = ("rtol", "max_iter", "raise_on_failure")
# The options of the solvers, as messages call them, that are the user's to give.
_OPTIONS = {
    "Poisson noise": (*_ANY, "x0"),
    "a denoiser": (*_ANY, "callback"),
    "total variation": (*_ANY, "x0", "callback", "check_finite", "isotropic", "coupled", "huber", "L"),
    "a quadratic prior": (*_ANY, "x0", "atol", "method", "memory_limit", "check_finite"),
}


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

    NaN, and masked entries of a ``numpy.ma`` array, are missing pixels: they have no say, the answer has values there,
    and an :class:`~lsconv.errors.InputWarning` counts them. ``(..., H, W, 3)`` under a PSF of two axes, with neither
    ``channels`` nor ``ndim`` given, is taken for colours; other shapes that can be read in two ways are refused.

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
            missing. Of Gaussian noise, without a map of ``noise_std``.
        saturated: the grey level from which pixels are saturated, and missing; "auto" for the largest value of an image
            of integers, where so many pixels have it that it is a plateau, with an InputWarning that says so.
        one_sided: saturated pixels are not missing: the blurred scene is at least as bright as that level there
            (``at_least`` of :func:`lsconv.tikhonov`). Not with Poisson noise or a denoiser.
        background: light without the scene, b: a number or a map; taken from nothing, since the model has it.
        gain: grey levels per photon, of Poisson noise; a number or a map.
        offset: grey level of no light; a number or a map.
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
            unknowns, else from 64 samples, or as many as are asked for. Of "tikhonov" and "gradient".
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
    _check_choices(damp, prior, weight, noise, options)
    options = {name: value for name, value in options.items() if value is not None}
    positions = None if psf_positions is None else torch.as_tensor(psf_positions)
    layout = Layout.of(image, psf[0] if positions is not None and getattr(psf, "ndim", 0) > 1 else psf, channels, ndim)
    camera = {"background": background, "gain": gain, "offset": offset, "read_noise": read_noise}
    measured = Measurement.of(layout, image, noise, noise_std, camera, observed=observed, weights=weights,
                              saturated=saturated, one_sided=one_sided)  # fmt: skip
    y, kernel = measured.y, layout.kernel(psf, image)
    if positions is not None:
        if noise == "poisson":
            raise MethodError('psf_positions: a blur that varies is served with noise="gaussian"')
        kernel = kernel.squeeze(-layout.ndim - 1) if layout.channels is None else kernel
    if normalize_psf:
        kernel = normalised(kernel, layout.ndim)
    centre = origin_of(kernel, layout.ndim, origin)
    batch = y.shape[: -layout.ndim - 1]
    if 0 in batch:  # solved with an item of zeros, which is cut away in the end
        measured = Measurement(
            with_item_of(y, len(batch)), counts=None if noise == "gaussian" else with_item_of(y, len(batch))
        )
        y = measured.y
        damp = with_item_of(damp, damp.ndim, 1) if isinstance(damp, Tensor) else damp
        weight = with_item_of(weight, weight.ndim, 1) if isinstance(weight, Tensor) else weight
    A = blur_operator(kernel, layout.size(y), boundary=boundary, channels=y.shape[-layout.ndim - 1], ndim=layout.ndim,
                      origin=centre, positions=positions)  # fmt: skip
    if isinstance(damp, Tensor):
        damp = damp.to(y.device)
    if isinstance(damp, str) and damp == "auto":
        damp = "gcv" if measured.noise_std is None or measured.mapped else "upre"
    quadratic = not (callable(prior) or prior == "tv" or bounds is not None or noise == "poisson" or one_sided)
    if error_bars and not quadratic:
        raise MethodError(
            'error_bars: are those of prior "gradient" or "tikhonov" without bounds or one_sided, and Gaussian noise'
        )
    if not quadratic and any_requires_grad(y, kernel):
        raise MethodError(
            f"prior: {prior!r} with noise={noise!r}, bounds={bounds!r} and one_sided={one_sided} has no gradient by "
            f'image or psf; use "gradient" or "tikhonov" without bounds, or torch.no_grad()'
        )
    bounds = (0.0, None) if bounds is None and noise == "poisson" else None if bounds == (None, None) else bounds
    if bounds is not None:
        check_bounds(bounds, A)
    check_meaning(measured.seen(), bounds, noise_std, float(kernel.detach().flatten(-layout.ndim).sum(-1).mean()))
    if not crop and boundary != "unknown":
        crop = True  # the field is the image
    # pixel of the image in the field
    first = [k - 1 - c if boundary == "unknown" else 0 for k, c in zip(A.kernel_size, centre, strict=True)]
    if crop and isinstance(A, Convolution) and not any_requires_grad(kernel):
        A, first = _without_margins(A, first, layout.size(y))
    mean = measured.certain().mean(tuple(range(-A.ndim, 0)))
    problem = _Restoration(A, measured, level_for_mean(A, mean), bounds, damp, weight, options)
    solution = problem.solve(prior)
    x, std = solution.x, None
    if error_bars:
        std = problem.error_bars(solution, prior, 64 if error_bars is True else error_bars)
    if crop:
        window: Any = (..., *(slice(start, start + size) for size, start in zip(layout.size(y), first, strict=True)))
        x, std = x[window], None if std is None else std[window]
    std = None if std is None else layout.floating(std, image)
    solution = replace(solution, x=layout.answer(x, image), std=std)
    return without_item(solution, batch) if 0 in batch else solution


def _check_choices(damp: Any, prior: Any, weight: Any, noise: str, options: dict[str, Any]) -> None:
    """Refuse what the prior does not take, before any work."""
    if not (callable(prior) or (isinstance(prior, str) and prior in ("tv", "tikhonov", "gradient"))):
        raise ArgumentError(f'prior: expected "gradient", "tikhonov", "tv" or a denoiser, got {prior!r}')
    if isinstance(damp, str) and damp not in ("auto", *RULES):
        rules = ", ".join(map(repr, ("auto", *RULES)))
        raise ArgumentError(f"damp: expected a number or one of the rules {rules}, got {damp!r}")
    if prior == "tv" and not (isinstance(damp, str) and damp == "auto"):
        raise ArgumentError('damp: is of the other priors; prior="tv" has weight=, chosen where it is left out')
    if prior != "tv" and weight is not None:
        raise ArgumentError('weight: is of prior="tv"; the other priors have damp=')
    variation = "total variation" if prior == "tv" else "Poisson noise" if noise == "poisson" else "a quadratic prior"
    taker = "a denoiser" if callable(prior) else variation
    unknown = sorted(set(options) - set(_OPTIONS[taker]))
    if unknown:
        known = list(inspect.signature(deconvolve).parameters)[2:-1]
        raise ArgumentTypeError(
            f"{', '.join(unknown)}: {taker} takes no such option; deconvolve has {', '.join(known)}; for {taker} also "
            f"{', '.join(_OPTIONS[taker])}"
        )


def _without_margins(A: Convolution, first: list[int], size: tuple[int, ...]) -> tuple[Convolution, list[int]]:
    """The blur without the zeros around its PSF, and the image's first pixel in its field, which may be smaller."""
    way = Reduction.trimmed(A)
    if way is None:
        return A, first
    moved = [start - cells.start for start, cells in zip(first, way.inputs, strict=True)]
    inside = all(m >= 0 and m + n <= field for m, n, field in zip(moved, size, way.B.spatial_in, strict=True))
    return (way.B, moved) if inside else (A, first)


@dataclass(frozen=True, eq=False)
class _Restoration:
    """The problem of one prior after the other."""

    A: Convolution | VaryingConvolution
    measured: Measurement
    middle: Tensor
    bounds: Bounds | None
    damp: float | Tensor | str
    weight: float | Tensor | None
    options: dict[str, Any]

    def solve(self, prior: str | Denoiser) -> Solution:
        """The answer under a prior."""
        poisson = self.measured.counts is not None
        if callable(prior):
            if poisson:
                raise MethodError('prior: a denoiser is served with noise="gaussian"; use "gradient" or "tv"')
            return self._with_denoiser(prior)
        if prior == "tv":
            return self._with_total_variation(poisson)
        L = self.gradient() if prior == "gradient" else None
        return self._penalised_poisson(L) if poisson else self._with_quadratic(L)

    def gradient(self) -> Gradient:
        A = self.A
        boundary = "periodic" if MODES[A.padding_mode].periodic else "neumann"
        return Gradient(A.in_shape, ndim=A.ndim, boundary=boundary, dtype=A.dtype, device=A.device)

    def _with_quadratic(self, L: Gradient | None) -> Solution:
        A, y = self.measured.weighted(self.A)
        solve = {"damp": self.damp, "noise_std": self._noise_of_rule(), **self.options}
        if not (isinstance(self.A, VaryingConvolution) and isinstance(self.damp, str)):
            return image_tikhonov(A, y, L, self.middle, self.bounds, solve, self.measured.at_least)
        # rules look at a convolution: the middle of the image under the PSF there
        B, cells = middle_of(self.A)
        certain = self.measured.certain()
        rows = None if certain.rows is None else certain.rows.expand(certain.y.shape)[cells]
        inside = replace(self, A=B, measured=replace(certain, y=certain.y[cells], rows=rows))
        mean = level_for_mean(B, self.measured.mean(tuple(range(-B.ndim, 0))))
        options = {"L": None if L is None else inside.gradient(), "x_prior": mean, "noise_std": solve.pop("noise_std")}
        selection = choose_damp(*inside.measured.weighted(B), self.damp, **options)
        solve["damp"] = selection.damp
        found = image_tikhonov(A, y, L, self.middle, self.bounds, solve, self.measured.at_least)
        return replace(found, selection=selection)

    def error_bars(self, solution: Solution, prior: str | Denoiser, count: int) -> Tensor:
        """The standard deviations of an answer."""
        A, y = self.measured.weighted(self.A)
        L = self.gradient() if prior == "gradient" else None
        return standard_deviations(A, y, solution.damp, L, self.middle, self.measured.noise_std, count)

    def _noise_of_rule(self) -> float | Tensor | None:
        """The noise as Tikhonov takes it: a map has given the weights; a number that no rule uses is refused."""
        by_noise = isinstance(self.damp, str) and self.damp in ("upre", "discrepancy")
        return self.measured.noise_std if by_noise or not self.measured.mapped else None

    def _with_denoiser(self, denoiser: Denoiser) -> Solution:
        """Plug-and-play from Tikhonov's answer, which also chooses damp where that is a rule."""
        if self.measured.at_least is not None:
            raise MethodError('one_sided: is served with prior "gradient", "tikhonov" and "tv", not with a denoiser')
        A, y = self.measured.weighted(self.A)
        start = replace(self, bounds=None, options={})._with_quadratic(None)
        return plug_and_play(A, y, denoiser, start.damp**2, bounds=self.bounds, x0=start.x, **self.options)

    def _with_total_variation(self, poisson: bool) -> Solution:
        measured = self.measured
        given = {"bounds": self.bounds, "at_least": measured.at_least, **self.options}
        if poisson:
            assert measured.counts is not None
            A, y = measured.photon_operator(self.A), measured.counts
            given.update(noise="poisson", background=measured.expected)
        else:
            A, y = measured.weighted(self.A)
        check_options(A, y, "image", given)  # before the weight is sought, which takes time
        weight = self._variation_weight() if self.weight is None else self.weight
        if not poisson or self.weight is not None:
            return total_variation(A, y, weight, **given)

        def solve(strength: Tensor, x0: Tensor | None) -> Solution:
            return total_variation(A, y, strength, x0=x0, **given)

        given.pop("x0", None)
        measured_pixels = None if measured.rows is None else measured.rows > 0
        return by_discrepancy(solve, torch.as_tensor(weight).double() / 4, A, y, measured.expected, measured_pixels)

    def _variation_weight(self) -> Tensor:
        r"""``0.5 * variance of the noise / mean |gradient|``, per item.

        The maximum a posteriori estimate under white noise and Laplace distributed differences has this weight but for
        the factor, which is measured: differences of images have heavier tails, and eight images of scikit-image (none
        of those of ``python -m benchmarks restoration``) under three blurs were restored best with 0.1 to 0.9 times it,
        and half of it lost 0.24 dB on the average. The mean is that of the gradient prior's answer by GCV. Noise that
        is not given is measured on the mixed differences of y, where a blurred image has next to nothing, by their
        median (Donoho and Johnstone 1994). The likelihood of photons is divided by their variance already.
        """
        A, measured = self.A, self.measured.certain()
        variance = measured.variance(A.ndim)
        smooth = replace(self, bounds=None, damp="gcv", measured=replace(measured, noise_std=None), options={})
        x = smooth._with_quadratic(self.gradient()).x
        slope = torch.linalg.vector_norm(self.gradient()(x), dim=(-A.ndim - 2, -A.ndim - 1)).flatten(-A.ndim).mean(-1)
        weight: Tensor = _WEIGHT_SHARE * variance / slope.clamp_min(torch.finfo(slope.dtype).tiny)
        return torch.where(slope > 0, weight, 0)

    def _penalised_poisson(self, L: Gradient | None) -> Solution:
        measured = self.measured
        assert measured.counts is not None
        A, counts = measured.photon_operator(self.A), measured.counts

        def solve(damp: Tensor, x0: Tensor | None = None) -> Solution:
            given = self.options if x0 is None else {**self.options, "x0": x0}
            return penalised_poisson(A, counts, damp, L=L, middle=self.middle, background=measured.expected,
                                     bounds=self.bounds, **given)  # fmt: skip

        if not isinstance(self.damp, str):
            return solve(check_damp(self.damp, A))
        by_rule = "gcv" if self.damp in ("discrepancy", "upre") else self.damp
        B, y = measured.weighted(self.A)
        selection = choose_damp(B, y, by_rule, L=L, x_prior=self.middle)
        start = selection.damp.double() * measured.curvature(self.A.ndim).sqrt()
        if self.damp == "discrepancy":
            keep = None if measured.rows is None else measured.rows > 0
            return by_discrepancy(solve, start, A, counts, measured.expected, keep)
        return replace(solve(start), selection=selection)
