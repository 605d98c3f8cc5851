"""OME-Zarr images, by zarr, which the extra ``zarr`` installs: axes, scales and channels kept, a pyramid written.

The format is that of https://ngff.openmicroscopy.org: versions 0.1 to 0.4 on Zarr's format 2, and 0.5 on its format 3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lsconv.app.picture import ImageFileError, Metadata, Picture, rounded

__all__ = [
    "Multiscale",
    "arranged",
    "check_zarr",
    "is_image_folder",
    "is_replaceable",
    "read_ome_zarr",
    "write_ome_zarr",
]

_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_VERSIONS = {2: "0.4", 3: "0.5"}
_READ = ("0.1", "0.2", "0.3", "0.4", "0.5")
_LEAST = 256  # pixels along y and x of the smallest level


@dataclass(frozen=True)
class Multiscale:
    """The description of an OME-Zarr image.

    Attributes:
        axes: name, type and unit of every axis, in the order of the array's.
        transformations: of its highest level: a scale, and perhaps a translation.
        zarr_format: Zarr's, 2 or 3.
        entry: the rest of the image's entry under "multiscales".
        ome: what stands beside "multiscales", such as "omero" with the channels' names and colours.
        attributes: other attributes of the group.
        chunks: the shape of a chunk, and of a shard or None.
    """

    axes: list[dict[str, Any]]
    transformations: list[dict[str, Any]]
    zarr_format: int
    entry: dict[str, Any]
    ome: dict[str, Any]
    attributes: dict[str, Any]
    chunks: tuple[Any, Any]


def check_zarr(path: Path) -> Any:
    """The package ``zarr``, or the line that installs it.

    Raises:
        ImageFileError: it is missing.
    """
    try:
        import zarr
    except ImportError:
        raise ImageFileError(f"{path}: OME-Zarr needs zarr; install it with: pip install 'lsconv[zarr]'") from None
    return zarr


def is_image_folder(path: Path) -> bool:
    """Tell a folder that is one image from a folder of images, by its name or its content."""
    return path.is_dir() and (path.suffix.lower() == ".zarr" or _is_zarr(path))


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs"))


def is_replaceable(path: Path) -> bool:
    """Tell a folder that is an OME-Zarr image and no more from plates, collections and folders of other things."""
    try:
        for name in ("zarr.json", ".zattrs"):
            if path.suffix.lower() == ".zarr" and (path / name).is_file():
                found = json.loads((path / name).read_text(encoding="utf-8"))
                return "multiscales" in (found.get("attributes", {}).get("ome", {}) if name == "zarr.json" else found)
    except (OSError, ValueError, AttributeError):
        return False
    return False


def read_ome_zarr(path: Path) -> Picture:
    """The highest level of the first image of an OME-Zarr group; time, channel and depth are leading axes."""
    zarr = check_zarr(path)
    if not _is_zarr(path):
        raise ImageFileError(f"{path}: a folder that is no Zarr group")
    group = zarr.open_group(path, mode="r")
    attributes = group.attrs.asdict()
    ome = attributes.pop("ome") if "ome" in attributes else {k: attributes.pop(k) for k in list(attributes)}
    if not ome.get("multiscales"):
        raise ImageFileError(
            f"{path}: a Zarr group without multiscales; of a plate or a collection name an image, such as {path / '0'}"
        )
    entry = ome.pop("multiscales")[0]
    version = str(ome.pop("version", entry.pop("version", "0.4")))
    if version[:3] not in _READ:
        raise ImageFileError(f"{path}: OME-Zarr version {version} is not supported, {_READ[0]} to {_READ[-1]} are")
    axes = [
        {"name": axis, "type": _KINDS.get(axis, "")} if isinstance(axis, str) else axis
        for axis in entry.pop("axes", "tczyx")  # names alone until 0.3, nothing until 0.2
    ]
    dataset = entry.pop("datasets")[0]
    array = group[dataset["path"]]
    names = [str(axis["name"]).lower() for axis in axes]
    letters = "".join(name.upper() if name in _KINDS else "Q" for name in names)
    if letters[-2:] != "YX" or len(set(letters)) < len(letters):
        raise ImageFileError(f"{path}: axes {', '.join(names)}; expected t, c, z, y, x or fewer")
    if len(axes) != array.ndim:
        raise ImageFileError(f"{path}: {len(axes)} axes are named, the array has {array.ndim}")
    values = np.asarray(array[...])
    multiscale = Multiscale(
        axes, dataset.get("coordinateTransformations", []), group.metadata.zarr_format, entry, ome, attributes,
        (array.chunks, getattr(array, "shards", None)),
    )  # fmt: skip
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return Picture(native[..., None], metadata=Metadata(ome=multiscale), axes=letters[:-2])


def arranged(path: Path, picture: Picture) -> tuple[np.ndarray[Any, Any], Multiscale]:
    """The array and its description as they are written: time, channel, depth, height, width; colours are channels.

    Raises:
        ImageFileError: the picture has axes that the format has not.
    """
    values, known = picture.values, picture.metadata.ome
    if known is not None and values.shape[-1] == 1 and len(known.axes) == values.ndim - 1:
        return values[..., 0], known
    letters = picture.axes
    if values.shape[-1] > 1:
        values, letters = np.moveaxis(values, -1, -3), f"{letters}C"
    else:
        values = values[..., 0]
    order = sorted(range(len(letters)), key=lambda index: "TCZ".find(letters[index]))
    if len(set(letters)) < len(letters) or set(letters) - set("TCZ"):
        raise ImageFileError(f"{path}: OME-Zarr has time, channel, depth, y and x, the axes are {letters}YX; use .tif")
    values = values.transpose(*order, -2, -1)
    names = [letters[index].lower() for index in order] + ["y", "x"]
    axes = [{"name": name, "type": _KINDS[name]} for name in names]
    scale = [1.0] * len(axes)
    if picture.metadata.resolution is not None and picture.metadata.unit != "none":
        across, down = picture.metadata.resolution
        scale[-2:] = [1 / down, 1 / across]
        axes[-2:] = [{**axis, "unit": {"cm": "centimeter"}.get(picture.metadata.unit, "inch")} for axis in axes[-2:]]
    transformations = [{"type": "scale", "scale": scale}]
    chunks = (*(1 for _ in order), *(min(n, 1024) for n in values.shape[-2:]))
    return values, Multiscale(axes, transformations, 3, {}, {}, {}, (chunks, None))


def write_ome_zarr(folder: Path, picture: Picture) -> None:
    """Write the image and its pyramid of means over 2×2 pixels into a folder, in the version that it was read from.

    Images of other formats are written in version 0.5. Further images and labels of the group are not copied.
    """
    zarr = check_zarr(folder)
    values, source = arranged(folder, picture)
    group = zarr.open_group(folder, mode="w", zarr_format=source.zarr_format)
    if source.zarr_format == 3:
        layout: dict[str, Any] = {"dimension_names": [axis["name"] for axis in source.axes]}
    else:
        layout = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    given = {step["type"]: step.get(step["type"]) for step in source.transformations}
    scale = np.array(given.get("scale") or [1.0] * values.ndim)
    translation = np.array(given.get("translation") or [0.0] * values.ndim)
    across = np.array([0.0] * (values.ndim - 2) + [1.0, 1.0])
    chunks, shards = source.chunks
    datasets = []
    for level, array in enumerate(_levels(values)):
        made = group.create_array(
            str(level), shape=array.shape, dtype=array.dtype, chunks=chunks, shards=shards, **layout
        )
        made[...] = array
        # the first pixel of a level lies in the middle of those that it is the mean of
        shift = translation + scale * across * (2**level - 1) / 2
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": (scale * (1 + across * (2**level - 1))).tolist()}]
        if shift.any():
            steps.append({"type": "translation", "translation": shift.tolist()})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    entry = {**source.entry, "axes": source.axes, "datasets": datasets, "type": "mean"}
    entry.pop("metadata", None)  # of the pyramid that was read
    version = _VERSIONS[source.zarr_format]
    if source.zarr_format == 3:
        attributes = {**source.attributes, "ome": {**source.ome, "version": version, "multiscales": [entry]}}
    else:
        attributes = {**source.attributes, **source.ome, "multiscales": [{**entry, "version": version}]}
    group.attrs.put(attributes)


def _levels(values: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The image, and each half of the last along y and x, an odd edge repeated."""
    yield values
    while max(values.shape[-2:]) > _LEAST:
        odd = [(0, 0)] * (values.ndim - 2) + [(0, n % 2) for n in values.shape[-2:]]
        padded = np.pad(values, odd, mode="edge")
        quarters = np.stack([padded[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
        means: np.ndarray[Any, Any] = quarters.mean(axis=0, dtype=np.float64)
        if values.dtype.kind in "iu":
            values = rounded(means, values.dtype)
        else:
            values = means >= 0.5 if values.dtype == bool else means.astype(values.dtype)
        yield values
