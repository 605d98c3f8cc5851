"""The search for the point-spread function of an image: its models, their parameters, and the maxima of the likelihood.

The search works on vectors x in which positive parameters are replaced by their logarithms and angles are in radians,
so that all entries have comparable scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv import psf
from lsconv.errors import ArgumentError
from lsconv.inverse.uncertainty.local_spectra import Fit, LocalSpectra, PowerLaw

__all__ = ["PsfModel", "PsfSearch"]


@dataclass(frozen=True)
class PsfModel:
    """A parametric model of a PSF, with the starts and bounds of a search in windows of one size.

    Attributes:
        names: the names of the parameters; "angle" is in degrees and has no bounds, the others are positive.
        make: the function that makes the PSF of given parameters.
        starts: parameters to start from.
        bounds: lowest and highest value of every parameter.
        sized: ``make`` takes an argument ``size``; else its PSFs are all of one size.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor]
    starts: list[tuple[float, ...]]
    bounds: list[tuple[float, float]]
    sized: bool = True

    @classmethod
    def of(cls, model: str | Callable[..., Tensor], start: Any, window: int) -> PsfModel:
        """Make the model of a name, such as "disk", or of a function; ``start`` replaces the grid of starts."""
        if not isinstance(model, str):
            several = [start] if isinstance(start, Mapping) else list(start or [])
            if not several or not all(isinstance(each, Mapping) for each in several):
                raise ArgumentError(
                    f"start: a function as model needs values by the names of its parameters, got {start}"
                )
            names = tuple(several[0])
            return cls(names, model, [_values(each, names) for each in several], [(1e-6, 1e6)] * len(names), False)
        models = {
            "gaussian": lambda: cls(
                ("sigma",), psf.gaussian, _grid(_geometric(0.4, window / 12, 1.4)), [(0.2, window / 8)]
            ),
            "disk": lambda: cls(("radius",), psf.disk, _grid(_geometric(0.8, window / 5, 1.18)), [(0.2, window / 4)]),
            "motion": lambda: cls(
                ("length", "angle"),
                psf.motion,
                _grid(_geometric(2.5, window / 3, 1.3), range(0, 180, 15)),
                [(0.2, window / 2), (-math.inf, math.inf)],
            ),
            "moffat": lambda: cls(
                ("fwhm", "beta"), psf.moffat, _grid(_geometric(1.0, window / 6, 1.4), (1.5, 3.0)),
                [(0.2, window / 4), (1.1, 20.0)],
            ),
        }  # fmt: skip
        if model not in models:
            raise ArgumentError(f"model: expected one of {', '.join(models)} or a function, got {model!r}")
        named = models[model]()
        if start is None:
            return named
        return cls(named.names, named.make, [_values(start, named.names)], named.bounds)

    def vector(self, values: Sequence[float], like: Tensor) -> Tensor:
        """The vector x of the search for parameters in pixels and degrees."""
        return like.new_tensor(
            [math.radians(v) if n == "angle" else math.log(v) for n, v in zip(self.names, values, strict=True)]
        )

    def kernel(self, x: Tensor, size: int | None) -> Tensor:
        """The PSF of a vector x of the search; ``size``: its side in pixels, for models that take one."""
        values = [torch.rad2deg(v) if name == "angle" else v.exp() for name, v in zip(self.names, x, strict=True)]
        return self.make(*values, size=size) if self.sized else self.make(*values)

    def values(self, x: Tensor) -> dict[str, float]:
        """The parameters of x by their names, in pixels and degrees, angles from 0 to 180."""
        return {
            name: math.degrees(float(v)) % 180 if name == "angle" else math.exp(float(v))
            for name, v in zip(self.names, x, strict=False)
        }

    def errors(self, x: Tensor, covariance: Tensor) -> dict[str, float]:
        """Standard errors by the names of the parameters, from the covariance of x."""
        deviations = covariance.diagonal().clamp_min(0).sqrt().tolist()
        return {
            name: math.degrees(std) if name == "angle" else math.exp(float(v)) * std
            for name, v, std in zip(self.names, x, deviations, strict=False)
        }

    def distance(self, x: Tensor, y: Tensor) -> float:
        """The largest difference of two vectors: of logarithms, or of angles in radians modulo a half turn."""
        gaps = []
        for name, a, b in zip(self.names, x.tolist(), y.tolist(), strict=False):
            gaps.append(abs(a - b) if name != "angle" else abs((a - b + math.pi / 2) % math.pi - math.pi / 2))
        return max(gaps)


