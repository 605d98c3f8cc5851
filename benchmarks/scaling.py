"""How does the time grow with the picture, the channels, the kernel and the batch?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import lsconv
from benchmarks.deblurring import kernels
from benchmarks.runner import Table, race, slope
from lsconv.border.plan import BorderPlan

Make = Callable[[int], tuple[lsconv.Convolution, tuple[int, ...], float]]  # operator, batch shape, damp / σ_max


def smoothing(size: int, channels: int = 1, kernel: int = 9) -> lsconv.Convolution:
    """A random kernel, float32, valid; damped below, so that every channel count has a well-defined answer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, kernel, kernel, generator=generator) / kernel / channels**0.5
    return lsconv.Conv2d(weight, in_size=(size, size))


def blurring(size: int) -> lsconv.Convolution:
    """The Gaussian of the deblurring benchmark, which has almost no inverse: the border is what takes the time."""
    return lsconv.Conv2d(kernels()["gaussian"].float()[None, None], in_size=(size, size))


def questions(quick: bool) -> Iterator[tuple[str, Sequence[int], Make, Callable[[int], float], str]]:
    """``(variable, its values, operator and batch shape, units of work, the unit's name)``."""
    yield (
        "side of the picture",
        (64, 128, 256) if quick else (256, 512, 1024, 2048),
        lambda size: (smoothing(size), (), 1e-2),
        lambda size: size**2,
        "pixel",
    )
    yield (
        "side of the picture, Gaussian 15×15",
        (64, 128, 256) if quick else (256, 512, 1024, 2048),
        lambda size: (blurring(size), (), 1e-3),
        lambda size: size**2,
        "pixel",
    )
    yield (
        "channels",
        (1, 4, 8) if quick else (1, 2, 4, 8, 16, 32, 64, 128),
        lambda channels: (smoothing(32, channels, 3), (), 1e-2),
        lambda channels: channels,
        "channel",
    )
    yield (
        "side of the kernel",
        (3, 9, 15) if quick else (3, 5, 9, 15, 21, 31),
        lambda kernel: (smoothing(64 if quick else 256, 1, kernel), (), 1e-2),
        lambda kernel: kernel,
        "kernel side",
    )
    yield (
        "batch",
        (1, 4, 16) if quick else (1, 4, 16, 64, 256),
        lambda batch: (smoothing(64 if quick else 128), (batch,), 1e-2),
        lambda batch: batch,
        "item",
    )


def measure(values: Sequence[int], make: Make, units: Callable[[int], float], unit: str, quick: bool) -> list[Any]:
    """A row for every value, of the first solve with a plan; all sizes are raced in one run."""
    repeats = 2 if quick else 3
    runs: dict[str, Callable[[], Any]] = {}
    for value in values:
        A, batch, relative_damp = make(value)
        damp = relative_damp * float(lsconv.norm(A))
        y = torch.randn(*batch, *A.out_shape, generator=torch.Generator().manual_seed(1))
        # a plan learns from a solve, and goes over to factors after some: each is asked once
        plans = itertools.cycle([BorderPlan(A, damp) for _ in range(1 + repeats)])
        runs[f"setup {value}"] = lambda A=A, damp=damp: BorderPlan(A, damp)
        runs[f"solve {value}"] = lambda plans=plans, y=y: next(plans).solve(y)
    times = race(runs, repeats=repeats, patience=1 if quick else 3)
    rows, first = [], times[f"solve {values[0]}"].median / units(values[0])
    for value in values:
        setup, solve = times[f"setup {value}"], times[f"solve {value}"]
        per_unit = solve.median / units(value)
        rows.append(
            {
                "value": value,
                "setup s": setup.median,
                "solve s": solve.median,
                "border its": int(solve.result.iterations.max()),
                "converged": bool(solve.result.converged.all()),
                f"solve μs / {unit}": 1e6 * per_unit,
                "against the first": per_unit / first,
            }
        )
    return rows


def drawing(variable: str, rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    """What draws setup and solve against the variable, both axes logarithmic."""

    def draw(path: Path) -> None:
        from matplotlib.figure import Figure

        axes = (figure := Figure(figsize=(5, 3.5), layout="constrained")).subplots()
        for name in ("setup s", "solve s"):
            axes.loglog([row["value"] for row in rows], [row[name] for row in rows], "o-", label=name[:-2])
        axes.set_xlabel(variable)
        axes.set_ylabel("seconds")
        axes.set_xticks([row["value"] for row in rows], [str(row["value"]) for row in rows])
        axes.minorticks_off()
        axes.legend()
        figure.savefig(path, dpi=120)

    return draw


def tables(quick: bool) -> Iterator[Table]:
    """A table and a plot for each variable."""
    for variable, values, make, units, unit in questions(quick):
        rows = measure(values, make, units, unit, quick)
        axis = [float(row["value"]) for row in rows]
        powers = {name: slope(axis, [row[name] for row in rows]) for name in ("setup s", "solve s")}
        yield Table(
            f"Cost against the {variable}",
            rows,
            f"setup ~ value^{powers['setup s']:.2f}, solve ~ value^{powers['solve s']:.2f}, fitted. float32, valid, "
            f"damp {make(values[0])[2]:.0e} σ_max{', random kernel' if 'Gaussian' not in variable else ''}.",
            drawing(variable, rows),
        )
