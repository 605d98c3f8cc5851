"""The image formats, a reader and a writer each; :mod:`lsconv.app.image_io` chooses among them."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo
from scipy.io import wavfile

from lsconv.app.fits import read_fits, write_fits
from lsconv.app.ome_zarr import write_ome_zarr
from lsconv.app.picture import ImageFileError, Metadata, Picture
from lsconv.app.tiff import read_tiff, write_tiff

__all__ = ["FORMATS", "Format", "reader_of"]

_UINT8, _UINT16 = np.dtype(np.uint8), np.dtype(np.uint16)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG's chunks of metadata. Those about the coding of the pixels (PLTE, tRNS, sBIT, ...) are left out: the file that is
# written codes its pixels differently.
_METADATA_CHUNKS = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"pHYs", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tIME")


@dataclass(frozen=True)
class Format:
    """A file format: its limits, and the function that writes it.

    Attributes:
        name: the format's name.
        write: writes an image that the format can hold into an open file, or into a folder.
        depths: the number types that it holds; others are converted to the last. None: it holds all.
        opacity: whether it holds opacity.
        stacks: whether it holds several pages.
        images: whether it holds images; False: signals only.
        folder: whether it is a folder of files.
    """

    name: str
    write: Callable[[Any, Picture], None]
    depths: tuple[np.dtype[Any], ...] | None = None
    opacity: bool = True
    stacks: bool = True
    images: bool = True
    folder: bool = False


def reader_of(head: bytes) -> Callable[[Path], Picture] | None:
    """The function that reads a file with these first bytes, or None where no format has them."""
    if head.startswith(_PNG_SIGNATURE):
        return _read_png
    if head.startswith(b"\xff\xd8\xff"):
        return _read_jpeg
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return read_tiff
    if head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE":
        return _read_wav
    if head.startswith(b"SIMPLE  ="):
        return read_fits
    return _read_npy if head.startswith(b"\x93NUMPY") else None


def _from_pillow(values: np.ndarray[Any, Any], metadata: Metadata) -> Picture:
    """The image of an array ``(height, width)`` or ``(height, width, channels)``; of 2 or 4 the last is opacity."""
    values = values[..., None] if values.ndim == 2 else values
    return Picture(values, values.shape[-1] in (2, 4), metadata)


# ------------------------------------------------------------------------------------------------------- PNG, JPEG


def _open(path: Path, name: str) -> PillowImage.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PillowImage.DecompressionBombWarning)  # large images are expected here
        return PillowImage.open(path, formats=[name])


def _read_png(path: Path) -> Picture:
    data = path.read_bytes()
    with _open(path, "PNG") as image:
        image.load()
        text = getattr(image, "text", {})
        metadata = Metadata(
            icc=image.info.get("icc_profile"),
            exif=image.info.get("exif"),
            resolution=image.info.get("dpi"),
            description=text.get("Description"),
            chunks=tuple(chunk for chunk in _chunks(data) if chunk[0] in _METADATA_CHUNKS),
        )
        if data[24] == 16:  # Pillow truncates 16-bit colour to 8 bits
            values = np.asarray(imagecodecs.png_decode(data))
        elif image.mode == "P" or "transparency" in image.info:
            values = np.array(image.convert("RGBA" if "transparency" in image.info else "RGB"))
        else:
            values = np.array(image.convert("L") if image.mode == "1" else image)
    return _from_pillow(values, metadata)


def _read_jpeg(path: Path) -> Picture:
    with _open(path, "JPEG") as image:
        if image.mode not in ("L", "RGB"):
            raise ImageFileError(f"{path}: JPEG pictures in {image.mode} are not supported, only grey and RGB are")
        comment = image.info.get("comment")
        metadata = Metadata(
            icc=image.info.get("icc_profile"),
            exif=image.info.get("exif"),
            resolution=image.info.get("dpi"),
            description=comment.decode("utf-8", "replace") if comment else None,
        )
        return _from_pillow(np.array(image), metadata)


def _write_png(file: BinaryIO, picture: Picture) -> None:
    values = np.ascontiguousarray(picture.values[..., 0] if picture.values.shape[-1] == 1 else picture.values)
    data = bytes(imagecodecs.png_encode(values, level=6))
    header = len(_PNG_SIGNATURE) + 25  # IHDR: 4 of length, 4 of name, 13 of data, 4 of checksum
    file.write(data[:header])
    for name, body in picture.metadata.chunks or _metadata_chunks(picture.metadata):
        file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    file.write(data[header:])


def _metadata_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """Name and body of the chunks for metadata from another format.

    They are taken from an image of one pixel that Pillow writes with this metadata.
    """
    text = PngInfo()
    if metadata.description and metadata.layout is None:
        text.add_itxt("Description", metadata.description)
    options: dict[str, Any] = {"icc_profile": metadata.icc, "exif": metadata.exif, "dpi": metadata.dpi}
    buffer = io.BytesIO()
    given = {name: value for name, value in options.items() if value is not None}
    PillowImage.new("L", (1, 1)).save(buffer, format="PNG", pnginfo=text, **given)
    return [chunk for chunk in _chunks(buffer.getvalue()) if chunk[0] in _METADATA_CHUNKS]


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and body of all chunks of a PNG file but those of pixels."""
    chunks, start = [], len(_PNG_SIGNATURE)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        name = data[start + 4 : start + 8]
        if name != b"IDAT":
            chunks.append((name, data[start + 8 : start + 8 + length]))
        start += 12 + length
    return chunks


