"""An image in the number type of its file, with what the file says about it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsconv.app.calibration import Calibration

__all__ = ["ImageFileError", "Metadata", "Picture", "imported", "quantised", "rounded"]

_EXTRAS = {"OME-Zarr": ("zarr", "zarr"), "FITS": ("astropy.io.fits", "fits")}  # format: module and extra


class ImageFileError(Exception):
    """A file cannot be read or written as a picture; the message names the file and says why."""


def imported(path: Path, format_name: str) -> Any:
    """The module that reads and writes "OME-Zarr" or "FITS", or the line that installs it.

    Raises:
        ImageFileError: it is missing.
    """
    module, extra = _EXTRAS[format_name]
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ImageFileError(
            f"{path}: {format_name} needs {package}; install it with: pip install 'lsconv[{extra}]'"
        ) from None


@dataclass(frozen=True)
class Metadata:
    """The description that a file has of its image, apart from the pixels.

    Attributes:
        icc: the ICC colour profile.
        exif: the EXIF block as PNG and JPEG hold it. An orientation in it stays true: pixels are read as stored.
        resolution: pixels per ``unit`` along the width and the height.
        unit: "inch", "cm" or "none" (only the ratio of the two resolutions means something).
        description: TIFF's ImageDescription, PNG's text "Description", JPEG's comment.
        layout: shape and number type of the array that the description tells the layout of (ImageJ's and OME's do);
            None for plain words.
        rate: samples per second of a signal.
        header: the header of a FITS file.
        ome: the description of an OME-Zarr image (:class:`lsconv.app.ome_zarr.Multiscale`).
        calibration: the physical steps of axes, and the names of channels, for a way to another format.
        chunks: PNG's ancillary chunks, word for word, for a way from PNG to PNG.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    resolution: tuple[float, float] | None = None
    unit: str = "inch"
    description: str | None = None
    layout: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
    rate: int | None = None
    header: Any = None
    ome: Any = None
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def dpi(self) -> tuple[float, float] | None:
        """Pixels per inch, or None where the resolution has no unit."""
        if self.resolution is None or self.unit == "none":
            return None
        factor = 2.54 if self.unit == "cm" else 1.0
        return self.resolution[0] * factor, self.resolution[1] * factor

    @property
    def steps(self) -> Mapping[str, tuple[float, str]]:
        """The physical steps of axes, those of x and y by the resolution where nothing else says them."""
        if self.resolution is None or self.unit == "none":
            return self.calibration.steps
        unit = {"cm": "centimeter"}.get(self.unit, "inch")
        across, down = self.resolution
        return {"X": (1 / across, unit), "Y": (1 / down, unit), **self.calibration.steps}

    def description_of(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        """The description, unless it tells the layout of an array of another shape or number type."""
        return self.description if self.layout in (None, (shape, dtype)) else None


@dataclass(frozen=True)
class Picture:
    """An image, a stack of them or a signal, in the number type of its file.

    Attributes:
        values: ``(*leading, height, width, channels)``, channels being 1 (grey) or 3, and one more where there is
            opacity; a signal has height 1 and any number of channels.
        opacity: whether the last channel is opacity.
        metadata: what else the file said.
        axes: a letter for every leading axis, as TIFF names them: T time, C channel, Z depth, others for anything else;
            given none, Z for one axis.
        line: whether it is a signal.
    """

    values: np.ndarray[Any, Any]
    opacity: bool = False
    metadata: Metadata = field(default_factory=Metadata)
    axes: str = ""
    line: bool = False

    def __post_init__(self) -> None:
        if not self.axes and self.values.ndim > 3:
            object.__setattr__(self, "axes", "QPNMZ"[-(self.values.ndim - 3) :])

    @property
    def is_integer(self) -> bool:
        """True where the values are integers."""
        return np.issubdtype(self.values.dtype, np.integer)

    @property
    def pixels(self) -> Tensor:
        """float64, ``(..., channels, height, width)``; integers scaled so that 1 is the largest possible."""
        values = np.moveaxis(self.values, -1, -3).astype(np.float64)
        return torch.from_numpy(values / np.iinfo(self.values.dtype).max if self.is_integer else values)

    @property
    def colours(self) -> Tensor:
        """The values without the opacity, ``(..., channels, height, width)``, in the units of the file.

        float32, or float64 where the file holds 32 bits or more (float32 itself excepted).
        """
        values = np.moveaxis(self.values[..., :-1] if self.opacity else self.values, -1, -3)
        wide = self.values.dtype.itemsize > 4 or (self.is_integer and self.values.dtype.itemsize == 4)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32))

    def with_colours(self, colours: Tensor, crop: tuple[slice, ...] = (slice(None), slice(None))) -> Picture:
        """The image with other colours, rounded and cut off to its number type, and its opacity cut by ``crop``.

        Args:
            colours: ``(..., channels, height, width)``, in the units of the file.
            crop: rows and columns (before them pages) of this image that the colours stand for.
        """
        values = np.moveaxis(colours.detach().cpu().numpy(), -3, -1)
        if self.is_integer:
            values = rounded(values, self.values.dtype)
        else:
            values = values > 0.5 if self.values.dtype == bool else values.astype(self.values.dtype)
        if self.opacity:
            place: tuple[Any, ...] = (Ellipsis, *crop, slice(-1, None))
            values = np.concatenate([values, self.values[place]], axis=-1)
        return replace(self, values=values)


def rounded(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """``values`` as integers of that type, rounded and cut off.

    Example:
        >>> import numpy as np
        >>> rounded(np.array([-0.7, 2.6, 300.0]), np.dtype(np.uint8)).tolist()
        [0, 3, 255]
    """
    limits = np.iinfo(dtype)
    wide = values.astype(np.float64) if dtype.itemsize >= 4 else values  # float32 has no 2^32 - 1
    high = float(limits.max) if dtype.itemsize < 8 else float(np.nextafter(float(limits.max), 0))
    return np.clip(np.rint(wide), limits.min, high).astype(dtype)


def quantised(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """``values``, 1 being the largest integer of the type, rounded and cut off.

    Example:
        >>> import numpy as np
        >>> quantised(np.array([-0.5, 0.501 / 255, 2.0]), np.dtype(np.uint8)).tolist()
        [0, 1, 255]
    """
    return rounded(values.astype(np.float64) * np.iinfo(dtype).max, dtype)
