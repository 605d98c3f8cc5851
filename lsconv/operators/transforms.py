"""Solves inside functions that torch.compile compiles: they run as they are, between two graphs.

A solve looks at values (has it converged?), and its scalars are Python numbers on the host: traced, every iteration
would be a graph of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["untraced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Keep torch.compile out of a function; outside of a compilation this costs one test.

    As ``torch.compiler.disable``, but that is only applied, and torch's compiler, which takes seconds, only imported
    when something is being compiled.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if not disabled:
                disabled.append(torch.compiler.disable(function))
            return disabled[0](*args, **kwargs)
        return function(*args, **kwargs)

    return cast(_Function, run)
