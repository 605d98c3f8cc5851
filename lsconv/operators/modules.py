"""torch's convolution modules: the arguments of the convolution that each one is, a transposed one as its adjoint.

``ConvTranspose*d`` maps x to :math:`C^H x`, with C the convolution of the module's weight, stride and padding on
tensors of the *output's* size. ``output_padding`` is part of that size. Where it is a stride or more, which a dilation
allows, C has more outputs than x has cells, and these are cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from lsconv.errors import ArgumentError, ArgumentTypeError, ShapeError
from lsconv.operators.arguments import positive_ints

__all__ = [
    "ConvModule",
    "PlainModule",
    "TransposedModule",
    "advice",
    "check_module",
    "convolution_arguments",
    "input_size",
]

PlainModule: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedModule: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
ConvModule: TypeAlias = PlainModule | TransposedModule


def check_module(module: Any, name: str, dimensions: int | None = None) -> ConvModule:
    """Return a convolution module (of so many dimensions), and refuse others with advice.

    Raises:
        ArgumentTypeError: it is none.
        ArgumentError: it is a lazy one that has not met data yet.
    """
    if not isinstance(module, ConvModule) or dimensions not in (None, len(module.kernel_size)):
        d = str(dimensions) if dimensions else "*"
        raise ArgumentTypeError(
            f"{name}: expected a torch.nn.Conv{d}d or ConvTranspose{d}d, got {type(module).__name__}{advice(module)}"
        )
    if nn.parameter.is_lazy(module.weight):
        raise ArgumentError(f"{name}: {type(module).__name__} has no weight yet; call it once on data")
    return module


def advice(module: Any) -> str:
    """The end of an error message about a module: the operator to use instead."""
    if isinstance(module, ConvModule):
        return f"; use lsconv.Conv{len(module.kernel_size)}d, or lsconv.Convolution for any number of dimensions"
    if isinstance(module, nn.Linear):
        return "; a Linear layer is the matrix lsconv.Dense(module.weight)"
    if isinstance(module, nn.Module):
        return "; lsconv.as_operator(module, in_shape) gives the operator of any linear module"
    return ""


def convolution_arguments(
    module: ConvModule, in_size: int | Sequence[int]
) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """Return the arguments of the convolution C with the module's weight, and the outputs of C that the module uses.

    The second is None for a plain module, which uses all of them.

    Args:
        module: a plain module is C, a transposed one the adjoint of C.
        in_size: spatial size of the module's inputs.
    """
    arguments: dict[str, Any] = {
        "in_size": in_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding_mode": module.padding_mode,
    }
    if not isinstance(module, TransposedModule):
        return arguments, None
    sizes = positive_ints("in_size", in_size, len(module.kernel_size), ShapeError)
    axes = zip(sizes, module.stride, _extent(module), strict=True)
    arguments["in_size"] = tuple((n - 1) * s + extent for n, s, extent in axes)
    if min(arguments["in_size"]) < 1:
        raise ShapeError(f"in_size: {module} makes an empty output of {sizes}")
    return arguments, sizes


def input_size(module: ConvModule, spatial_out: Sequence[int]) -> tuple[int, ...]:
    """The smallest input that gives ``spatial_out``, as ``torch.nn.ConvTranspose`` takes it by default."""
    if module.padding == "same":
        return tuple(spatial_out)
    sizes = zip(spatial_out, module.stride, _extent(module), strict=True)
    if isinstance(module, TransposedModule):
        return tuple((n - extent) // s + 1 for n, s, extent in sizes)
    return tuple((n - 1) * s + extent for n, s, extent in sizes)


def _extent(module: ConvModule) -> tuple[int, ...]:
    """The size of the input that gives one output; of a transposed module the size of the output of one input."""
    none = (0,) * len(module.kernel_size)
    padding = none if isinstance(module.padding, str) else module.padding
    output_padding = module.output_padding if isinstance(module, TransposedModule) else none
    axes = zip(module.dilation, module.kernel_size, padding, output_padding, strict=True)
    return tuple(dilation * (kernel - 1) + 1 - 2 * int(pad) + int(extra) for dilation, kernel, pad, extra in axes)
