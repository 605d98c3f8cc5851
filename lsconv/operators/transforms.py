"""Functions under torch's transforms: kept out of torch.compile, and able to tell vmap and functorch.

A solve reads values on the host, to see whether it has converged, so torch.compile would break its graph in every
iteration. It is therefore not compiled, and runs between two graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["hidden_by_vmap", "transforming", "untraced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Keep torch.compile out of a function; outside of a compilation this costs one test.

    It does what ``torch.compiler.disable`` does, but imports torch's compiler, which takes seconds, only when something
    is being compiled.
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


def transforming() -> bool:
    """Tell whether a transform of torch.func runs, which hides values of tensors and what requires gradients."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(active and active())


def hidden_by_vmap(tensor: Tensor) -> bool:
    """Tell whether ``torch.func.vmap`` maps over the tensor, so that nothing can depend on its values."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
