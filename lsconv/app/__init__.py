"""The command line, ``lsconv``, and the reading and writing of pictures; uses the library's public names only.

The photograph that ``lsconv demo`` restores, ``data/astronaut-256.png``, is a 256×256 crop of NASA's portrait of the
astronaut Eileen Collins (public domain, as distributed with scikit-image).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["command_line", "main"]


def command_line() -> Callable[[], None]:
    """Import the command line; says what to install where the ``app`` extra is missing."""
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
