"""Arguments of ``lsconv blur`` and ``lsconv deblur``, checked before any work is done."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsconv import psf as formulas
from lsconv.app.formats import FORMATS
from lsconv.app.image_io import Picture, read_picture
from lsconv.app.ome_zarr import is_image_folder, is_replaceable

__all__ = [
    "AUTOMATIC",
    "BOUNDARIES",
    "Kernel",
    "UsageError",
    "check_plot",
    "check_writable",
    "choose_device",
    "choose_psf",
    "find_images",
    "parse_memory",
    "plan_outputs",
    "real_path",
]

AUTOMATIC = ("gaussian", "disk", "motion")  # the models of a blur that are estimated
BOUNDARIES = ("unknown", "zero", "periodic", "reflect")
_MAX_EXTENT = 2000.0  # pixels; a misplaced decimal point would make a PSF of gigabytes


class UsageError(Exception):
    """An option of the command line is wrong; the message names it, what was given and what was expected."""


@dataclass(frozen=True)
class Kernel:
    """A point spread function (PSF).

    Attributes:
        values: ``(*size)``; ``(channels, *size)`` with one PSF for each colour or channel; or ``(K, *size)`` at the
            ``positions``. Each sums to one.
        ndim: number of spatial axes: 1 for signals, 2 for images, 3 for stacks.
        total: the sum that the values of its file were divided by, where it differs from one by over 1 %; else None.
        model: the model whose parameters are estimated from each image, in place of the values; None: they are known.
        positions: ``(K, ndim)``, the pixels at which PSFs that vary across the image were measured; None: one PSF
            holds everywhere.
    """

    values: Tensor
    ndim: int
    total: float | None = None
    model: str | None = None
    positions: Tensor | None = None

    @property
    def channels(self) -> int:
        """The number of colours or channels with a PSF of their own; 0 where all share one."""
        return self.values.shape[0] if self.values.ndim > self.ndim and self.positions is None else 0

    @property
    def size(self) -> tuple[int, ...]:
        """The PSF's spatial size."""
        return tuple(self.values.shape[-self.ndim :])

    def fields_of(self, picture: Picture) -> Tensor:
        """The image as ``(items, channels, *size)``: the axes that the PSF blurs last, all others among the items.

        Raises:
            UsageError: the PSF has three axes and the image no depth, or one axis and the image is no signal; or their
                numbers of channels differ.
        """
        colours = picture.colours
        if self.channels and self.channels not in (colours.shape[-3], _channel_count(picture)):
            raise UsageError(
                f"--psf: it has {self.channels} channels, the image has {_channel_count(picture) or colours.shape[-3]}"
            )
        if picture.line != (self.ndim == 1):
            mismatch = "a signal needs a PSF of one axis" if picture.line else "a PSF of one axis needs a signal"
            raise UsageError(f"--psf: {mismatch} (an NPY array); --gaussian and --box serve signals")
        if self.ndim == 3:
            if "Z" not in picture.axes:
                raise UsageError(
                    f"--psf: a PSF of three axes needs a stack, here the axes are {picture.axes}YX without depth (Z)"
                )
            colours = colours.movedim(picture.axes.index("Z"), -3)
        if self.ndim == 1:
            colours = colours.squeeze(-2)
        return colours.reshape(-1, *colours.shape[-self.ndim - 1 :])

    def picture_of(self, fields: Tensor, picture: Picture, crop: tuple[slice, ...] | None = None) -> Picture:
        """The image whose :meth:`fields_of` these are.

        Args:
            fields: ``(items, channels, *size)``.
            picture: the image that the fields were made from; gives the axes, number type, opacity and metadata.
            crop: slices of the spatial axes of ``picture`` that the fields cover; None: all of it.
        """
        leading = [n for n, _ in self._item_axes(picture)]
        colours = fields.reshape(*leading, *fields.shape[1:])
        if self.ndim == 3:
            colours = colours.movedim(-3, picture.axes.index("Z"))
        if self.ndim == 1:
            colours = colours.unsqueeze(-2)
        return picture.with_colours(colours) if crop is None else picture.with_colours(colours, crop)

    def of_item(self, picture: Picture, item: int) -> Tensor:
        """The PSF of one of the items of :meth:`fields_of`, ``(*size)`` or ``(channels, *size)``."""
        if not self.channels or not _channel_count(picture):
            return self.values
        axes = self._item_axes(picture)
        index = np.unravel_index(item, [n for n, _ in axes])
        return self.values[int(index[[name for _, name in axes].index("C")])]

    def place_of(self, picture: Picture, item: int) -> str:
        """The place of an item of :meth:`fields_of` in words, such as "time 2 of 3, channel 1 of 2"."""
        axes = self._item_axes(picture)
        index = np.unravel_index(item, [n for n, _ in axes]) if axes else ()
        words = {"T": "time", "C": "channel", "Z": "slice"}
        return ", ".join(
            f"{words.get(name, f'axis {name}')} {int(at) + 1} of {n}"
            for at, (n, name) in zip(index, axes, strict=True)
            if n > 1
        )

    def _item_axes(self, picture: Picture) -> list[tuple[int, str]]:
        """The size and letter of every axis along which the items lie."""
        axes = zip(picture.values.shape, picture.axes, strict=False)
        return [(size, name) for size, name in axes if self.ndim < 3 or name != "Z"]

    def as_line(self) -> Kernel:
        """The PSF of one axis whose product with another is this separable one, for signals.

        Raises:
            UsageError: it is not separable, or not one PSF of two axes.
        """
        rows, columns = self.values.sum(0), self.values.sum(1)
        if (
            self.positions is not None
            or self.values.ndim != 2
            or not torch.allclose(columns[:, None] * rows, self.values, atol=1e-9)
        ):
            raise UsageError("a signal needs a blur of one axis: --gaussian, --box, or --psf with an NPY array")
        return Kernel(rows, 1)


