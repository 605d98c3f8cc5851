"""Sample data: a photograph out of focus, with noise, and its PSF."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image

import lsconv

__all__ = ["blurred_astronaut"]


def blurred_astronaut() -> list[tuple[np.ndarray[Any, Any], dict[str, Any], str]]:
    """Blur a colour photograph by a disk of radius 3, and add noise of standard deviation 2.

    Returns:
        Two layers: the image, uint8 of ``(height, width, 3)``, and the PSF, hidden.

    Example:
        >>> image, psf = blurred_astronaut()
        >>> image[0].shape, image[0].dtype, psf[0].shape
        ((250, 250, 3), dtype('uint8'), (7, 7))
    """
    with files("lsconv.app").joinpath("data/astronaut-256.png").open("rb") as file, Image.open(file) as photograph:
        scene = torch.from_numpy(np.array(photograph.convert("RGB"))).double().movedim(-1, 0)
    psf = lsconv.psf.disk(3.0)
    size = tuple(n - k + 1 for n, k in zip(scene.shape[1:], psf.shape, strict=True))
    blurred = lsconv.blur_operator(psf, size, channels=3)(scene)
    noisy = blurred + 2 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    image = noisy.round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy()
    return [(image, {"name": "blurred astronaut"}, "image"), (psf.numpy(), {"name": "PSF", "visible": False}, "image")]
