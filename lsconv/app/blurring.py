"""The blurring of one file by ``lsconv blur``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

import lsconv
from lsconv.app.arguments import Kernel, UsageError
from lsconv.app.batch import Advance
from lsconv.app.image_io import check_target, read_picture, write_picture

__all__ = ["Blur"]


@dataclass(frozen=True)
class Blur:
    """Blur files with these options; called with the name of the image to read and that of the one to write.

    Attributes:
        kernel: the PSF.
        boundary: what lies beyond the image; "unknown" keeps the pixels that depend on nothing beyond it.
        noise_std: standard deviation of the noise added, in the units of the image.
        seed: the seed of the noise, the same for every file.
        device: the device that computes.
    """

    kernel: Kernel
    boundary: str
    noise_std: float
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UsageError(f"--noise-std {self.noise_std}: expected a number >= 0")
        if self.kernel.model is not None:
            raise UsageError(
                f"--psf auto:{self.kernel.model}: estimates a blur for lsconv deblur; give lsconv blur a PSF"
            )

    def __call__(self, image: Path, target: Path, advance: Advance = lambda *_: None) -> tuple[str, bool]:
        """Blur one file, as a :data:`~lsconv.app.batch.Work`; nothing has to converge."""
        picture = read_picture(image)
        check_target(target, picture)
        kernel = self.kernel.as_line() if picture.line and self.kernel.ndim == 2 else self.kernel
        fields = kernel.fields_of(picture)
        if not bool(torch.isfinite(fields).all()):
            raise UsageError("contains NaN; a blur needs the value of every pixel")
        ndim, size = kernel.ndim, tuple(fields.shape[-kernel.ndim :])
        if any(k > n for k, n in zip(kernel.size, size, strict=True)):
            raise UsageError(f"the PSF's size {kernel.size} exceeds that of the image, {size}")
        first, kept = (0,) * ndim, size
        if self.boundary == "unknown":
            first = tuple((k - 1) // 2 for k in kernel.size)
            kept = tuple(n - k + 1 for n, k in zip(size, kernel.size, strict=True))
            if any(k > n for k, n in zip(kernel.size, kept, strict=True)):
                raise UsageError(f"nothing to restore would be left: PSF {kernel.size}, image {size}")
        blurred = torch.empty(*fields.shape[:2], *kept, dtype=fields.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        for item, field in enumerate(fields):
            advance("blurring", item, len(fields))
            A = lsconv.blur_operator(
                kernel.of_item(picture, item).to(field), kept, boundary=self.boundary, channels=len(field), ndim=ndim
            )
            noise = torch.randn(A.out_shape, generator=generator, dtype=torch.float64)
            blurred[item] = A.to(self.device)(field.to(self.device)).cpu() + self.noise_std * noise.to(field.dtype)
        crop = tuple(slice(f, f + n) for f, n in zip(first, kept, strict=True))
        write_picture(target, kernel.picture_of(blurred, picture, crop))
        psf, shape = ("×".join(map(str, extent)) for extent in (kernel.size, kept))
        return f"{target}: {shape}, PSF {psf}, boundary {self.boundary}, noise {self.noise_std:g}", True
