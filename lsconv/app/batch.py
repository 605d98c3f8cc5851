"""The loop over many files: progress, processes, and a line for every error and warning."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import lsconv
from lsconv.app.arguments import UsageError
from lsconv.app.image_io import ImageFileError

__all__ = ["Advance", "Outcome", "describe", "print_error", "process_files"]

# A function that is told the stage, the items done and the items in all.
Advance = Callable[[str, int, int], None]
# The work on one file, of the image to read, the one to write and an Advance: it returns a line about the file written,
# and whether every solve converged.
Work = Callable[[Path, Path, Advance], tuple[str, bool]]


@dataclass
class Outcome:
    """The outcome of one file.

    Attributes:
        image: the file read.
        line: a line about the file written, or None where it failed.
        converged: whether every solve converged.
        remarks: its error and warnings, one line each.
    """

    image: Path
    line: str | None = None
    converged: bool = False
    remarks: list[str] = field(default_factory=list)


def process_files(
    work: Work, images: Sequence[Path], targets: Sequence[Path], *, jobs: int = 1, quiet: bool = False
) -> tuple[int, list[Outcome]]:
    """Process every file, and go on after those that fail.

    A line about every file goes to stdout unless ``quiet``; errors and warnings go to stderr, a line each.

    Args:
        work: restores or blurs one file; returns a line about it, and whether every solve converged.
        images: the files to read.
        targets: the files to write, one for every image.
        jobs: processes that share the files.
        quiet: print errors and warnings only.

    Returns:
        The exit code, 0, 1 (something did not converge) or 2 (something failed), and the outcome of every file.

    Raises:
        UsageError: a process was killed.
    """
    code, outcomes = 0, []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
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
    """Process the files here, or shared among ``jobs`` processes; the outcomes come in the order of the files."""
    if jobs <= 1:
        for image, target in zip(images, targets, strict=True):
            yield _attempt(work, image, target, advance)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    try:
        with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            yield from pool.map(_attempt, [work] * len(images), images, targets)
    except BrokenProcessPool:
        raise UsageError(
            f"--jobs {jobs}: a process was killed, probably for want of memory; give fewer jobs, or --max-memory"
        ) from None


def _attempt(work: Work, image: Path, target: Path, advance: Advance = lambda *_: None) -> Outcome:
    """Process one file, with errors and warnings as remarks."""
    outcome = Outcome(image)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome.line, outcome.converged = work(image, target, advance)
        except (UsageError, ImageFileError, lsconv.LsconvError, OSError, MemoryError, RuntimeError) as error:
            if _is_unexpected(error):
                raise
            outcome.remarks.append(_remark(image, error))
    outcome.remarks += list(dict.fromkeys(f"{image}: {warning.message}" for warning in caught))
    return outcome


def _is_unexpected(error: Exception) -> bool:
    """Tell a mistake in the program from torch's error about a lack of memory, which is a RuntimeError too."""
    return isinstance(error, RuntimeError) and not isinstance(error, lsconv.LsconvError) and "memory" not in str(error)


def _remark(image: Path, error: Exception) -> str:
    """The error in words that begin with the file's name."""
    if isinstance(error, OSError) and error.filename is not None:
        return describe(error)
    if isinstance(error, (MemoryError, RuntimeError)) and not isinstance(error, lsconv.LsconvError):
        return f"{image}: not enough memory for an image of this size"
    return str(error) if str(error).startswith(str(image)) else f"{image}: {error}"


def describe(error: Exception) -> str:
    """An error in words; one of the file system begins with the file's name."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def print_error(message: str) -> None:
    """Print what is wrong as one line on stderr."""
    print("lsconv:", " ".join(message.split()), file=sys.stderr)
