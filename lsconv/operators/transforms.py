"""Functions inside torch's transforms: kept out of torch.compile, and told of vmap and functorch, which hide values.

A solve looks at values (has it converged?), and its scalars are Python numbers on the host: traced, every iteration
would be a graph of its own. So it runs as it is, between two graphs.
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


def transforming() -> bool:
    """Tell whether torch.func transforms are running, under which values are hidden and requires_grad says little."""
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
