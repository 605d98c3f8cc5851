r"""as_operator: the operator of a linear module or function of torch, with its adjoint by autograd.

The vector-Jacobian product of a linear f is its adjoint at every point; it is computed at zero. For complex f it is
:math:`A^H y` too, by torch's convention for gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lsconv.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.elementary import FromFunctions
from lsconv.operators.modules import ConvModule
from lsconv.operators.transforms import transforming

__all__ = ["as_operator"]

_Function = Callable[..., Tensor]


def as_operator(
    function: nn.Module | Callable[..., Tensor],
    in_shape: Sequence[int],
    *,
    parameters: Sequence[Tensor] = (),
    linear_part: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> LinearOperator:
    r"""Return the operator of a linear module or function of torch, its adjoint by autograd.

    A convolution module becomes its :class:`Convolution`, which the exact methods invert; all else a
    :class:`FromFunctions`, solved by LSMR. Random tensors show that f is linear: ``f(0) = 0``, sums, multiples, batch
    items that do not meet, and the adjoint identity.

    Args:
        function: a module, or ``f(x, *parameters)``; it is called with ``(items, *in_shape)``, any number of items.
        in_shape: shape of one input item, without batch dimensions.
        parameters: the tensors of a function that gradients of a solve reach and ``A.to`` converts; tensors hidden in
            a closure are neither. Those of a module are found.
        linear_part: take ``f(x) - f(0)`` of an affine f. Then ``f(x) = y`` is ``A x = y - f(0)``.
        dtype: dtype of inputs and outputs; that of the parameters when omitted, or torch's default.
        device: device of inputs and outputs, in the same way.

    Raises:
        ArgumentTypeError: ``function`` cannot be called, or returns no tensor.
        ArgumentError: it is not linear, mixes batch items, or does something that autograd does not see.
        ShapeError, DtypeError, DeviceError: it does not return one item for each that it gets, of the same dtype, on
            the same device.

    Example:
        >>> shrink = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Conv2d(1, 4, 3, bias=False))
        >>> A = lsconv.as_operator(shrink, (1, 16, 16))
        >>> A.out_shape, A.dot_test() < 1e-5
        ((4, 6, 6), True)
        >>> lsconv.as_operator(lambda x: x.cumsum(-1), (3,)).H(torch.tensor([1.0, 0.0, 2.0]))
        tensor([3., 2., 2.])
    """
    if not callable(function) or isinstance(function, LinearOperator):
        text = f"function: expected a torch.nn.Module or a function of a tensor, got {type(function).__name__}"
        raise ArgumentTypeError(text)
    shape = tuple(int(n) for n in in_shape)
    call: _Function = function
    if isinstance(function, nn.Module):
        if parameters:
            raise ArgumentError("parameters: those of a module are found, so none can be given")
        call, parameters = _with_its_tensors(function)
    typed = [t for t in parameters if t.is_floating_point() or t.is_complex()]
    dtype = dtype or (typed[0].dtype if typed else torch.get_default_dtype())
    device = device or (typed[0].device if typed else "cpu")
    parameters = [t.to(device, dtype) if t.is_floating_point() or t.is_complex() else t.to(device) for t in parameters]
    if linear_part:
        affine = call
        call = lambda x, *tensors: affine(x, *tensors) - affine(x.new_zeros(1, *shape), *tensors)
    out_shape = _check_linear(call, shape, parameters, dtype, device)
    A = FromFunctions(
        shape,
        out_shape,
        lambda x, *tensors: _by_items(call, x, tensors, shape, out_shape),
        lambda y, *tensors: _by_items(_transposed(call, shape), y, tensors, out_shape, shape),
        dtype=dtype,
        device=device,
        parameters=parameters,
    )
    _check_adjoint(A)
    if isinstance(function, ConvModule):
        C = Convolution.from_module(function, shape[1:]).to(A.device, A.dtype)
        with torch.no_grad():
            x = _random(1, shape, A.dtype, A.device)
            if _relative_difference(C(x), A(x)) <= _tolerance(
                A.dtype
            ):  # a subclass or a hook may compute something else
                return C
    return A


def _with_its_tensors(module: nn.Module) -> tuple[_Function, tuple[Tensor, ...]]:
    """Return a module as a function of its input, parameters and buffers, and the latter as a tuple."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(module, dict(zip(state, tensors, strict=True)), (x,))
        return result

    return call, tuple(state.values())


def _by_items(
    function: _Function, x: Tensor, tensors: Sequence[Tensor], item: tuple[int, ...], result: tuple[int, ...]
) -> Tensor:
    """Apply ``function`` to x with its batch dimensions flattened to one, as torch's modules require."""
    batch = x.shape[: x.ndim - len(item)]
    if math.prod(batch) == 0:
        return x.new_zeros(*batch, *result)
    return function(x.reshape(math.prod(batch), *item), *tensors).reshape(*batch, *result)


