"""Pictures in files and as tensors; files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from torch import Tensor

__all__ = ["ImageFileError", "Picture", "atomically", "read_picture", "write_picture"]


class ImageFileError(Exception):
    """A file cannot be read or written as a picture; the message names the file and says why."""


@dataclass(frozen=True)
class Picture:
    """A picture and how its file stored it.

    Attributes:
        pixels: float64, ``(channels, height, width)``, 0 is black and 1 is the largest value the file can hold;
            channels is 1 (grey), 2 (grey, opacity), 3 (red, green, blue) or 4 (red, green, blue, opacity).
        bit_depth: bits per channel in the file, 8 or 16.
    """

    pixels: Tensor
    bit_depth: int = 8


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends, and disappears when the block raises.

    It lies in the folder of ``path`` until then, so that the final renaming is one step of the file system and no
    reader ever sees half a file.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's 0600 would make the picture private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def read_picture(path: Path) -> Picture:
    """Read a PNG file of 8 or 16 bits per channel.

    Args:
        path: the file.

    Returns:
        The :class:`Picture`; palette and black-and-white files come back as colour and grey.

    Raises:
        ImageFileError: when the file is no PNG picture, or holds 16-bit colour, which Pillow would cut to 8 bits.
        OSError: when the file cannot be opened.
    """
    try:
        with PillowImage.open(path, formats=["PNG"]) as image:
            depth = _png_bit_depth(path)
            if depth == 16 and not image.mode.startswith("I"):
                raise ImageFileError(f"{path}: 16-bit colour PNG is not supported (8-bit colour and 16-bit grey are)")
            if image.mode in ("1", "P"):
                image.load()
                modern = "L" if image.mode == "1" else ("RGBA" if "transparency" in image.info else "RGB")
                values = np.array(image.convert(modern))
            else:
                values = np.array(image)
    except UnidentifiedImageError:
        raise ImageFileError(f"{path}: not a PNG picture") from None
    except (SyntaxError, ValueError) as error:  # Pillow's errors for damaged files
        raise ImageFileError(f"{path}: damaged PNG file ({error})") from None
    bit_depth = 16 if depth == 16 else 8
    pixels = torch.from_numpy(values.astype(np.float64) / (2**bit_depth - 1))
    return Picture(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous(), bit_depth)


def write_picture(path: Path, picture: Picture) -> None:
    """Write a PNG file, rounding to the nearest value the file can hold and cutting off below 0 and above 1.

    Args:
        path: the file; replaced in one step where it exists.
        picture: what to write; 16 bits for grey pictures only.

    Raises:
        ImageFileError: when the picture has a shape or depth that PNG files written here do not have.
        OSError: when the file cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "ramp.png"
        ...     write_picture(path, Picture(torch.linspace(0, 1, 256).reshape(1, 16, 16)))
        ...     read_picture(path).pixels[0, -1, -1].item()
        1.0
    """
    channels = picture.pixels.shape[0] if picture.pixels.ndim == 3 else 0
    if not 1 <= channels <= 4:
        shape = tuple(picture.pixels.shape)
        raise ImageFileError(f"{path}: expected pixels of shape (1 to 4 channels, height, width), got {shape}")
    if picture.bit_depth not in (8, 16) or (picture.bit_depth == 16 and channels > 1):
        raise ImageFileError(f"{path}: {picture.bit_depth} bits with {channels} channels is not supported")
    top = 2**picture.bit_depth - 1
    values = (picture.pixels.detach().to("cpu", torch.float64).clamp(0, 1) * top).round().permute(1, 2, 0).numpy()
    values = values.astype(np.uint8 if picture.bit_depth == 8 else np.uint16)
    image = PillowImage.fromarray(values[..., 0] if channels == 1 else values)
    with atomically(path) as file:
        image.save(file, format="PNG")


def _png_bit_depth(path: Path) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]  # 8 bytes of signature, 4 + 4 of chunk head, 4 + 4 of size, then the depth


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
