"""The search for the point-spread function of an image: its models, their parameters, and the maxima of the likelihood.

Inside, positive parameters are logarithms and angles are radians, so that steps of one are large for all.
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
    """A model of a PSF for windows of one size.

    Attributes:
        names: its parameters; "angle" is in degrees and has no bounds, the others are positive.
        make: the PSF of the parameters.
        starts: values to start from.
        bounds: lowest and highest value of every parameter.
        sized: whether ``make`` has a ``size``, and otherwise is of fixed size.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor]
    starts: list[tuple[float, ...]]
    bounds: list[tuple[float, float]]
    sized: bool = True

    @classmethod
    def of(cls, model: str | Callable[..., Tensor], start: Any, window: int) -> PsfModel:
        """The model of a name or a function, started where asked to."""
        if not isinstance(model, str):
            several = [start] if isinstance(start, Mapping) else list(start or [])
            if not several or not all(isinstance(each, Mapping) for each in several):
                raise ArgumentError(
                    f"start: a function as model needs values by the names of its parameters, got {start}"
                )
            names = tuple(several[0])
            return cls(names, model, [_values(each, names) for each in several], [(1e-6, 1e6)] * len(names), False)
        known = {
            "gaussian": lambda: cls(
                ("sigma",), psf.gaussian, _grid(_ladder(0.4, window / 12, 1.4)), [(0.2, window / 8)]
            ),
            "disk": lambda: cls(("radius",), psf.disk, _grid(_ladder(0.8, window / 5, 1.18)), [(0.2, window / 4)]),
            "motion": lambda: cls(
                ("length", "angle"),
                psf.motion,
                _grid(_ladder(2.5, window / 3, 1.3), range(0, 180, 15)),
                [(0.2, window / 2), (-math.inf, math.inf)],
            ),
            "moffat": lambda: cls(
                ("fwhm", "beta"), psf.moffat, _grid(_ladder(1.0, window / 6, 1.4), (1.5, 3.0)),
                [(0.2, window / 4), (1.1, 20.0)],
            ),
        }  # fmt: skip
        if model not in known:
            raise ArgumentError(f"model: expected one of {', '.join(known)} or a function, got {model!r}")
        found = known[model]()
        if start is None:
            return found
        return cls(found.names, found.make, [_values(start, found.names)], found.bounds)

    def inside(self, values: Sequence[float], like: Tensor) -> Tensor:
        """Parameters as the search has them."""
        return like.new_tensor(
            [math.radians(v) if n == "angle" else math.log(v) for n, v in zip(self.names, values, strict=True)]
        )

    def kernel(self, x: Tensor, size: int | None) -> Tensor:
        """The PSF for a vector of the search's parameters, which are logarithms and radians."""
        values = [torch.rad2deg(v) if name == "angle" else v.exp() for name, v in zip(self.names, x, strict=True)]
        return self.make(*values, size=size) if self.sized else self.make(*values)

    def values(self, x: Tensor) -> dict[str, float]:
        """Parameters by their names, angles from 0 to 180."""
        return {
            name: math.degrees(float(v)) % 180 if name == "angle" else math.exp(float(v))
            for name, v in zip(self.names, x, strict=False)
        }

    def errors(self, x: Tensor, covariance: Tensor) -> dict[str, float]:
        """Standard errors by the names of the parameters."""
        deviations = covariance.diagonal().clamp_min(0).sqrt().tolist()
        return {
            name: math.degrees(std) if name == "angle" else math.exp(float(v)) * std
            for name, v, std in zip(self.names, x, deviations, strict=False)
        }

    def distance(self, x: Tensor, y: Tensor) -> float:
        """The largest difference of two sets of parameters, relative to the value or in radians modulo a half turn."""
        gaps = []
        for name, a, b in zip(self.names, x.tolist(), y.tolist(), strict=False):
            gaps.append(abs(a - b) if name != "angle" else abs((a - b + math.pi / 2) % math.pi - math.pi / 2))
        return max(gaps)


@dataclass(frozen=True)
class PsfSearch:
    """One image's likelihood under one model.

    Attributes:
        spectra: the likelihood.
        model: of the PSF.
    """

    spectra: LocalSpectra
    model: PsfModel

    @classmethod
    def of(cls, planes: Tensor, model: PsfModel, window: int, law: PowerLaw) -> PsfSearch:
        """The search in ``(planes, height, width)``."""
        ends = [[-100.0 if math.isinf(end) else math.log(end) for end, _ in model.bounds],
                [100.0 if math.isinf(end) else math.log(end) for _, end in model.bounds]]  # fmt: skip
        # as large as the largest PSF within the bounds
        spectra = LocalSpectra(planes, window, lambda x: model.kernel(x, window + 1), law, planes.new_tensor(ends))
        return cls(spectra, model)

    def maxima(self, most: int = 3) -> list[Fit]:
        """The maxima found from the best starts that are not neighbours, the highest first, each once.

        A start that eight steps leave far below the best is given up where it stands.
        """
        starts = [self.spectra.start(self.model.inside(each, self.spectra.lower)) for each in self.model.starts]
        heights = [self.spectra.value(x) for x in starts] if len(starts) > most else [0.0] * len(starts)
        chosen: list[Tensor] = []
        for index in sorted(range(len(starts)), key=heights.__getitem__):
            if len(chosen) < most and all(self.model.distance(starts[index], other) > 0.36 for other in chosen):
                chosen.append(starts[index])
        begun = sorted((self.spectra.maximise(x, iterations=8) for x in chosen), key=lambda fit: fit.value)
        ended = [self.spectra.maximise(fit.x) if fit.value < begun[0].value + 200 else fit for fit in begun]
        found: list[Fit] = []
        for fit in sorted(ended, key=lambda fit: fit.value):
            if all(self.model.distance(fit.x, other.x) > 0.03 for other in found):
                found.append(fit)
        return found

    def at_bound(self, x: Tensor) -> bool:
        """Tell whether a parameter of the PSF stands on a bound."""
        count = len(self.model.names)
        ends = torch.stack([self.spectra.lower, self.spectra.upper])[:, :count]
        return bool(((x[:count] - ends).abs() < 1e-3).any())

    def profile(self, x: Tensor, first: float) -> float:
        """The value with the PSF's first parameter given, its others held and those of scene and noise fitted."""
        moved = x.clone()
        moved[0] = math.log(first)
        return self.spectra.maximise(moved, held=len(self.model.names)).value


def _ladder(low: float, high: float, ratio: float) -> list[float]:
    steps = max(1, round(math.log(high / low) / math.log(ratio)))
    return [low * (high / low) ** (i / steps) for i in range(steps + 1)]


def _grid(*axes: Sequence[float]) -> list[tuple[float, ...]]:
    return list(itertools.product(*axes))


def _values(start: Any, names: tuple[str, ...]) -> tuple[float, ...]:
    """The values to start from in the order of the names."""
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
