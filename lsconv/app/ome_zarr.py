"""OME-Zarr images, by zarr, which the extra ``zarr`` installs: axes, scales and channels kept, a pyramid written.

The format is that of https://ngff.openmicroscopy.org: versions 0.1 to 0.4 on Zarr's format 2, and 0.5 on its format 3.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lsconv.app.calibration import Calibration
from lsconv.app.picture import ImageFileError, Metadata, Picture, imported, rounded

__all__ = [
    "Multiscale",
    "arranged",
    "arrangement",
    "created_ome_zarr",
    "is_image_folder",
    "is_replaceable",
    "label_names",
    "open_ome_zarr",
    "read_ome_zarr",
    "write_ome_zarr",
]

_AXIS_TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_VERSIONS = {2: "0.4", 3: "0.5"}
_READ = ("0.1", "0.2", "0.3", "0.4", "0.5")
_SMALLEST_LEVEL = 256  # most pixels along y and x of the last level of a pyramid
_PIXELS_AT_ONCE = 2**22  # of the pyramid in memory; chunks are mostly smaller, and slow one by one


@dataclass(frozen=True)
class Multiscale:
    """The metadata of an OME-Zarr image.

    Attributes:
        axes: name, type and unit of every axis, in the array's order.
        transformations: those of the highest level: a scale, and perhaps a translation.
        zarr_format: the version of Zarr's format, 2 or 3.
        entry: the rest of the image's entry under "multiscales".
        ome: the entries beside "multiscales", such as "omero" with the channels' names and colours.
        attributes: other attributes of the group.
        chunks: the shape of a chunk, and the shape of a shard or None.
        shape: the array's shape.
        labels: the folder of the image's labels, or None.
        calibration: the names of channels from which "omero" is written, or None to leave it as it is.
    """

    axes: list[dict[str, Any]]
    transformations: list[dict[str, Any]]
    zarr_format: int
    entry: dict[str, Any]
    ome: dict[str, Any]
    attributes: dict[str, Any]
    chunks: tuple[Any, Any]
    shape: tuple[int, ...]
    labels: Path | None = None
    calibration: Calibration | None = None


def is_image_folder(path: Path) -> bool:
    """Tell a folder that is one OME-Zarr image from a folder of images, by its name or its content."""
    return path.is_dir() and (path.suffix.lower() == ".zarr" or _is_zarr(path))


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def is_replaceable(path: Path) -> bool:
    """True for a folder that is one OME-Zarr image, and may be overwritten; not for plates and other folders."""
    try:
        for name in ("zarr.json", ".zattrs"):
            if path.suffix.lower() == ".zarr" and (path / name).is_file():
                found = json.loads((path / name).read_text(encoding="utf-8"))
                return "multiscales" in (found.get("attributes", {}).get("ome", {}) if name == "zarr.json" else found)
    except (OSError, ValueError, AttributeError):
        return False
    return False


def label_names(path: Path | None) -> list[str]:
    """The names of the label images in an OME-Zarr image's folder "labels"; none where there is no such folder."""
    return [] if path is None or not path.is_dir() else sorted(e.name for e in path.iterdir() if _is_zarr(e))


