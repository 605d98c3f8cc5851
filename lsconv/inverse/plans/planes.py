"""The volumes that are answered as images whose channels are their planes, and what the setup of that costs.

The border of an image is a curve, which is small enough to be factorised; that of a volume is a surface, which is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.lsmr_cost import SETUP_BYTE_WORK, iteration_work, iterations_needed
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.fft_convolution import good_fft_length
from lsconv.operators.memory import allowed_bytes

__all__ = ["Planes", "is_one_sided"]


@dataclass(frozen=True)
class Planes:
    """The planes of a volume along one of its axes, as channels of an image.

    Attributes:
        axis: the axis that becomes channels.
        bytes: the bytes of the border's plan of the image.
        work: the work of the setup of that plan, in the unit of :func:`iteration_work`.
    """

    axis: int
    bytes: int
    work: float

    @classmethod
    def of(cls, A: LinearOperator, damp: Tensor | float, memory_limit: int | None = None) -> Planes | None:
        """The axis whose planes cost least; None unless A convolves volumes of one channel a group and an axis serves.

        An axis serves where the convolution is one-sided along the other two (:func:`is_one_sided`), which makes the
        matrix of the border definite. Any other axis serves where ``damp > 0`` and the factors of the border cost no
        more than twice what LSMR does.

        Args:
            A: the operator.
            damp: the damping, a number or one per batch item.
            memory_limit: bytes that the plan may use; None: 60 % of what is free on A's device.
        """
        if not (isinstance(A, Convolution) and A.ndim == 3 and A.c_in == A.c_out == A.groups and Embedding.serves(A)):
            return None
        damping = torch.as_tensor(damp)
        blocks = A.groups * math.prod(broadcast_shapes(A.batch_shape, damping.shape))
        damped, found = bool((damping > 0).all()), []
        for axis in range(A.ndim):
            others = [a for a in range(A.ndim) if a != axis]
            one_sided = is_one_sided(A, others)
            if any(A.stride[a] > 1 for a in others) or not (one_sided or (damped and _factors_pay(A, damping, axis))):
                continue
            grid = [good_fft_length(max(A.spatial_in[a], A.spatial_out[a])) for a in others]
            frequencies = blocks * math.prod(grid) // (1 if A.is_complex else 2)
            n, m = A.spatial_in[axis], A.spatial_out[axis]
            smaller = min(n, m)
            border = max(n, m) if one_sided else n + m
            # the symbol, the smaller normal matrix and its inverse, the border and its kernel
            needed = frequencies * (n * m + 2 * smaller**2 + 3 * border**2) * A.dtype.to_complex().itemsize
            # beside SETUP_BYTE_WORK, complex products and inverses take four real operations for each number and row
            found.append(cls(axis, needed, (SETUP_BYTE_WORK + 4 * border) * needed))
        cheapest = min(found, key=lambda planes: planes.work, default=None)
        return cheapest if cheapest is not None and cheapest.bytes <= allowed_bytes(memory_limit, A.device) else None


def _factors_pay(A: Convolution, damping: Tensor, axis: int) -> bool:
    """Tell whether the factors of a border of inputs and outputs cost no more than twice what LSMR does."""
    others = [a for a in range(A.ndim) if a != axis]
    lines = [(A.kernel_extent[a] - 1) * A.spatial_in[b] for a, b in (others, others[::-1])]
    unknowns = (A.spatial_in[axis] + A.spatial_out[axis]) / 2 * min(lines)
    factors = 8 / 3 * A.groups * unknowns**3  # real operations of a complex factorisation into triangles
    return factors <= 2 * iteration_work(A) * float(iterations_needed(A, damping, norm_bound(A)).max())


def is_one_sided(A: Convolution, axes: Sequence[int]) -> bool:
    """Tell whether along all these axes A has no padding, or along all of them full padding.

    With kernel length k, the outputs are then k - 1 fewer than the inputs, or k - 1 more.
    """
    sizes = [(A.spatial_in[a] - A.spatial_out[a], A.kernel_extent[a] - 1) for a in axes]
    return any(all(sign * cropped == most for cropped, most in sizes) for sign in (1, -1))
