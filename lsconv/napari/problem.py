"""The deconvolution problem of a layer: an image of any axes, as fields that a PSF blurs; independent of Qt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lsconv
from lsconv.app import Evidence, Kernel, rounded, working_dtype

__all__ = ["MODELS", "CancelledError", "Problem", "Restored", "Settings", "psf_of"]

MODELS = {"gaussian": "sigma", "disk": "radius", "motion": "length", "box": "width"}
_CROP = {2: (160, 160), 3: (24, 96, 96)}  # pixels of a preview, by the axes of the PSF

Index = tuple[int | slice, ...]
Callback = Callable[[], bool]


class CancelledError(Exception):
    """The restoration was cancelled, and has no result."""


class _Cancellable(TorchFunctionMode):
    """A context in which every operation of torch first calls ``cancelled``.

    Raises:
        CancelledError: the callback has returned True.
    """

    def __init__(self, cancelled: Callback) -> None:
        super().__init__()
        self._cancelled = cancelled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._cancelled():
            raise CancelledError
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Settings:
    """The choices of the widget.

    Attributes:
        boundary, noise, background, gain, prior: see :func:`lsconv.deconvolve`.
        strength: damp, or the weight of the total variation; None: chosen by a rule.
        nonnegative: whether the values are constrained to be >= 0.
        error_bars: whether to compute the standard deviations of the pixels.
    """

    boundary: str = "unknown"
    noise: str = "gaussian"
    background: float = 0.0
    gain: float = 1.0
    prior: str = "gradient"
    strength: float | None = None
    nonnegative: bool = False
    error_bars: bool = False

    def options(self) -> dict[str, Any]:
        """The settings as arguments of :func:`lsconv.deconvolve`."""
        options: dict[str, Any] = {"boundary": self.boundary, "noise": self.noise, "prior": self.prior,
                                   "background": self.background, "error_bars": self.error_bars}  # fmt: skip
        if self.noise == "poisson":
            options["gain"] = self.gain
        if self.nonnegative:
            options["bounds"] = (0.0, None)
        if self.strength is not None:
            options["weight" if self.prior == "tv" else "damp"] = self.strength
        return options


@dataclass(frozen=True, eq=False)
class Restored:
    """The answer for one field.

    Attributes:
        values: the restored field, ``(*size)`` or ``(*size, 3 or 4)``, in the image's number type.
        std: the standard deviations of the pixels, ``(*size)``, the mean over the colours; or None.
        strength: the damp or weight used.
        converged: whether the certificate met its tolerance.
        status: the reason why the solve ended, in words.
        evidence: the parts of the report, or None where it is not kept.
        remarks: the warnings of the solver.
    """

    values: np.ndarray[Any, Any]
    std: np.ndarray[Any, Any] | None
    strength: float
    converged: bool
    status: str
    evidence: Evidence | None
    remarks: tuple[str, ...]


def psf_of(blur: str, size: float, angle: float = 0.0, depth: float = 0.0) -> Tensor:
    """Make the PSF of a model, ``(*size)``.

    Args:
        blur: one of ``MODELS``.
        size: the sigma, radius, length or width in pixels, as ``MODELS`` names it.
        angle: the direction of a motion, in degrees from horizontal.
        depth: sigma of a Gaussian along depth, in slices; 0 for a PSF of two axes.

    Example:
        >>> psf_of("gaussian", 1.0).shape, psf_of("gaussian", 1.0, depth=2.0).shape, psf_of("box", 3).shape
        (torch.Size([9, 9]), torch.Size([17, 9, 9]), torch.Size([3, 3]))
    """
    if blur == "gaussian":
        return lsconv.psf.gaussian((depth, size, size)) if depth > 0 else lsconv.psf.gaussian(size)
    if blur == "disk":
        return lsconv.psf.disk(size)
    return lsconv.psf.motion(size, angle) if blur == "motion" else lsconv.psf.box(max(1, round(size)))


@dataclass(frozen=True, eq=False)
class Problem:
    """An image of any axes, the PSF and the axes that it blurs, and the settings of the restoration.

    Attributes:
        data: the image, ``(*shape)`` or ``(*shape, 3 or 4)``; an array, or an object that is indexed like one.
        colour: whether the last axis is that of colours.
        psf: the PSF, ``(*size)`` with two or three axes.
        axes: the axes of the image that the PSF blurs.
        mask: ``(*shape)``, other than zero where pixels are bad; or None.
        settings: the choices of the widget.
    """

    data: Any
    colour: bool
    psf: Tensor
    axes: tuple[int, ...]
    mask: Any
    settings: Settings

    @classmethod
    def of(
        cls,
        data: Any,
        psf: Any,
        settings: Settings,
        *,
        colour: bool = False,
        mask: Any = None,
        labels: Sequence[str] = (),
    ) -> Problem:
        """Make the problem from the data of layers.

        Args:
            data: the image.
            psf: the PSF, divided by its sum; its leading axes of length one are dropped.
            settings: the choices of the widget.
            colour: whether the last axis of the image is that of colours.
            mask: labels, other than zero where pixels are bad, of the image's shape or its last axes; or None.
            labels: the names of the image's axes; depth is the axis named z, else the third from the end.

        Raises:
            ArgumentError: image, PSF and mask do not fit together.
        """
        shape = tuple(data.shape[:-1] if colour else data.shape)
        kernel = torch.as_tensor(np.asarray(psf, dtype=np.float64))
        while kernel.ndim > 2 and kernel.shape[0] == 1:
            kernel = kernel[0]
        if kernel.sum() > 0:  # the solver refuses any other PSF
            kernel = kernel / kernel.sum()
        if kernel.ndim not in (2, 3):
            raise lsconv.ArgumentError(f"PSF: an array of shape {tuple(kernel.shape)}, expected two or three axes")
        if len(shape) < kernel.ndim:
            raise lsconv.ArgumentError(
                f"PSF: has {kernel.ndim} axes, the image {len(shape)}; choose a PSF of {len(shape)} axes"
            )
        plane = (len(shape) - 2, len(shape) - 1)
        named = [name.lower() for name in labels]
        depth = named.index("z") if "z" in named[:-2] else len(shape) - 3
        axes = plane if kernel.ndim == 2 else (depth, *plane)
        if mask is not None:
            if tuple(mask.shape) != shape[len(shape) - mask.ndim :]:
                raise lsconv.ArgumentError(
                    f"bad pixels: of shape {tuple(mask.shape)}, expected the image's, {shape}, or its last axes"
                )
            mask = np.broadcast_to(np.asarray(mask), shape)
        if settings.boundary != "zero":
            for axis, size in zip(axes, kernel.shape, strict=True):
                if size > shape[axis]:
                    raise lsconv.ArgumentError(
                        f"PSF: its size {tuple(kernel.shape)} exceeds the image's, {tuple(shape[a] for a in axes)}; "
                        f"choose a smaller one, or zero beyond the edge"
                    )
        return cls(data, colour, kernel, axes, mask, settings)

    @property
    def shape(self) -> tuple[int, ...]:
        """The image's shape, without the axis of colours."""
        return tuple(self.data.shape[:-1] if self.colour else self.data.shape)

    def fields(self) -> list[Index]:
        """The indices of the fields, each an image or a volume."""
        leading = [1 if axis in self.axes else n for axis, n in enumerate(self.shape)]
        return [self._index(pixel) for pixel in np.ndindex(*leading)]

    def _index(self, pixel: Sequence[int]) -> Index:
        return tuple(slice(None) if axis in self.axes else int(i) for axis, i in enumerate(pixel))

    def field_at(self, pixel: Sequence[int]) -> Index:
        """The index of the field that a pixel lies in; a pixel outside the image counts as the nearest inside."""
        return self._index([min(max(int(i), 0), n - 1) for i, n in zip(pixel, self.shape, strict=True)])

    def cropped(self, pixel: Sequence[int]) -> tuple[Problem, tuple[slice, ...]]:
        """The problem of a small part of one field around a pixel, and the part's slices; the boundary is unknown."""
        largest = dict(zip(self.axes, _CROP[len(self.axes)], strict=True))
        kernel = dict(zip(self.axes, self.psf.shape, strict=True))
        window = []
        for axis, (n, at) in enumerate(zip(self.shape, pixel, strict=True)):
            size = min(n, max(largest[axis], 2 * kernel[axis])) if axis in largest else 1
            start = min(max(int(at) - size // 2, 0), n - size)
            window.append(slice(start, start + size))
        part = tuple(window)
        mask = None if self.mask is None else self.mask[part]
        settings = replace(self.settings, boundary="unknown", error_bars=False)
        return replace(self, data=np.asarray(self.data[part]), mask=mask, settings=settings), part

    def by_rule(self) -> Problem:
        """The problem with its strength chosen by a rule."""
        return replace(self, settings=replace(self.settings, strength=None))

    def restore(self, index: Index, cancelled: Callback = lambda: False) -> Restored:
        """Restore one field.

        Args:
            index: one of :meth:`fields`.
            cancelled: called before every operation of torch; True ends the restoration.

        Raises:
            LsconvError: the settings do not fit the data.
            CancelledError: the callback has returned True.
        """
        values = np.asarray(self.data[index])
        colours = np.moveaxis(values[..., :3], -1, 0) if self.colour else values[None]
        wide = working_dtype(values.dtype) == torch.float64
        field = torch.from_numpy(np.ascontiguousarray(colours, dtype=np.float64 if wide else np.float32))
        observed = None if self.mask is None else torch.from_numpy(np.asarray(self.mask[index]) == 0)
        options = self.settings.options()
        ndim = self.psf.ndim
        with warnings.catch_warnings(record=True) as caught, _Cancellable(cancelled):
            warnings.simplefilter("always")
            solution: Any = lsconv.deconvolve(
                field, self.psf, channels="first", ndim=ndim, crop=False, observed=observed, **options
            )
        window: Any = (..., *self._window(field, solution.x))
        x = solution.x[window]
        std = None if solution.std is None else solution.std[window].mean(0).numpy()
        if observed is not None:
            field = torch.where(observed, field, torch.nan)
        A = lsconv.blur_operator(
            self.psf.to(field), tuple(field.shape[1:]), boundary=self.settings.boundary, channels=len(field), ndim=ndim
        )
        camera = {"background": self.settings.background, "offset": 0.0, "gain": self.settings.gain, "read_noise": 0.0}
        evidence = Evidence.of(
            field, A, solution, x, Kernel(self.psf, ndim), camera, poisson=self.settings.noise == "poisson",
            std=None if std is None else torch.from_numpy(std)[None],
        )  # fmt: skip
        return Restored(
            self._like(values, x), std, float(solution.damp), bool(solution.converged.all()),
            lsconv.Status.from_code(int(solution.codes)).sentence, evidence,
            tuple(dict.fromkeys(str(warning.message) for warning in caught)),
        )  # fmt: skip

    def _window(self, field: Tensor, x: Tensor) -> Iterator[slice]:
        """The slices of the image within the answer, which boundary "unknown" extends by the PSF's size less one."""
        for size, whole, k in zip(field.shape[1:], x.shape[1:], self.psf.shape, strict=True):
            start = (k - 1 - k // 2) if whole > size else 0
            yield slice(start, start + size)

    def _like(self, values: np.ndarray[Any, Any], x: Tensor) -> np.ndarray[Any, Any]:
        """The answer in the number type of the image's ``values``, with colours last and the image's opacity."""
        restored = np.moveaxis(x.numpy(), 0, -1) if self.colour else x[0].numpy()
        restored = rounded(restored, values.dtype.newbyteorder("="))
        return np.concatenate([restored, values[..., 3:]], axis=-1) if self.colour else restored
