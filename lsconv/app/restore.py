"""The restoration of one file by ``lsconv deblur``."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from lsconv.app.arguments import Kernel, UsageError
from lsconv.app.batch import Advance
from lsconv.app.image_io import Picture, check_target, read_picture, write_picture
from lsconv.app.report import Evidence, draw_pair, draw_report

__all__ = ["PRIORS", "RULES", "Restoration"]

RULES = ("gcv", "discrepancy", "upre", "lcurve", "evidence")
PRIORS = ("gradient", "tikhonov", "tv")
# Arrays of the field's size that a solve holds at once; measured on images and stacks, and rounded up.
_ARRAYS_OF_SOLVE = 40


@dataclass(frozen=True)
class Restoration:
    """Restore files with these options; called with the name of the image to read and that of the one to write.

    Attributes:
        kernel: the PSF.
        boundary: what lies beyond the image, one of ``BOUNDARIES``.
        prior: one of ``PRIORS``.
        damp: "auto", one of ``RULES`` or a number.
        weight: the weight of the total variation, or None for the one that suits the noise.
        noise_std: standard deviation of the noise, in the units of the image; None: not known.
        device: the device that computes.
        plot: the PNG file for the report, or None.
        noise: "gaussian" or "poisson".
        background, gain, offset, read_noise: see :func:`lsconv.deconvolve`.
        bounds: lowest and highest value in the units of the image, each None for no bound.
        origin: the PSF's centre, "center", "peak" or "centroid".
        max_memory: the bytes that a file may need, or None for no limit.
        verbose: whether the line about a file explains the choices made.
        report: the folder for the reports of all files, or None.
        bad_pixels: an image of the same height and width, white where pixels are bad, or None.
        saturated: the grey level from which pixels are saturated, "auto" or None.
        error_bars: the file for the standard deviations of the pixels, or None.
    """

    kernel: Kernel
    boundary: str
    prior: str
    damp: str
    weight: float | None
    noise_std: float | None
    device: torch.device
    plot: Path | None = None
    noise: str = "gaussian"
    background: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    read_noise: float = 0.0
    bounds: tuple[float | None, float | None] = (None, None)
    origin: str = "center"
    max_memory: int | None = None
    verbose: bool = False
    report: Path | None = None
    bad_pixels: Path | None = None
    saturated: str | None = None
    error_bars: Path | None = None

    def __post_init__(self) -> None:
        if self.prior not in PRIORS:
            raise UsageError(f"--prior {self.prior}: expected one of {', '.join(PRIORS)}")
        if self.noise not in ("gaussian", "poisson"):
            raise UsageError(f"--noise {self.noise}: expected gaussian or poisson")
        if self.origin not in ("center", "peak", "centroid"):
            raise UsageError(f"--origin {self.origin}: expected center, peak or centroid")
        if self.noise_std is not None and not (math.isfinite(self.noise_std) and self.noise_std >= 0):
            raise UsageError(f"--noise-std {self.noise_std}: expected a number >= 0")
        poisson = self.noise == "poisson"
        if poisson and self.noise_std is not None:
            raise UsageError("--noise-std: is of gaussian noise; with --noise poisson say --read-noise, in photons")
        for name, value, unset in (("gain", self.gain, 1.0), ("read-noise", self.read_noise, 0.0)):
            positive = name == "gain"
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise UsageError(f"--{name} {value:g}: expected a number {'> 0' if positive else '>= 0'}")
            if not poisson and value != unset:
                raise UsageError(f"--{name}: needs --noise poisson")
        for name, value in (("background", self.background), ("offset", self.offset)):
            if not math.isfinite(value):
                raise UsageError(f"--{name} {value:g}: expected a finite number")
        if poisson and self.background < 0:
            raise UsageError(f"--background {self.background:g}: expected a number >= 0 for Poisson noise")
        low, high = self.bounds
        for name, bound in (("min", low), ("max", high)):
            if bound is not None and not math.isfinite(bound):
                raise UsageError(f"--{name} {bound:g}: expected a finite number")
        if low is not None and high is not None and low > high:
            raise UsageError(f"--min {low:g}: exceeds --max {high:g}")
        rule = self.rule()
        if rule in ("discrepancy", "upre") and self.noise_std is None and not poisson:
            raise UsageError(f"--damp {rule}: needs --noise-std; the rule gcv needs none")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"--weight {self.weight}: expected a number >= 0")
        if self.weight is not None and self.prior != "tv":
            raise UsageError(f"--weight: is of --prior tv; --prior {self.prior} has --damp")
        if self.damp != "auto" and self.prior == "tv":
            raise UsageError("--damp: is of the other priors; --prior tv has --weight")
        if self.error_bars is not None and (self.prior == "tv" or poisson or self.bounds != (None, None)):
            raise UsageError("--error-bars: are of gaussian noise and --prior gradient or tikhonov without bounds")
        self._saturation()
        if self.kernel.positions is not None and poisson:
            raise UsageError("--noise poisson: is not served with --psf-grid; use --noise gaussian")

    def _saturation(self) -> float | str | None:
        """The grey level of saturation as a number, "auto" or None."""
        if self.saturated in (None, "auto"):
            return self.saturated
        try:
            return float(self.saturated)
        except ValueError:
            raise UsageError(f"--saturated {self.saturated}: expected a grey level or auto") from None

    def _fields_with_missing(self, picture: Picture) -> Tensor:
        """The fields of an image, ``(items, channels, *size)``, NaN where pixels are bad or saturated."""
        fields = self.kernel.fields_of(picture)
        bad = np.zeros(picture.values.shape, dtype=bool)
        if self.bad_pixels is not None:
            bad |= self._bad_pixels(self.bad_pixels, picture)[..., None]
        saturation = self._saturation()
        if saturation == "auto" and not picture.is_integer:
            raise UsageError("--saturated auto: looks for the plateau of an image of integers; give the grey level")
        values = picture.values[..., :-1] if picture.opacity else picture.values
        level = lsconv.saturation_level(values, saturation)
        if level is not None:
            bad |= picture.values >= level
        if not bad.any():
            return fields
        missing = self.kernel.fields_of(replace(picture, values=bad.astype(np.uint8))) > 0
        return torch.where(missing, torch.nan, fields)

    def _bad_pixels(self, path: Path, picture: Picture) -> np.ndarray[Any, Any]:
        """Read the mask of bad pixels, shaped like the image without channels.

        Bad are labels other than zero of an OME-Zarr image, and white pixels of any other: those above half of the
        largest integer, or above 0.5 in floating point.
        """
        mask = read_picture(path)
        labels = mask.metadata.ome is not None
        values = mask.values[..., :-1] if mask.opacity else mask.values
        threshold = np.iinfo(values.dtype).max / 2 if mask.is_integer else 0.5
        white = np.any(values != 0 if labels else values > threshold, axis=-1)
        if not white.any() and values.any():
            raise UsageError(
                f"--bad-pixels {path}: has no white pixel, its largest value is {values.max():g}; expected values "
                f"above {threshold:g} where pixels are bad"
            )
        size = picture.values.shape[:-1]
        if white.shape[-2:] != size[-2:]:
            raise UsageError(f"--bad-pixels {path}: is of {white.shape[-2:]} pixels, the image of {size[-2:]}")
        if white.shape[:-2] == size[:-2]:
            return white
        lengths = dict(zip(mask.axes, white.shape, strict=False))
        fits = all(lengths.get(axis, 1) in (1, n) for axis, n in zip(picture.axes, size, strict=False))
        order = sorted(range(len(mask.axes)), key=lambda index: picture.axes.find(mask.axes[index]))
        white = white.transpose(*order, -2, -1)
        if not fits or any(n > 1 for axis, n in lengths.items() if axis not in picture.axes):
            raise UsageError(
                f"--bad-pixels {path}: is of {mask.values.shape[:-1]} with axes {mask.axes}YX, the image of {size} "
                f"with {picture.axes}YX"
            )
        return np.broadcast_to(white.reshape(*(lengths.get(axis, 1) for axis in picture.axes), *size[-2:]), size)

    def rule(self) -> float | str:
        """The damping as a number, or the name of the rule that chooses it."""
        if self.damp == "auto":
            return "gcv" if self.noise_std is None else "upre"
        if self.damp in RULES:
            return self.damp
        try:
            number = float(self.damp)
        except ValueError:
            raise UsageError(f"--damp {self.damp}: expected auto, {', '.join(RULES)} or a number") from None
        if not (math.isfinite(number) and number >= 0):
            raise UsageError(f"--damp {self.damp}: expected a number >= 0")
        return number

    def __call__(self, image: Path, target: Path, advance: Advance = lambda *_: None) -> tuple[str, bool]:
        """Restore one file, as a :data:`~lsconv.app.batch.Work`."""
        begun = time.perf_counter()
        advance("reading", 0, 1)
        picture = read_picture(image)
        check_target(target, picture)
        if self.error_bars is not None:
            check_target(self.error_bars, _floating_point(picture))
        work = replace(self, kernel=self.kernel.as_line()) if picture.line and self.kernel.ndim == 2 else self
        fields = work._fields_with_missing(picture)
        estimate = None
        if work.kernel.model is not None:
            advance("estimating the PSF", 0, 1)
            estimate = work._estimate(picture, fields)
            work = replace(work, kernel=Kernel(estimate.psf, 2))
        work._check_memory(fields)
        work.check_size(tuple(fields.shape[-work.kernel.ndim :]))
        restored, deviations, solutions = torch.empty_like(fields), torch.empty_like(fields), []
        reported = len(fields) // 2  # the report is about the middle item
        evidence: Evidence | None = None
        for item in range(len(fields)):
            advance("solving", item, len(fields))
            data, psf = fields[item].to(self.device), work.kernel.of_item(picture, item)
            solution = work._solve(data, psf)
            x = work._cropped(solution.x, data)
            restored[item] = x.cpu()
            if solution.std is not None:
                deviations[item] = work._cropped(solution.std, data).cpu()
            solutions.append(replace(solution, x=x[:0], std=None))
            if item == reported:
                std = None if solution.std is None else deviations[item]
                evidence = work._evidence(data, psf, solution, x, estimate, std)
        assert evidence is not None
        advance("writing", len(fields), len(fields))
        write_picture(target, work.kernel.picture_of(restored, picture))
        if self.error_bars is not None:
            write_picture(self.error_bars, work.kernel.picture_of(deviations, _floating_point(picture)))
        missing = int(torch.isnan(fields).sum())
        summary = f"{work._describe_problem()}, {work._describe_strength(solutions)}"
        summary = f"{f'{estimate}, ' if estimate else ''}{summary}{f', {missing} pixel(s) missing' if missing else ''}"
        place = work.kernel.place_of(picture, reported)
        title = f"{image.name}{f', {place}' if place else ''}: {summary}"
        if self.plot is not None:
            draw_report(self.plot, evidence, title)
        if self.report is not None:
            draw_report(self.report / f"{target.name}.png", evidence, title)
            draw_pair(self.report, target.name, evidence)
        line = f"{target}: {summary}, residual rms {torch.nan_to_num(evidence.residual).square().mean().sqrt():.3g}"
        if self.verbose:
            line += "\n" + work._explanation(picture, fields, solutions, time.perf_counter() - begun)
        converged = estimate is None or estimate.converged
        return line, converged and all(bool(solution.converged.all()) for solution in solutions)

    def _estimate(self, picture: Picture, fields: Tensor) -> Any:
        """Estimate the PSF of the model from the image."""
        if picture.line or self.origin != "center":
            given = "a signal" if picture.line else f"--origin {self.origin}"
            raise UsageError(f"--psf auto:{self.kernel.model}: is of images and centred blurs, here is {given}")
        return lsconv.estimate_psf(fields.flatten(0, 1), str(self.kernel.model))

    def _evidence(
        self, data: Tensor, psf: Tensor, solution: Any, x: Tensor, estimate: Any, std: Tensor | None
    ) -> Evidence:
        """Gather the evidence about one item, ``(channels, *size)``; of PSFs that vary the mean is shown."""
        kernel = self.kernel
        A = lsconv.blur_operator(
            psf.to(data), tuple(data.shape[-kernel.ndim :]), boundary=self.boundary, channels=len(data),
            ndim=kernel.ndim, origin=self.origin, positions=kernel.positions,
        )  # fmt: skip
        shown = Kernel(psf if kernel.positions is None else psf.mean(0), kernel.ndim)
        return Evidence.of(
            data, A, solution, x, shown, self._camera(), poisson=self.noise == "poisson",
            centre=_centre(kernel, self.origin), estimate=estimate, std=std,
        )  # fmt: skip

    def _solve(self, data: Tensor, psf: Tensor) -> Any:
        """Restore one item, ``(channels, *size)``, on the whole field that the PSF reaches."""
        rule = self.rule()
        strength = {"weight": self.weight} if self.prior == "tv" else {"damp": rule}
        options: dict[str, Any] = {**strength, "noise": self.noise}
        if self.noise_std is not None and (self.prior == "tv" or rule in ("discrepancy", "upre")):
            options["noise_std"] = self.noise_std
        if self.bounds != (None, None):
            options["bounds"] = self.bounds
        return lsconv.deconvolve(
            data,
            psf,
            boundary=self.boundary,
            prior=self.prior,
            channels="first",
            ndim=self.kernel.ndim,
            **self._camera(),
            origin=self.origin,
            psf_positions=self.kernel.positions,
            crop=False,
            error_bars=self.error_bars is not None,
            **options,
        )

    def _camera(self) -> dict[str, Any]:
        """The camera's arguments of :func:`lsconv.deconvolve`."""
        return {"background": self.background, "offset": self.offset, "gain": self.gain, "read_noise": self.read_noise}

    def _cropped(self, field: Tensor, data: Tensor) -> Tensor:
        """The pixels of the image within the field that was restored."""
        if self.boundary == "unknown":
            ndim = self.kernel.ndim
            beyond = [n - m for n, m in zip(field.shape[-ndim:], data.shape[-ndim:], strict=True)]
            centre = _centre(self.kernel, self.origin)
            for axis, (size, margin, c) in enumerate(zip(data.shape[-ndim:], beyond, centre, strict=True), start=-ndim):
                field = field.narrow(axis, margin - c, size)
        return field

    def check_size(self, size: tuple[int, ...]) -> None:
        """Refuse a PSF larger than an image of this size, unless zeros lie beyond the image."""
        if self.boundary != "zero" and any(k > n for k, n in zip(self.kernel.size, size, strict=True)):
            raise UsageError(
                f"psf: its size {self.kernel.size} exceeds that of the image, {size}; crop it, or use --boundary zero"
            )

    def needed(self, fields: Tensor) -> int:
        """The bytes that restoring takes, estimated from above.

        Args:
            fields: ``(items, channels, *size)``.
        """
        size = zip(fields.shape[-self.kernel.ndim :], self.kernel.size, strict=True)
        field = fields.shape[1] * math.prod(n + k for n, k in size) * fields.element_size()
        return 2 * fields.numel() * fields.element_size() + _ARRAYS_OF_SOLVE * field

    def _check_memory(self, fields: Tensor) -> None:
        if self.max_memory is not None and self.needed(fields) > self.max_memory:
            needed, allowed = (size / 2**30 for size in (self.needed(fields), self.max_memory))
            raise UsageError(f"needs about {needed:.2g} GiB, --max-memory allows {allowed:.2g} GiB")

    def gradient(self, A: Any) -> lsconv.Gradient:
        """The gradient that penalises the inputs of A, periodic where the boundary is."""
        edge = "periodic" if self.boundary == "periodic" else "neumann"
        return lsconv.Gradient(A.in_shape, ndim=self.kernel.ndim, boundary=edge, dtype=A.dtype, device=A.device)

    def _describe_problem(self) -> str:
        """The PSF, the boundary, the prior and the noise in words."""
        size = "×".join(map(str, self.kernel.size))
        total = "" if self.kernel.total is None else f" (divided by its sum, {self.kernel.total:.4g})"
        noise = "" if self.noise == "gaussian" else ", Poisson noise"
        many = "" if self.kernel.positions is None else f" at {len(self.kernel.positions)} points"
        return f"PSF {size}{total}{many}, boundary {self.boundary}, prior {self.prior}{noise}"

    def _describe_strength(self, solutions: Sequence[Any]) -> str:
        """The damp or weight that was used, or its range over the items, in words."""
        damping = torch.cat([solution.damp.reshape(-1).double() for solution in solutions])
        used = " to ".join(dict.fromkeys(f"{each:.3g}" for each in (damping.min(), damping.max())))
        return f"{'weight' if self.prior == 'tv' else 'damp'} {used}"

    def _explanation(self, picture: Picture, fields: Tensor, solutions: Sequence[Any], seconds: float) -> str:
        """The choices that were made and their reasons, an indented line each, for --verbose."""
        rule = self.rule()
        if self.prior == "tv":
            why = "as given" if self.weight is not None else "from the noise and the mean slope"
        else:
            why = "as given" if isinstance(rule, float) else f"by the rule {rule}"
        iterations = sum(int(solution.iterations.max()) for solution in solutions)
        centre = ", ".join(map(str, _centre(self.kernel, self.origin)))
        lines = [
            f"axes {picture.axes}{'X' if picture.line else 'YX'}, {len(fields)} item(s) of {tuple(fields.shape[1:])} "
            f"{fields.dtype}".replace("torch.", ""),
            f"{self._describe_strength(solutions)}, {why}",
            f"PSF centre at {centre} ({self.origin})",
            f"{iterations} iteration(s) in all, about {self.needed(fields) / 2**20:.0f} MiB, {seconds:.1f} s",
        ]
        if self.prior != "tv" and self.noise == "gaussian" and self.bounds == (None, None) and not fields.isnan().any():
            lines += self._plan(fields, solutions[0])
        return "\n".join(f"  {line}" for line in lines)

    def _plan(self, fields: Tensor, solution: Any) -> list[str]:
        """The plan that solves complete data of this size, and why it was chosen."""
        size = tuple(fields.shape[-self.kernel.ndim :])
        psf, positions = self.kernel.values.reshape(-1, *self.kernel.size).to(fields.dtype), self.kernel.positions
        A = lsconv.blur_operator(psf if positions is not None else psf[:1], size, boundary=self.boundary,
                                 ndim=self.kernel.ndim, origin=self.origin, positions=positions)  # fmt: skip
        L = self.gradient(A) if self.prior == "gradient" else None
        explained = lsconv.explain(A, float(solution.damp.reshape(-1)[0]), L)
        return [f"plan {explained.plan}", *(f"because {reason}" for reason in explained.reasons)]


def _floating_point(picture: Picture) -> Picture:
    """The image with its values in floating point, without opacity and labels: the form of its standard deviations."""
    ome = picture.metadata.ome
    metadata = replace(picture.metadata, ome=None if ome is None else replace(ome, labels=None))
    return replace(picture, values=picture.colours.movedim(-3, -1).numpy(), opacity=False, metadata=metadata)


def _centre(kernel: Kernel, origin: str) -> tuple[int, ...]:
    """The index of the PSF's centre, by which the field extends beyond the image."""
    values = kernel.values.reshape(-1, *kernel.size).double()
    values = values[:1] if kernel.positions is None else values.mean(0, keepdim=True)
    padded = lsconv.blur_operator(values, kernel.size, boundary="zero", ndim=kernel.ndim, origin=origin).padding
    return tuple(after for _, after in padded)