def open_ome_zarr(path: Path) -> tuple[Any, str, Metadata]:
    """Open the first image of an OME-Zarr group.

    Returns:
        The Zarr array of the highest level, a letter for every axis, and the metadata.

    Raises:
        ImageFileError: the folder is no such group, or its version or axes are not supported.
    """
    zarr = imported(path, "OME-Zarr")
    if not _is_zarr(path):
        raise ImageFileError(f"{path}: expected an OME-Zarr image, got a folder that is no Zarr group")
    group = zarr.open(path, mode="r")
    if isinstance(group, zarr.Array):
        raise ImageFileError(
            f"{path}: a Zarr array without metadata; give the image that it is in, such as {path.parent}"
        )
    attributes = group.attrs.asdict()
    ome = attributes.pop("ome") if "ome" in attributes else {k: attributes.pop(k) for k in list(attributes)}
    if not ome.get("multiscales"):
        raise ImageFileError(
            f"{path}: a Zarr group without multiscales; of a plate or a collection give an image, such as {path / '0'}"
        )
    entry = ome.pop("multiscales")[0]
    version = str(ome.pop("version", entry.pop("version", "0.4")))
    if version[:3] not in _READ:
        raise ImageFileError(f"{path}: OME-Zarr version {version} is not supported, {_READ[0]} to {_READ[-1]} are")
    axes = [
        {"name": axis, "type": _AXIS_TYPES.get(axis, "")} if isinstance(axis, str) else axis
        for axis in entry.pop("axes", "tczyx")  # names alone until 0.3, nothing until 0.2
    ]
    dataset = entry.pop("datasets")[0]
    array = group[dataset["path"]]
    names = [str(axis["name"]).lower() for axis in axes]
    letters = "".join(name.upper() if name in _AXIS_TYPES else "Q" for name in names)
    if letters[-2:] != "YX" or len(set(letters)) < len(letters):
        raise ImageFileError(f"{path}: axes {', '.join(names)}; expected t, c, z, y, x or fewer")
    if len(axes) != array.ndim:
        raise ImageFileError(f"{path}: {len(axes)} axes are named, the array has {array.ndim}")
    steps = dataset.get("coordinateTransformations", [])
    labels = path / "labels"
    multiscale = Multiscale(
        axes, steps, group.metadata.zarr_format, entry, ome, attributes, (array.chunks, getattr(array, "shards", None)),
        tuple(array.shape), labels if label_names(labels) else None,
    )  # fmt: skip
    # the transformations of the image are applied after those of its level
    scales = [step["scale"] for step in [*steps, *entry.get("coordinateTransformations", [])] if "scale" in step]
    if any(len(scale) != array.ndim for scale in scales):
        raise ImageFileError(f"{path}: a scale of {[len(scale) for scale in scales]} numbers for {array.ndim} axes")
    scale = np.prod([np.ones(array.ndim), *scales], axis=0)
    calibration = Calibration.of_ome_zarr(axes, scale, (ome.get("omero") or {}).get("channels") or [])
    return array, letters, Metadata(ome=multiscale, calibration=calibration)


def read_ome_zarr(path: Path) -> Picture:
    """Read the highest level of the first image of an OME-Zarr group; time, channel and depth are leading axes."""
    array, axes, metadata = open_ome_zarr(path)
    values = np.asarray(array[...])
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Picture(native[..., None], metadata=metadata, axes=axes[:-2])


def arrangement(path: Path, axes: str, shape: tuple[int, ...], metadata: Metadata) -> tuple[list[int], Multiscale]:
    """The order in which the axes of an array are written, T, C, Z, Y, X, and the metadata of the image written.

    An image that was read from OME-Zarr keeps its order and metadata.

    Args:
        path: the image to write, for messages.
        axes: a letter for every axis; S, the samples of a pixel, is written as C.
        shape: the array's shape.
        metadata: that of the file from which the image was read.

    Raises:
        ImageFileError: the array has axes for which OME-Zarr has no place.
    """
    source = metadata.ome
    if source is not None and len(source.axes) == len(axes):
        return list(range(len(axes))), source
    letters = axes.replace("S", "C")
    order = sorted(range(len(letters)), key=lambda index: "TCZYX".find(letters[index]))
    if len(set(letters)) < len(letters) or set(letters) - set("TCZYX"):
        raise ImageFileError(f"{path}: OME-Zarr has time, channel, depth, y and x, the axes are {axes}; use .tif")
    names = [letters[index].lower() for index in order]
    steps = [metadata.steps.get(name.upper(), (1.0, "")) for name in names]
    described = [
        {"name": name, "type": _AXIS_TYPES[name], **({"unit": unit} if unit else {})}
        for name, (_, unit) in zip(names, steps, strict=True)
    ]
    sizes = tuple(shape[index] for index in order)
    chunks = (*(1 for _ in order[:-2]), *(min(n, 1024) for n in sizes[-2:]))
    transformations = [{"type": "scale", "scale": [step for step, _ in steps]}]
    named = "c" in names and len(metadata.calibration.channels) == sizes[names.index("c")]
    calibration = metadata.calibration if named else None
    return order, Multiscale(described, transformations, 3, {}, {}, {}, (chunks, None), sizes, None, calibration)


def arranged(path: Path, picture: Picture) -> tuple[np.ndarray[Any, Any], Multiscale]:
    """The array of an image with its axes as OME-Zarr orders them, and its metadata."""
    grey = picture.values.shape[-1] == 1
    values, axes = (picture.values[..., 0], "YX") if grey else (picture.values, "YXS")
    order, multiscale = arrangement(path, picture.axes + axes, values.shape, picture.metadata)
    return values.transpose(order), multiscale


def write_ome_zarr(folder: Path, picture: Picture) -> None:
    """Write an image and its pyramid of means over 2×2 pixels into a folder.

    The version is that which the image was read from, 0.4 or 0.5, and 0.5 for images of other formats. Of a group of
    several images only the first is written.
    """
    values, source = arranged(folder, picture)
    with created_ome_zarr(folder, values.shape, values.dtype, source) as array:
        array[...] = values


