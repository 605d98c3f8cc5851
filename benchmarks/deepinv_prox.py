"""How exact and how fast is ``prox_l2`` inside deepinv, against deepinv's own?

The error is the distance from the minimiser in float64, relative to it, for float32 data; deepinv runs once with its
defaults, and once with as many iterations as bring it to the same error. ``kept`` is a further call with that gamma,
``further`` the first call with another gamma, as a diffusion sampler makes them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import deblurring
from benchmarks.runner import Table, race, timed

_MOST_ITERATIONS = 4096
_LONGEST = 5.0  # seconds of one call after which deepinv gets no more iterations


def _quietly(call: Any) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return call()


def measure(name: str, kernel: Tensor, size: int, channels: int, gamma: float, repeats: int) -> dict[str, Any]:
    """One row."""
    import deepinv

    from lsconv.deepinv import Blur

    taps = kernel[None, None].float()
    truth = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    z = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = Blur(taps), deepinv.physics.Blur(taps)
    y = ours.A(truth) + 0.01 * torch.randn(ours.A(truth).shape, generator=torch.Generator().manual_seed(2))
    A = lsconv.Conv2d(taps.double().flip(-2, -1), (size, size))
    exact = lsconv.tikhonov(
        A, y[0].unsqueeze(1).double(), gamma**-0.5, x_prior=z[0].unsqueeze(1).double(), rtol=1e-12
    ).x

    def error(x: Tensor) -> float:
        return float(torch.linalg.vector_norm(x[0].unsqueeze(1) - exact) / torch.linalg.vector_norm(exact))

    first, x = timed(lambda: Blur(taps).prox_l2(z, y, gamma))
    target = error(x)
    for _ in range(12):  # a plan that is kept
        ours.prox_l2(z, y, gamma)
    gammas = (gamma * (1 + 0.01 * k) for k in itertools.count(1))
    runs = race(
        {
            "further": lambda: ours.prox_l2(z, y, next(gammas)),
            "kept": lambda: ours.prox_l2(z, y, gamma),
            "default": lambda: _quietly(lambda: theirs.prox_l2(z, y, gamma)),
        },
        repeats=repeats,
    )
    iterations, seconds, reached = 64, math.inf, math.inf
    while iterations <= _MOST_ITERATIONS:
        more = functools.partial(theirs.prox_l2, z, y, gamma, max_iter=iterations, tol=1e-12)
        seconds, x = timed(functools.partial(_quietly, more))
        reached = error(x)
        if reached <= 2 * target or seconds > _LONGEST:
            break
        iterations *= 2
    kept, as_right = runs["kept"].median, reached <= 2 * target
    return {
        "blur": name,
        "image": f"{channels}x{size}²",
        "gamma": f"{gamma:.0e}",
        "error": f"{target:.0e}",
        "first ms": f"{1e3 * first:.1f}",
        "further ms": f"{1e3 * runs['further'].median:.1f}",
        "kept ms": f"{1e3 * kept:.1f}",
        "deepinv error": f"{error(runs['default'].result):.0e}",
        "deepinv ms": f"{1e3 * runs['default'].median:.1f}",
        "at equal error ms": f"{1e3 * seconds:.0f}" if as_right else f"> {1e3 * seconds:.0f} ({reached:.0e})",
        "times": f"{seconds / kept:.0f}",
    }


def tables(quick: bool) -> Iterator[Table]:
    """The table."""
    import deepinv  # noqa: F401  the row says what is missing

    kernels = deblurring.kernels()
    rows = []
    for name in ("gaussian", "box", "motion"):
        for size, channels in ((64, 1),) if quick else ((128, 1), (256, 1), (128, 3)):
            for gamma in (1e4,) if quick else (1e2, 1e4, 1e6, 1e7):
                rows.append(measure(name, kernels[name], size, channels, gamma, 3 if quick else 7))
    yield Table("prox_l2 of a blur without padding, float32", rows)
