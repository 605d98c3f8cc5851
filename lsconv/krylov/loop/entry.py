"""Decorators of the public functions: options that are numbers are checked, and an empty batch gets an empty answer.

An empty batch is solved for one item of zeros, which is removed from the answer. So arguments are checked as usual, and
the answer has the usual fields, shapes and dtypes.
"""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, unreported
from lsconv.krylov.loop.problem import accept_operator
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["checks_numbers", "serves_empty_batches", "with_item_of", "without_item"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_SHAPED_LIKE_X = ("x0", "x_prior")
_ABOUT_ITEMS = ("callback", "progress", "raise_on_failure")  # options that do not apply to an empty batch


def serves_empty_batches(
    item: Callable[[LinearOperator], tuple[int, ...]] = lambda A: A.out_shape,
) -> Callable[[_Function], _Function]:
    """Give a function ``(A, y, ...)`` an empty answer for an empty batch, with its gradients.

    Args:
        item: the shape of an item of the second argument, of the operator.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        first, second = list(signature.parameters)[:2]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            empty = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.numel() == 0]
            if not empty:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            options = given.pop("options", {})
            given |= options
            A, y = given[first], given[second]
            A = with_item_of(A, A.ndim - 2) if isinstance(A, Tensor) else A
            operator = accept_operator(A, y)
            shapes = {n: t.shape for n, t in given.items() if isinstance(t, Tensor) and n != first}
            shapes.pop("L", None)
            ndims = {n: len(operator.in_shape) if n in _SHAPED_LIKE_X else 0 for n in shapes}
            ndims[second] = len(item(operator))
            if "penalty_data" in shapes:
                L = given.get("L")
                ndims["penalty_data"] = len(operator.in_shape if L is None else accept_operator(L, name="L").out_shape)
            parameter_batch = given[first].shape[:-2] if isinstance(given[first], Tensor) else operator.batch_shape
            try:
                batch = broadcast_shapes(
                    parameter_batch, *(shape[: len(shape) - ndims[n]] for n, shape in shapes.items())
                )
            except RuntimeError:
                return function(*args, **kwargs)  # which refuses them
            if 0 not in batch or tuple(y.shape[y.ndim - ndims[second] :]) != item(operator):
                return function(*args, **kwargs)
            for n in shapes:
                given[n] = with_item_of(given[n], given[n].ndim - ndims[n], 0 if ndims[n] else 1)
            given = {n: value for n, value in given.items() if n not in _ABOUT_ITEMS}
            with unreported():
                return without_item(function(**{**given, first: A}), batch)

        return cast(_Function, run)

    return decorate


def with_item_of(tensor: Tensor, batch_ndim: int, value: float = 0) -> Tensor:
    """Give every empty batch dimension of a tensor one index, filled with ``value``, such that gradients pass."""
    for dim in range(batch_ndim):
        if tensor.shape[dim] == 0:
            item = tensor.new_full((*tensor.shape[:dim], 1, *tensor.shape[dim + 1 :]), value)
            tensor = torch.cat([tensor, item], dim)
    return tensor


def without_item(answer: Any, batch: Sequence[int], *, vectors: bool = True) -> Any:
    """Remove the item that :func:`with_item_of` added from an answer.

    Args:
        answer: a tensor or an array, or an object that has some.
        batch: the batch dimensions.
        vectors: the tensors hold a vector per item, behind the batch dimensions; False: a scalar, or rows of scalars.
    """
    if hasattr(answer, "shape"):
        rows = 0 if vectors else answer.ndim - len(batch)
        if rows not in (0, 1):
            return answer
        where = [slice(None)] * rows + [slice(0, size) for size in batch]
        return answer[tuple(where)]
    if isinstance(answer, tuple):
        return tuple(without_item(value, batch, vectors=vectors) for value in answer)
    if is_dataclass(answer) and not isinstance(answer, type):
        parts = {
            f.name: without_item(getattr(answer, f.name), batch, vectors=f.name in ("x", "std")) for f in fields(answer)
        }
        return replace(answer, **parts)
    return answer


_REAL = frozenset({"rtol", "atol", "conlim", "huber", "safety"})
_POSITIVE_INTEGER = frozenset({"check_every", "restart"})
_INTEGER = frozenset({"max_iter", "max_refinements", "memory_limit"}) | _POSITIVE_INTEGER


def checks_numbers(function: _Function) -> _Function:
    """Make a function check its options that are single numbers, by their names, and refuse anything else.

    A tensor of one number is accepted.

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
                options[name] = _number(name, value, numbers.Real, 0)
            elif name in _INTEGER:
                options[name] = _number(name, value, numbers.Integral, 1 if name in _POSITIVE_INTEGER else 0)
            elif name == "bounds":
                options[name] = _bounds(value)
            elif name == "noise_std" and isinstance(value, (str, bytes, bool)):
                raise ArgumentTypeError(f"noise_std: expected a number or one per batch item, got {value!r}")
        return function(*args, **options)

    return cast(_Function, run)


def _number(name: str, value: Any, kind: type[Any], least: float) -> Any:
    """Check a number of this kind, or a tensor of one, and return it."""
    given = value
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, kind):
        wanted = "an integer" if kind is numbers.Integral else "a single number"
        shown = f"{type(given).__name__} of shape {tuple(given.shape)}" if hasattr(given, "shape") else repr(given)
        raise ArgumentTypeError(f"{name}: expected {wanted} >= {least}, got {shown}")
    if not value >= least:
        raise ArgumentError(f"{name}: expected a number >= {least}, got {value}")
    return value


def _bounds(bounds: Any) -> tuple[Any, Any]:
    """Check the lowest and the highest value, and return both."""
    try:
        low, high = bounds
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"bounds: expected (lowest, highest), each a number or None, got {bounds!r}") from None
    for end in (low, high):
        if end is not None and (isinstance(end, bool) or not isinstance(end, numbers.Real)):
            raise ArgumentTypeError(f"bounds: expected one number or None for either end, got {type(end).__name__}")
    return low, high