@contextmanager
def created_ome_zarr(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any], source: Multiscale) -> Iterator[Any]:
    """Make the Zarr array of a new image, whose pyramid and metadata are written when the block ends.

    Args:
        folder: the image's folder, which is emptied.
        shape: the array's shape.
        dtype: its number type.
        source: the metadata; its labels are copied where they are of the image's size.
    """
    zarr = imported(folder, "OME-Zarr")
    dtype = np.dtype(dtype.str)  # NumPy has two types for int64, zarr knows only one
    group = zarr.open_group(folder, mode="w", zarr_format=source.zarr_format)
    if source.zarr_format == 3:
        layout: dict[str, Any] = {"dimension_names": [axis["name"] for axis in source.axes]}
    else:
        layout = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    chunks, shards = source.chunks
    array = group.create_array("0", shape=shape, dtype=dtype, chunks=chunks, shards=shards, **layout)
    yield array
    levels = [array]
    while max(levels[-1].shape[-2:]) > _SMALLEST_LEVEL:
        last = levels[-1]
        size = (*shape[:-2], *(-(-n // 2) for n in last.shape[-2:]))
        level = group.create_array(str(len(levels)), shape=size, dtype=dtype, chunks=chunks, shards=shards, **layout)
        for block in _blocks(size, shards or chunks):
            level[block] = _halved(last, block)
        levels.append(level)
    if source.calibration is not None:
        source = replace(source, ome=source.ome | {"omero": source.calibration.omero(_limits(levels[-1]))})
    group.attrs.put(_attributes(source, len(levels), array))
    if source.labels is not None and source.shape == tuple(shape):
        shutil.copytree(source.labels, folder / "labels")


def _attributes(source: Multiscale, levels: int, array: Any) -> dict[str, Any]:
    """The attributes of a group with this number of levels."""
    given = {step["type"]: step.get(step["type"]) for step in source.transformations}
    scale = np.array(given.get("scale") or [1.0] * array.ndim)
    translation = np.array(given.get("translation") or [0.0] * array.ndim)
    across = np.array([0.0] * (array.ndim - 2) + [1.0, 1.0])
    datasets = []
    for level in range(levels):
        # a pixel is the mean of 2**level by 2**level pixels, and lies at their centre
        shift = translation + scale * across * (2**level - 1) / 2
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": (scale * (1 + across * (2**level - 1))).tolist()}]
        if shift.any():
            steps.append({"type": "translation", "translation": shift.tolist()})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    entry = {**source.entry, "axes": source.axes, "datasets": datasets, "type": "mean"}
    entry.pop("metadata", None)  # describes the pyramid that was read, not this one
    version = _VERSIONS[source.zarr_format]
    if source.zarr_format == 3:
        return {**source.attributes, "ome": {**source.ome, "version": version, "multiscales": [entry]}}
    return {**source.attributes, **source.ome, "multiscales": [{**entry, "version": version}]}


def _limits(array: Any) -> tuple[float, float]:
    """The lowest and highest value that the number type holds, for integers; else those in the array."""
    if array.dtype.kind in "iu":
        return np.iinfo(array.dtype).min, np.iinfo(array.dtype).max
    values = np.asarray(array[...], dtype=np.float64)
    return float(np.nanmin(values)), float(np.nanmax(values))


def _blocks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Divide an array into blocks of whole chunks, each of about ``_PIXELS_AT_ONCE`` pixels."""
    block = list(chunk)
    for axis in reversed(range(len(shape))):
        while block[axis] < shape[axis] and math.prod(block) < _PIXELS_AT_ONCE:
            block[axis] *= 2
    starts = (range(0, n, step) for n, step in zip(shape, block, strict=True))
    for corner in itertools.product(*starts):
        yield tuple(slice(at, min(at + step, n)) for at, step, n in zip(corner, block, shape, strict=True))


def _halved(array: Any, block: tuple[slice, ...]) -> np.ndarray[Any, Any]:
    """A block of the next level: the means over 2×2 pixels of an array, with an odd edge repeated."""
    source = (*block[:-2], *(slice(2 * cells.start, 2 * cells.stop) for cells in block[-2:]))
    values = np.asarray(array[source])
    odd = [(0, 0)] * (values.ndim - 2) + [(0, n % 2) for n in values.shape[-2:]]
    padded = np.pad(values, odd, mode="edge")
    quarters = np.stack([padded[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    means: np.ndarray[Any, Any] = quarters.mean(axis=0, dtype=np.float64)
    # at the border of a mask half of the pixels are enough
    return means >= 0.5 if values.dtype == bool else rounded(means, values.dtype)
