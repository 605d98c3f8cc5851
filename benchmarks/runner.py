"""What every benchmark shares: races in which all contestants are interleaved, and the tables made of them.

A benchmark is a file of this folder with a function ``tables(quick: bool)`` that yields :class:`Table` objects; its
docstring's first line is the question. ``python -m benchmarks`` finds it by that function and does the rest. A file
that has only a ``main()`` is run too, outside the quick round; the Markdown tables that it prints are taken over.
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Answer",
    "Arrival",
    "Table",
    "Timing",
    "described",
    "machine",
    "race",
    "reach",
    "reached",
    "run_times",
    "shown",
    "slope",
    "timed",
    "times_faster",
    "write",
]

T = TypeVar("T")


# ------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing(Generic[T]):
    """The seconds of one contestant's runs, and what its last run returned."""

    samples: tuple[float, ...]
    result: T

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.samples)


def race(
    contestants: Mapping[str, Callable[[], T]], *, repeats: int = 5, patience: float = 10.0, warm_up: bool = True
) -> dict[str, Timing[T]]:
    """Run all contestants in turn, ``repeats`` times round, after a warm-up round of which nothing counts.

    The rounds are interleaved, so that a load that comes and goes meets all of them alike. A contestant whose warm-up
    takes longer than ``patience`` seconds is not run again: its one run counts.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, T] = {}
    slow: set[str] = set()
    for round_ in range(-int(warm_up), repeats):
        for name, run in contestants.items():
            if name in slow:
                continue
            seconds, results[name] = timed(run)
            if seconds > patience and not samples[name]:
                slow.add(name)
            if round_ >= 0 or name in slow:
                samples[name].append(seconds)
    return {name: Timing(tuple(samples[name]), results[name]) for name in contestants}


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Seconds and result of one run; work queued on a GPU is waited for."""
    _wait()
    start = time.perf_counter()
    result = run()
    _wait()
    return time.perf_counter() - start, result


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ------------------------------------------------------------------ the same accuracy for all


@dataclass(frozen=True)
class Answer:
    """What a method returned: a tensor, and after how many iterations (None: it does not iterate)."""

    x: Tensor
    iterations: int | None = None


@dataclass(frozen=True)
class Arrival:
    """How a method got to a target: the loosest tolerance that does it, or what it reached within its limit."""

    error: float
    arrived: bool
    answer: Answer
    tolerance: float
    seconds: float
    run: Callable[[], Answer]


def reach(
    solve: Callable[[float, int | None], Answer],
    error: Callable[[Tensor], float],
    target: float,
    *,
    seconds: float | None = None,
    decades: int = 6,
) -> Arrival:
    """The loosest tolerance, by decades, with which ``solve(tolerance, max_iter)`` meets ``error(x) <= target``.

    Methods mean different things by a tolerance, so none is compared at the same one: each gets the loosest that
    makes the error, measured here, meet the target. The search costs the method nothing: only ``run`` is raced.

    Args:
        solve: the method.
        error: the benchmark's own measure of an answer.
        target: what the error has to fall to.
        seconds: limit for one run, turned into a limit on the iterations by timing a few; None: no limit.
        decades: how many tolerances are tried, from a thousand times the target downwards: many are relative to a
            residual that noise keeps from falling.
    """
    most = None
    if seconds is not None:
        few = 10
        solve(target * 1e-6, few)
        spent, _ = timed(lambda: solve(target * 1e-6, few))
        most = max(few, int(seconds * few / spent))
    tolerance = 1e3 * target
    for _ in range(decades):
        took, answer = timed(functools.partial(solve, tolerance, most))
        measured = error(answer.x)
        if seconds is not None and measured > target and _stopped(answer, most) and took < 0.7 * seconds:
            most = int(most * seconds / took)  # a few iterations had cost more than their share
            took, answer = timed(functools.partial(solve, tolerance, most))
            measured = error(answer.x)
        # at the limit a tighter tolerance changes nothing
        if measured <= target or _stopped(answer, most):
            break
        tolerance /= 10
    final = tolerance
    return Arrival(measured, measured <= target, answer, final, took, lambda: solve(final, most))


