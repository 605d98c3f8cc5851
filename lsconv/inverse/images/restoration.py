"""The restoration of a blurred image: its solution under each prior, and the standard deviations of its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError
from lsconv.inverse.admm.proximal import Bounds
from lsconv.inverse.convex_arguments import check_bounds, check_options
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.damping.rules import RULES, WITH_NOISE
from lsconv.inverse.damping.selection import Selection
from lsconv.inverse.images.blur import central_blur, level_for_mean
from lsconv.inverse.images.identical_groups import EqualGroups
from lsconv.inverse.images.image_noise import Measurement, NoiseModel
from lsconv.inverse.plug_and_play import plug_and_play
from lsconv.inverse.poisson import by_discrepancy, penalised_poisson
from lsconv.inverse.tikhonov import tikhonov
from lsconv.inverse.total_variation import total_variation
from lsconv.inverse.uncertainty.posterior import noise_level, posterior_std
from lsconv.krylov.loop.entry import with_item_of
from lsconv.krylov.loop.problem import check_damp
from lsconv.krylov.loop.solution import Solution, join_parts
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.padding_modes import MODES
from lsconv.operators.varying_convolution import VaryingConvolution

__all__ = ["Bounds", "Denoiser", "Regularisation", "Restoration"]

Denoiser = Callable[[Tensor], Tensor]

_ANY = ("rtol", "max_iter", "raise_on_failure")
# The options of each solver that a user may give; the keys are the words of error messages.
_OPTIONS = {
    "Poisson noise": (*_ANY, "x0"),
    "a denoiser": (*_ANY, "callback"),
    "total variation": (*_ANY, "x0", "callback", "check_finite", "isotropic", "coupled", "huber", "L"),
    "a quadratic prior": (*_ANY, "x0", "atol", "method", "memory_limit", "check_finite"),
}


@dataclass(frozen=True, eq=False)
class Regularisation:
    """The regularisation of :func:`lsconv.deconvolve`, from its arguments of the same names.

    Attributes:
        prior: "gradient", "tikhonov", "tv", or a denoiser.
        damp: a number, one per batch item, or a rule.
        weight: the weight of the total variation; None: chosen from the noise.
        bounds: lowest and highest value of x, or None.
        options: the options of the solver.
    """

    prior: str | Denoiser
    damp: float | Tensor | str
    weight: float | Tensor | None
    bounds: Bounds | None
    options: dict[str, Any]

    def check(self, noise: str, known: list[str]) -> None:
        """Refuse arguments and options that the prior does not take, before any work is done.

        Args:
            noise: "gaussian" or "poisson".
            known: the arguments of :func:`lsconv.deconvolve`, for the message.

        Raises:
            ArgumentError, ArgumentTypeError: an unknown word, or an argument or option of another prior.
        """
        prior, damp = self.prior, self.damp
        if not (callable(prior) or (isinstance(prior, str) and prior in ("tv", "tikhonov", "gradient"))):
            raise ArgumentError(f'prior: expected "gradient", "tikhonov", "tv" or a denoiser, got {prior!r}')
        if isinstance(damp, str) and damp not in ("auto", *RULES):
            rules = ", ".join(map(repr, ("auto", *RULES)))
            raise ArgumentError(f"damp: expected a number or one of the rules {rules}, got {damp!r}")
        if prior == "tv" and not (isinstance(damp, str) and damp == "auto"):
            raise ArgumentError('damp: is of the other priors; prior="tv" has weight=, chosen where it is left out')
        if prior != "tv" and self.weight is not None:
            raise ArgumentError('weight: is of prior="tv"; the other priors have damp=')
        variation = (
            "total variation" if prior == "tv" else "Poisson noise" if noise == "poisson" else "a quadratic prior"
        )
        taker = "a denoiser" if callable(prior) else variation
        unknown = sorted(set(self.options) - set(_OPTIONS[taker]))
        if unknown:
            raise ArgumentTypeError(
                f"{', '.join(unknown)}: {taker} takes no such option; deconvolve has {', '.join(known)}; for {taker} "
                f"also {', '.join(_OPTIONS[taker])}"
            )

    def with_item(self) -> Regularisation:
        """Return the regularisation of an empty batch with one item added."""
        damp, weight = self.damp, self.weight
        return replace(
            self,
            damp=with_item_of(damp, damp.ndim, 1) if isinstance(damp, Tensor) else damp,
            weight=with_item_of(weight, weight.ndim, 1) if isinstance(weight, Tensor) else weight,
        )

    def resolved(self, A: LinearOperator, measured: Measurement) -> Regularisation:
        """Fill in the rule for "auto" and the bounds of photons, and move damp to the device of A.

        Raises:
            ArgumentError, ArgumentTypeError: the bounds are not the ends of an interval.
        """
        damp, bounds = self.damp, self.bounds
        if isinstance(damp, str) and damp == "auto":
            damp = "gcv" if measured.noise_std is None or measured.noise_is_map else "upre"
        if bounds is None and measured.counts is not None:
            bounds = (0.0, None)
        bounds = None if bounds == (None, None) else bounds
        if bounds is not None:
            check_bounds(bounds, A)
        damp = damp.to(A.device) if isinstance(damp, Tensor) else damp
        options = {name: value for name, value in self.options.items() if value is not None}
        return replace(self, damp=damp, bounds=bounds, options=options)

    def is_quadratic(self, model: NoiseModel) -> bool:
        """Tell whether the answer is linear in the image, so that it has gradients and standard deviations."""
        plain = model.noise == "gaussian" and not model.one_sided
        return plain and self.bounds is None and self.prior in ("gradient", "tikhonov")


@dataclass(frozen=True, eq=False)
class Restoration:
    """The problem of restoring one image.

    Attributes:
        A: the blur.
        measured: the image with its noise.
        x_prior: the constant image whose blur has the mean of the image; quadratic priors penalise the difference to
            it.
        regularisation: the prior, its strength, and the bounds.
    """

    A: Convolution | VaryingConvolution
    measured: Measurement
    x_prior: Tensor
    regularisation: Regularisation

    def solve(self) -> Solution:
        """Restore the image on the whole field, with a certificate."""
        name, poisson = self.regularisation.prior, self.measured.counts is not None
        if callable(name):
            if poisson:
                raise MethodError('prior: a denoiser is served with noise="gaussian"; use "gradient" or "tv"')
            return self._with_denoiser(name)
        if name == "tv":
            return self._with_total_variation(poisson)
        return self._with_poisson_likelihood() if poisson else self._with_quadratic(self._penalty())

    def error_bars(self, solution: Solution, count: int) -> Tensor:
        """The standard deviations of the answer on the whole field, from ``count`` samples if that is large."""
        A, y = self.measured.weighted(self.A)
        return standard_deviations(A, y, solution.damp, self._penalty(), self.x_prior, self.measured.noise_std, count)

    def _penalty(self) -> Gradient | None:
        """The L of a quadratic prior; None: the identity."""
        return self._gradient() if self.regularisation.prior == "gradient" else None

    def _gradient(self) -> Gradient:
        """The forward differences of the field, periodic where the blur is."""
        A = self.A
        boundary = "periodic" if MODES[A.padding_mode].periodic else "neumann"
        return Gradient(A.in_shape, ndim=A.ndim, boundary=boundary, dtype=A.dtype, device=A.device)

    def _with_quadratic(self, L: Gradient | None) -> Solution:
        """Restore by Tikhonov regularisation with the penalty L, and choose damp where it is a rule."""
        (A, y), damp = self.measured.weighted(self.A), self.regularisation.damp
        # A map of standard deviations is in the weights already, and rules that need no noise refuse a number.
        ruled = isinstance(damp, str) and damp in WITH_NOISE
        noise_std = self.measured.noise_std if ruled or not self.measured.noise_is_map else None
        selection = None
        if isinstance(self.A, VaryingConvolution) and isinstance(damp, str):
            selection = self._damp_in_the_centre(self.A, damp, with_gradient=L is not None, noise_std=noise_std)
            damp, noise_std = selection.damp, None
        options = {"damp": damp, "noise_std": noise_std, **self.regularisation.options}
        solution = image_tikhonov(A, y, L, self.x_prior, self.regularisation.bounds, options, self.measured.at_least)
        return solution if selection is None else replace(solution, selection=selection)

    def _damp_in_the_centre(
        self, A: VaryingConvolution, rule: str, *, with_gradient: bool, noise_std: float | Tensor | None
    ) -> Selection:
        """Choose damp for the central part of the image with the PSF there, because rules need a convolution."""
        B, cells = central_blur(A)
        measured = self.measured.without_lower_bounds()
        rows = None if measured.rows is None else measured.rows.expand(measured.y.shape)[cells]
        centre = replace(self, A=B, measured=replace(measured, y=measured.y[cells], rows=rows))
        x_prior = level_for_mean(B, self.measured.mean(tuple(range(-B.ndim, 0))))
        L = centre._gradient() if with_gradient else None
        return choose_damp(*centre.measured.weighted(B), rule, L=L, x_prior=x_prior, noise_std=noise_std)

    def _with_denoiser(self, denoiser: Denoiser) -> Solution:
        """Restore by plug-and-play from the Tikhonov solution, which also chooses damp where that is a rule."""
        if self.measured.at_least is not None:
            raise MethodError('one_sided: is served with prior "gradient", "tikhonov" and "tv", not with a denoiser')
        A, y = self.measured.weighted(self.A)
        start = replace(self, regularisation=replace(self.regularisation, bounds=None, options={}))._with_quadratic(
            None
        )
        return plug_and_play(
            A, y, denoiser, start.damp**2, bounds=self.regularisation.bounds, x0=start.x, **self.regularisation.options
        )

    def _with_total_variation(self, poisson: bool) -> Solution:
        """Restore with total variation; a weight that is not given follows from the noise, or the fit of photons."""
        measured, weight = self.measured, self.regularisation.weight
        options = {"bounds": self.regularisation.bounds, "at_least": measured.at_least, **self.regularisation.options}
        if poisson:
            assert measured.counts is not None
            A, y = measured.photon_operator(self.A), measured.counts
            options.update(noise="poisson", background=measured.expected)
        else:
            A, y = measured.weighted(self.A)
        check_options(A, y, "image", options)  # before the choice of the weight, which takes time
        if weight is not None or not poisson:
            return total_variation(A, y, self._variation_weight() if weight is None else weight, **options)

        def solve(strength: Tensor, x0: Tensor | None) -> Solution:
            return total_variation(A, y, strength, x0=x0, **options)

        options.pop("x0", None)
        first = self._variation_weight().double() / 4
        return by_discrepancy(solve, first, A, y, measured.expected, measured.measured_pixels)

    def _variation_weight(self) -> Tensor:
        r"""Half the variance of the noise over the mean ``|gradient|``, per item.

        Twice this is the weight of the maximum a posteriori estimate under white noise and Laplace distributed
        differences. The factor of one half is empirical, because differences of images have heavier tails: the best
        factors were 0.1 to 0.9 for eight images of scikit-image (none of those of ``python -m benchmarks restoration``)
        under three blurs, and one half lost 0.24 dB on the average. The mean gradient is that of the solution with the
        gradient prior and GCV. The variance of noise that is not given is estimated (:meth:`Measurement.variance`,
        after Donoho and Johnstone 1994); the Poisson likelihood needs none.
        """
        A, measured, L = self.A, self.measured.without_lower_bounds(), self._gradient()
        variance = measured.variance(A.ndim)
        by_gcv = replace(self.regularisation, bounds=None, damp="gcv", options={})
        smooth = replace(self, measured=replace(measured, noise_std=None), regularisation=by_gcv)
        x = smooth._with_quadratic(L).x
        slope = torch.linalg.vector_norm(L(x), dim=(-A.ndim - 2, -A.ndim - 1)).flatten(-A.ndim).mean(-1)
        return torch.where(slope > 0, 0.5 * variance / slope.clamp_min(torch.finfo(slope.dtype).tiny), 0)

    def _with_poisson_likelihood(self) -> Solution:
        """Restore with a quadratic prior and the Poisson likelihood."""
        measured, damp, L = self.measured, self.regularisation.damp, self._penalty()
        assert measured.counts is not None
        A, counts = measured.photon_operator(self.A), measured.counts

        def solve(damp: Tensor, x0: Tensor | None = None) -> Solution:
            options = self.regularisation.options if x0 is None else {**self.regularisation.options, "x0": x0}
            return penalised_poisson(A, counts, damp, L=L, x_prior=self.x_prior, background=measured.expected,
                                     bounds=self.regularisation.bounds, **options)  # fmt: skip

        if not isinstance(damp, str):
            return solve(check_damp(damp, A))
        B, y = measured.weighted(self.A)
        selection = choose_damp(B, y, "gcv" if damp in WITH_NOISE else damp, L=L, x_prior=self.x_prior)
        start = selection.damp.double() * measured.curvature(self.A.ndim).sqrt()
        if damp == "discrepancy":
            return by_discrepancy(solve, start, A, counts, measured.expected, measured.measured_pixels)
        return replace(solve(start), selection=selection)


def image_tikhonov(
    A: LinearOperator,
    y: Tensor,
    L: Gradient | None,
    x_prior: Tensor,
    bounds: Bounds | None,
    options: dict[str, Any],
    at_least: Tensor | None = None,
) -> Solution:
    """Solve by Tikhonov regularisation; channels under one PSF are one problem with many data and one damp.

    Args:
        A: the blur, with rows multiplied or masked.
        y: the data.
        L: the penalty; None: the identity.
        x_prior: the constant image in the penalty ``||L (x - x_prior)||``, ``(*batch, *in_shape)``.
        bounds: lowest and highest value of x, or None.
        options: the options of :func:`lsconv.tikhonov`, damp among them.
        at_least: True where the data are lower bounds; None: nowhere.
    """
    ndim, options = len(A.in_shape) - 1, dict(options)
    if isinstance(options["damp"], str):
        two_sided = None if at_least is None else ~at_least
        selection = choose_damp(
            A, y, options["damp"], L=L, x_prior=x_prior, noise_std=options.pop("noise_std"), observed=two_sided
        )
        found = image_tikhonov(A, y, L, x_prior, bounds, {**options, "damp": selection.damp}, at_least)
        return replace(found, selection=selection)
    equal = EqualGroups.of(A)
    if equal is not None:
        gradient = None if L is None else Gradient(equal.A.in_shape, ndim=ndim, boundary=L.boundary, dtype=A.dtype,
                                                device=A.device)  # fmt: skip
        rows = None if at_least is None else equal.split(at_least)
        found = image_tikhonov(equal.A, equal.split(y), gradient, equal.split(x_prior), bounds, options, rows)
        return join_parts(replace(found, x=equal.join(found.x)))
    if bounds is not None or at_least is not None:
        prior = x_prior.expand(*x_prior.shape[: -ndim - 1], *A.in_shape)
        return tikhonov(A, y, L=L, x_prior=prior, bounds=bounds, at_least=at_least, **options)
    # The residual of a constant image is rounding, which needs an absolute tolerance.
    norms = torch.linalg.vector_norm(y.flatten(-ndim - 1), dim=-1)
    options.setdefault("atol", 8 * torch.finfo(y.dtype).eps * float(norms.detach().min()))
    # The gradient of the constant x_prior is zero; solving for the difference to it keeps more digits.
    return tikhonov(A, y, L=L, x_prior=x_prior, **options)


@torch.no_grad()
def standard_deviations(
    A: LinearOperator,
    y: Tensor,
    damp: Tensor,
    L: LinearOperator | None,
    x_prior: Tensor,
    noise_std: float | Tensor | None,
    count: int,
) -> Tensor:
    """The posterior standard deviations of ``tikhonov(A, y, damp, L=L, x_prior=x_prior)``.

    Args:
        A, y, damp, L, x_prior: the problem as solved.
        noise_std: standard deviation of the noise in the entries of y; None: estimated from the residual, for each
            channel where all channels have the same kernels.
        count: number of samples where the unknowns are too many for an exact map; their seed is fixed.

    Returns:
        ``(*batch, *in_shape)``.
    """
    # Where A and L treat all channels alike, one channel is the operator and the channels are a batch.
    equal = EqualGroups.of(A, L)
    if equal is not None and (L is None or equal.L is not None):
        prior = x_prior.expand(*x_prior.shape[: x_prior.ndim - len(A.in_shape)], *A.in_shape)
        bars = standard_deviations(equal.A, equal.split(y), damp, equal.L, equal.split(prior), noise_std, count)
        return equal.join(bars.expand(equal.groups, *bars.shape[-damp.ndim - len(A.in_shape) :]))
    sigma = noise_level(A, y, damp, L=L, x_prior=x_prior) if noise_std is None else noise_std
    generator = torch.Generator(A.device).manual_seed(0)
    std: Tensor = posterior_std(A, damp, noise_std=sigma, L=L, count=count, generator=generator)
    return std
