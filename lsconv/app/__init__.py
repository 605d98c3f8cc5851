"""The command line, ``lsconv``, and the reading and writing of images; uses the library's public names only.

In the order in which an image passes: :mod:`~lsconv.app.cli` declares the options, :mod:`~lsconv.app.arguments` checks
them, :mod:`~lsconv.app.batch` goes through the files, :mod:`~lsconv.app.image_io` reads each by its format
(:mod:`~lsconv.app.formats`), :mod:`~lsconv.app.restore` or :mod:`~lsconv.app.tiled_restore` solves, and
:mod:`~lsconv.app.report` draws how well the answer explains the data.

Other programs may use the report: :class:`Evidence` gathers what :func:`report_figure` draws, :class:`Kernel` is a PSF
with its number of spatial axes, :func:`working_dtype` is the dtype to compute in for a number type of images, and
:func:`rounded` converts an answer to one.

Example:
    >>> from lsconv.app import Evidence, Kernel, report_figure
    >>> data, psf = torch.rand(1, 32, 32), lsconv.psf.gaussian(1.0)
    >>> solution = lsconv.deconvolve(data, psf, channels="first", damp=0.1, crop=False)
    >>> A = lsconv.blur_operator(psf.float(), (32, 32))
    >>> restored = solution.x[:, 4:-4, 4:-4]
    >>> camera = {"background": 0.0, "offset": 0.0, "gain": 1.0, "read_noise": 0.0}
    >>> evidence = Evidence.of(data, A, solution, restored, Kernel(psf, 2), camera, poisson=False)
    >>> figure, whiteness = report_figure(evidence, "a title")
    >>> len(figure.axes) > 4
    True

The photograph that ``lsconv demo`` restores, ``data/astronaut-256.png``, is a 256×256 crop of NASA's portrait of the
astronaut Eileen Collins (public domain, as distributed with scikit-image).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsconv.app.arguments import Kernel
    from lsconv.app.picture import rounded, working_dtype
    from lsconv.app.report import Evidence, report_figure

__all__ = ["Evidence", "Kernel", "command_line", "main", "report_figure", "rounded", "working_dtype"]

_MODULE_OF = {
    "Evidence": "report",
    "Kernel": "arguments",
    "report_figure": "report",
    "rounded": "picture",
    "working_dtype": "picture",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts where the ``app`` extra is missing."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lsconv.app' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lsconv.app.{_MODULE_OF[name]}"), name)


def command_line() -> Callable[[], None]:
    """Import the command line, or print what to install where the ``app`` extra is missing."""
    try:
        from lsconv.app.cli import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "lsconv":
            raise
        print(
            f"lsconv: the command line needs {error.name}; install it with: pip install 'lsconv[app]'", file=sys.stderr
        )
        raise SystemExit(2) from None
    return run


def main() -> None:
    """Run the command line as ``lsconv`` does."""
    command_line()()
