"""The command ``lsconv`` before anything that takes time to import: Ctrl-C ends it in one line at any moment.

It stands outside of the package, whose import brings torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130  # as shells count it


class _Interrupted(BaseException):
    """Ctrl-C while the command is at work: files half written are removed on the way out."""


def main() -> None:
    """Run the command line and leave with its exit code, 130 when interrupted."""
    # Started in the background, it is not to be interrupted, and inherits that.
    interruptible = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    try:
        if interruptible:
            signal.signal(signal.SIGINT, _leave)
        from lsconv.app import command_line

        run = command_line()
        if interruptible:
            signal.signal(signal.SIGINT, _unwind)
        run()
    except _Interrupted:
        _leave()
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, _leave)


def _leave(*_: int | FrameType | None) -> None:
    """Leave at once: while modules are imported, or at the end, there is nothing to tidy up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # closed, or interrupted while being written
            stream.flush()
    os.write(2, b"lsconv: interrupted\n")
    os._exit(_INTERRUPTED)


def _unwind(*_: int | FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # tidying up is not to be interrupted
    raise _Interrupted
