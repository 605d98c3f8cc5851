"""The loop over many files: progress, processes, and a line about everything amiss."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lsconv
from lsconv.app.arguments import UsageError
from lsconv.app.image_io import ImageFileError

__all__ = ["Outcome", "describe", "print_error", "process_files"]

Advance = Callable[[str, int, int], None]
Work = Callable[[Path, Path, Advance], tuple[str, bool]]


@dataclass
class Outcome:
    """The outcome of one file.

    Attributes:
        image: the file read.
        line: what was done, or None where it failed.
        converged: whether every solve converged.
        remarks: what was amiss.
    """

    image: Path
    line: str | None = None
    converged: bool = False
    remarks: list[str] = field(default_factory=list)


def process_files(
    work: Work, images: Sequence[Path], targets: Sequence[Path], *, jobs: int = 1, quiet: bool = False
) -> tuple[int, list[Outcome]]:
    """Work on every file, go on after those that fail, and say so.

    A line about every file goes to stdout unless ``quiet``, one about everything amiss to stderr.

    Args:
        work: restores or blurs one file.
        images: the files to read.
        targets: the files to write.
        jobs: processes that share the files.
        quiet: say nothing but what is amiss.

    Returns:
        The exit code, 0, 1 (something did not converge) or 2 (something failed), and what came of every file.
    """
    code, outcomes = 0, []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        files = progress.add_task("files", total=len(images), visible=len(images) > 1)
        stage = progress.add_task("", total=None)

        def advance(name: str, done: int, total: int) -> None:
            progress.update(stage, description=name, completed=done, total=total)

        for outcome in _outcomes(work, images, targets, min(jobs, len(images)), advance):
            for remark in outcome.remarks:
                print_error(remark)
            if outcome.line is None:
                code = 2
            else:
                code = max(code, int(not outcome.converged))
                if not quiet:
                    print(outcome.line, flush=True)
            outcomes.append(outcome)
            progress.advance(files)
    return code, outcomes


def _outcomes(
    work: Work, images: Sequence[Path], targets: Sequence[Path], jobs: int, advance: Advance
) -> Iterator[Outcome]:
    if jobs <= 1:
        for image, target in zip(images, targets, strict=True):
            yield _attempt(work, image, target, advance)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        yield from pool.map(_attempt, [work] * len(images), images, targets)


def _attempt(work: Work, image: Path, target: Path, advance: Advance = lambda *_: None) -> Outcome:
    """Work on one file, with errors and warnings as remarks."""
    outcome = Outcome(image)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome.line, outcome.converged = work(image, target, advance)
        except (UsageError, ImageFileError, lsconv.LsconvError, OSError, MemoryError, RuntimeError) as error:
            if type(error) is RuntimeError and "memory" not in str(error):
                raise
            outcome.remarks.append(_about(image, error))
    outcome.remarks += list(dict.fromkeys(f"{image}: {warning.message}" for warning in caught))
    return outcome


def _about(image: Path, error: Exception) -> str:
    """The error with the file's name before it, unless it is there already."""
    if isinstance(error, OSError) and error.filename is not None:
        return describe(error)
    if isinstance(error, (MemoryError, RuntimeError)) and not isinstance(error, lsconv.LsconvError):
        return f"{image}: not enough memory for an image of this size"
    return str(error) if str(error).startswith(str(image)) else f"{image}: {error}"


def describe(error: Exception) -> str:
    """An error in words, a file's with the name first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(message: str) -> None:
    """Print what is wrong as one line on stderr."""
    print("lsconv:", " ".join(message.split()), file=sys.stderr)
