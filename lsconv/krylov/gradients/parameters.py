r"""The tensors of an operator that autograd follows, and derivatives by them from applications of A alone.

The matrices of a derivative rule are never formed. :math:`\bar A = \sum_k c_k d_k^H` is the derivative of
:math:`\sum_k \mathrm{Re}\langle c_k, A d_k\rangle` with c and d held fixed (:func:`parameter_vjp`), :math:`dA\,d` that
of :math:`A d` along the tangents of the parameters (:func:`parameter_jvp`): one application of A under autograd each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lsconv.errors import MethodError
from lsconv.operators.base import LinearOperator
from lsconv.operators.transforms import transforming

__all__ = ["any_requires_grad", "no_autocast", "parameter_jvp", "parameter_vjp", "parameters_of", "rebuild"]


def parameters_of(A: LinearOperator) -> tuple[Tensor, ...]:
    """The tensors A is made of; none where it cannot be rebuilt from others."""
    with suppress(MethodError):  # a pseudo-inverse as an operator cannot be rebuilt from other tensors
        return A.parameters()
    return ()


def rebuild(A: LinearOperator, params: Sequence[Tensor]) -> LinearOperator:
    """Rebuild A from other parameters, per batch item where A allows that; A itself where it has no parameters."""
    return A.with_parameters(params, per_item=True) if params else A


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Tell whether autograd, in reverse or forward mode, or a torch.func transform follows any of the tensors."""
    if transforming():
        return True
    given = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in given if t.is_floating_point() or t.is_complex())


def no_autocast(A: LinearOperator) -> Any:
    """A context in which A and the solves compute in their own dtype."""
    device = A.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def parameter_vjp(
    A: LinearOperator,
    transposed: bool,
    params: Sequence[Tensor],
    needed: Sequence[bool],
    directions: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    r"""Derivative of :math:`\sum_k \mathrm{Re}\langle c_k, A d_k\rangle` by the parameters, c and d held fixed.

    Args:
        A: the operator.
        transposed: take its adjoint.
        params: the parameters of A.
        needed: for each of them, whether its derivative is needed.
        directions: the d, all of one shape.
        cotangents: the c, all of one shape; A is applied to all pairs as one batch.
    """
    indices = [index for index, need in enumerate(needed) if need]
    d, c = (torch.stack(torch.broadcast_tensors(*tensors)) for tensors in (directions, cotangents))

    def image(*values: Tensor) -> Tensor:
        everything = list(params)
        for index, tensor in zip(indices, values, strict=True):
            everything[index] = tensor
        B = rebuild(A, everything)
        return B.adjoint(d) if transposed else B.apply(d)

    values = [params[index] for index in indices]
    with no_autocast(A):
        if transforming():
            bars = torch.func.vjp(image, *values)[1](c)
        else:
            twice_differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                # aliases of the parameters, because d and c may depend on these and are held fixed
                alias = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in values]
                bars = torch.autograd.grad(
                    image(*alias), alias, c, create_graph=twice_differentiable, allow_unused=True
                )
    result: list[Tensor | None] = [None] * len(params)
    for index, bar in zip(indices, bars, strict=True):
        result[index] = bar
    return result


def parameter_jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor | None:
    """Derivative of ``function(*primals)`` along the tangents; None where there are none.

    It is computed in reverse mode, as the vector-Jacobian product of the vector-Jacobian product, which is linear in
    its cotangent: torch does not nest forward mode, and some of its functions have none.
    """
    indices = [index for index, tangent in enumerate(tangents) if tangent is not None]
    if not indices:
        return None
    values = [primals[index] for index in indices]

    def image(*moved: Tensor) -> Tensor:
        everything = list(primals)
        for index, tensor in zip(indices, moved, strict=True):
            everything[index] = tensor
        return function(*everything)

    zero = torch.zeros_like(function(*primals))
    along = tuple(tangents[index] for index in indices)
    result: Tensor = torch.func.vjp(lambda c: torch.func.vjp(image, *values)[1](c), zero)[1](along)[0]
    return result
