"""Images read from files, and written to them atomically."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lsconv.app.formats import FORMATS, reader_of
from lsconv.app.ome_zarr import arranged, is_image_folder, is_replaceable, label_names, read_ome_zarr
from lsconv.app.picture import ImageFileError, Metadata, Picture, imported, quantised

__all__ = [
    "ImageFileError",
    "Metadata",
    "Picture",
    "atomically",
    "atomically_folder",
    "check_labels",
    "check_target",
    "read_picture",
    "warn_of_labels",
    "write_picture",
]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes ``path`` when the block ends, and is removed when the block raises.

    The folder of ``path`` is made where it is missing. Until the end the file is in that folder under another name, so
    that renaming it is one step of the file system and no reader sees half a file.
    """
    # The name is chosen before the file is made, so that an interruption at any moment leaves none behind.
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        with open(str(name), "x+b") as file:  # a str, because tifffile reads file.name and expects one
            yield file
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


@contextmanager
def atomically_folder(path: Path, draft: Path | None = None) -> Iterator[Path]:
    """Make a folder that becomes ``path`` when the block ends, and is removed when the block raises.

    Args:
        path: the folder.
        draft: its path until then, on the same file system; None: a new name beside it.
    """
    path = Path(os.path.realpath(path))  # a link to a folder stays a link
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name}.{secrets.token_hex(4)}.part" if draft is None else draft
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
        if path.exists():
            _swap(folder, path)
        else:
            folder.rename(path)
    finally:
        for _ in range(10):  # zarr's threads may still be writing after an interruption
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break


