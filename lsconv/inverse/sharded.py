"""Tensors in parts on several devices (DTensor) at the entry of a solve: a batch in parts is solved where it is."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

from torch import Tensor

from lsconv.errors import ArgumentError
from lsconv.krylov.loop.problem import accept_operator
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.varying_convolution import VaryingConvolution

__all__ = ["solves_shards"]

F = TypeVar("F", bound=Callable[..., Any])


def solves_shards(function: F) -> F:
    """Let a solver ``(A, y, ...)`` take a y whose batch is in parts: each device solves its own items.

    Raises:
        ArgumentError: y is in parts along an axis of an item.
    """

    @functools.wraps(function)
    def wrapped(A: Any, y: Any, *args: Any, **options: Any) -> Any:
        tensors = sys.modules.get("torch.distributed.tensor")
        if tensors is None or not isinstance(y, tensors.DTensor):
            return function(A, y, *args, **options)
        operator = accept_operator(A, y)
        if not _convolves(operator):
            return function(A, y, *args, **options)  # torch's own products of DTensors are right
        batch = y.ndim - len(operator.out_shape)
        for placement in y.placements:
            if not placement.is_replicate() and not (placement.is_shard() and placement.dim < batch):
                raise ArgumentError(
                    f"y: a DTensor with placements {y.placements}, which split an item; {function.__name__} solves a "
                    f"batch in parts. For an image in parts use lsconv.tiled.Plan(A, damp=damp, mesh=mesh).solve(rows)"
                )
        for name, value in [*zip(("damp",), args, strict=False), *options.items()]:
            if isinstance(value, Tensor) and value.ndim > 0:
                raise ArgumentError(f"{name}: beside a y in parts (DTensor) only values for all items together serve")
        solution = function(A, y.to_local(), *args, **options)
        return _wrapped(solution, y, tensors.DTensor)

    return cast(F, wrapped)


def _convolves(A: LinearOperator) -> bool:
    """Tell whether an operator is, or is made of, a convolution, which torch computes wrongly for an item in parts."""
    return isinstance(A, (Convolution, VaryingConvolution)) or any(map(_convolves, A._parts()))


def _wrapped(solution: Solution, y: Any, kind: Any) -> Solution:
    """The solution with every tensor of items in parts as those of y."""
    batch = solution.codes.ndim
    found = {}
    for field in fields(solution):
        value = getattr(solution, field.name)
        if isinstance(value, Tensor) and value.ndim >= batch:
            shape = (*y.shape[:batch], *value.shape[batch:])
            layout = value.new_empty(shape, device="meta")
            found[field.name] = kind.from_local(
                value.contiguous(), y.device_mesh, y.placements, run_check=False, shape=layout.shape,
                stride=layout.stride(),
            )  # fmt: skip
    return replace(solution, history=None, **found)
