"""The restoration of one file by ``lsconv deblur``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from lsconv.app.arguments import Kernel, UsageError
from lsconv.app.image_io import Picture, check_target, read_picture, write_picture
from lsconv.app.report import Evidence, draw_pair, draw_report

__all__ = ["PRIORS", "RULES", "Restoration"]

RULES = ("gcv", "discrepancy", "upre", "lcurve", "evidence")
PRIORS = ("gradient", "tikhonov", "tv")
# Arrays of the field's size that a solve holds at once: measured on images and stacks, rounded up.
_ARRAYS = 40

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Restoration:
    """The options of a restoration; called with the names of a file and of what to write.

    Attributes:
        kernel: the blur.
        boundary: what lies beyond the image.
        prior: "gradient", "tikhonov" or "tv".
        damp: "auto", a rule's name or a number.
        weight: of the total variation, or None for the one that suits the noise.
        noise_std: standard deviation of the noise, in the units of the image; None: not known.
        device: where to compute.
        plot: the report to write, or None.
        noise: "gaussian" or "poisson".
        background, gain, offset, read_noise: see :func:`lsconv.deconvolve`.
        bounds: lowest and highest value, None for none.
        origin: the PSF's centre.
        max_memory: bytes, or None.
        verbose: whether to say what was chosen, and why.
        report: the folder for reports, or None.
        bad_pixels: a picture of the image's size, white where its pixels are bad, or None.
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
        for name, value, least in (("gain", self.gain, 1e-300), ("read-noise", self.read_noise, 0.0)):
            if not (math.isfinite(value) and value >= least):
                raise UsageError(f"--{name} {value:g}: expected a number {'> 0' if least else '>= 0'}")
            if not poisson and value != (name == "gain"):
                raise UsageError(f"--{name}: needs --noise poisson")
        for name, value in (("background", self.background), ("offset", self.offset)):
            if not math.isfinite(value):
                raise UsageError(f"--{name} {value:g}: expected a finite number")
        if poisson and self.background < 0:
            raise UsageError(f"--background {self.background:g}: expected a number >= 0 for Poisson noise")
        low, high = self.bounds
        if low is not None and high is not None and not low <= high:
            raise UsageError(f"--min {low:g}: exceeds --max {high:g}")
        if any(end is not None and not math.isfinite(end) for end in self.bounds):
            raise UsageError("--min, --max: expected finite numbers")
        rule = self.rule()
        if rule in ("discrepancy", "upre") and self.noise_std is None and not poisson:
            raise UsageError(f"--damp {rule}: needs --noise-std")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"--weight {self.weight}: expected a number >= 0")
        if self.weight is not None and self.prior != "tv":
            raise UsageError("--weight: is of --prior tv; the others have --damp")
        if self.damp != "auto" and self.prior == "tv":
            raise UsageError("--damp: is of the other priors; --prior tv has --weight")
        if self.error_bars is not None and (self.prior == "tv" or poisson or self.bounds != (None, None)):
            raise UsageError("--error-bars: are of gaussian noise and --prior gradient or tikhonov without bounds")
        self._saturation()
        if self.kernel.positions is not None and poisson:
            raise UsageError("--noise poisson: is not served with --psf-grid")

    def _saturation(self) -> float | str | None:
        """The level of saturation as the library takes it."""
        if self.saturated in (None, "auto"):
            return self.saturated
        try:
            return float(self.saturated)
        except ValueError:
            raise UsageError(f"--saturated {self.saturated}: expected a grey level or auto") from None

    def _with_missing(self, picture: Picture) -> Tensor:
        """The fields of a picture, NaN where pixels are bad or saturated."""
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
        """The bad pixels of every plane: white ones of a picture, those other than zero of an OME-Zarr image."""
        mask = read_picture(path)
        labels = mask.metadata.ome is not None
        white = np.max(mask.values != 0 if labels else mask.pixels.movedim(-3, -1).numpy() > 0.5, axis=-1)
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
        """The damping as the library takes it."""
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
        """Restore one file; answers a line about it, and whether every solve converged.

        Args:
            image: the file to read.
            target: the file to write.
            advance: told the stage, the items done and the items in all.
        """
        begun = time.perf_counter()
        advance("reading", 0, 1)
        picture = read_picture(image)
        check_target(target, picture)
        work = replace(self, kernel=self.kernel.as_line()) if picture.line and self.kernel.ndim == 2 else self
        fields = work._with_missing(picture)
        estimate = None
        if work.kernel.model is not None:
            if picture.line or self.origin != "center":
                said = "a signal" if picture.line else f"--origin {self.origin}"
                raise UsageError(f"--psf auto:{work.kernel.model}: is of images and centred blurs, here is {said}")
            advance("estimating the PSF", 0, 1)
            estimate = lsconv.estimate_psf(fields.flatten(0, 1), work.kernel.model)
            work = replace(work, kernel=Kernel(estimate.psf, 2))
        work._check_memory(fields)
        work._check_size(fields)
        restored, deviations, solutions = torch.empty_like(fields), torch.empty_like(fields), []
        shown = len(fields) // 2
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
            if item == shown:
                kernel = Kernel(psf if work.kernel.positions is None else psf.mean(0), work.kernel.ndim)
                A = lsconv.blur_operator(
                    psf.to(data), tuple(data.shape[-work.kernel.ndim :]), boundary=self.boundary, channels=len(data),
                    ndim=work.kernel.ndim, origin=self.origin, positions=work.kernel.positions,
                )  # fmt: skip
                evidence = Evidence.of(
                    data, A, solution, x, kernel, self._camera(), poisson=self.noise == "poisson",
                    centre=_centre(work.kernel, self.origin), estimate=estimate,
                    std=None if solution.std is None else deviations[item],
                )  # fmt: skip
        advance("writing", len(fields), len(fields))
        write_picture(target, work.kernel.picture_of(restored, picture))
        if self.error_bars is not None:
            unlabelled = replace(
                picture.metadata, ome=picture.metadata.ome and replace(picture.metadata.ome, labels=None)
            )
            colours = picture.colours.movedim(-3, -1).numpy()
            plain = replace(picture, values=colours, opacity=False, metadata=unlabelled)
            write_picture(self.error_bars, work.kernel.picture_of(deviations, plain))
        assert evidence is not None
        missing = int(torch.isnan(fields).sum())
        said = f", {missing} pixel(s) missing" if missing else ""
        found = "" if estimate is None else f"{estimate}, "
        line = f"{found}{work._words()}, {work._strength(solutions)}{said}"
        which = work.kernel.place_of(picture, shown)
        title = f"{image.name}{which and f', {which}'}: {line}"
        if self.plot is not None:
            draw_report(self.plot, evidence, title)
        if self.report is not None:
            draw_report(self.report / f"{target.name}.png", evidence, title)
            draw_pair(self.report, target.name, evidence)
        line = f"{target}: {line}, residual rms {torch.nan_to_num(evidence.residual).square().mean().sqrt():.3g}"
        if self.verbose:
            line += "\n" + work._reasons(picture, fields, solutions, time.perf_counter() - begun)
        told = estimate is None or estimate.converged
        return line, told and all(bool(solution.converged.all()) for solution in solutions)

    def _solve(self, data: Tensor, psf: Tensor) -> Any:
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
        return {"background": self.background, "offset": self.offset, "gain": self.gain, "read_noise": self.read_noise}

    def _cropped(self, field: Tensor, data: Tensor) -> Tensor:
        if self.boundary == "unknown":
            ndim = self.kernel.ndim
            beyond = [n - m for n, m in zip(field.shape[-ndim:], data.shape[-ndim:], strict=True)]
            centre = _centre(self.kernel, self.origin)
            for axis, (size, margin, c) in enumerate(zip(data.shape[-ndim:], beyond, centre, strict=True), start=-ndim):
                field = field.narrow(axis, margin - c, size)
        return field

    def _check_size(self, fields: Tensor) -> None:
        size = tuple(fields.shape[-self.kernel.ndim :])
        if self.boundary != "zero" and any(k > n for k, n in zip(self.kernel.size, size, strict=True)):
            raise UsageError(f"psf: its size {self.kernel.size} exceeds that of the image, {size}")

    def needed(self, fields: Tensor) -> int:
        """The bytes that restoring takes, about."""
        size = zip(fields.shape[-self.kernel.ndim :], self.kernel.size, strict=True)
        one = fields.shape[1] * math.prod(n + k for n, k in size) * fields.element_size()
        return 2 * fields.numel() * fields.element_size() + _ARRAYS * one

    def _check_memory(self, fields: Tensor) -> None:
        if self.max_memory is not None and self.needed(fields) > self.max_memory:
            needed, allowed = (size / 2**30 for size in (self.needed(fields), self.max_memory))
            raise UsageError(f"needs about {needed:.2g} GiB, --max-memory allows {allowed:.2g} GiB")

    def _words(self) -> str:
        size = "×".join(map(str, self.kernel.size))
        total = "" if self.kernel.total is None else f" (divided by its sum, {self.kernel.total:.4g})"
        noise = "" if self.noise == "gaussian" else ", Poisson noise"
        many = "" if self.kernel.positions is None else f" at {len(self.kernel.positions)} points"
        return f"PSF {size}{total}{many}, boundary {self.boundary}, prior {self.prior}{noise}"

    def _strength(self, solutions: Sequence[Any]) -> str:
        damping = torch.cat([solution.damp.reshape(-1).double() for solution in solutions])
        used = " to ".join(dict.fromkeys(f"{each:.3g}" for each in (damping.min(), damping.max())))
        return f"{'weight' if self.prior == 'tv' else 'damp'} {used}"

    def _reasons(self, picture: Picture, fields: Tensor, solutions: Sequence[Any], seconds: float) -> str:
        """The choices and their reasons, a line each, indented."""
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
            f"{self._strength(solutions)}, {why}",
            f"PSF centre at {centre} ({self.origin})",
            f"{iterations} iteration(s) in all, about {self.needed(fields) / 2**20:.0f} MiB, {seconds:.1f} s",
        ]
        if self.prior != "tv" and self.noise == "gaussian" and self.bounds == (None, None):
            lines += self._plan(fields, solutions[0])
        return "\n".join(f"  {line}" for line in lines)

    def _plan(self, fields: Tensor, solution: Any) -> list[str]:
        """The plan that answers, and why."""
        size = tuple(fields.shape[-self.kernel.ndim :])
        psf, positions = self.kernel.values.reshape(-1, *self.kernel.size).to(fields.dtype), self.kernel.positions
        A = lsconv.blur_operator(psf if positions is not None else psf[:1], size, boundary=self.boundary,
                                 ndim=self.kernel.ndim, origin=self.origin, positions=positions)  # fmt: skip
        L = lsconv.Gradient(A.in_shape, ndim=self.kernel.ndim, dtype=fields.dtype) if self.prior == "gradient" else None
        explained = lsconv.explain(A, float(solution.damp.reshape(-1)[0]), L)
        return [f"plan {explained.plan}", *(f"because {reason}" for reason in explained.reasons)]


def _centre(kernel: Kernel, origin: str) -> tuple[int, ...]:
    """The PSF's centre, as the field without crop has it."""
    values = kernel.values.reshape(-1, *kernel.size).double()
    values = values[:1] if kernel.positions is None else values.mean(0, keepdim=True)
    padded = lsconv.blur_operator(values, kernel.size, boundary="zero", ndim=kernel.ndim, origin=origin).padding
    return tuple(after for _, after in padded)
