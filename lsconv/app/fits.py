"""FITS files, by astropy, which the extra ``fits`` installs: header and WCS are kept, and NaN are missing pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np

import lsconv
from lsconv.app.picture import ImageFileError, Metadata, Picture, imported

__all__ = ["read_fits", "write_fits"]


def read_fits(path: Path) -> Picture:
    """Read the first image of a FITS file, with its header."""
    fits = imported(path, "FITS")
    with fits.open(path, memmap=False) as file:
        images = [hdu for hdu in file if hdu.is_image and hdu.data is not None and hdu.data.ndim > 0]
        if not images:
            raise ImageFileError(f"{path}: holds no image")
        values, header = np.asarray(images[0].data), images[0].header.copy()
    if values.ndim > 5:
        raise ImageFileError(f"{path}: an image of {values.ndim} axes is not supported, at most 5 are")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    if native.ndim == 1:
        return Picture(native[None, :, None], line=True, metadata=Metadata(header=header))
    return Picture(native[..., None], metadata=Metadata(header=header))


def write_fits(file: BinaryIO, picture: Picture) -> None:
    """Write the image as the primary HDU, with the header that it was read with and a line of HISTORY."""
    fits = imported(Path(file.name), "FITS")
    values = picture.values[0] if picture.line else picture.values
    values = np.moveaxis(values, -1, 0) if values.shape[-1] > 1 else values[..., 0]
    header = None if picture.metadata.header is None else picture.metadata.header.copy()
    hdu = fits.PrimaryHDU(values, header)
    hdu.header["HISTORY"] = f"written by lsconv {lsconv.__version__}"
    buffer = io.BytesIO()  # astropy refuses a file opened in mode "x"
    hdu.writeto(buffer, output_verify="silentfix")
    file.write(buffer.getbuffer())
