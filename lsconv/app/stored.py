"""Images that stay in their files, read and written by slices: OME-Zarr, TIFF without compression, NPY."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lsconv.app.image_io import ImageFileError, Metadata, atomically_folder, check_labels, warn_of_labels
from lsconv.app.ome_zarr import arrangement, created_ome_zarr, is_image_folder, open_ome_zarr
from lsconv.app.tiff import create_tiff, open_tiff

__all__ = ["Stored", "opened", "written"]


@dataclass(frozen=True)
class Stored:
    """An image in a file, of which nothing is in memory.

    Attributes:
        array: a memory map or a Zarr array, read and written by integers and slices.
        axes: a letter for every axis of the array: T time, C channel, Z depth, Y, X, S the samples of a pixel.
        metadata: the metadata of the file.
    """

    array: Any
    axes: str
    metadata: Metadata = field(default_factory=Metadata)

    def planes_first(self, ndim: int) -> list[int]:
        """The order of the axes in which the last ``ndim`` are depth, height and width.

        Raises:
            ImageFileError: the axis of depth is missing.
        """
        letters = "ZYX"[-ndim:]
        if letters[0] not in self.axes:
            raise ImageFileError(
                f"--psf: a PSF of three axes needs a stack, here the axes are {self.axes} without depth (Z)"
            )
        last = [self.axes.index(letter) for letter in letters]
        return [axis for axis in range(len(self.axes)) if axis not in last] + last

    def read_as(self, order: Sequence[int]) -> Any:
        """The array with its axes in another order, without reading it."""
        return self.array.transpose(order) if isinstance(self.array, np.ndarray) else _ZarrView(self.array, order)


class _ZarrView:
    """A Zarr array with its axes in another order, read by one integer or slice per axis.

    Args:
        array: the Zarr array.
        order: its axes in the new order; those that are read by slices keep the array's order among themselves.
    """

    def __init__(self, array: Any, order: Sequence[int]) -> None:
        self._array, self._order = array, list(order)
        self.shape, self.dtype = tuple(array.shape[axis] for axis in order), array.dtype

    def __getitem__(self, cells: Any) -> Any:
        """Read a part.

        Raises:
            ImageFileError: a chunk is damaged.
        """
        try:
            return self._array[tuple(cells[self._order.index(axis)] for axis in range(len(self._order)))]
        except (ValueError, RuntimeError, KeyError) as error:
            raise ImageFileError(f"damaged or unsupported file ({error})") from None


def opened(image: Path) -> Stored:
    """Open an image without reading its pixels.

    Raises:
        ImageFileError: its format cannot be read by slices, or it is no image of real numbers.
    """
    opacity = False
    if is_image_folder(image):
        try:
            stored = Stored(*open_ome_zarr(image))
        except (ImageFileError, MemoryError):
            raise
        except Exception as error:  # zarr raises many kinds of errors for damaged groups
            raise ImageFileError(f"{image}: damaged or unsupported file ({error})") from None
    elif image.suffix.lower() == ".npy":
        try:
            array = np.load(image, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ImageFileError(f"{image}: damaged or unsupported file ({error})") from None
        samples = array.ndim > 2 and array.shape[-1] <= 4
        stored = Stored(array, "QPNMZ"[5 - max(array.ndim - 2 - samples, 0) :] + "YX" + "S" * samples)
        opacity = samples and array.shape[-1] in (2, 4)
    else:
        mapped, axes, metadata, opacity = open_tiff(image)
        stored = Stored(mapped, axes, metadata)
    shape, dtype = tuple(stored.array.shape), stored.array.dtype
    if dtype.kind not in "iuf" or not 2 <= len(shape) <= 5 or 0 in shape:
        raise ImageFileError(f"{image}: an array of {dtype} and shape {shape} is not an image")
    if opacity:
        raise ImageFileError(f"{image}: has opacity, which --tile does not serve; remove it")
    return stored


@contextmanager
def written(target: Path, like: Stored, folder: Path) -> Iterator[tuple[Any, list[int]]]:
    """Make an array for an image like another, which becomes ``target`` when the block ends without an error.

    Args:
        target: the file to write.
        like: the other image.
        folder: a folder beside the target, in which the array is until then; one left by a killed process is replaced.

    Yields:
        The array, and for each of its axes the axis of the other image that it is.
    """
    dtype = like.array.dtype.newbyteorder("=")
    order = list(range(len(like.axes)))
    suffix = target.suffix.lower()
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"answer{suffix}"
    if suffix == ".zarr":
        check_labels(target, like.metadata)
        order, multiscale = arrangement(target, like.axes, tuple(like.array.shape), like.metadata)
        shape = tuple(like.array.shape[axis] for axis in order)
        with atomically_folder(target, draft) as made, created_ome_zarr(made, shape, dtype, multiscale) as array:
            yield array, order
    elif suffix in (".npy", ".tif", ".tiff"):
        order.sort(key=lambda axis: like.axes[axis] == "S")  # samples last
        shape = tuple(like.array.shape[axis] for axis in order)
        axes = "".join(like.axes[axis] for axis in order)
        try:
            if suffix == ".npy":
                mapped: Any = np.lib.format.open_memmap(draft, mode="w+", dtype=dtype, shape=shape)
            else:
                mapped = create_tiff(draft, shape, dtype, axes, like.metadata)
            yield mapped, order
            mapped.flush()
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    else:
        raise ImageFileError(f"{target}: --tile writes .zarr, .tif and .npy; give such a name")
    warn_of_labels(target, like.metadata, shape)
