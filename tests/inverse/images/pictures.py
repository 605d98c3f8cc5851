"""Scenes, PSFs and blurs by their definition, for the tests of deconvolve."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import lsconv

BOUNDARIES = ("unknown", "zero", "periodic", "reflect")


def blurred_by_definition(field: np.ndarray, psf: np.ndarray, boundary: str) -> np.ndarray:
    """``y[i] = sum_j psf[j] x[i - j + c]``, c = size // 2, pixel by pixel; "unknown": x's inner pixels only."""
    centre = [size // 2 for size in psf.shape]
    first = [(size - 1) // 2 if boundary == "unknown" else 0 for size in psf.shape]
    sizes = [n - k + 1 if boundary == "unknown" else n for n, k in zip(field.shape, psf.shape, strict=True)]
    y = np.zeros(sizes)
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*psf.shape):
            read = [i + f - j + c for i, f, j, c in zip(place, first, tap, centre, strict=True)]
            if boundary == "periodic":
                read = [r % n for r, n in zip(read, field.shape, strict=True)]
            elif boundary == "reflect":
                read = [n - 1 - abs(n - 1 - abs(r)) for r, n in zip(read, field.shape, strict=True)]
            elif any(not 0 <= r < n for r, n in zip(read, field.shape, strict=True)):
                continue
            y[place] += psf[tap] * field[tuple(read)]
    return y


def asymmetric(*shape: int) -> np.ndarray:
    """A PSF with a strong centre at size // 2 (so that it can be inverted) and no symmetry, sum one."""
    rng = np.random.default_rng(4)
    psf = rng.random(shape)
    psf[tuple(size // 2 for size in shape)] += psf.size
    return psf / psf.sum()


def edges_and_slopes(size: int) -> Tensor:
    """A square, a disk and a slope: what total variation is for."""
    row, column = torch.meshgrid(*[torch.arange(size, dtype=torch.float64)] * 2, indexing="ij")
    disk = (row - 0.7 * size) ** 2 + (column - 0.6 * size) ** 2 < (0.2 * size) ** 2
    square = (row > 0.15 * size) & (row < 0.45 * size) & (column > 0.2 * size) & (column < 0.6 * size)
    return 0.2 + 0.3 * disk + 0.5 * square + 0.1 * row / size


def gaussian_psf(size: int = 7, sigma: float = 1.2) -> np.ndarray:
    line = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    psf = np.outer(line, line)
    return psf / psf.sum()


def camera_scene() -> np.ndarray:
    """Blocks between 0 and 100 grey levels, and their blur."""
    return np.kron(np.random.default_rng(0).uniform(0, 100, (6, 6)), np.ones((6, 6)))


def blurred_camera() -> np.ndarray:
    field = torch.from_numpy(np.pad(camera_scene(), 3, mode="edge"))
    return lsconv.blur_operator(torch.from_numpy(gaussian_psf()), (36, 36))(field[None])[0].numpy()
