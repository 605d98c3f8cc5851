"""torch's own convolution as a backend, with its adjoint: a transposed convolution, or one with flipped kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lsconv.operators.padding import pad, pad_adjoint
from lsconv.operators.padding_modes import MODES, Pairs

__all__ = ["DirectConvolution"]

_CONV = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONV_TRANSPOSE = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)


@dataclasses.dataclass(frozen=True)
class DirectConvolution:
    """torch's convolution and its adjoint, on tensors ``(items, channels, *spatial)``.

    Attributes:
        spatial_in: spatial size of the inputs.
        extent: cells that the dilated kernel spans, per axis.
        padding: ``(left, right)`` per axis.
        mode: mode of the padding.
        stride: step between outputs.
        dilation: step between the taps of the kernel.
        symmetric: the padding that torch's convolution does itself, per axis. It is split as torch does, so that
            results agree in the last bit.
        extra: the padding that is done before it.
        reversible: the adjoint can be computed as a convolution with flipped kernels: stride 1, at most two axes, and
            no more padding than the kernel is long.
    """

    spatial_in: tuple[int, ...]
    extent: tuple[int, ...]
    padding: Pairs
    mode: str
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    symmetric: tuple[int, ...] = dataclasses.field(init=False)
    extra: Pairs = dataclasses.field(init=False)
    reversible: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        symmetric = tuple(min(pair) if MODES[self.mode].zero else 0 for pair in self.padding)
        extra = tuple((left - s, right - s) for (left, right), s in zip(self.padding, symmetric, strict=True))
        object.__setattr__(self, "symmetric", symmetric)
        object.__setattr__(self, "extra", extra)
        reversible = len(self.stride) <= 2 and all(step == 1 for step in self.stride)
        reversible = reversible and all(p < e for p, e in zip(symmetric, self.extent, strict=True))
        object.__setattr__(self, "reversible", reversible)

    def apply(self, x: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The convolution of ``x``, bit for bit torch's but for half precision on the CPU."""
        x = pad(x, self.extra, self.mode)
        return _convolve(_CONV[len(self.stride) - 1], x, weight, self.stride, self.symmetric, self.dilation, groups)

    def adjoint(self, y: Tensor, weight: Tensor, groups: int) -> Tensor:
        """Apply the adjoint, by torch's transposed convolution."""
        # Several input sizes give the same output size when stride > 1; output_padding restores the one we have.
        output_padding = [
            (size + left + right - extent) % stride
            for size, (left, right), extent, stride in zip(
                self.spatial_in, self.padding, self.extent, self.stride, strict=True
            )
        ]
        function = _CONV_TRANSPOSE[len(self.stride) - 1]
        x = _convolve(function, y, weight.conj(), self.stride, self.symmetric, output_padding, groups, self.dilation)
        return pad_adjoint(x, self.extra, self.mode)

    def flipped(self, weight: Tensor, groups: int) -> Tensor:
        """The kernels of the adjoint as a convolution."""
        axes = tuple(range(-len(self.stride), 0))
        kernels = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flip(axes)
        return kernels.conj().resolve_conj().reshape(groups * weight.shape[1], -1, *weight.shape[2:])

    def adjoint_by_flipped(self, y: Tensor, flipped: Tensor, groups: int) -> Tensor:
        """Apply the adjoint, as a convolution with the kernels of :meth:`flipped`."""
        margins = tuple(e - 1 - p for e, p in zip(self.extent, self.symmetric, strict=True))
        x = _convolve(_CONV[len(self.stride) - 1], y, flipped, 1, margins, self.dilation, groups)
        return pad_adjoint(x, self.extra, self.mode)


def _convolve(function: Callable[..., Tensor], x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    """``function(x, weight, None, *arguments)``; half precision on the CPU is computed in float32 and rounded."""
    # oneDNN's half-precision convolutions on processors with AMX return wrong values for some small inputs, or crash.
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        return function(x.float(), weight.float(), None, *arguments).to(x.dtype)
    return function(x, weight, None, *arguments)
