"""The work of ``lsconv blur`` and ``lsconv deblur`` on one picture, and the loop over several."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import lsconv
from lsconv.app.image_io import ImageFileError, check_target, read_picture, write_picture
from lsconv.app.report import draw_report
from lsconv.app.requests import Kernel, UsageError

__all__ = ["Blurring", "Restoring", "complain", "describe", "for_each"]

_RULES = ("gcv", "discrepancy", "upre", "lcurve", "evidence")
_PRIORS = ("gradient", "tikhonov", "tv")


@dataclass(frozen=True)
class Restoring:
    """How to restore; called with the names of a picture and of what to write.

    Attributes:
        kernel: the blur.
        boundary: what lies beyond the picture.
        prior: "gradient", "tikhonov" or "tv".
        damp: "auto", a rule's name or a number.
        weight: of the total variation, or None for the one that suits the noise.
        noise_std: standard deviation of the noise, 1 being white in pictures of integers; None: not known.
        device: where to compute.
        plot: the report to write, or None.
    """

    kernel: Kernel
    boundary: str
    prior: str
    damp: str
    weight: float | None
    noise_std: float | None
    device: torch.device
    plot: Path | None = None

    def __post_init__(self) -> None:
        if self.prior not in _PRIORS:
            raise UsageError(f"--prior {self.prior}: expected one of {', '.join(_PRIORS)}")
        if self.noise_std is not None and not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UsageError(f"--noise-std {self.noise_std}: expected a number >= 0")
        rule = self.rule()
        if rule in ("discrepancy", "upre") and self.noise_std is None:
            raise UsageError(f"--damp {rule}: needs --noise-std")

    def rule(self) -> float | str:
        """The damping as the library takes it."""
        if self.damp == "auto":
            return "gcv" if self.noise_std is None else "upre"
        if self.damp in _RULES:
            return self.damp
        try:
            number = float(self.damp)
        except ValueError:
            raise UsageError(f"--damp {self.damp}: expected auto, {', '.join(_RULES)} or a number") from None
        if not (math.isfinite(number) and number >= 0):
            raise UsageError(f"--damp {self.damp}: expected a number >= 0")
        return number

    def __call__(self, image: Path, target: Path) -> tuple[str, bool]:
        """Restore one picture; answers a line about it, and whether the solver converged."""
        picture = read_picture(image)
        check_target(target, picture)
        data = self.kernel.channels_of(picture.colours.to(self.device))
        rule = self.rule()
        options: dict[str, Any] = {"damp": rule}
        if self.prior == "tv":
            options["weight"] = self.weight
        if self.noise_std is not None and (self.prior == "tv" or rule in ("discrepancy", "upre")):
            options["noise_std"] = self.noise_std
        solution = lsconv.deconvolve(
            data,
            self.kernel.values,
            boundary=self.boundary,
            prior=self.prior,
            channels="first",
            ndim=self.kernel.ndim,
            crop=False,
            **options,
        )
        restored = self._cropped(solution.x, data)
        write_picture(target, picture.with_colours(self.kernel.pages_of(restored)))
        A = self._operator(data)
        residual = data - A(solution.x)
        damping = solution.damp.reshape(-1)
        used = f"{damping.min():.3g}" if len(damping) == 1 else f"{damping.min():.3g} to {damping.max():.3g}"
        line = f"{self._words()}, {'weight' if self.prior == 'tv' else 'damp'} {used}"
        if self.plot is not None:
            draw_report(self.plot, data, restored, self.kernel, residual, solution, f"{image.name}: {line}")
        line = f"{target}: {line}, residual rms {residual.square().mean().sqrt():.3g}"
        return line, bool(solution.converged.all())

    def _operator(self, data: Tensor) -> Any:
        values = self.kernel.values.to(data)
        size = tuple(data.shape[-self.kernel.ndim :])
        channels = data.shape[-self.kernel.ndim - 1]
        return lsconv.blur_operator(values, size, boundary=self.boundary, channels=channels, ndim=self.kernel.ndim)

    def _cropped(self, field: Tensor, data: Tensor) -> Tensor:
        if self.boundary == "unknown":
            sizes = data.shape[-self.kernel.ndim :]
            for axis, (size, extent) in enumerate(zip(sizes, self.kernel.size, strict=True), start=-self.kernel.ndim):
                field = field.narrow(axis, (extent - 1) // 2, size)
        return field

    def _words(self) -> str:
        size = "×".join(map(str, self.kernel.size))
        return f"PSF {size}, boundary {self.boundary}, prior {self.prior}"


@dataclass(frozen=True)
class Blurring:
    """How to blur; called with the names of a picture and of what to write.

    Attributes:
        kernel: the blur.
        boundary: what lies beyond the picture; "unknown" gives the pixels that need nothing from there.
        noise_std: standard deviation of the noise added, 1 being white in pictures of integers.
        generator: source of the noise.
        device: where to compute.
    """

    kernel: Kernel
    boundary: str
    noise_std: float
    generator: torch.Generator
    device: torch.device

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UsageError(f"--noise-std {self.noise_std}: expected a number >= 0")

    def __call__(self, image: Path, target: Path) -> tuple[str, bool]:
        """Blur one picture; answers a line about it, and True."""
        picture = read_picture(image)
        check_target(target, picture)
        field = self.kernel.channels_of(picture.colours.to(self.device))
        ndim, size = self.kernel.ndim, tuple(field.shape[-self.kernel.ndim :])
        if any(k > n for k, n in zip(self.kernel.size, size, strict=True)):
            raise UsageError(f"the PSF's size {self.kernel.size} exceeds that of the picture, {size}")
        first, kept = (0,) * ndim, size
        if self.boundary == "unknown":
            first = tuple((k - 1) // 2 for k in self.kernel.size)
            kept = tuple(n - k + 1 for n, k in zip(size, self.kernel.size, strict=True))
            if any(k > n for k, n in zip(self.kernel.size, kept, strict=True)):
                raise UsageError(f"nothing to restore would be left: PSF {self.kernel.size}, picture {size}")
        A = lsconv.blur_operator(
            self.kernel.values.to(field), kept, boundary=self.boundary, channels=field.shape[-ndim - 1], ndim=ndim
        )
        blurred = A(field)
        noise = torch.randn(blurred.shape, generator=self.generator, dtype=torch.float64)
        blurred = blurred + self.noise_std * noise.to(blurred)
        crop = tuple(slice(f, f + n) for f, n in zip(first, kept, strict=True))
        write_picture(target, picture.with_colours(self.kernel.pages_of(blurred), crop))
        psf, shape = ("×".join(map(str, extent)) for extent in (self.kernel.size, kept))
        return f"{target}: {shape}, PSF {psf}, boundary {self.boundary}, noise {self.noise_std:g}", True


def for_each(work: Callable[[Path, Path], tuple[str, bool]], images: Sequence[Path], targets: Sequence[Path]) -> int:
    """Work on every picture, go on after those that fail, and say so; 0, 1 (not converged) or 2 (failed).

    A line about every picture goes to stdout, one about everything amiss to stderr.
    """
    code = 0
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(images))
        for image, target in zip(images, targets, strict=True):
            progress.update(task, description=image.name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    line, converged = work(image, target)
                except (UsageError, ImageFileError, lsconv.LsconvError, OSError, MemoryError, RuntimeError) as error:
                    if type(error) is RuntimeError and "memory" not in str(error):
                        raise
                    complain(_about(image, error))
                    code = 2
                else:
                    print(line)
                    if not converged:
                        code = max(code, 1)
            for warning in caught:
                complain(f"{image}: {warning.message}")
            progress.advance(task)
    return code


def _about(image: Path, error: Exception) -> str:
    """The error with the picture's name before it, unless it is there already."""
    if isinstance(error, OSError) and error.filename is not None:
        return describe(error)
    if isinstance(error, (MemoryError, RuntimeError)) and not isinstance(error, lsconv.LsconvError):
        return f"{image}: not enough memory for a picture of this size"
    return str(error) if str(error).startswith(str(image)) else f"{image}: {error}"


def describe(error: Exception) -> str:
    """An error in words, a file's with the name first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def complain(message: str) -> None:
    """Say what is wrong in one line on stderr."""
    print("lsconv:", " ".join(message.split()), file=sys.stderr)
