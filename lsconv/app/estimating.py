"""The command ``lsconv psf``: the PSF of an image, estimated from the image alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

import lsconv
from lsconv.app.arguments import AUTOMATIC, UsageError, check_writable, real_path
from lsconv.app.batch import print_error
from lsconv.app.image_io import atomically, read_picture

__all__ = ["estimate"]


def estimate(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG, TIFF, NPY or FITS file.", metavar="IMAGE")],
    model: Annotated[str, typer.Option(help=f"The kind of blur: {', '.join(AUTOMATIC)}.", metavar="MODEL")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="An .npy file for the PSF.", metavar="FILE")
    ] = None,
) -> None:
    """Estimate the parameters of an image's blur from the image, with their standard errors.

    All colours, channels and slices are taken to have one blur. Exit codes: 0 done, 1 the image does not tell the
    parameters, 2 asked for wrongly.

    \b
    Example, with a picture photo.png:
      lsconv blur photo.png --disk 3 --noise-std 2 -o blurred.png
      lsconv psf blurred.png --model disk -o psf.npy
    """  # noqa: D301 - a backspace, which tells click not to fill the lines
    if model not in AUTOMATIC:
        raise UsageError(f"--model {model}: expected one of {', '.join(AUTOMATIC)}")
    if output is not None:
        if output.suffix.lower() != ".npy":
            raise UsageError(f"--output {output}: the PSF is an array, give a name that ends in .npy")
        check_writable("--output", output)
        if real_path(output) == real_path(image):
            raise UsageError(f"--output {output}: would replace the image; give another name")
    picture = read_picture(image)
    if picture.line:
        raise UsageError(f"{image}: is a signal; blurs are estimated in images")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)  # the status is printed below
        estimated = lsconv.estimate_psf(picture.colours.to(torch.float64), model)
    if output is not None:
        with atomically(output) as file:
            np.save(file, estimated.psf.numpy())
    print(estimated)
    if not estimated.converged:
        print_error(f"{image}: {estimated.status.sentence}")
        raise typer.Exit(1)
