r"""A convolution whose short axis becomes channels: a volume of few planes is an image of as many channels.

Along an axis of n inputs and m outputs the convolution is a matrix of ``m x n`` for every kernel tap of the other axes,
so that

.. math:: A[(o, a), (i, b)] = \sum_t K[o, i, t]\; T_t[a, b]

is the weight of a convolution B over the other axes, whose channels are the pairs of a channel and a plane. Padding,
stride and dilation of the axis are in the matrices T. B is the same linear map as A: x and y only change their shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lsconv.factored.batch_axes import on_axes
from lsconv.operators.convolution import Convolution

__all__ = ["AxisAsChannels"]


@dataclass(frozen=True)
class AxisAsChannels:
    """The convolution B with one axis of A among its channels, and the reshaping of tensors between A and B.

    The methods are those of :class:`~lsconv.factored.batch_axes.Reduction`; here P and Q reorder all entries.

    Attributes:
        A: the convolution.
        B: the convolution with one axis less.
        axis: the axis of A that became channels.
    """

    A: Convolution
    B: Convolution
    axis: int
    folded: ClassVar[tuple[int, ...]] = ()
    drops_outputs: ClassVar[bool] = False
    reads_all: ClassVar[bool] = True
    reason: ClassVar[str] = "the planes of the volume are channels of an image, whose border is a line"

    @classmethod
    def of(cls, A: Convolution, axis: int) -> AxisAsChannels:
        """Make B from A, which has at least two axes, by turning ``axis`` into channels."""
        n, m, taps = A.spatial_in[axis], A.spatial_out[axis], A.kernel_size[axis]
        weight = A.weight.detach()
        each_tap = torch.eye(taps, dtype=weight.dtype, device=weight.device).unsqueeze(1)
        line = Convolution(each_tap, (n,), (A.stride[axis],), [A.padding[axis]], (A.dilation[axis],), 1, A.padding_mode)
        T = line.to_dense().reshape(taps, m, n)
        weight = weight.movedim(axis - A.ndim, -1)
        weight = torch.einsum("...oirt,tab->...oaibr", weight.flatten(-A.ndim, -2), T)
        other = [a for a in range(A.ndim) if a != axis]
        shape = (A.c_out * m, A.c_in // A.groups * n, *(A.kernel_size[a] for a in other))
        return cls(A, on_axes(A, weight.reshape(*A.batch_shape, *shape), other), axis)

    def reshape_damp(self, damp: Tensor | float) -> Tensor | float:
        """The damping of B, which is that of A."""
        return damp

    def restrict_inputs(self, x: Tensor) -> Tensor:
        """``P^H x``: inputs of A as inputs of B."""
        return self._to_channels(x)

    def restrict_outputs(self, y: Tensor) -> Tensor:
        """``Q^H y``: outputs of A as outputs of B."""
        return self._to_channels(y)

    def extend_inputs(self, x: Tensor) -> Tensor:
        """``P x``: inputs of B as inputs of A."""
        return self._from_channels(x, self.A.in_shape)

    def extend_outputs(self, y: Tensor) -> Tensor:
        """``Q y``: outputs of B as outputs of A."""
        return self._from_channels(y, self.A.out_shape)

    def _to_channels(self, z: Tensor) -> Tensor:
        channel = z.ndim - self.A.ndim - 1
        return z.movedim(channel + 1 + self.axis, channel + 1).flatten(channel, channel + 1)

    def _from_channels(self, z: Tensor, item: tuple[int, ...]) -> Tensor:
        channel = z.ndim - self.A.ndim
        z = z.unflatten(channel, (item[0], item[1 + self.axis]))
        return z.movedim(channel + 1, channel + 1 + self.axis).contiguous()