def _write_jpeg(file: BinaryIO, picture: Picture) -> None:
    values = np.ascontiguousarray(picture.values[..., 0] if picture.values.shape[-1] == 1 else picture.values)
    metadata = picture.metadata
    comment = None
    if metadata.description and metadata.layout is None:
        comment = metadata.description.encode("utf-8")
    options: dict[str, Any] = {"icc_profile": metadata.icc, "exif": metadata.exif, "comment": comment}
    if metadata.dpi is not None:
        options["dpi"] = (round(metadata.dpi[0]), round(metadata.dpi[1]))  # JFIF has integers only
    given = {name: value for name, value in options.items() if value is not None}
    PillowImage.fromarray(values).save(file, format="JPEG", quality=95, subsampling=0, **given)


# -------------------------------------------------------------------------------------------------------- NPY, WAV


def _read_npy(path: Path) -> Picture:
    values = np.load(path, allow_pickle=False)
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.ndim == 1:
        return Picture(native[None, :, None], line=True)
    if values.ndim not in (2, 3, 4):
        raise ImageFileError(f"{path}: an array of shape {values.shape} is not a signal, an image or a stack of images")
    channels = values.ndim > 2 and values.shape[-1] <= 4
    if values.ndim == 4 and not channels:
        raise ImageFileError(f"{path}: an array of shape {values.shape} is not a stack: it has more than 4 channels")
    return Picture(native if channels else native[..., None], channels and values.shape[-1] in (2, 4))


def _write_npy(file: BinaryIO, picture: Picture) -> None:
    values = picture.values[..., 0] if picture.values.shape[-1] == 1 else picture.values
    np.save(file, values[0] if picture.line else values)


def _read_wav(path: Path) -> Picture:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # unknown chunks, which are skipped
        rate, values = wavfile.read(path)
    samples = values[:, None] if values.ndim == 1 else values
    return Picture(samples[None].astype(samples.dtype.newbyteorder("="), copy=False), line=True,
                   metadata=Metadata(rate=int(rate)))  # fmt: skip


def _write_wav(file: BinaryIO, picture: Picture) -> None:
    values = picture.values[0]
    wavfile.write(file, picture.metadata.rate or 1, values[:, 0] if values.shape[-1] == 1 else values)


_JPEG = Format("JPEG", _write_jpeg, (_UINT8,), opacity=False, stacks=False)
_TIFF = Format("TIFF", write_tiff)
_WAVE_DEPTHS = tuple(np.dtype(name) for name in ("uint8", "int16", "int32", "float64", "float32"))
_FITS_DEPTHS = tuple(np.dtype(f"{kind}{size}") for kind in "iu" for size in (2, 4, 8))
_FITS = Format("FITS", write_fits, (np.dtype(np.uint8), np.dtype(np.float32), *_FITS_DEPTHS, np.dtype(np.float64)))
FORMATS = {
    ".png": Format("PNG", _write_png, (_UINT8, _UINT16), stacks=False),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".npy": Format("NPY", _write_npy),
    ".fits": _FITS,
    ".fit": _FITS,
    ".zarr": Format("OME-Zarr", write_ome_zarr, opacity=False, folder=True),
    ".wav": Format("WAV", _write_wav, _WAVE_DEPTHS, opacity=False, stacks=False, images=False),
}