def _channel_count(picture: Picture) -> int:
    """The length of the axis of channels (C), 0 where there is none; colours are on an axis of their own."""
    return picture.values.shape[picture.axes.index("C")] if "C" in picture.axes else 0


def choose_psf(
    file: Path | str | None, gaussian: float | None, disk: float | None, motion: str | None, box: int | None
) -> Kernel:
    """Make the PSF from the one of five options that was given.

    Args:
        file: an image (of three colours: one PSF for each), a stack of images, or an NPY array of one to three axes,
            which is divided by its sum; or ``auto:MODEL`` for a PSF that is estimated from each image.
        gaussian: sigma in pixels.
        disk: radius in pixels.
        motion: ``LENGTH,ANGLE`` in pixels and degrees from horizontal.
        box: width in pixels.

    Raises:
        UsageError: none or several were given, or one out of range.
        ImageFileError, OSError: the file cannot be read.
    """
    given = {"--psf": file, "--gaussian": gaussian, "--disk": disk, "--motion": motion, "--box": box}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise UsageError(f"give one of {', '.join(given)} as the blur, got {', '.join(names) or 'none'}")
    if file is not None and str(file).startswith("auto:"):
        model = str(file).removeprefix("auto:")
        if model not in AUTOMATIC:
            raise UsageError(f"--psf {file}: expected auto:{', auto:'.join(AUTOMATIC)} or a file")
        return Kernel(torch.ones(1, 1, dtype=torch.float64), 2, model=model)
    if file is not None:
        return _from_file(Path(file))
    if gaussian is not None:
        return _by_formula("--gaussian", gaussian, formulas.gaussian, gaussian)
    if disk is not None:
        return _by_formula("--disk", disk, formulas.disk, disk)
    if box is not None:
        return _by_formula("--box", box, formulas.box, box)
    assert motion is not None  # for the type checker: exactly one was given
    try:
        length, angle = (float(word) for word in motion.split(","))
    except ValueError:
        raise UsageError(f"--motion {motion}: expected LENGTH,ANGLE in pixels and degrees, such as 15,30") from None
    return _by_formula("--motion", length, formulas.motion, length, angle)


def _by_formula(name: str, extent: float, formula: Callable[..., Tensor], *arguments: float) -> Kernel:
    """The PSF that a formula gives; ``extent``, in pixels, sets its size."""
    if extent > _MAX_EXTENT:
        raise UsageError(f"{name} {extent:g}: expected at most {_MAX_EXTENT:g} pixels")
    try:
        return Kernel(formula(*arguments), 2)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _from_file(path: Path) -> Kernel:
    """The PSF in an image file, divided by its sum."""
    picture = read_picture(path)
    if path.suffix.lower() == ".npy" and picture.values.ndim == 3 and picture.values.shape[-1] > 1:
        values, ndim = (
            torch.from_numpy(picture.values.astype(np.float64)),
            3,
        )  # a stack: its last axis is width, not colour
    elif picture.line:
        values, ndim = picture.colours.double()[..., 0, :], 1
    else:
        colours = picture.colours.double()
        ndim = 3 if "Z" in picture.axes else 2
        if len(picture.axes) > (ndim - 2) + ("C" in picture.axes) or ("C" in picture.axes and colours.shape[-3] > 1):
            raise UsageError(f"--psf {path}: axes {picture.axes}YX, expected YX, ZYX, CYX or CZYX")
        if "C" in picture.axes:
            values = colours.movedim(picture.axes.index("C"), 0).squeeze(-3)
        else:
            values = colours.movedim(-3, 0)
    if not bool(torch.isfinite(values).all()):
        raise UsageError(f"--psf {path}: contains NaN")
    sums = values.sum(tuple(range(-ndim, 0)), keepdim=True)
    if not bool((sums > 0).all()):
        raise UsageError(f"--psf {path}: its values sum to {sums.min():g}, expected a sum > 0")
    total = float(sums.flatten()[(sums.flatten() - 1).abs().argmax()])
    values = values / sums
    values = values[0] if values.ndim > ndim and len(values) == 1 else values
    return Kernel(values, ndim, total if abs(total - 1) > 0.01 else None)