def _swap(new: Path, old: Path) -> None:
    """Swap two folders; in one step where the operating system can."""
    if sys.platform == "linux":
        swap = getattr(ctypes.CDLL(None), "renameat2", None)
        names = (_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        if swap is not None and swap(*names, _RENAME_EXCHANGE) == 0:
            return
    aside = new.with_suffix(".old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def read_picture(path: Path) -> Picture:
    """Read a PNG, JPEG, TIFF, NPY, WAV or FITS file, recognised by its first bytes, or an OME-Zarr folder.

    PNG: 1 to 16 bits, palettes converted to colour. TIFF: any number type and any axes ...YX (time, channel, depth).
    OME-Zarr: the highest level, with time, channel and depth as leading axes.
    NPY: ``(samples,)``, ``(height, width)``, ``(height, width, up to 4 channels)``, ``(pages, height, width)`` or
    ``(pages, height, width, channels)``; 2 and 4 channels mean that the last one is opacity. NaN stays NaN.

    Args:
        path: the file.

    Returns:
        The :class:`Picture`.

    Raises:
        ImageFileError: the file has none of these formats, is damaged, or holds infinity.
        OSError: the file cannot be opened.
    """
    if is_image_folder(path):
        read: Callable[[Path], Picture] | None = read_ome_zarr
    else:
        with open(path, "rb") as file:
            read = reader_of(file.read(12))
    if read is None:
        raise ImageFileError(f"{path}: not a PNG, JPEG, TIFF, NPY, WAV or FITS file")
    try:
        picture = read(path)
    except (ImageFileError, MemoryError):
        raise
    except Exception as error:  # the readers raise many kinds of errors for damaged files
        raise ImageFileError(f"{path}: damaged or unsupported file ({error})") from None
    values = picture.values
    if values.dtype.kind not in "iufb":
        raise ImageFileError(f"{path}: values of type {values.dtype} are not supported")
    if values.size == 0 or values.ndim < 3 or not (picture.line or 1 <= values.shape[-1] <= 4):
        raise ImageFileError(f"{path}: an array of shape {values.shape} (with channels last) is not an image")
    if values.dtype.kind == "f" and np.isinf(values).any():
        raise ImageFileError(f"{path}: contains infinity; missing pixels are NaN")
    return picture


def check_target(path: Path, picture: Picture) -> None:
    """Raise :class:`ImageFileError` unless an image like this one can be written to a file of this name."""
    target = FORMATS.get(path.suffix.lower())
    if target is None:
        raise ImageFileError(f"{path}: the name must end in one of {', '.join(FORMATS)}")
    if path.is_dir() and not (target.folder and is_replaceable(path)):
        raise ImageFileError(f"{path}: is a folder")
    if target.folder:
        if path.is_file():
            raise ImageFileError(f"{path}: is a file; {target.name} images are folders")
        imported(path, target.name)
        check_labels(path, picture.metadata)
    if target.name == "FITS":
        imported(path, target.name)
        if picture.values.dtype not in (target.depths or ()):
            raise ImageFileError(f"{path}: FITS cannot hold {picture.values.dtype}; use .npy")
    if picture.values.ndim > 3 and not target.stacks:
        raise ImageFileError(f"{path}: {target.name} cannot hold a stack of images; use .tif or .npy")
    if picture.line and target.images and target.name not in ("NPY", "FITS"):
        raise ImageFileError(f"{path}: {target.name} cannot hold a signal; use .npy or .wav")
    if not picture.line and not target.images:
        raise ImageFileError(f"{path}: {target.name} cannot hold an image; use .tif or .npy")
    if picture.line and not target.images and picture.values.dtype not in (target.depths or ()):
        raise ImageFileError(f"{path}: {target.name} cannot hold {picture.values.dtype}; use .npy")
    if picture.opacity and not target.opacity:
        raise ImageFileError(f"{path}: {target.name} cannot hold opacity; use .png or .tif")
    if target.folder:
        arranged(path, picture)
    if target.depths is None or picture.values.dtype in target.depths:
        return
    if picture.values.dtype.kind == "f" and bool(((picture.values < 0) | (picture.values > 1)).any()):
        raise ImageFileError(f"{path}: {target.name} cannot hold values outside [0, 1]; use .tif or .npy")
    if picture.values.dtype.kind == "i":
        raise ImageFileError(f"{path}: {target.name} cannot hold negative integers; use .tif or .npy")


def check_labels(path: Path, metadata: Metadata) -> None:
    """Raise :class:`ImageFileError` where replacing an OME-Zarr image would lose labels.

    Args:
        path: the image to replace.
        metadata: that of the new image, whose own labels are written with it.
    """
    own = [] if metadata.ome is None else label_names(metadata.ome.labels)
    lost = [name for name in label_names(path / "labels") if name not in own]
    if lost:
        raise ImageFileError(f"{path}: has labels ({', '.join(lost)}), which would be lost; give another name")


def warn_of_labels(path: Path, metadata: Metadata, shape: tuple[int, ...]) -> None:
    """Warn of the labels of the input that are not written with the output.

    Args:
        path: the output.
        metadata: that of the input.
        shape: the shape of the output's array.
    """
    names = [] if metadata.ome is None else label_names(metadata.ome.labels)
    folder = FORMATS[path.suffix.lower()].folder
    if names and not (folder and shape == metadata.ome.shape):
        name = FORMATS[path.suffix.lower()].name
        reason = "the image is of another size" if folder else f"{name} has no place for them"
        warnings.warn(f"labels {', '.join(names)} are not written: {reason}", stacklevel=2)


def write_picture(path: Path, picture: Picture) -> None:
    """Write an image in the format of the file's ending, replacing the file in one step.

    PNG holds 8 and 16 bits, JPEG 8 (quality 95, colour at full resolution); deeper integers are rounded to these,
    floating point becomes 16 bits in PNG and 8 in JPEG. TIFF, NPY and OME-Zarr hold every number type. Metadata are
    written where the format has a place for them: physical sizes and names of channels in TIFF and OME-Zarr, labels
    from OME-Zarr to OME-Zarr. A warning tells of labels that are not written.

    Args:
        path: the file, ending in .png, .jpg, .jpeg, .tif, .tiff, .npy, .fits, .fit, .zarr or .wav.
        picture: the image.

    Raises:
        ImageFileError: the format cannot hold the image.
        OSError: the file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "ramp.png"
        ...     write_picture(path, Picture(np.arange(256, dtype=np.uint8).reshape(16, 16, 1)))
        ...     read_picture(path).pixels[0, -1, -1].item()
        1.0
    """
    check_target(path, picture)
    target = FORMATS[path.suffix.lower()]
    if target.depths is not None and picture.values.dtype not in target.depths:
        scale = float(np.iinfo(picture.values.dtype).max) if picture.is_integer else 1.0
        picture = replace(picture, values=quantised(picture.values / scale, target.depths[-1]))
    output: Any = atomically_folder(path) if target.folder else atomically(path)
    with output as opened:
        target.write(opened, picture)
    warn_of_labels(path, picture.metadata, picture.values.shape[:-1])
