r"""A convolution as a smaller one: without zero margins of its kernel, with axes of kernel size one in its batch.

.. math:: A = Q\, B\, P^H, \qquad P^H P = 1,\; Q^H Q = 1, \qquad A^+ = P B^+ Q^H

P and Q are selections: the inputs that some output reads, and the outputs that read some input. A kernel of extent one
along an axis makes that axis a batch axis of B. A kernel with zeros at its margins is replaced by the kernel without
them and less padding, or, where the padding would become negative, by a convolution of fewer inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lsconv.operators.batch_layout import over_items
from lsconv.operators.convolution import Convolution
from lsconv.operators.padding_modes import MODES

__all__ = ["Reduction", "on_axes"]


@dataclass(frozen=True)
class Reduction:
    """The smaller convolution B, with the maps P and Q between tensors of A and of B.

    Attributes:
        A: the convolution.
        B: the smaller convolution; the folded axes are the last of its batch dimensions.
        inputs: per axis of A, the slice of inputs that B has.
        outputs: per axis of A, the slice of outputs that B has.
        folded: the axes of A that are batch dimensions of B.
    """

    A: Convolution
    B: Convolution
    inputs: tuple[slice, ...]
    outputs: tuple[slice, ...]
    folded: tuple[int, ...] = ()
    reason: ClassVar[str] = "the kernel has margins of zeros, or an extent of one along some axes, which are a batch"

    @classmethod
    def trimmed(cls, A: Convolution) -> Reduction | None:
        """Remove the zero margins of the kernel; None where there are none."""
        weight = A.weight.detach()
        if bool((weight != 0).all()):
            return None
        sides = [_margins(weight, a) for a in range(-A.ndim, 0)]
        may_crop = MODES[A.padding_mode].zero or not any(map(any, A.padding))
        padding, inputs = [], []
        for a, (before, after) in enumerate(sides):
            left, right = A.padding[a]
            dilation = A.dilation[a]
            if not may_crop:  # only what shortens the padding: a crop would move the border that it copies from
                before, after = min(before, left // dilation), min(after, right // dilation)
            sides[a] = (before, after)
            left, right = left - dilation * before, right - dilation * after
            inputs.append(slice(max(0, -left), A.spatial_in[a] - max(0, -right), 1))
            padding.append((max(0, left), max(0, right)))
        if not any(map(any, sides)):
            return None
        for a, (before, after) in enumerate(sides, start=-A.ndim):
            weight = weight.narrow(a, before, weight.shape[a] - before - after)
        size = tuple(cells.stop - cells.start for cells in inputs)
        if min(size) < 1:
            return None
        B = Convolution(
            weight.contiguous(), size, A.stride, padding, A.dilation, A.groups, A.padding_mode, A.backend,
            check_finite=False,
        )  # fmt: skip
        return cls(A, B, tuple(inputs), tuple(slice(0, n, 1) for n in A.spatial_out))

    @classmethod
    def without_batch_axes(cls, A: Convolution) -> Reduction | None:
        """Move the axes of kernel extent one to the batch; None where there are none, or no others."""
        folded = tuple(
            a for a in range(A.ndim) if A.kernel_size[a] == 1 and (MODES[A.padding_mode].zero or not any(A.padding[a]))
        )
        if not folded or len(folded) == A.ndim:
            return None
        inputs, outputs = [slice(0, n, 1) for n in A.spatial_in], [slice(0, n, 1) for n in A.spatial_out]
        for a in folded:
            stride, left, cells = A.stride[a], A.padding[a][0], A.spatial_in[a]
            first = -(-left // stride)
            end = min((cells - 1 + left) // stride + 1, A.spatial_out[a])
            if end <= first:
                return None
            start = first * stride - left
            outputs[a] = slice(first, end, 1)
            inputs[a] = slice(start, start + stride * (end - first - 1) + 1, stride)
        remaining = [a for a in range(A.ndim) if a not in folded]
        weight = A.weight.detach()
        shape = (*weight.shape[: -A.ndim], *(A.kernel_size[a] for a in remaining))
        if A.batch_shape:
            shape = (*A.batch_shape, *(1 for _ in folded), *shape[len(A.batch_shape) :])
        B = on_axes(A, weight.reshape(shape), remaining)
        return cls(A, B, tuple(inputs), tuple(outputs), folded)

    @property
    def same_shapes(self) -> bool:
        """True where B has the shapes of A."""
        return not self.folded and self.B.in_shape == self.A.in_shape

    @property
    def drops_outputs(self) -> bool:
        """True where some outputs of A read no input."""
        return any(cells.stop - cells.start < n for cells, n in zip(self.outputs, self.A.spatial_out, strict=True))

    @property
    def reads_all(self) -> bool:
        """True where every input of A is one of B."""
        return all(cells == slice(0, n, 1) for cells, n in zip(self.inputs, self.A.spatial_in, strict=True))

    def reshape_damp(self, damp: Tensor | float) -> Tensor | float:
        """Reshape the damping for the batch of B."""
        if not isinstance(damp, Tensor) or not damp.ndim:
            return damp
        return over_items(damp, len(self.folded))

    def restrict_inputs(self, x: Tensor) -> Tensor:
        """``P^H x``: the inputs of B among those of A."""
        return self._select(x, self.inputs)

    def restrict_outputs(self, y: Tensor) -> Tensor:
        """``Q^H y``: the outputs of B among those of A."""
        return self._select(y, self.outputs)

    def extend_inputs(self, x: Tensor) -> Tensor:
        """``P x``: inputs of A, zero where B has none."""
        return self._place(x, self.inputs, self.A.in_shape)

    def extend_outputs(self, y: Tensor) -> Tensor:
        """``Q y``: outputs of A, zero where B has none."""
        return self._place(y, self.outputs, self.A.out_shape)

    def _select(self, z: Tensor, slices: tuple[slice, ...]) -> Tensor:
        cells: tuple[Any, ...] = (..., *slices)
        z = z[cells]
        channel = z.ndim - self.A.ndim - 1
        moved = [z.ndim - self.A.ndim + a for a in self.folded]
        return z.movedim(moved, list(range(channel, channel + len(moved)))) if moved else z

    def _place(self, z: Tensor, slices: tuple[slice, ...], item: tuple[int, ...]) -> Tensor:
        channel = z.ndim - self.B.ndim - 1 - len(self.folded)
        moved = [z.ndim - self.A.ndim + a for a in self.folded]
        z = z.movedim(list(range(channel, channel + len(moved))), moved) if moved else z
        if z.shape[channel:] == item:
            return z.contiguous()
        full = z.new_zeros(*z.shape[:channel], *item)
        cells: tuple[Any, ...] = (..., *slices)
        full[cells] = z
        return full


def on_axes(A: Convolution, weight: Tensor, axes: Sequence[int]) -> Convolution:
    """Make a convolution with another weight along some of the axes of A."""
    return Convolution(
        weight,
        tuple(A.spatial_in[a] for a in axes),
        tuple(A.stride[a] for a in axes),
        [A.padding[a] for a in axes],
        tuple(A.dilation[a] for a in axes),
        A.groups,
        A.padding_mode,
        A.backend,
        check_finite=False,
    )


def _margins(weight: Tensor, a: int) -> tuple[int, int]:
    """The number of taps along an axis, before and after those at which some kernel is not zero."""
    places = torch.nonzero((weight.movedim(a, 0) != 0).flatten(1).any(1)).flatten()
    return (int(places[0]), weight.shape[a] - 1 - int(places[-1])) if len(places) else (0, 0)
