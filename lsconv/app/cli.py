"""The command ``lsconv``: ``deblur``, ``blur``, ``psf``, ``demo`` and ``info``."""

from __future__ import annotations

import io
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import lsconv
from lsconv.app import demo as comparison
from lsconv.app.arguments import (
    AUTOMATIC,
    BOUNDARIES,
    UsageError,
    check_plot,
    check_writable,
    choose_device,
    choose_psf,
    find_images,
    parse_memory,
    plan_outputs,
)
from lsconv.app.batch import describe, print_error, process_files
from lsconv.app.blurring import Blur
from lsconv.app.estimating import estimate
from lsconv.app.image_io import ImageFileError
from lsconv.app.psf_grid import read_psf_grid
from lsconv.app.report_page import write_page
from lsconv.app.restore import PRIORS, RULES, Restoration
from lsconv.app.tiled_restore import TiledRestoration

__all__ = ["app", "run"]

app = typer.Typer(
    name="lsconv",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
ImagesArgument = Annotated[
    list[Path],
    typer.Argument(help="PNG, JPEG, TIFF, NPY, WAV, FITS or OME-Zarr images, or folders of them.", metavar="IMAGE..."),
]
OutputOption = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="The file to write, whose ending names the format, or a folder/.", metavar="PATH"
    ),
]
PsfOption = Annotated[
    str | None,
    typer.Option(
        help="The blur: an image, a stack or an NPY array, divided by its sum. Of deblur also "
        f"{', '.join(f'auto:{model}' for model in AUTOMATIC)}: found in the image.",
        metavar="FILE",
    ),
]
GaussianOption = Annotated[float | None, typer.Option(help="The blur: a Gaussian of this sigma.", metavar="SIGMA")]
DiskOption = Annotated[float | None, typer.Option(help="The blur: out of focus, this radius.", metavar="RADIUS")]
MotionOption = Annotated[
    str | None,
    typer.Option(help="The blur: a straight movement, degrees from horizontal.", metavar="LENGTH,ANGLE"),
]
BoxOption = Annotated[int | None, typer.Option(help="The blur: the mean over K×K pixels.", metavar="K")]
BoundaryOption = Annotated[
    str, typer.Option(help=f"What lies beyond the image: {', '.join(BOUNDARIES)}.", metavar="BOUNDARY")
]


