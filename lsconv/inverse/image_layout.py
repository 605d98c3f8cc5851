"""How the axes, kinds and number types of an image become ``(*batch, channels, *size)``, and come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.checks import require_finite

__all__ = ["Layout", "spatial_axes"]

_MISSING = (
    "for missing pixels solve lsconv.tikhonov(lsconv.Mask(keep) @ A, y, damp, L=lsconv.Gradient(A.in_shape)) with "
    "A = lsconv.blur_operator(psf, size) and y = image[None] as a tensor, keep being False where a pixel is missing"
)
_REAL = ("int", "uint", "float", "bfloat")


@dataclass(frozen=True)
class Layout:
    """How the axes and values of what the user gave become ``(*batch, channels, *size)`` in floating point."""

    ndim: int
    channels: str | None
    scale: int | None
    dtype: torch.dtype

    @classmethod
    def of(cls, image: Any, psf: Any, channels: Any, ndim: int | None) -> Layout:
        """The layout of what the user gave, checked."""
        for name, value in (("image", image), ("psf", psf)):
            if np.ma.is_masked(value):
                raise ArgumentTypeError(f"{name}: is an array with masked entries, which would be taken for data; "
                                        f"{_MISSING}")  # fmt: skip
            if not isinstance(value, (Tensor, np.ndarray)):
                raise ArgumentTypeError(f"{name}: expected a torch.Tensor or a NumPy array, got {type(value).__name__}")
            number = _name(value.dtype)
            if not number.startswith((*_REAL, "complex") if name == "image" else _REAL):
                wanted = "real or complex numbers" if name == "image" else "real numbers"
                raise DtypeError(f"{name}: expected {wanted}, got {value.dtype}")
            if name == "psf" and 0 in value.shape:
                raise ShapeError(f"psf: is empty, of shape {tuple(value.shape)}")
        if channels not in (None, "first", "last"):
            raise ArgumentError(f'channels: expected None, "first" or "last", got {channels!r}')
        spatial = spatial_axes(psf.ndim, ndim)
        if image.ndim < spatial + (channels is not None):
            raise ShapeError(
                f"image: expected {spatial} spatial axes{'' if channels is None else ' and one of channels'} for a PSF "
                f"of shape {tuple(psf.shape)}, got shape {tuple(image.shape)}"
            )
        if 0 in image.shape[image.ndim - spatial - (channels is not None) :]:
            raise ShapeError(f"image: is empty, of shape {tuple(image.shape)}")
        width, limit = _integer(image)
        if width == 8:
            raise DtypeError(f"image: 64-bit integers have no white; convert, got {image.dtype}")
        number = _name(image.dtype)
        real = torch.float64 if width == 4 or number in ("float64", "complex128") else torch.float32
        return cls(spatial, channels, limit, real.to_complex() if number.startswith("complex") else real)

    def to_tensor(self, image: Any) -> Tensor:
        """``(*batch, channels, *size)``."""
        y = _tensor(image, self.dtype)
        if self.scale is not None:
            y = y / self.scale
        if self.channels is None:
            y = y.unsqueeze(-self.ndim - 1)
        elif self.channels == "last":
            y = y.movedim(-1, -self.ndim - 1)
        try:
            require_finite(y, "image", self.ndim + 1)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {_MISSING}") from None
        return y.contiguous()

    def kernel(self, psf: Any, image: Any) -> Tensor:
        """``(*batch, 1 or channels, *size)`` or ``(*size)``."""
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
        """``x`` in the kind, type and layout of the image."""
        if self.channels is None:
            x = x.squeeze(-self.ndim - 1)
        elif self.channels == "last":
            x = x.movedim(-self.ndim - 1, -1)
        if self.scale is not None:
            limits = np.iinfo(_name(image.dtype))
            x = (x * self.scale).round().clamp(limits.min, limits.max)
        if isinstance(image, Tensor):
            return x.to(image.dtype)
        return x.detach().cpu().numpy().astype(image.dtype.newbyteorder("="))


def spatial_axes(psf_ndim: int, ndim: int | None) -> int:
    """The number of spatial axes: ``ndim``, or all that the PSF has."""
    found = psf_ndim if ndim is None else ndim
    if isinstance(found, bool) or found not in (1, 2, 3) or psf_ndim < found:
        said = "" if ndim is None else f" and ndim={ndim!r}"
        raise ShapeError(
            f"psf: expected 1, 2 or 3 spatial axes (say ndim=2 for a PSF per channel or image), got {psf_ndim}{said}"
        )
    return found


def _integer(image: Any) -> tuple[int, int | None]:
    """Bytes and largest value of an integer type; (0, None) of others."""
    name = _name(image.dtype)
    if "int" not in name:
        return 0, None
    limits = np.iinfo(name)
    return limits.bits // 8, int(limits.max)


def _name(dtype: Any) -> str:
    """The name of a torch or NumPy type, the same in both, whatever the order of the bytes."""
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(dtype)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=str(dtype).removeprefix("torch.")))
