"""The arguments and the report that bounded, sparse and plug-and-play reconstruction have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError, ShapeError
from lsconv.inverse.admm.proximal import Bounds
from lsconv.inverse.solve import without_items
from lsconv.krylov.gradients.parameters import any_requires_grad, parameters_of
from lsconv.krylov.loop.problem import accept_penalty
from lsconv.krylov.loop.solution import Solution, report
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["batch_of", "check_background", "check_bounds", "check_options", "refuse_gradient", "reported"]


def check_options(A: LinearOperator, y: Tensor, name: str, options: dict[str, Any]) -> None:
    """Refuse options of :func:`total_variation` that do not fit A and the data.

    Args:
        A: the operator.
        y: the data.
        name: what the user calls them.
        options: some of the options.
    """
    huber, noise, L = options.get("huber", 0.0), options.get("noise", "gaussian"), options.get("L")
    if not math.isfinite(huber):
        raise ArgumentError(f"huber: expected a finite number >= 0, got {huber}")
    if noise not in ("gaussian", "poisson"):
        raise ArgumentError(f'noise: expected "gaussian" or "poisson", got {noise!r}')
    if L is not None:
        accept_penalty(L, A)
    if options.get("bounds") is not None:
        check_bounds(options["bounds"], A)
    if noise == "poisson" and (y.is_complex() or bool((y < 0).any())):
        raise ArgumentError(f"{name}: counts must be >= 0 for Poisson noise; add back what was subtracted, and give it "
                            f"as background=")  # fmt: skip


def check_bounds(bounds: Bounds, A: LinearOperator) -> None:
    """Refuse bounds that are not ``(lowest, highest)`` in order, that bound nothing, or that come with a complex A."""
    if len(bounds) != 2 or A.is_complex:
        raise ArgumentError(f"bounds: expected (lowest, highest) on a real operator, got {bounds!r}")
    low, high = bounds
    if low is not None and high is not None and not low <= high:
        raise ArgumentError(f"bounds: the lowest value {low} exceeds the highest {high}")
    if low is None and high is None:
        raise ArgumentError("bounds: (None, None) bounds nothing; leave bounds out")


def check_background(background: Any, A: LinearOperator) -> float | Tensor:
    """A background of the Poisson likelihood as a number, or as a tensor that broadcasts with the data."""
    if isinstance(background, (str, bytes, bool)) or background is None:
        raise ArgumentTypeError(f"background: expected a number >= 0 or a tensor, got {background!r}")
    try:
        found = torch.as_tensor(background)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"background: expected a number >= 0 or a tensor, got {background!r}") from None
    if found.is_complex() or not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ArgumentError("background: expected finite numbers >= 0")
    shape, wanted = tuple(found.shape), A.out_shape
    if shape[-len(wanted) :] != wanted[max(0, len(wanted) - len(shape)) :]:
        raise ShapeError(f"background: shape {shape} does not broadcast with A's out_shape {wanted}")
    return float(found) if found.ndim == 0 else found.to(A.device)


def refuse_gradient(name: str, A: LinearOperator, L: LinearOperator | None, values: dict[str, Any]) -> None:
    """Raise where autograd follows an argument of ``name``, whose answer has no gradient."""
    followed = [key for key, value in values.items() if isinstance(value, Tensor) and any_requires_grad(value)]
    followed += [key for key, op in (("A", A), ("L", L)) if op is not None and any_requires_grad(*parameters_of(op))]
    if followed:
        raise MethodError(
            f"{', '.join(followed)}: autograd follows it, and {name} has no gradient; call it under torch.no_grad() or "
            f"with detached tensors, or use tikhonov, which is differentiable"
        )


def batch_of(batch: torch.Size, values: Tensor, name: str) -> torch.Size:
    """The batch dimensions of the data broadcast with those of one value per item."""
    try:
        return broadcast_shapes(batch, values.shape)
    except RuntimeError:
        raise ShapeError(
            f"{name}: shape {tuple(values.shape)} does not broadcast with the batch {tuple(batch)}"
        ) from None


def reported(solution: Solution, nonfinite: Tensor, name: str, raise_on_failure: bool) -> Solution:
    """The solution, NaN for the items that ``nonfinite`` marks, with a warning or an error where one has failed."""
    if bool(nonfinite.any()):
        solution = without_items(solution, nonfinite)
    report(solution, name, raise_on_failure=raise_on_failure)
    return solution
