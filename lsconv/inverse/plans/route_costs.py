"""The costs of the routes of a convolution: LSMR, the setup of the border, and a volume as an image of its planes.

The unit of work is that of the border's cost model, an operation of a factorisation. The border of an image is a curve,
which is small enough to be factorised; that of a volume is a surface, which is not, so that a volume of few planes is
answered as an image whose channels are its planes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lsconv.border.cost_model import direct_plan_cost, plan_bytes
from lsconv.fourier.embedding import Embedding
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution, norm_bound
from lsconv.operators.convolution_cost import matrix_operations
from lsconv.operators.dtypes import direct_rtol
from lsconv.operators.fft_convolution import good_fft_length
from lsconv.operators.memory import allowed_bytes

__all__ = [
    "CALL_OVERHEAD",
    "Planes",
    "border_iteration_work",
    "border_setup_work",
    "is_one_sided",
    "iteration_work",
    "iterations_needed",
]

# The setup of the border takes the time of this many operations of a factorisation for each byte of its plan, be it one
# that iterates or, beside their own operations, the factors.
_SETUP_BYTE_WORK = 25
# The overhead of calling torch in one iteration of LSMR, in operations: a third of that in one on the border.
CALL_OVERHEAD = 8e6


def border_setup_work(A: Convolution, damp_shape: tuple[int, ...] = ()) -> float:
    """The work of the first solve by the border: with factors, or by iteration where these cost more or do not fit.

    With a stride, factors of many groups are left out of the comparison: they take several times longer than their
    operations suggest.
    """
    factors, iterated = direct_plan_cost(A, damp_shape), border_iteration_work(A, damp_shape)
    fit = factors.peak_bytes <= allowed_bytes(None, A.device)
    counts = fit and (A.groups == 1 or set(A.stride) == {1})
    direct = factors.setup_work + factors.solve_work + _SETUP_BYTE_WORK * factors.peak_bytes
    return min(direct, iterated) if counts else iterated


def border_iteration_work(A: Convolution, damp_shape: tuple[int, ...] = ()) -> float:
    """The work of the first solve by the border where it iterates."""
    return _SETUP_BYTE_WORK * plan_bytes(A, damp_shape)


def iteration_work(A: Convolution) -> float:
    """The work of one iteration of LSMR, which applies A and its adjoint."""
    return matrix_operations(A.nanoseconds(transposed=False) + A.nanoseconds(transposed=True)) + CALL_OVERHEAD


def iterations_needed(A: Convolution, damp: Tensor | float, norm: Tensor) -> Tensor:
    """The number of iterations after which the bound of conjugate gradients meets the tolerance rtol, per item.

    It is ``log(2 / rtol) ||A|| / (2 damp)``, with the default rtol of the direct methods.

    Args:
        A: the operator.
        damp: the damping, > 0, a number or one per batch item.
        norm: an upper bound of ``||A||``, per item.
    """
    return 0.5 * norm / torch.as_tensor(damp, dtype=torch.float64, device=A.device) * math.log(2 / direct_rtol(A.dtype))


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
            # beside _SETUP_BYTE_WORK, complex products and inverses take four real operations for each number and row
            found.append(cls(axis, needed, (_SETUP_BYTE_WORK + 4 * border) * needed))
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
