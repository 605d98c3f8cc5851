"""vmap over a solve: the mapped dimension becomes a batch dimension of the data, of damp and of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lsconv.errors import MethodError
from lsconv.krylov.system import System

__all__ = ["front"]


def front(
    system: System,
    size: int,
    tensors: Sequence[Any],
    ndims: Sequence[int],
    params: Sequence[Tensor],
    dims: Sequence[int | None],
) -> tuple[list[Any], list[Tensor]]:
    """Everything with the mapped dimension in front of all batch dimensions, those of the operators and of damp too.

    Args:
        system: the system.
        size: of the mapped dimension.
        tensors: data, which have to carry the mapped dimension, then what may carry it (damp, prior).
        ndims: dimensions of an item in each of these.
        params: what A and L are made of.
        dims: where the mapped dimension is in each of tensors and params.
    """
    data, own = dims[: len(tensors)], dims[len(tensors) :]
    moved = [t if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, data, strict=True)]
    if data[0] is None:
        assert moved[0] is not None
        moved[0] = moved[0].expand(size, *moved[0].shape)
    mapped = [index == 0 or dim is not None for index, dim in enumerate(data)]
    batches = [
        0 if t is None else t.ndim - ndim - is_mapped for t, ndim, is_mapped in zip(moved, ndims, mapped, strict=True)
    ]
    plain = [p.select(dim, 0) if dim is not None else p for p, dim in zip(params, own, strict=True)]
    operators = [operator for operator in system.operators(plain) if operator is not None]
    longest = max(*batches, *(len(operator.batch_shape) for operator in operators))
    for index, (tensor, batch) in enumerate(zip(moved, batches, strict=True)):
        if tensor is not None and mapped[index]:
            moved[index] = tensor.reshape(size, *(1 for _ in range(longest - batch)), *tensor.shape[1:])
    return moved, [
        p if dim is None else _kernel_per_item(system, plain, index, p.movedim(dim, 0), longest)
        for index, (p, dim) in enumerate(zip(params, own, strict=True))
    ]


def _kernel_per_item(system: System, plain: list[Tensor], index: int, param: Tensor, longest: int) -> Tensor:
    """A parameter with the mapped dimension in front, where the operator takes that as one value per batch item."""
    before = system.operators(plain)[index >= system.count]
    assert before is not None
    missing = longest - len(before.batch_shape)
    param = param.reshape(param.shape[0], *(1 for _ in range(missing)), *param.shape[1:])
    try:
        after = system.operators([*plain[:index], param, *plain[index + 1 :]])[index >= system.count]
        assert after is not None
        served = after.in_shape == before.in_shape and after.batch_shape == (
            param.shape[0], *(1 for _ in range(missing)), *before.batch_shape
        )  # fmt: skip
    except (ValueError, TypeError, RuntimeError):
        served = False
    if not served:
        raise MethodError(
            f"vmap: {before!r} does not take one of each of its parameters per batch item, so only y, damp and x_prior "
            "can be mapped over; a Convolution or a Dense operator takes them"
        )
    return param
