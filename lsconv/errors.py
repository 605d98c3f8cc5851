"""Exceptions and warnings of lsconv.

Every exception derives from :class:`LsconvError` and from the builtin that a caller would expect, so both
``except lsconv.LsconvError`` and ``except ValueError`` catch a wrong shape.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "ConvergenceError",
    "ConvergenceWarning",
    "DeviceError",
    "DtypeError",
    "InputWarning",
    "LsconvError",
    "MethodError",
    "NonFiniteError",
    "PlanMemoryError",
    "PreconditionerError",
    "RankError",
    "ShapeError",
    "unreported",
    "warn",
]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TRANSPARENT = ("torch.", "contextlib")  # what only passes calls on


class LsconvError(Exception):
    """Base class of every error raised on purpose by lsconv."""


class ArgumentError(LsconvError, ValueError):
    """An argument has a value outside its domain (a negative damp, an unknown option)."""


class ArgumentTypeError(LsconvError, TypeError):
    """An argument has the wrong Python type (a list where a tensor is needed)."""


class ShapeError(LsconvError, ValueError):
    """A tensor's trailing dimensions are not the operator's ``in_shape`` or ``out_shape``, or shapes do not compose."""


class DtypeError(LsconvError, TypeError):
    """Two tensors or operators that must share a dtype do not, or a dtype cannot serve the computation."""


class DeviceError(LsconvError, ValueError):
    """Two tensors or operators that must share a device do not."""


class NonFiniteError(LsconvError, ValueError):
    """An input contains NaN or infinity; the message names the batch items."""


class MethodError(LsconvError, ValueError):
    """The method asked for cannot serve this operator; the message names one that can."""


class PreconditionerError(LsconvError, ValueError):
    """A preconditioner is not Hermitian positive definite, or its shapes do not fit."""


class PlanMemoryError(LsconvError, MemoryError):
    """A plan would need more memory than its limit; the message names the bytes and the alternatives."""


class ConvergenceError(LsconvError, RuntimeError):
    """A solve did not converge and ``raise_on_failure=True`` was given."""


class RankError(LsconvError, RuntimeError):
    """A process that solves a part of the problem has failed, or does not answer; the message names it and why."""


class ConvergenceWarning(UserWarning):
    """A solve did not converge; ``Solution.status`` says why."""


class InputWarning(UserWarning):
    """An input was read in a way that the caller should know of: pixels as missing, a PSF as unnormalised."""


def warn(message: str, category: type[Warning] = ConvergenceWarning) -> None:
    """Warn at the line of the caller's own code, however deep in lsconv, or in torch's autograd, the cause lies."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    # a stack level would count the frames that torch.compile puts in, in some versions only
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "<unknown>")
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, name, registry)


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Silence :class:`ConvergenceWarning` in an inner solve, whose result is judged elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _is_inside(filename: str, module: str) -> bool:
    return filename.startswith(_PACKAGE) or f"{module}.".startswith(_TRANSPARENT)
