"""Options that are single numbers, looked at before anything is done with them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError

__all__ = ["checks_numbers"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The least value of each; those of the first kind are real, of the second integers.
_REAL: dict[str, float] = {"rtol": 0, "atol": 0, "conlim": 0, "huber": 0, "safety": 0}
_INTEGER = {"max_iter": 0, "max_refinements": 0, "memory_limit": 0, "check_every": 1, "restart": 1}


def checks_numbers(function: _Function) -> _Function:
    """Let a function refuse arrays, words and fractions for its options that are single numbers, by their names.

    A tensor of one number is taken for it.

    Raises:
        ArgumentTypeError: an option is no number, or no integer where it counts.
        ArgumentError: it is too small.
    """

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        for name, value in options.items():
            if value is None:
                continue
            if name in _REAL:
                options[name] = _number(name, value, numbers.Real, _REAL[name])
            elif name in _INTEGER:
                options[name] = _number(name, value, numbers.Integral, _INTEGER[name])
            elif name == "bounds":
                options[name] = _bounds(value)
            elif name == "noise_std" and isinstance(value, (str, bytes, bool)):
                raise ArgumentTypeError(f"noise_std: expected a number or one per batch item, got {value!r}")
        return function(*args, **options)

    return cast(_Function, run)


def _number(name: str, value: Any, kind: type[Any], least: float) -> Any:
    given = value
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "an integer" if kind is numbers.Integral else "a single number"
        what = f"{type(given).__name__} of shape {tuple(given.shape)}" if hasattr(given, "shape") else repr(given)
        raise ArgumentTypeError(f"{name}: expected {wanted} >= {least}, got {what}")
    if not value >= least:
        raise ArgumentError(f"{name}: expected a number >= {least}, got {value}")
    return value


def _bounds(bounds: Any) -> tuple[Any, Any]:
    try:
        low, high = bounds
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"bounds: expected (lowest, highest), each a number or None, got {bounds!r}") from None
    for end in (low, high):
        if end is not None and (isinstance(end, bool) or not isinstance(end, numbers.Real)):
            raise ArgumentTypeError(f"bounds: expected one number or None for either end, got {type(end).__name__}")
    return low, high
