"""TIFF files, ImageJ's and OME's among them: axes, physical sizes and the names of channels are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from lsconv.app.calibration import Calibration
from lsconv.app.picture import ImageFileError, Metadata, Picture

__all__ = ["create_tiff", "open_tiff", "read_tiff", "write_tiff"]

# The beginnings of descriptions that tell the array's layout, and are wrong for another shape or number type.
_LAYOUTS = ("ImageJ=", "<?xml", "<OME")
_TIFFFILE = '{"shape"'  # the beginning of the description that tifffile writes by default
_UNITS = {1: "none", 2: "inch", 3: "cm"}
_OME_TYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


def read_tiff(path: Path) -> Picture:
    """Read the image, or stack of images, of a TIFF file; the samples of a pixel are its channels."""
    with tifffile.TiffFile(path) as tiff:
        axes, metadata, opacity = _describe(path, tiff)
        values = tiff.series[0].asarray()
        values = np.moveaxis(values, axes.index("S"), -1) if "S" in axes else values[..., None]
        if tiff.pages.first.photometric.name == "MINISWHITE" and values.dtype.kind == "u":
            values = np.iinfo(values.dtype).max - values
    native = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("="), copy=False)
    return Picture(native, opacity, metadata, axes.replace("S", "")[:-2])


def open_tiff(path: Path) -> tuple[np.ndarray[Any, Any], str, Metadata, bool]:
    """Open an uncompressed TIFF file without reading its pixels.

    Returns:
        The memory map, a letter for every axis, the metadata, and whether the last sample is opacity.

    Raises:
        ImageFileError: the file has several series, is compressed or inverted, or is no TIFF file.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            axes, metadata, opacity = _describe(path, tiff)
            if tiff.pages.first.photometric.name == "MINISWHITE":
                raise ValueError("its value 0 is white")
        return tifffile.memmap(path, mode="r"), axes, metadata, opacity
    except (ValueError, tifffile.TiffFileError) as error:
        raise ImageFileError(
            f"{path}: --tile reads NPY files, OME-Zarr and TIFF files without compression, of one series ({error})"
        ) from None


def _describe(path: Path, tiff: Any) -> tuple[str, Metadata, bool]:
    """A letter for every axis, the metadata, and whether the last sample is opacity."""
    if len(tiff.series) != 1:
        raise ImageFileError(
            f"{path}: damaged, or {len(tiff.series)} pictures of different kinds; expected one or a stack"
        )
    series, page = tiff.series[0], tiff.pages.first
    if page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB"):
        raise ImageFileError(f"{path}: TIFF pictures in {page.photometric.name} are not supported, use grey or RGB")
    if page.bitspersample < 8:
        raise ImageFileError(f"{path}: TIFF pictures of {page.bitspersample} bit(s) are not supported")
    axes, shape = series.axes, dict(enumerate(series.shape))
    if not axes.replace("S", "").endswith("YX"):
        raise ImageFileError(f"{path}: TIFF axes {axes} are not supported, expected ...YX")
    samples = axes.find("S")
    size = (*(n for axis, n in shape.items() if axis != samples), shape.get(samples, 1))
    description = page.description or None
    if description is not None and description.startswith(_TIFFFILE):
        description = None
    tags = page.tags
    resolution = _resolution(*(tags[name].value if name in tags else None for name in ("XResolution", "YResolution")))
    metadata = Metadata(
        icc=bytes(tags["InterColorProfile"].value) if "InterColorProfile" in tags else None,
        resolution=resolution,
        unit=_UNITS.get(int(tags["ResolutionUnit"].value), "none") if "ResolutionUnit" in tags else "inch",
        description=description,
    )
    if description is not None and description.startswith(_LAYOUTS):
        metadata = replace(metadata, layout=(size, np.dtype(series.dtype).newbyteorder("=")))
    if tiff.is_imagej:
        metadata = replace(metadata, calibration=Calibration.of_imagej(tiff.imagej_metadata or {}, resolution))
    elif tiff.is_ome:
        metadata = replace(metadata, calibration=Calibration.of_ome_xml(description or ""))
    first, *others = axes.replace("S", "")
    if len(others) == 2 and first not in "TCZ":
        axes = axes.replace(first, "Z")  # pages without a named axis are taken for depth
    opacity = bool(page.extrasamples) and size[-1] in (2, 4)
    return axes, metadata, opacity