LEGEND = """
residual: |Ax - y| / |y|. min-norm: distance of x to the minimum-norm solution.
truth: distance of x to the x that y was made from. Both relative.
iterations: * the tolerance was not met. seconds: with setup, after a warm-up."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with code 0, 1 (not converged), 2 (wrong arguments or failed) or 130 (interrupted).

    Args:
        arguments: the words after ``lsconv``; those of this process by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words, prog_name="lsconv", standalone_mode=False, obj=["lsconv", *words])
    except (UsageError, ImageFileError, lsconv.LsconvError, OSError) as error:
        print_error(describe(error))
        code = 2
    except typer.Abort:
        code = 130  # 128 + SIGINT, as shells report it
    except Exception as error:
        if not hasattr(error, "format_message"):  # only errors of typer and click about the arguments have it
            raise
        print_error(error.format_message())
        code = 2
    raise SystemExit(code or 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lsconv {lsconv.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def overview(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Invert convolutions: least-squares, minimum-norm and regularised solutions of y = conv(x, K).

    Exit codes: 0 done, 1 written but not converged, 2 asked for wrongly or failed, 130 interrupted.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def deblur(
    context: typer.Context,
    images: ImagesArgument,
    output: OutputOption,
    psf: PsfOption = None,
    gaussian: GaussianOption = None,
    disk: DiskOption = None,
    motion: MotionOption = None,
    box: BoxOption = None,
    psf_grid: Annotated[
        Path | None,
        typer.Option(
            help="The blur: PSFs that vary, an NPZ of kernels and positions, or a folder with positions.csv.",
            metavar="FILE",
        ),
    ] = None,
    origin: Annotated[str, typer.Option(help="The PSF's centre: center (pixel size // 2), peak, centroid.")] = "center",
    boundary: BoundaryOption = "unknown",
    prior: Annotated[
        str, typer.Option(help=f"What images are like: {', '.join(PRIORS)}.", metavar="PRIOR")
    ] = "gradient",
    damp: Annotated[
        str, typer.Option(help=f"A number, a rule ({', '.join(RULES)}), or auto: gcv, upre with --noise-std.")
    ] = "auto",
    weight: Annotated[float | None, typer.Option(help="Of the total variation; from the noise if not given.")] = None,
    noise: Annotated[str, typer.Option(help="Of the image: gaussian or poisson.")] = "gaussian",
    noise_std: Annotated[
        float | None, typer.Option(help="Standard deviation of gaussian noise, in the image's own units.")
    ] = None,
    background: Annotated[float, typer.Option(help="Light without the scene, in the image's own units.")] = 0.0,
    gain: Annotated[float, typer.Option(help="Grey levels per photon, of Poisson noise.")] = 1.0,
    offset: Annotated[float, typer.Option(help="Grey level of no light.")] = 0.0,
    read_noise: Annotated[float, typer.Option(help="Noise of the camera beside the photons', in photons.")] = 0.0,
    low: Annotated[float | None, typer.Option("--min", help="Lowest value, in the image's own units.")] = None,
    high: Annotated[float | None, typer.Option("--max", help="Highest value.")] = None,
    nonnegative: Annotated[bool, typer.Option("--nonnegative", help="The same as --min 0.")] = False,
    bad_pixels: Annotated[
        Path | None,
        typer.Option(
            help="A picture of the image's size, white where pixels are bad, or OME-Zarr labels, zero where good.",
            metavar="FILE",
        ),
    ] = None,
    saturated: Annotated[
        str | None, typer.Option(help="The grey level from which pixels are saturated, or auto.", metavar="LEVEL")
    ] = None,
    error_bars: Annotated[
        Path | None,
        typer.Option(help="Write standard deviations of the pixels: .tif, .npy, .fits, .zarr.", metavar="FILE"),
    ] = None,
    device: DeviceOption = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the files.")] = 1,
    max_memory: Annotated[
        str | None, typer.Option(help="Refuse files that need more, such as 4G.", metavar="SIZE")
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Restore by tiles of so many pixels, for files larger than memory: OME-Zarr, uncompressed TIFF, NPY.",
            metavar="N",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a report about one restoration, a .png file.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with a report about every file into this folder.", metavar="FOLDER"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say what was chosen, and why.")] = False,
) -> None:
    """Restore images whose blur is known, or of a kind whose size the image itself tells (--psf auto:disk).

    Everything in the image's units (noise, background, bounds) is in grey levels of the file, or values of floating
    point, and so is the answer. Bit depth, colour, opacity, axes (time, channel, depth) and metadata are kept where the
    format has them, physical sizes and channels' names also from TIFF to OME-Zarr and back. NaN, bad and saturated
    pixels are missing: they have no say, and are filled in. Every time and channel, and every slice under a PSF of two
    axes, is restored by itself; a PSF may have one kernel per channel.
    Between the points of --psf-grid, pixels of the image (row, column), which form a grid, the PSF is linear.
    With boundary 'unknown' nothing is assumed about what lies beyond the image. Folders are made where missing.
    With --tile the answer is that of the whole image, out of core; the same command goes on after an interruption.

    Exit codes: 0 done, 1 written but not converged, 2 asked for wrongly or failed, 130 interrupted.

    \b
    Example, with a picture photo.png:
      lsconv blur photo.png --disk 3 --noise-std 2 -o blurred.png
      lsconv deblur blurred.png --disk 3 -o restored.png --plot report.png
    """  # noqa: D301 - a backspace, which makes click keep the line breaks
    _check_boundary(boundary)
    if quiet and verbose:
        raise UsageError("--quiet, --verbose: give one of them")
    if nonnegative and low is not None and low != 0:
        raise UsageError(f"--nonnegative: is --min 0, got --min {low:g} beside it")
    if psf_grid is not None and any(blur is not None for blur in (psf, gaussian, disk, motion, box)):
        raise UsageError("--psf-grid: is a blur of its own; give no other beside it")
    kernel = choose_psf(psf, gaussian, disk, motion, box) if psf_grid is None else read_psf_grid(psf_grid)
    files = find_images(images)
    work = Restoration(
        kernel, boundary, prior, damp, weight, noise_std, choose_device(device), plot, noise, background, gain, offset,
        read_noise, (0.0 if nonnegative else low, high), origin, parse_memory(max_memory), verbose, report,
        bad_pixels, saturated, error_bars,
    )  # fmt: skip
    targets = plan_outputs(images, files, output)
    check_plot(plot, files, targets, error_bars)
    if report is not None:
        check_writable("--report", report / "index.html")
    restore = work if tile is None else TiledRestoration(work, tile, quiet)
    code, outcomes = process_files(restore, files, targets, jobs=jobs, quiet=quiet)
    if report is not None:
        page = write_page(report, outcomes, targets, shlex.join(map(str, context.obj)))
        if not quiet:
            print(f"report: {page}")
    raise typer.Exit(code)


@app.command()
def blur(
    images: ImagesArgument,
    output: OutputOption,
    psf: PsfOption = None,
    gaussian: GaussianOption = None,
    disk: DiskOption = None,
    motion: MotionOption = None,
    box: BoxOption = None,
    boundary: BoundaryOption = "unknown",
    noise_std: Annotated[
        float, typer.Option(help="Standard deviation of the noise to add, in the image's own units.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise; the same gives the same.")] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Blur images and add noise, to try `lsconv deblur` on.

    With boundary 'unknown' the result is smaller: the pixels that need nothing from beyond the image.

    \b
    Example, with a picture photo.png:
      lsconv blur photo.png --motion 15,30 --noise-std 2 --seed 1 -o blurred.png
    """  # noqa: D301
    _check_boundary(boundary)
    kernel = choose_psf(psf, gaussian, disk, motion, box)
    files = find_images(images)
    work = Blur(kernel, boundary, noise_std, seed, choose_device(device))
    targets = plan_outputs(images, files, output)
    code, _ = process_files(work, files, targets)
    raise typer.Exit(code)