def _stopped(answer: Answer, most: int | None) -> bool:
    return most is not None and (answer.iterations or 0) >= most


def run_times(
    arrivals: Mapping[str, Arrival], others: Mapping[str, Callable[[], Any]] | None = None, **how: Any
) -> dict[str, float]:
    """Median seconds of ``others`` and of all that arrived, raced as :func:`race` does with the options ``how``.

    What did not arrive has had its run, and is not raced again.
    """
    runs = {name: arrival.run for name, arrival in arrivals.items() if arrival.arrived}
    times = race({**(others or {}), **runs}, **how)
    return {name: arrival.seconds for name, arrival in arrivals.items()} | {name: t.median for name, t in times.items()}


def reached(seconds: float, arrival: Arrival) -> str:
    """A peer's cell: seconds and iterations, and for one that did not arrive the error that it had by then."""
    text = f"{shown(seconds)} s, {arrival.answer.iterations} its"
    return text if arrival.arrived else f"{text}, only {arrival.error:.0e}"


def times_faster(arrivals: Mapping[str, Arrival], times: Mapping[str, float], own: float) -> str:
    """The time of the best that arrived over ``own``; where none did, ``>`` and the longest that one was given."""
    arrived = [times[name] for name, arrival in arrivals.items() if arrival.arrived]
    if arrived:
        return f"{min(arrived) / own:.1f}"
    return f"> {max(times[name] for name in arrivals) / own:.0f}"


def slope(x: list[float], y: list[float]) -> float:
    """The exponent p of the power law ``y ~ x^p``, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


# ------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Table:
    """One table of a benchmark; ``plot`` draws it into the file it is given."""

    title: str
    rows: list[dict[str, Any]]
    note: str = ""
    plot: Callable[[Path], None] | None = field(default=None, compare=False)

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def markdown(self, heading: str = "### {}") -> str:
        """The table in Markdown, its columns aligned so that it reads as plain text too."""
        cells = [self.columns, *([shown(row.get(name)) for name in self.columns] for row in self.rows)]
        widths = [max(len(line[c]) for line in cells) for c in range(len(self.columns))]
        lines = [
            "| " + " | ".join(f"{cell:<{width}}" if c == 0 else f"{cell:>{width}}"
                              for c, (cell, width) in enumerate(zip(line, widths, strict=True))) + " |"
            for line in cells
        ]  # fmt: skip
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([heading.format(self.title), "", *lines, *(["", self.note] if self.note else [])]) + "\n"


def shown(value: Any) -> str:
    """A cell's text: three digits of a number, ``-`` for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def machine() -> dict[str, Any]:
    """The machine and the versions that the figures hold for."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def described(host: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return ", ".join(f"{key} {value}" for key, value in host.items() if value is not None)


def write(
    name: str, question: str, tables: list[Table], output: Path, *, quick: bool, seconds: float, complete: bool
) -> None:
    """Write ``name.json``, ``name.md`` and the plots into the folder ``output``.

    Called after every table, so that what was measured outlives a later failure; ``complete`` says whether all tables
    are there.
    """
    output.mkdir(parents=True, exist_ok=True)
    host = machine()
    content = {
        "benchmark": name,
        "question": question,
        "quick": quick,
        "complete": complete,
        "seconds": round(seconds),
        "machine": host,
        "tables": [{"title": t.title, "note": t.note, "columns": t.columns, "rows": t.rows} for t in tables],
    }
    (output / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False, default=float) + "\n")
    parts = [f"## {question}\n"]
    for number, table in enumerate(tables):
        parts.append(table.markdown())
        if table.plot is not None:
            table.plot(output / f"{name}-{number + 1}.png")
            parts.append(f"![{table.title}]({name}-{number + 1}.png)\n")
    if not complete:
        parts.append("Stopped before its end: tables are missing.\n")
    parts.append(f"`python -m benchmarks {name}{' --quick' if quick else ''}`, {seconds:.0f} s on {described(host)}.\n")
    (output / f"{name}.md").write_text("\n".join(parts))
