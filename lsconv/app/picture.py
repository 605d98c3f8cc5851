"""An image in the number type of its file, with the file's metadata."""

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

__all__ = ["ImageFileError", "Metadata", "Picture", "imported", "quantised", "rounded", "working_dtype"]

_EXTRAS = {"OME-Zarr": ("zarr", "zarr"), "FITS": ("astropy.io.fits", "fits")}  # format: module and extra


class ImageFileError(Exception):
    """A file cannot be read or written as an image; the message names the file and gives the reason."""


def imported(path: Path, format_name: str) -> Any:
    """Import the module that reads and writes "OME-Zarr" or "FITS".

    Raises:
        ImageFileError: it is missing; the message has the command that installs it.
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
    """The metadata of an image file.

    Attributes:
        icc: the ICC colour profile.
        exif: the EXIF block as PNG and JPEG hold it. An orientation in it stays true: pixels are read as stored.
        resolution: pixels per ``unit`` along the width and the height.
        unit: "inch", "cm" or "none" (only the ratio of the two resolutions means something).
        description: TIFF's ImageDescription, PNG's text "Description", JPEG's comment.
        layout: shape and number type of the array whose layout the description tells (ImageJ's and OME's do); None
            for free text.
        rate: samples per second of a signal.
        header: the header of a FITS file.
        ome: the description of an OME-Zarr image (:class:`lsconv.app.ome_zarr.Multiscale`).
        calibration: the physical steps of axes, and the names of channels, to be written in another format.
        chunks: PNG's ancillary chunks, name and bytes, to be written to PNG unchanged.
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
        """The physical steps of axes; x and y have those of the resolution where the calibration has none."""
        if self.resolution is None or self.unit == "none":
            return self.calibration.steps
        unit = {"cm": "centimeter"}.get(self.unit, "inch")
        across, down = self.resolution
        return {"X": (1 / across, unit), "Y": (1 / down, unit), **self.calibration.steps}

    def description_of(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        """The description, or None where it tells the layout of another shape or number type than these."""
        return self.description if self.layout in (None, (shape, dtype)) else None


@dataclass(frozen=True)
class Picture:
    """An image, a stack of them or a signal, in the number type of its file.

    Attributes:
        values: ``(*leading, height, width, channels)``, channels being 1 (grey) or 3, and one more where there is
            opacity; a signal has height 1 and any number of channels.
        opacity: whether the last channel is opacity.
        metadata: the metadata of the file.
        axes: a letter for every leading axis, as TIFF names them: T time, C channel, Z depth, others for anything else.
            By default Z for the last, and letters without a meaning for those before it.
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

        Their number type is that of :func:`working_dtype`.
        """
        values = np.moveaxis(self.values[..., :-1] if self.opacity else self.values, -1, -3)
        wide = working_dtype(values.dtype) == torch.float64
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64 if wide else np.float32))

    def with_colours(self, colours: Tensor, crop: tuple[slice, ...] = (slice(None), slice(None))) -> Picture:
        """The image with other colours, rounded and clipped to its number type, and its opacity cropped.

        Args:
            colours: ``(..., channels, height, width)``, in the units of the file.
            crop: rows and columns (before them pages) of this image that the colours cover.
        """
        values = np.moveaxis(colours.detach().cpu().numpy(), -3, -1)
        values = rounded(values, self.values.dtype)
        if self.opacity:
            cells: tuple[Any, ...] = (Ellipsis, *crop, slice(-1, None))
            values = np.concatenate([values, self.values[cells]], axis=-1)
        return replace(self, values=values)


def working_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    """The number type to compute in: float32 where it holds every value of ``dtype`` exactly, else float64."""
    wide = dtype.itemsize > 4 or (dtype.kind in "iu" and dtype.itemsize == 4)
    return torch.float64 if wide else torch.float32


def rounded(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Convert values to a number type: integers are rounded and clipped to its range, true is above one half.

    Example:
        >>> import numpy as np
        >>> rounded(np.array([-0.7, 2.6, 300.0]), np.dtype(np.uint8)).tolist()
        [0, 3, 255]
        >>> rounded(np.array([0.2, 0.8]), np.dtype(bool)).tolist()
        [False, True]
    """
    if dtype.kind not in "iu":
        return values > 0.5 if dtype.kind == "b" else values.astype(dtype)
    limits = np.iinfo(dtype)
    wide = values.astype(np.float64) if dtype.itemsize >= 4 else values  # 2^32 - 1 is no float32
    high = float(limits.max) if dtype.itemsize < 8 else float(np.nextafter(float(limits.max), 0))
    return np.clip(np.rint(wide), limits.min, high).astype(dtype)


def quantised(values: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Scale values so that 1 becomes the largest integer of a type, round them, and clip them to its range.

    Example:
        >>> import numpy as np
        >>> quantised(np.array([-0.5, 0.501 / 255, 2.0]), np.dtype(np.uint8)).tolist()
        [0, 1, 255]
    """
    return rounded(values.astype(np.float64) * np.iinfo(dtype).max, dtype)
