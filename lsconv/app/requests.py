"""The arguments of ``lsconv blur`` and ``lsconv deblur``, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsconv.app import psf as formulas
from lsconv.app.formats import FORMATS
from lsconv.app.image_io import read_picture

__all__ = ["BOUNDARIES", "Kernel", "UsageError", "check_plot", "choose_device", "choose_psf", "plan_outputs"]

BOUNDARIES = ("unknown", "zero", "periodic", "reflect")
_LARGEST = 2000.0  # pixels; a slip of the decimal point should not ask for gigabytes


class UsageError(Exception):
    """An argument that cannot be served; the message is all they need to see."""


@dataclass(frozen=True)
class Kernel:
    """A point spread function.

    Attributes:
        values: ``(*size)``, or ``(channels, *size)`` with one for each colour; every one sums to one.
        ndim: number of its spatial axes: 2 for pictures, 3 for stacks.
    """

    values: Tensor
    ndim: int

    @property
    def size(self) -> tuple[int, ...]:
        """Its spatial size."""
        return tuple(self.values.shape[-self.ndim :])

    def channels_of(self, colours: Tensor) -> Tensor:
        """Colours ``(*pages, channels, height, width)`` with the axes that the PSF blurs last, after the channels.

        Raises:
            UsageError: a PSF of three axes for a single picture, or a number of colours that does not fit.
        """
        if self.ndim == 3 and colours.ndim == 3:
            raise UsageError("--psf: a PSF of three axes needs a stack of pictures, here there is a single one")
        if self.values.ndim > self.ndim and self.values.shape[0] != colours.shape[-3]:
            raise UsageError(f"--psf: it has {self.values.shape[0]} channels, the picture has {colours.shape[-3]}")
        return colours.movedim(-3, 0) if self.ndim == 3 else colours

    def pages_of(self, fields: Tensor) -> Tensor:
        """The way back from :meth:`channels_of`."""
        return fields.movedim(0, -3) if self.ndim == 3 else fields


def choose_psf(
    file: Path | None, gaussian: float | None, disk: float | None, motion: str | None, box: int | None
) -> Kernel:
    """The point spread function asked for, by exactly one of the five.

    A file is a picture (one colour channel for all, or three for one each), a stack of pictures, or an NPY array of two
    or three axes. It is divided by its sum.

    Raises:
        UsageError: none or several were given, or one that makes no sense.
        ImageFileError, OSError: the file cannot be read.
    """
    given = {"--psf": file, "--gaussian": gaussian, "--disk": disk, "--motion": motion, "--box": box}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        said = f"got {', '.join(names)}" if names else "got none"
        raise UsageError(f"give one of {', '.join(given)} as the blur, {said}")
    if file is not None:
        return _from_file(file)
    if gaussian is not None:
        return _by_formula("--gaussian", gaussian, formulas.gaussian, gaussian)
    if disk is not None:
        return _by_formula("--disk", disk, formulas.disk, disk)
    if box is not None:
        return _by_formula("--box", box, formulas.box, box)
    assert motion is not None  # the only one left; for the type checker
    try:
        length, angle = (float(word) for word in motion.split(","))
    except ValueError:
        raise UsageError(f"--motion {motion}: expected LENGTH,ANGLE in pixels and degrees, such as 15,30") from None
    return _by_formula("--motion", length, formulas.motion, length, angle)


def _by_formula(name: str, extent: float, formula: Callable[..., Tensor], *arguments: float) -> Kernel:
    if extent > _LARGEST:
        raise UsageError(f"{name} {extent:g}: at most {_LARGEST:g} pixels are served")
    try:
        return Kernel(formula(*arguments), 2)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _from_file(path: Path) -> Kernel:
    picture = read_picture(path)
    if path.suffix.lower() == ".npy" and picture.values.ndim == 3 and picture.values.shape[-1] > 1:
        values, ndim = torch.from_numpy(picture.values.astype(np.float64)), 3  # an array of three axes is no colours
    else:
        colours = picture.colours.double()
        ndim = colours.ndim - 1
        values = colours.movedim(-3, 0)
    sums = values.sum(tuple(range(-ndim, 0)), keepdim=True)
    if not bool((sums > 0).all()):
        raise UsageError(f"--psf {path}: its values sum to {sums.min():g}, expected a sum > 0")
    values = values / sums
    return Kernel(values[0] if values.ndim > ndim and len(values) == 1 else values, ndim)


def plan_outputs(images: Sequence[Path], output: Path) -> list[Path]:
    """The file to write for every picture: ``output`` itself, or one of the picture's name in the folder ``output``.

    Raises:
        UsageError: outputs that cannot be written, that coincide, or that would replace an input.
    """
    if len(images) == 1 and not output.is_dir():
        if output.suffix.lower() not in FORMATS:
            raise UsageError(f"--output {output}: the name must end in one of {', '.join(FORMATS)}, or be a folder")
        targets = [output]
    else:
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output}: several pictures need a folder, this is a file")
        if not output.exists() and output.suffix.lower() in FORMATS:
            raise UsageError(f"--output {output}: several pictures need a folder, this is the name of a picture")
        targets = [output / image.name for image in images]
        twice = {target.name for target in targets if targets.count(target) > 1}
        if twice:
            raise UsageError(f"--output {output}: two pictures would both become {sorted(twice)[0]}")
        if not output.exists():
            _check_folder("--output", output)
            output.mkdir()
    inputs = {image.resolve() for image in images}
    for target in targets:
        _check_folder("--output", target)
        if target.resolve() in inputs:
            raise UsageError(f"--output {target}: would replace an input; give another name or folder")
    return targets


def check_plot(plot: Path | None, images: Sequence[Path], output: Path) -> None:
    """Raise :class:`UsageError` unless the report can be written."""
    if plot is None:
        return
    if len(images) > 1:
        raise UsageError("--plot: a report is about one picture, give one")
    if plot.suffix.lower() != ".png":
        raise UsageError(f"--plot {plot}: the report is a PNG file, give a name that ends in .png")
    _check_folder("--plot", plot)
    if plot.resolve() in (output.resolve(), images[0].resolve()):
        raise UsageError(f"--plot {plot}: is also the name of the picture")


def _check_folder(option: str, path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: its folder does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option} {path}: its folder cannot be written to")


def choose_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: there is none, or it is neither a CPU nor a CUDA device.
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