def _transposed(call: _Function, shape: tuple[int, ...]) -> _Function:
    """The adjoint of a linear function, differentiable by y and the tensors of the function."""

    def adjoint(y: Tensor, *tensors: Tensor) -> Tensor:
        if transforming():
            vjp = torch.func.vjp(lambda x: call(x, *tensors), y.new_zeros(len(y), *shape))[1]
            x: Tensor = vjp(y)[0]
            return x
        create_graph = torch.is_grad_enabled() and any(t.requires_grad for t in (y, *tensors))
        with torch.inference_mode(False), torch.enable_grad():
            y = y.clone() if y.is_inference() else y
            x = y.new_zeros(len(y), *shape).requires_grad_()
            return torch.autograd.grad(call(x, *tensors), x, y, create_graph=create_graph)[0]

    return adjoint


# ------------------------------------------------------------------ the checks


def _random(items: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return torch.randn(items, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(device)


def _tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that is attributed to rounding."""
    return min(1000 * torch.finfo(dtype).eps, 0.1)


def _relative_difference(a: Tensor, b: Tensor) -> float:
    """The relative difference ``||a - b|| / max(||a||, ||b||)``."""
    size = torch.maximum(torch.linalg.vector_norm(a), torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b) / size) if size > 0 else 0.0


@torch.no_grad()
def _check_linear(
    call: _Function, shape: tuple[int, ...], tensors: Sequence[Tensor], dtype: torch.dtype, device: torch.device | str
) -> tuple[int, ...]:
    """Check on random inputs that a function is linear, item by item, and return the shape of an output item."""
    copies = [t.clone() for t in tensors]  # the checks must not change the buffers of a module in training mode
    f = lambda x: call(x, *copies)
    x = _random(2, shape, dtype, device)
    y = _check_result(f(x), x)
    tolerance = _tolerance(dtype)
    u, v = x[:1], x[1:]
    fu, fv, f0 = f(u), f(v), f(torch.zeros_like(u))
    alone = _relative_difference(torch.cat([fu, fv]), y)
    if not alone <= tolerance:
        raise ArgumentError(
            f"function: a batch of two items gives other values than the items alone, by {alone:.0e} of them: it mixes "
            "them, or is random; put modules such as BatchNorm and Dropout into eval() mode"
        )
    one, f0 = torch.linalg.vector_norm(fu), f0 if torch.linalg.vector_norm(f0) > 0 else torch.zeros_like(fu)
    tests: list[tuple[str, Any, Tensor]] = [
        ("f(u + v) and f(u) + f(v)", u + v, fu + fv - f0),
        ("f(-1000 u) and -1000 f(u)", -1000 * u, f0 - 1000 * (fu - f0)),
    ]
    if dtype.is_complex:
        tests.append(("f(1j u) and 1j f(u)", 1j * u, 1j * (fu - f0) + f0))
    for name, point, expected in tests:
        wrong = _relative_difference(f(point), expected)
        if not wrong <= tolerance:
            raise ArgumentError(
                f"function: it is not linear: {name}, of random u and v, differ by {wrong:.0e} of them. Of a function "
                "that is smooth, lambda v: torch.func.jvp(f, (x0.expand_as(v),), (v,))[1] is the linear part at x0"
            )
    if torch.linalg.vector_norm(f0) > tolerance * one:
        raise ArgumentError(
            "function: it is affine: f(0) is not zero. Give linear_part=True, which takes f(x) - f(0), and subtract "
            "f(0) from the data: f(x) = y is A x = y - f(0)"
        )
    return tuple(y.shape[1:])


def _check_result(y: Any, x: Tensor) -> Tensor:
    """Check that a function returns a tensor with one item for each of x, of x's dtype and device."""
    if not isinstance(y, Tensor):
        raise ArgumentTypeError(f"function: expected it to return a torch.Tensor, got {type(y).__name__}")
    if y.ndim < 1 or len(y) != len(x):
        raise ShapeError(
            f"function: expected one output item for each of the {len(x)} items of x, shape ({len(x)}, ...), got "
            f"{tuple(y.shape)}; torch.func.vmap(function) acts on every item"
        )
    if y.dtype != x.dtype:
        raise DtypeError(
            f"function: x of {x.dtype} gives {y.dtype}; an operator keeps the dtype (give dtype={y.dtype}, or use "
            "torch.view_as_real on complex results)"
        )
    if y.device != x.device:
        raise DeviceError(f"function: x on {x.device} gives a result on {y.device}; give device= or move it")
    return y


def _check_adjoint(A: LinearOperator) -> None:
    """Refuse a function whose adjoint by autograd fails the dot test, because autograd does not follow all of it."""
    reason = ""
    try:
        error = A.dot_test(generator=torch.Generator(A.device).manual_seed(0))
    except RuntimeError as raised:
        error, reason = math.inf, f" ({str(raised).splitlines()[0]})"
    if not error <= _tolerance(A.dtype):
        raise ArgumentError(
            f"function: autograd does not give its adjoint{reason}: some of it is detached, in numpy or in place. Use "
            "lsconv.FromFunctions with an adjoint of your own"
        )