@dataclass(frozen=True)
class PsfSearch:
    """The search for the maxima of one image's likelihood under one model.

    Attributes:
        spectra: the likelihood.
        model: the model of the PSF.
    """

    spectra: LocalSpectra
    model: PsfModel

    @classmethod
    def of(cls, planes: Tensor, model: PsfModel, window: int, law: PowerLaw) -> PsfSearch:
        """Set up the search for an image ``(planes, height, width)``."""
        ends = [[-100.0 if math.isinf(end) else math.log(end) for end, _ in model.bounds],
                [100.0 if math.isinf(end) else math.log(end) for _, end in model.bounds]]  # fmt: skip
        # A PSF of window + 1 pixels holds the largest that the bounds allow.
        spectra = LocalSpectra(planes, window, lambda x: model.kernel(x, window + 1), law, planes.new_tensor(ends))
        return cls(spectra, model)

    def maxima(self, max_starts: int = 3) -> list[Fit]:
        """Find local maxima, each once and the highest first, from the most likely starts that are far apart.

        A start whose likelihood is still far below the best after eight iterations is not iterated further.
        """
        starts = [self.spectra.start(self.model.vector(each, self.spectra.lower)) for each in self.model.starts]
        values = [self.spectra.value(x) for x in starts] if len(starts) > max_starts else [0.0] * len(starts)
        chosen: list[Tensor] = []
        for index in sorted(range(len(starts)), key=values.__getitem__):
            if len(chosen) < max_starts and all(self.model.distance(starts[index], other) > 0.36 for other in chosen):
                chosen.append(starts[index])
        preliminary = sorted((self.spectra.maximise(x, iterations=8) for x in chosen), key=lambda fit: fit.value)
        refined = [
            self.spectra.maximise(fit.x) if fit.value < preliminary[0].value + 200 else fit for fit in preliminary
        ]
        found: list[Fit] = []
        for fit in sorted(refined, key=lambda fit: fit.value):
            if all(self.model.distance(fit.x, other.x) > 0.03 for other in found):
                found.append(fit)
        return found

    def at_bound(self, x: Tensor) -> bool:
        """Tell whether a parameter of the PSF is at one of its bounds."""
        count = len(self.model.names)
        ends = torch.stack([self.spectra.lower, self.spectra.upper])[:, :count]
        return bool(((x[:count] - ends).abs() < 1e-3).any())

    def profile(self, x: Tensor, first: float) -> float:
        """The least :attr:`Fit.value` for a given first parameter of the PSF.

        Its other parameters are those of x; scene and noise are fitted.
        """
        start = x.clone()
        start[0] = math.log(first)
        return self.spectra.maximise(start, fixed_count=len(self.model.names)).value


def _geometric(low: float, high: float, ratio: float) -> list[float]:
    """Values from low to high whose quotients are about ``ratio``."""
    steps = max(1, round(math.log(high / low) / math.log(ratio)))
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)]


def _grid(*axes: Sequence[float]) -> list[tuple[float, ...]]:
    """All combinations of one value per parameter."""
    return list(itertools.product(*axes))


def _values(start: Any, names: tuple[str, ...]) -> tuple[float, ...]:
    """Check the ``start`` of a user, and bring its values into the order of the names."""
    if isinstance(start, Mapping):
        if set(start) != set(names):
            raise ArgumentError(f"start: expected values of {', '.join(names)}, got {', '.join(map(str, start))}")
        start = [start[name] for name in names]
    try:
        values = tuple(float(v) for v in (start if isinstance(start, Sequence) else [start]))
    except (TypeError, ValueError):
        values = ()
    good = len(values) == len(names) and all(
        math.isfinite(v) and (v > 0 or name == "angle") for name, v in zip(names, values, strict=True)
    )
    if not good:
        raise ArgumentError(f"start: expected a positive value of each of {', '.join(names)}, got {start}")
    return values
