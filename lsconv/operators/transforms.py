"""Functions under torch's transforms: kept out of torch.compile, cached where none follows, able to tell vmap.

A solve reads values on the host, to see whether it has converged, so torch.compile would break its graph in every
iteration. It is therefore not compiled, and runs between two graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["cached", "hidden_by_vmap", "may_cache", "transforming", "untraced"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Value = TypeVar("_Value")


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


def cached(holder: object, name: str, tensors: Sequence[Tensor], make: Callable[[], _Value]) -> _Value:
    """Return ``make()``, cached in ``holder`` under ``name`` until one of the tensors that it depends on changes."""
    if not all(map(may_cache, tensors)):
        return make()
    name, state = f"_cached_{name}", [(t, t._version) for t in tensors]
    entry: tuple[list[tuple[Tensor, int]], _Value] | None = holder.__dict__.get(name)
    if entry is None or any(a is not b or v != w for (a, v), (b, w) in zip(entry[0], state, strict=True)):
        entry = holder.__dict__[name] = (state, make())
    return entry[1]


def may_cache(tensor: Tensor) -> bool:
    """Tell whether what is computed from a tensor may be cached.

    Not while autograd follows the tensor, nor for inference tensors, which do not count their changes and cannot enter
    a graph later, nor while torch.compile traces, which cannot see either.
    """
    if torch.compiler.is_compiling() or (tensor.requires_grad and torch.is_grad_enabled()):
        return False
    return not (tensor.is_inference() or torch.is_inference_mode_enabled())


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