def _resolution(x: Any, y: Any) -> tuple[float, float] | None:
    """Pixels per unit along width and height, from TIFF's fractions; None where one is missing or zero."""
    if x is None or y is None or 0 in (*x, *y):
        return None
    return x[0] / x[1], y[0] / y[1]


def write_tiff(file: BinaryIO, picture: Picture) -> None:
    """Write an image, with its own description where that is still true, else with OME-XML where metadata need it."""
    values = picture.values[..., 0] if picture.values.shape[-1] == 1 else picture.values
    axes = f"{picture.axes}YX" + "S" * (picture.values.shape[-1] > 1)
    options = _options(axes, values.shape, values.dtype, picture.metadata, opacity=picture.opacity)
    tifffile.imwrite(file, values, **options)


def create_tiff(
    path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], axes: str, metadata: Metadata
) -> np.ndarray[Any, Any]:
    """Make a TIFF file and open it as a memory map.

    Args:
        path: the file.
        shape: the array's shape.
        dtype: its number type.
        axes: a letter for every axis, S (the samples of a pixel) last.
        metadata: the metadata to write.
    """
    large = math.prod(shape) * dtype.itemsize > 2**31  # TIFF's offsets have 32 bits
    options = _options(axes, shape, dtype, metadata, opacity=False)
    return tifffile.memmap(path, shape=shape, dtype=dtype, bigtiff=large, **options)


def _options(
    axes: str, shape: tuple[int, ...], dtype: np.dtype[Any], metadata: Metadata, *, opacity: bool
) -> dict[str, Any]:
    """The options of tifffile that write an array and its metadata."""
    samples = shape[-1] if axes.endswith("S") else 1
    options: dict[str, Any] = {"photometric": "rgb" if samples - opacity == 3 else "minisblack", "metadata": None}
    if samples > 1:
        options["planarconfig"] = "contig"
    if opacity:
        options["extrasamples"] = ["unassalpha"]
    resolution, unit = metadata.resolution, metadata.unit
    if resolution is None:
        resolution, unit = metadata.calibration.resolution, "cm"
    if resolution is not None:
        options.update(resolution=resolution, resolutionunit={v: k for k, v in _UNITS.items()}[unit])
    if metadata.icc is not None:
        options["iccprofile"] = metadata.icc
    description = metadata.description_of(shape if axes.endswith("S") else (*shape, 1), dtype)
    if (description is None or metadata.layout is None) and _needs_ome_xml(axes, dtype, metadata):
        entries = {"axes": axes, **_ome_xml(axes, shape, metadata)}
        return options | {"ome": True, "metadata": entries | ({"Description": description} if description else {})}
    # tifffile's own description (metadata={}) is needed to tell several leading axes apart; else None omits it
    several = description is None and len(axes.removesuffix("S")) > 3
    text = description.encode("utf-8") if description else None  # tifffile takes text beyond ASCII as bytes only
    return options | {"ome": False, "description": text, "metadata": {} if several else None}


def _needs_ome_xml(axes: str, dtype: np.dtype[Any], metadata: Metadata) -> bool:
    """True where OME-XML can hold the image, and plain TIFF would lose its calibration or the names of its axes."""
    leading = axes.removesuffix("S")[:-2]
    if dtype.name not in _OME_TYPES or set(leading) - set("TCZ") or len(set(leading)) < len(leading):
        return False
    return bool(metadata.calibration) or leading not in ("", "Z")


def _ome_xml(axes: str, shape: tuple[int, ...], metadata: Metadata) -> Mapping[str, Any]:
    """The calibration as entries of OME-XML, without names of channels where their number is another."""
    entries = metadata.calibration.ome_xml()
    channels = shape[axes.index("C")] if "C" in axes else 1
    if len(metadata.calibration.channels) != channels:
        entries.pop("Channel", None)
    return entries
