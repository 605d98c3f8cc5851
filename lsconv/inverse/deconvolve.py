r"""deconvolve: the one call for images, from a blurred image and its PSF to the restored one.

The image is the true convolution of the field with the PSF, plus noise,

    y[i] = sum_j psf[j] x[i - j + c],   c = size // 2 per axis,

so that a PSF with a single one at its centre c is the identity. In torch's convention (a cross-correlation) this is the
flipped PSF with padding (size - 1) // 2 on the left and size // 2 on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, MethodError, ShapeError
from lsconv.factored.batch_axes import Reduction
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.identical_groups import SharedGroups
from lsconv.inverse.image_layout import Layout, spatial_axes
from lsconv.inverse.plug_and_play import plug_and_play
from lsconv.inverse.tikhonov import tikhonov
from lsconv.inverse.total_variation import check_options, total_variation
from lsconv.krylov.gradients.parameters import any_requires_grad
from lsconv.krylov.loop.entry import checks_numbers, cut, filled
from lsconv.krylov.loop.solution import Solution, together
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient
from lsconv.operators.transforms import untraced

__all__ = ["blur_operator", "deconvolve"]

Denoiser = Callable[[Tensor], Tensor]
Bounds = tuple[float | None, float | None]

_WEIGHT_SHARE = 0.5  # see _variation_weight
_PADDING_MODES = {"unknown": "zeros", "zero": "zeros", "periodic": "circular", "reflect": "reflect"}


def blur_operator(
    psf: Tensor,
    size: tuple[int, ...],
    *,
    boundary: str = "unknown",
    channels: int = 1,
    ndim: int | None = None,
) -> Convolution:
    r"""The blur of an image by a PSF as an operator, from the field to an image of the given size.

    .. math:: y[i] = \sum_j \mathrm{psf}[j]\, x[i - j + c], \qquad c = \lfloor \mathrm{size}/2 \rfloor

    a true convolution, the PSF's centre being its pixel ``size // 2`` on every axis; channels are blurred apart.

    Args:
        psf: ``(*size)``, or with ``ndim`` given ``(*batch, 1 or channels, *size)``; its scale is the operator's.
        size: spatial size of the blurred image.
        boundary: what the field is beyond the image: "unknown" (the field is larger than the image by the PSF less
            one, and nothing is assumed), "zero", "periodic" or "reflect" (mirrored about the border pixels).
        channels: channels of image and field.
        ndim: number of spatial axes, the PSF's by default.

    Returns:
        A :class:`Convolution` from ``(channels, *field)`` to ``(channels, *size)``.

    Raises:
        ArgumentError: an unknown boundary.
        ShapeError: shapes that do not fit, or a PSF larger than the image.

    Example:
        >>> psf = torch.tensor([[0.5, 0.5, 0.0]])
        >>> A = lsconv.blur_operator(psf, (1, 4), boundary="zero")
        >>> A(torch.tensor([[[1.0, 2.0, 4.0, 8.0]]]))
        tensor([[[1.5000, 3.0000, 6.0000, 4.0000]]])
    """
    if boundary not in _PADDING_MODES:
        raise ArgumentError(f"boundary: expected one of {', '.join(map(repr, _PADDING_MODES))}, got {boundary!r}")
    spatial = spatial_axes(psf.ndim, ndim)
    size = tuple(size)
    if len(size) != spatial:
        raise ShapeError(f"size: expected {spatial} numbers for a PSF of {spatial} axes, got {size}")
    extent = tuple(psf.shape[-spatial:])
    if any(k > n for k, n in zip(extent, size, strict=True)):
        raise ShapeError(f"psf: its size {extent} exceeds that of the image, {size}")
    kernels = psf.shape[-spatial - 1] if psf.ndim > spatial else 1
    if kernels not in (1, channels):
        raise ShapeError(
            f"psf: expected 1 or {channels} kernels before its {spatial} axes, got shape {tuple(psf.shape)}"
        )
    weight = psf.flip(tuple(range(-spatial, 0)))
    if psf.ndim == spatial:
        weight = weight[None]
    weight = weight.unsqueeze(-spatial - 1).expand(*psf.shape[: -spatial - 1], channels, 1, *extent).contiguous()
    known = boundary != "unknown"
    return Convolution(
        weight,
        size if known else tuple(n + k - 1 for n, k in zip(size, extent, strict=True)),
        padding=[((k - 1) // 2, k // 2) for k in extent] if known else 0,
        groups=channels,
        padding_mode=_PADDING_MODES[boundary],
    )


@untraced
@checks_numbers
def deconvolve(
    image: Tensor | np.ndarray[Any, Any],
    psf: Tensor | np.ndarray[Any, Any],
    *,
    boundary: str = "unknown",
    damp: float | Tensor | str = "gcv",
    prior: str | Denoiser = "gradient",
    weight: float | Tensor | None = None,
    bounds: Bounds | None = None,
    channels: str | None = None,
    ndim: int | None = None,
    noise_std: float | None = None,
    crop: bool = True,
    **options: Any,
) -> Solution:
    r"""Restore a blurred image.

    .. math:: \min_x \|A x - y\|^2 + \mathrm{damp}^2 \|L (x - m)\|^2

    with A the blur (:func:`blur_operator`: a true convolution, the PSF centred on its pixel ``size // 2``) and m the
    constant that blurs to the image's mean. ``prior`` says what L is: "gradient" the forward differences, "tikhonov"
    the identity. "tv" is :func:`lsconv.total_variation`. A function is taken for a denoiser and given to
    :func:`lsconv.plug_and_play`; it gets and returns ``(*batch, channels, *field)``.

    The differences of natural images are closer to white than their values are, which the rules for damp assume: with
    "gradient" the damp of "gcv" comes within 0.2 dB of the best one on the benchmark's scenes, with "tikhonov" it is
    too small and loses 1 to 5 dB (``python -m benchmarks restoration``).

    Integer images are divided by the largest value of their type, solved in [0, 1], and answered in their type,
    rounded and cut off. float64 is solved in float64, everything else in float32.

    With "tikhonov" and "gradient" x is differentiable with respect to image, psf and a damp given as a tensor (one that
    a rule chose is held fixed); with the other priors it is not.

    Args:
        image: a tensor or array without missing pixels, real or complex, ``(*batch, *size)``, or with ``channels`` set
            ``(*batch, C, *size)`` or ``(*batch, *size, C)``. Every batch item is restored apart, the channels of an
            item together.
        psf: the point spread function, ``(*size)``, as many axes as the image has spatial ones. With ``ndim`` given
            it may have more in front: ``(*batch, *size)``, or ``(*batch, 1 or C, *size)`` where there are channels.
        boundary: "unknown" (the image shows a part of a larger scene), "zero", "periodic" or "reflect".
        damp: the damping in units of the PSF's transfer function (a PSF of sum one passes the mean with factor one): a
            number, a tensor with one per batch item, or the name of a rule for it (see :func:`lsconv.tikhonov`). Given
            a denoiser, the square root of ADMM's penalty.
        prior: "gradient", "tikhonov", "tv", or a denoiser.
        weight: of the total variation, for ``prior="tv"``, a number or one per batch item; None: the variance of the
            noise (``noise_std``, or measured on the image) over the mean slope of the gradient prior's answer,
            halved.
        bounds: lowest and highest value of x, None for none, for "tv" and denoisers; same units.
        channels: "first", "last", or None where the image has none.
        ndim: number of spatial axes; those of the PSF by default.
        noise_std: standard deviation of the noise, same units; some rules for damp need it.
        crop: give back the image's own pixels; False gives all of the field, which with boundary "unknown" is larger
            by the PSF less one, ``(size - 1) // 2`` of it before the image's first pixel.
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
    layout = Layout.of(image, psf, channels, ndim)
    y, kernel = layout.to_tensor(image), layout.kernel(psf, image)
    batch = y.shape[: -layout.ndim - 1]
    if 0 in batch:  # solved with an item of zeros, which is cut away in the end
        y = filled(y, len(batch))
        damp = filled(damp, damp.ndim, 1) if isinstance(damp, Tensor) else damp
        weight = filled(weight, weight.ndim, 1) if isinstance(weight, Tensor) else weight
    A = blur_operator(kernel, layout.size(y), boundary=boundary, channels=y.shape[-layout.ndim - 1], ndim=layout.ndim)
    if isinstance(damp, Tensor):
        damp = damp.to(y.device)
    if not crop and boundary != "unknown":
        crop = True  # the field is the image
    first = [(k - 1) // 2 if boundary == "unknown" else 0 for k in A.kernel_size]  # pixel of the image in the field
    if crop and not any_requires_grad(kernel):
        A, first = _without_margins(A, first, layout.size(y))
    middle = _mean_level(A, y)
    solve: dict[str, Any] = {"damp": damp, "noise_std": noise_std, **options}
    if (callable(prior) or prior == "tv") and any_requires_grad(y, kernel):
        raise MethodError(
            f'prior: {prior!r} has no gradient by image or psf; use "gradient" or "tikhonov", or torch.no_grad()'
        )
    if callable(prior):
        solution = _with_denoiser(A, y, prior, middle, bounds, solve)
    elif prior == "tv":
        solution = _with_total_variation(A, y, weight, noise_std, {"bounds": bounds, **options})
    elif prior in ("tikhonov", "gradient"):
        if bounds is not None:
            raise MethodError(f'bounds: prior={prior!r} has no bounds; use prior="tv" or a denoiser')
        solution = _with_quadratic(A, y, prior == "gradient", middle, solve)
    else:
        raise ArgumentError(f'prior: expected "gradient", "tikhonov", "tv" or a denoiser, got {prior!r}')
    x = solution.x
    if crop:
        for axis, (size, start) in enumerate(zip(layout.size(y), first, strict=True), start=-layout.ndim):
            x = x.narrow(axis, start, size)
    solution = replace(solution, x=layout.answer(x, image))
    return cut(solution, batch) if 0 in batch else solution


# ---------------------------------------------------------------------------------------------------- the problems


def _without_margins(A: Convolution, first: list[int], size: tuple[int, ...]) -> tuple[Convolution, list[int]]:
    """The blur without the zeros around its PSF, and the image's first pixel in its field, which may be smaller."""
    way = Reduction.trimmed(A)
    if way is None:
        return A, first
    moved = [start - cells.start for start, cells in zip(first, way.inputs, strict=True)]
    inside = all(m >= 0 and m + n <= field for m, n, field in zip(moved, size, way.B.spatial_in, strict=True))
    return (way.B, moved) if inside else (A, first)


def _mean_level(A: Convolution, y: Tensor) -> Tensor:
    """``(*batch, *in_shape)``: per channel the constant that blurs to the mean of y; zero where there is none."""
    axes = tuple(range(-A.ndim, 0))
    total = A.weight.sum(axes, keepdim=True).squeeze(-A.ndim - 1)
    size = A.weight.abs().sum(axes, keepdim=True).squeeze(-A.ndim - 1)
    has_mean = total.abs() > 1e-3 * size
    level = torch.where(has_mean, y.mean(axes, keepdim=True) / torch.where(has_mean, total, 1), 0)
    return level.expand(*level.shape[: -A.ndim], *A.spatial_in)


def _gradient(A: Convolution) -> Gradient:
    boundary = "periodic" if A.padding_mode == "circular" else "neumann"
    return Gradient(A.in_shape, ndim=A.ndim, boundary=boundary, dtype=A.dtype, device=A.device)


def _with_quadratic(A: Convolution, y: Tensor, gradient: bool, middle: Tensor, solve: dict[str, Any]) -> Solution:
    """Tikhonov's answer; channels under one PSF are one problem with many data, but for the damp, which they share."""
    if isinstance(solve["damp"], str):
        L = _gradient(A) if gradient else None
        selection = choose_damp(A, y, solve["damp"], L=L, x_prior=middle, noise_std=solve.pop("noise_std"))
        return replace(_with_quadratic(A, y, gradient, middle, {**solve, "damp": selection.damp}), selection=selection)
    shared = SharedGroups.of(A)
    if shared is not None:
        apart = _with_quadratic(shared.A, shared.split(y), gradient, shared.split(middle), solve)
        return together(replace(apart, x=shared.join(apart.x)))
    # Where the constant alone explains the image, what is left of it is rounding and meets no relative tolerance.
    norms = torch.linalg.vector_norm(y.flatten(-A.ndim - 1), dim=-1)
    solve.setdefault("atol", 8 * torch.finfo(y.dtype).eps * float(norms.detach().min()))
    # differences do not see the constant m; it keeps its digits all the same
    return tikhonov(A, y, L=_gradient(A) if gradient else None, x_prior=middle, **solve)


def _with_total_variation(
    A: Convolution,
    y: Tensor,
    weight: float | Tensor | None,
    noise_std: float | None,
    options: dict[str, Any],
) -> Solution:
    check_options(A, y, "image", options)  # before the weight is sought, which takes time
    if weight is None:
        weight = _variation_weight(A, y, noise_std)
    return total_variation(A, y, weight, **options)


def _variation_weight(A: Convolution, y: Tensor, noise_std: float | None) -> Tensor:
    r"""``0.5 * variance of the noise / mean |gradient|``, per item.

    The maximum a posteriori estimate under white noise and Laplace distributed differences has this weight but for the
    factor, which is measured: differences of images have heavier tails, and eight images of scikit-image (none of
    those of ``python -m benchmarks restoration``) under three blurs were restored best with 0.1 to 0.9 times it, and
    half of it lost 0.24 dB on the average. The mean is that of the gradient prior's answer by GCV. Noise that is not
    given is measured on the mixed differences of y, where a blurred image has next to nothing, by their median
    (Donoho and Johnstone 1994).
    """
    if noise_std is None:
        fine = y
        for axis in range(-A.ndim, 0):
            fine = fine.diff(dim=axis) if fine.shape[axis] > 1 else fine
        variance = (fine.abs().flatten(-A.ndim - 1).median(-1).values / 0.6745) ** 2
        variance = variance / 2 ** sum(size > 1 for size in A.spatial_out)
    else:
        variance = torch.as_tensor(noise_std, dtype=y.real.dtype, device=y.device) ** 2
    x = _with_quadratic(A, y, True, _mean_level(A, y), {"damp": "gcv", "noise_std": None}).x
    slope = torch.linalg.vector_norm(_gradient(A)(x), dim=(-A.ndim - 2, -A.ndim - 1)).flatten(-A.ndim).mean(-1)
    weight: Tensor = _WEIGHT_SHARE * variance / slope.clamp_min(torch.finfo(y.dtype).tiny)
    return torch.where(slope > 0, weight, 0)


def _with_denoiser(
    A: Convolution, y: Tensor, denoiser: Denoiser, middle: Tensor, bounds: Bounds | None, solve: dict[str, Any]
) -> Solution:
    """Plug-and-play from Tikhonov's answer, which also chooses damp where that is a rule."""
    start = tikhonov(A, y, solve.pop("damp"), x_prior=middle, noise_std=solve.pop("noise_std"))
    return plug_and_play(A, y, denoiser, start.damp**2, bounds=bounds, x0=start.x, **solve)
