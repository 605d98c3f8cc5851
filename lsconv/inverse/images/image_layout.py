"""Conversion of images of any layout and number type to ``(*batch, channels, *size)`` in floating point, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    InputWarning,
    NonFiniteError,
    ShapeError,
    warn,
)
from lsconv.inverse.images.saturation import saturation_level

__all__ = ["Layout", "spatial_axes"]

_REAL = ("int", "uint", "float", "bfloat", "bool")


@dataclass(frozen=True)
class Layout:
    """The axes of an image, and its conversion to ``(*batch, channels, *size)`` in floating point.

    Attributes:
        ndim: number of spatial axes.
        channels: "first", "last" or None.
        dtype: the type in which the image is restored.
    """

    ndim: int
    channels: str | None
    dtype: torch.dtype

    @classmethod
    def of(cls, image: Any, psf: Any, channels: Any, ndim: int | None) -> Layout:
        """Check arguments of :func:`lsconv.deconvolve`, and make the layout of its image."""
        for name, value in (("image", image), ("psf", psf)):
            if not isinstance(value, (Tensor, np.ndarray)):
                raise ArgumentTypeError(f"{name}: expected a torch.Tensor or a NumPy array, got {type(value).__name__}")
            number = _name(value.dtype)
            if not number.startswith((*_REAL, "complex") if name == "image" else _REAL):
                wanted = "real or complex numbers" if name == "image" else "real numbers"
                raise DtypeError(f"{name}: expected {wanted}, got {value.dtype}")
        if np.ma.is_masked(psf):
            raise ArgumentTypeError("psf: is an array with masked entries; fill them with numbers")
        if 0 in psf.shape:
            raise ShapeError(f"psf: is empty, of shape {tuple(psf.shape)}")
        if channels not in (None, "first", "last"):
            raise ArgumentError(f'channels: expected None, "first" or "last", got {channels!r}')
        spatial = spatial_axes(psf.ndim, ndim)
        if channels is None and ndim is None:
            channels = _guess_channels(tuple(image.shape), tuple(psf.shape))
        if image.ndim < spatial + (channels is not None):
            raise ShapeError(
                f"image: expected {spatial} spatial axes{'' if channels is None else ' and one of channels'} for a PSF "
                f"of shape {tuple(psf.shape)}, got shape {tuple(image.shape)}"
            )
        if 0 in image.shape[image.ndim - spatial - (channels is not None) :]:
            raise ShapeError(f"image: is empty, of shape {tuple(image.shape)}")
        number = _name(image.dtype)
        real = torch.float64 if number.endswith(("32", "64", "128")) else torch.float32
        if number in ("float32", "complex64"):
            real = torch.float32
        return cls(spatial, channels, real.to_complex() if number.startswith("complex") else real)

    def image(
        self, image: Any, observed: Any = None, saturated: Any = None, *, one_sided: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Convert an image to pixels ``(*batch, channels, *size)``, and masks of measured pixels and of lower bounds.

        Missing pixels are zero. The second is None where all were measured, the third where none is a lower bound.

        Args:
            image: the image of the user.
            observed: True where pixels were measured, of the shape of the image or its spatial shape.
            saturated: the level from which pixels are saturated, "auto" or None.
            one_sided: saturated pixels are lower bounds at that level, and not missing.
        """
        given = measured = None if observed is None else self._mask(observed, image)
        level = saturation_level(image, saturated)
        bounded = None
        if level is not None:
            below = _tensor((np.ma.getdata(image) if isinstance(image, np.ndarray) else image) < level, torch.bool)
            if one_sided:
                bounded = self.channels_first(~below)
            else:
                measured = below if measured is None else measured.to(below.device) & below
        if isinstance(image, np.ma.MaskedArray):
            mask = torch.from_numpy(~np.ma.getmaskarray(image))
            measured = mask if measured is None else measured & mask
            image = np.ma.getdata(image)
        y = _tensor(image, self.dtype)
        if not bool(torch.isfinite(y.detach().sum())):  # the sum may overflow, so entries are tested then
            nan = torch.isnan(y)
            measured = ~nan if measured is None else measured.to(nan.device) & ~nan
        if measured is not None:
            measured = measured.to(y.device)
            y = torch.where(measured, y, 0)
        if not bool(torch.isfinite(y.detach()).all()):
            raise NonFiniteError("image: contains infinity; missing pixels are NaN, or masked in a numpy.ma array")
        y = self.channels_first(y).contiguous()
        if bounded is not None and level is not None:
            bounded = bounded.to(y.device)
            bounded = bounded if measured is None else bounded & self.channels_first(measured)
            bounded = bounded if bool(bounded.any()) else None
        if bounded is not None and level is not None:
            y = torch.where(bounded, y.new_tensor(level), y)
        if measured is None or bool(measured.all()):
            return y, None, bounded
        unannounced = int((~measured if given is None else given.to(y.device) & ~measured).sum())
        measured = self.channels_first(measured)
        if not bool(measured.flatten(-self.ndim - 1).any(-1).all()):
            raise NonFiniteError("image: has no measured pixel, all are NaN, masked, saturated or not observed")
        if unannounced:
            kinds = "NaN or masked"
            if level is not None and not one_sided:
                kinds = f"NaN, masked, or saturated (from {level:g})"
            warn(f"image: {unannounced} of {measured.numel()} pixels are {kinds} and count as missing", InputWarning)
        return y, measured, bounded

    def map(self, name: str, value: Any, image: Any, y: Tensor) -> Tensor:
        """Convert a number, one per batch item, or a map of the image's or its spatial shape, to broadcast with y.

        Raises:
            ArgumentTypeError, NonFiniteError, ShapeError: the value is none of these.
        """
        if isinstance(value, (str, bytes, bool)) or value is None:
            raise ArgumentTypeError(f"{name}: expected a number or a map, got {value!r}")
        try:
            found = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, dtype=np.float64))
        except (TypeError, ValueError):
            raise ArgumentTypeError(f"{name}: expected a number or a map, got {type(value).__name__}") from None
        found = found.to(y.real.dtype if y.is_complex() else y.dtype).to(y.device)
        if bool(torch.isnan(found).any()):
            raise NonFiniteError(f"{name}: contains NaN")
        shape, size = tuple(found.shape), tuple(y.shape[-self.ndim :])
        if shape == ():
            return found
        if shape == tuple(image.shape):
            return self.channels_first(found)
        if shape == size:
            return found
        if shape == tuple(y.shape[: -self.ndim - 1]):
            return found.reshape(*shape, *(1,) * (self.ndim + 1))
        raise ShapeError(
            f"{name}: expected a number, or a map of the image's shape {tuple(image.shape)} or its size {size}, got "
            f"shape {shape}"
        )

    def _mask(self, observed: Any, image: Any) -> Tensor:
        """Check ``observed``, and expand it to the shape of the image.

        Raises:
            ArgumentTypeError, DtypeError, ShapeError: ``observed`` is no mask of the image.
        """
        if not isinstance(observed, (Tensor, np.ndarray)):
            raise ArgumentTypeError(f"observed: expected a bool tensor or array, got {type(observed).__name__}")
        if _name(observed.dtype) != "bool":
            raise DtypeError(
                f"observed: expected bool, True where pixels were measured, got {observed.dtype}; write observed != 0"
            )
        mask = _tensor(np.ma.getdata(observed) if isinstance(observed, np.ndarray) else observed, torch.bool)
        shape, wanted = tuple(mask.shape), tuple(image.shape)
        if shape == wanted:
            return mask
        channels_last = self.channels == "last"
        if shape == wanted[len(wanted) - self.ndim - channels_last : len(wanted) - channels_last]:
            return (mask.unsqueeze(-1) if channels_last else mask).expand(wanted)
        raise ShapeError(f"observed: expected the image's shape {wanted} or its size, got {shape}")

    def channels_first(self, values: Tensor) -> Tensor:
        """Permute a tensor in the layout of the image to ``(*batch, channels, *size)``."""
        if self.channels is None:
            return values.unsqueeze(-self.ndim - 1)
        return values.movedim(-1, -self.ndim - 1) if self.channels == "last" else values

    def kernel(self, psf: Any, image: Any) -> Tensor:
        """Check the PSF, and convert it to ``(*batch, 1 or channels, *size)`` or ``(*size)``."""
        kernel = _tensor(psf, self.dtype.to_real())
        if isinstance(image, Tensor):
            kernel = kernel.to(image.device)
        if not bool(torch.isfinite(kernel).all()):
            raise NonFiniteError("psf: contains NaN or infinity")
        if not bool(kernel.any()):
            raise ArgumentError("psf: is zero everywhere")
        has_channel_axis = self.channels is not None or kernel.ndim == self.ndim
        return kernel if has_channel_axis else kernel.unsqueeze(-self.ndim - 1)

    def size(self, y: Tensor) -> tuple[int, ...]:
        """The spatial size of the image."""
        return tuple(y.shape[-self.ndim :])

    def answer(self, x: Tensor, image: Any) -> Any:
        """Convert x to the kind (tensor or array), number type and layout of the image; of bools: to floating point."""
        number = _name(image.dtype)
        if number == "bool":
            return self.floating(x, image)
        x = self._image_axes(x)
        if "int" in number:
            return _rounded(x, image)
        if isinstance(image, Tensor):
            return x.to(image.dtype)
        return x.detach().cpu().numpy().astype(image.dtype.newbyteorder("="))

    def floating(self, x: Tensor, image: Any) -> Any:
        """Convert x to the kind and layout of the image, in floating point."""
        x = self._image_axes(x)
        return x if isinstance(image, Tensor) else x.detach().cpu().numpy()

    def _image_axes(self, x: Tensor) -> Tensor:
        """Undo :meth:`channels_first`."""
        if self.channels is None:
            return x.squeeze(-self.ndim - 1)
        return x.movedim(-self.ndim - 1, -1) if self.channels == "last" else x