app.command("psf")(estimate)


@app.command()
def info() -> None:
    """Print versions and devices."""
    table = Table(box=None, show_header=False)
    for package in ("lsconv", "torch", "numpy", "scipy"):
        table.add_row(package, version(package))
    table.add_row("python", platform.python_version())
    table.add_row("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() == 0:
        table.add_row("cuda", "none")
    Console().print(table)


@app.command()
def demo(
    device: DeviceOption = "cpu",
    output: Annotated[Path, typer.Option(help="The picture to write, a .png file.")] = Path("lsconv-demo.png"),
    quick: Annotated[bool, typer.Option("--quick", help="Small problems, seconds instead of a minute.")] = False,
) -> None:
    """Invert two convolutions three ways, print how well each did, and write a picture."""
    place = choose_device(device)
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: the picture is a PNG file, give a name that ends in .png")
    check_writable("--output", output)
    console = Console()
    problems = [
        comparison.question_problem(place, quick=quick),
        comparison.photograph_problem(place, quick=quick),
    ]
    answers = _solve(problems, console)
    for problem, (reference, rows) in zip(problems, answers, strict=True):
        console.print()
        console.print(problem.title, style="bold", highlight=False)
        console.print(_table(rows))
        damping = f"damp = {problem.damp:g} where damped. " if problem.damp else ""
        console.print(
            f"{damping}Reference in float64: residual {reference.residual:.0e}, "
            f"orthogonal to the rest of the truth to {reference.inner_product:.0e}.",
            highlight=False,
        )
    console.print(LEGEND, highlight=False)
    width, height = comparison.draw(output, problems[1], answers[1][1])
    console.print(f"\nPicture: {output} ({width}×{height})", highlight=False)
    failures = []
    for problem, (reference, rows) in zip(problems, answers, strict=True):
        failed = [] if reference.verified else ["reference"]
        failed += [row.method for row in rows if row.method.startswith("lsconv") and not row.converged]
        failures += [f"{method} of '{problem.title}'" for method in failed]
    if failures:
        print_error(f"not converged: {'; '.join(failures)}")
        raise typer.Exit(1)


Answers = list[tuple[comparison.Reference, list[comparison.Answer]]]


def _solve(problems: Sequence[comparison.Problem], console: Console) -> Answers:
    """Solve every problem by every method, with a progress bar; the reference and the answers of each problem."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    steps = 1 + sum(1 + len(comparison.solvers(problem)) for problem in problems)
    answers: Answers = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("warming up", total=steps)
        comparison.warm_up(problems[0].y.device)
        progress.advance(task)
        for problem in problems:
            progress.update(task, description="minimum-norm reference, float64")
            reference = comparison.solve_reference(problem)
            progress.advance(task)
            rows = []
            for name, solve in comparison.solvers(problem).items():
                progress.update(task, description=name)
                rows.append(comparison.evaluate(problem, reference, name, solve))
                progress.advance(task)
            answers.append((reference, rows))
    return answers


def _table(rows: Sequence[comparison.Answer]) -> Table:
    """The answers to one problem as a table, a row for every method."""
    table = Table(box=MARKDOWN, header_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("residual", "min-norm", "truth", "iterations", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        figures = (f"{row.residual:.1e}", f"{row.distance:.1e}", f"{row.error:.1e}")
        iterations = "-" if row.iterations is None else str(row.iterations)
        if row.converged is False:
            iterations += "*"
        table.add_row(row.method, *figures, iterations, f"{row.seconds:.2f}")
    return table


def _check_boundary(boundary: str) -> None:
    if boundary not in BOUNDARIES:
        raise UsageError(f"--boundary {boundary}: expected one of {', '.join(BOUNDARIES)}")
