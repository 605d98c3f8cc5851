"""PSFs measured at points of the field, read from an NPZ file or a folder of images with a table of positions."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lsconv.app.arguments import Kernel, UsageError
from lsconv.app.image_io import read_picture

__all__ = ["read_psf_grid"]


def read_psf_grid(path: Path) -> Kernel:
    """Read PSFs, each divided by its sum, and the pixels of the image at which they were measured.

    Args:
        path: an NPZ file with ``kernels``, ``(K, *size)``, and ``positions``, ``(K, axes)``; or a folder with a table
            ``positions.csv`` whose lines are the name of an image in the folder, the row and the column. A first line
            without numbers is a heading.

    Raises:
        UsageError: it is neither, or kernels and positions do not fit together.
        ImageFileError, OSError: a file cannot be read.
    """
    kernels, positions = _from_folder(path) if path.is_dir() else _from_npz(path)
    option = f"--psf-grid {path}:"
    if positions.ndim != 2 or kernels.ndim != positions.shape[1] + 1 or len(kernels) != len(positions):
        raise UsageError(
            f"{option} kernels of shape {tuple(kernels.shape)} and positions {tuple(positions.shape)}, expected "
            f"(K, *size) and (K, axes)"
        )
    if not bool(torch.isfinite(kernels).all() and torch.isfinite(positions).all()):
        raise UsageError(f"{option} contains NaN or infinity")
    sums = kernels.sum(tuple(range(1, kernels.ndim)), keepdim=True)
    if not bool((sums > 0).all()):
        raise UsageError(f"{option} the values of a PSF sum to {sums.min():g}, expected a sum > 0")
    return Kernel(kernels / sums, positions.shape[1], positions=positions)


def _from_npz(path: Path) -> tuple[Tensor, Tensor]:
    """Read kernels, ``(K, *size)``, and positions, ``(K, axes)``, from an NPZ file."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            kernels, positions = (
                torch.from_numpy(arrays[name].astype(np.float64)) for name in ("kernels", "positions")
            )
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for damaged files
        raise UsageError(f"--psf-grid {path}: expected an NPZ file with kernels and positions ({error})") from None
    return kernels, positions


def _from_folder(path: Path) -> tuple[Tensor, Tensor]:
    """Read kernels, ``(K, *size)``, and positions, ``(K, axes)``, from a folder of images with a table."""
    table = path / "positions.csv"
    if not table.is_file():
        raise UsageError(
            f"--psf-grid {path}: the folder has no positions.csv with a line NAME,ROW,COLUMN for every PSF"
        )
    try:
        with table.open(encoding="utf-8", newline="") as lines:
            rows = [(number, row) for number, row in enumerate(csv.reader(lines), start=1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{table}: is not a table of text ({error})") from None
    kernels, positions = [], []
    for number, row in rows:
        try:
            position = [float(word) for word in row[1:]]
        except ValueError:
            if number == 1:
                continue
            raise UsageError(f"{table}: line {number}: expected a name and numbers, got {','.join(row)}") from None
        positions.append(position)
        kernels.append(read_picture(path / row[0].strip()).colours.double())
    sizes = {tuple(kernel.shape) for kernel in kernels}
    if len(sizes) != 1 or len({len(position) for position in positions}) != 1:
        raise UsageError(f"--psf-grid {path}: expected PSFs of one size, a name, a row and a column each, got {sizes}")
    size = next(iter(sizes))
    if any(n != 1 for n in size[:-2]):
        raise UsageError(f"--psf-grid {path}: expected grey images (height, width), got {size}")
    return torch.stack(kernels).reshape(-1, *size[-2:]), torch.tensor(positions, dtype=torch.float64)