def spatial_axes(psf_ndim: int, ndim: int | None) -> int:
    """The number of spatial axes: ``ndim``, or all axes of the PSF."""
    found = psf_ndim if ndim is None else ndim
    if isinstance(found, bool) or found not in (1, 2, 3) or psf_ndim < found:
        said = "" if ndim is None else f" and ndim={ndim!r}"
        raise ShapeError(
            f"psf: expected 1, 2 or 3 spatial axes (say ndim=2 for a PSF per channel or image), got {psf_ndim}{said}"
        )
    return found


def _guess_channels(image: tuple[int, ...], psf: tuple[int, ...]) -> str | None:
    """The channels of an image for which ``channels`` is not given: "last" for (..., H, W, 3) and a plane PSF.

    Raises:
        ShapeError: the axes are ambiguous.
    """
    if len(psf) == 2 and len(image) >= 3 and image[-1] in (3, 4) and min(image[-3:-1]) > image[-1]:
        if image[-1] == 3:
            return "last"
        raise ShapeError(
            f'image: shape {image} may be colours with opacity; say channels="last" to restore all four channels, give '
            f"image[..., :3] to restore the colours, or say ndim=2 for a batch of images that are 4 pixels wide"
        )
    if len(psf) == 3 and len(image) == 3:
        if psf[0] == image[0] <= 16 and psf[1:] != image[1:]:
            raise ShapeError(
                f"psf: shape {psf} for an image of shape {image} may be a volume or a PSF for every band; say ndim=3 "
                f'for a volume, or ndim=2 and channels="first" for bands'
            )
        if psf[0] in (3, 4) and image[-1] == psf[0] and min(image[:2]) > image[-1]:
            raise ShapeError(
                f"psf: shape {psf} for an image of shape {image} looks like a PSF for every colour; say channels="
                f'"last" and ndim=2, or ndim=3 for a volume'
            )
    return None


def _name(dtype: Any) -> str:
    """The name of a torch or NumPy type, without torch's prefix and NumPy's byte order."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _rounded(x: Tensor, image: Any) -> Any:
    """Round x to integers within the image's type, whose largest value floating point may not represent."""
    limits = np.iinfo(_name(image.dtype))
    rounded = x.detach().double().round()
    high = float(limits.max) if limits.bits < 64 else float(np.nextafter(float(limits.max), 0))
    rounded = rounded.clamp(float(limits.min), high)
    if isinstance(image, Tensor):
        return rounded.to(image.dtype)
    return rounded.cpu().numpy().astype(image.dtype.newbyteorder("="))


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(dtype)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=str(dtype).removeprefix("torch.")))