def find_images(given: Sequence[Path]) -> list[Path]:
    """List the files that were given, and the images in the folders that were given, sorted by name.

    Raises:
        UsageError: a folder has no image.
    """
    found: list[Path] = []
    for path in given:
        if not path.is_dir() or is_image_folder(path):
            found.append(path)
            continue
        inside = sorted(
            entry for entry in path.iterdir() if entry.suffix.lower() in FORMATS and not entry.name.startswith(".")
        )
        if not inside:
            raise UsageError(f"{path}: the folder has no file that ends in {', '.join(FORMATS)}")
        found += inside
    return found


def plan_outputs(given: Sequence[Path], images: Sequence[Path], output: str) -> list[Path]:
    """Name the file to write for every image: ``output`` itself, or one of the image's name in the folder ``output``.

    Args:
        given: the files and folders on the command line.
        images: the files to read.
        output: a file, or a folder; text, because a slash at its end means a folder, and a Path drops it.

    Raises:
        UsageError: an output cannot be written, coincides with another, or would replace an input.
    """
    place = Path(output)
    zarr = place.suffix.lower() == ".zarr"
    folder = (output.endswith(("/", os.sep)) and not zarr) or any(p.is_dir() and not is_image_folder(p) for p in given)
    if len(images) == 1 and not folder and (zarr or not place.is_dir()):
        if place.suffix.lower() not in FORMATS:
            ends = f"{', '.join(FORMATS)}, or in / for a folder"
            raise UsageError(f"--output {output}: the name must end in one of {ends}")
        targets = [place]
    else:
        if place.exists() and not place.is_dir():
            raise UsageError(f"--output {output}: several images need a folder, this is a file")
        if zarr or (not place.exists() and place.suffix.lower() in FORMATS):
            raise UsageError(f"--output {output}: several images need a folder, this is the name of an image")
        targets = [place / image.name for image in images]
        twice = {target.name for target in targets if targets.count(target) > 1}
        if twice:
            raise UsageError(f"--output {output}: two images would both become {sorted(twice)[0]}")
    inputs = [real_path(image) for image in images]
    for target in targets:
        check_writable("--output", target)
        if any(real_path(target).is_relative_to(image) for image in inputs):
            raise UsageError(f"--output {target}: would replace an input; give another name or folder")
    return targets


def real_path(path: Path) -> Path:
    """The path with its links followed; unlike ``Path.resolve`` it accepts links that lead in a circle."""
    return Path(os.path.realpath(path))


def parse_memory(text: str | None) -> int | None:
    """Convert a size such as 500M, 4G or 4GB to bytes.

    Raises:
        UsageError: the text is no size, or not positive.

    Example:
        >>> parse_memory("1.5G")
        1610612736
    """
    if text is None:
        return None
    word = text.strip().upper().removesuffix("B").removesuffix("I")
    power = "KMGT".find(word[-1:]) + 1 if word[-1:] else 0
    try:
        size = float(word[:-1] if power else word) * 1024**power
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise UsageError(f"--max-memory {text}: expected a size such as 500M or 4G")
    return int(size)


def check_plot(
    plot: Path | None, images: Sequence[Path], targets: Sequence[Path], error_bars: Path | None = None
) -> None:
    """Raise :class:`UsageError` unless the report and the error bars can be written."""
    if error_bars is not None:
        if len(images) > 1:
            raise UsageError("--error-bars: is one file, for one image; run lsconv deblur for each")
        if error_bars.suffix.lower() not in (".tif", ".tiff", ".npy", ".fits", ".zarr"):
            raise UsageError(f"--error-bars {error_bars}: are real numbers, give a name in .tif, .npy, .fits or .zarr")
        check_writable("--error-bars", error_bars)
        if real_path(error_bars) in (real_path(targets[0]), real_path(images[0])):
            raise UsageError(f"--error-bars {error_bars}: is also the name of the image")
    if plot is None:
        return
    if len(images) > 1:
        raise UsageError("--plot: a report is about one image; --report FOLDER is for several")
    if plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the report is a PNG file, give a name that ends in .png")
    check_writable("--plot", plot)
    if real_path(plot) in (real_path(targets[0]), real_path(images[0])):
        raise UsageError(f"--plot {plot}: is also the name of the image")


def check_writable(option: str, path: Path) -> None:
    """Raise :class:`UsageError` unless a file can be written there; missing folders on the way are no obstacle."""
    if path.is_dir() and not is_replaceable(path):
        raise UsageError(f"{option} {path}: is a folder")
    if path.is_file() and path.suffix.lower() == ".zarr":
        raise UsageError(f"{option} {path}: is a file; OME-Zarr images are folders")
    there = next(folder for folder in path.parents if folder.exists())
    if not there.is_dir():
        raise UsageError(f"{option} {there}: is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{option} {path}: its folder cannot be written to")


def choose_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        UsageError: the machine does not have it, or it is neither a CPU nor a CUDA device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; try cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device {name}: this machine and torch {torch.__version__} offer {found} CUDA devices")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    return device
