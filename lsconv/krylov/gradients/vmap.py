"""vmap over a solve: the mapped dimension becomes a batch dimension of the data, of damp and of the operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import MethodError
from lsconv.krylov.gradients.solve_record import SolveRecord

__all__ = ["batch_vmapped_axis", "under_old_vmap"]

_OLD_VMAP = torch._C._parse_dispatch_key("Batched")


def batch_vmapped_axis(
    record: SolveRecord,
    size: int,
    tensors: Sequence[Any],
    ndims: Sequence[int],
    params: Sequence[Tensor],
    dims: Sequence[int | None],
) -> tuple[list[Any], list[Tensor]]:
    """Move the mapped dimension of all tensors, operators and damp to the front of their batch dimensions.

    Args:
        record: the solve.
        size: the size of the mapped dimension.
        tensors: data, which have to carry the mapped dimension, then what may carry it (damp, prior).
        ndims: dimensions of an item in each of these.
        params: the parameters of A and L.
        dims: the mapped dimension of each tensor and parameter; None: it has none.
    """
    data, param_dims = dims[: len(tensors)], dims[len(tensors) :]
    moved = [t if t is None or dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, data, strict=True)]
    if data[0] is None:
        assert moved[0] is not None
        moved[0] = moved[0].expand(size, *moved[0].shape)
    mapped = [index == 0 or dim is not None for index, dim in enumerate(data)]
    batches = [
        0 if t is None else t.ndim - ndim - is_mapped for t, ndim, is_mapped in zip(moved, ndims, mapped, strict=True)
    ]
    plain = [p.select(dim, 0) if dim is not None else p for p, dim in zip(params, param_dims, strict=True)]
    operators = [operator for operator in record.operators(plain) if operator is not None]
    longest = max(*batches, *(len(operator.batch_shape) for operator in operators))
    for index, (tensor, batch) in enumerate(zip(moved, batches, strict=True)):
        if tensor is not None and mapped[index]:
            moved[index] = tensor.reshape(size, *(1 for _ in range(longest - batch)), *tensor.shape[1:])
    return moved, [
        p if dim is None else _kernel_per_item(record, plain, index, p.movedim(dim, 0), longest)
        for index, (p, dim) in enumerate(zip(params, param_dims, strict=True))
    ]


def _kernel_per_item(record: SolveRecord, plain: list[Tensor], index: int, param: Tensor, longest: int) -> Tensor:
    """Put the mapped dimension of one parameter in front of its batch dimensions, if its operator accepts that.

    Args:
        record: the solve.
        plain: the parameters of A and L without the mapped dimension.
        index: the number of the parameter.
        param: it, with the mapped dimension first.
        longest: the number of batch dimensions of the result.
    """
    of_penalty = index >= record.A_param_count  # the parameters of A come first
    before = record.operators(plain)[of_penalty]
    assert before is not None
    missing = longest - len(before.batch_shape)
    param = param.reshape(param.shape[0], *(1 for _ in range(missing)), *param.shape[1:])
    try:
        after = record.operators([*plain[:index], param, *plain[index + 1 :]])[of_penalty]
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


def under_old_vmap(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Make a ``backward`` or ``jvp`` of an autograd function work with ``is_grads_batched`` and ``vectorize=True``.

    torch.autograd runs these under its older vmap, which supports few operations and ignores the vmap rule of a
    function. Here its tensors are unwrapped, and the rule is run under torch.func.vmap.

    Args:
        rule: takes the context, then tensors or None; returns tensors and None.
    """

    @functools.wraps(rule)
    def run(ctx: Any, *given: Tensor | None) -> Any:
        level = max(map(_level, given), default=0)
        if level == 0:
            return rule(ctx, *given)
        mapped = [_level(t) == level for t in given]
        plain: list[Any] = [
            torch._remove_batch_dim(t, level, 1, 0) if t is not None and is_mapped else t
            for t, is_mapped in zip(given, mapped, strict=True)
        ]
        indices = [index for index, is_mapped in enumerate(mapped) if is_mapped]
        found: Any = None

        def tensors(*moved: Tensor) -> tuple[Tensor, ...]:
            nonlocal found
            everything = list(plain)
            for index, tensor in zip(indices, moved, strict=True):
                everything[index] = tensor
            found = rule(ctx, *everything)
            return tuple(t for t in (found if isinstance(found, tuple) else (found,)) if t is not None)

        answers = iter(torch.func.vmap(tensors)(*(plain[index] for index in indices)))
        if not isinstance(found, tuple):
            return torch._add_batch_dim(next(answers), 0, level)
        return tuple(None if t is None else torch._add_batch_dim(next(answers), 0, level) for t in found)

    return run


def _level(tensor: Tensor | None) -> int:
    """The deepest level at which torch's older vmap maps over the tensor; 0 for none."""
    if tensor is None or _OLD_VMAP is None or not torch._C._dispatch_keys(tensor).has(_OLD_VMAP):
        return 0
    deepest = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # Without its level a tensor has one dimension more, of the batch's size; a level that it lacks adds one of the size
    # named here.
    return max(
        level
        for level in range(1, deepest + 1)
        if len({torch._remove_batch_dim(tensor, level, size, 0).shape[0] for size in (1, 2)}) == 1
    )
