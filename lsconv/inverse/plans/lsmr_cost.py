"""The cost of LSMR on a convolution: the work of an iteration, and how many iterations a damping leaves.

The unit of work is that of the border's cost model, an operation of a factorisation, so that the two compare.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.cost_model import direct_work, plan_bytes
from lsconv.operators.convolution import Convolution
from lsconv.operators.convolution_cost import matrix_operations
from lsconv.operators.dtypes import direct_rtol
from lsconv.operators.memory import allowed_bytes

__all__ = [
    "CALLS",
    "SETUP_BYTE_WORK",
    "border_iteration_work",
    "border_setup_work",
    "iteration_work",
    "iterations_needed",
]

# The setup of the border takes the time of this many operations of a factorisation for each byte of its plan, be it one
# that iterates or, beside their own operations, the factors.
SETUP_BYTE_WORK = 25
# The overhead of calling torch in one iteration of LSMR, in operations: a third of that in one on the border.
CALLS = 8e6


def border_setup_work(A: Convolution, damp_shape: tuple[int, ...] = ()) -> float:
    """The work of the first solve by the border: with factors, or by iteration where these cost more or do not fit.

    With a stride, the factors of many groups take several times longer than their operations say, and do not count.
    """
    factors, iterated = direct_work(A, damp_shape), border_iteration_work(A, damp_shape)
    fit = factors.bytes <= allowed_bytes(None, A.device)
    counts = fit and (A.groups == 1 or set(A.stride) == {1})
    return min(factors.setup + factors.solve + SETUP_BYTE_WORK * factors.bytes, iterated) if counts else iterated


def border_iteration_work(A: Convolution, damp_shape: tuple[int, ...] = ()) -> float:
    """The work of the first solve by the border where it iterates."""
    return SETUP_BYTE_WORK * plan_bytes(A, damp_shape)


def iteration_work(A: Convolution) -> float:
    """The work of one iteration of LSMR, which applies A and its adjoint."""
    return matrix_operations(A.nanoseconds(transposed=False) + A.nanoseconds(transposed=True)) + CALLS


def iterations_needed(A: Convolution, damp: Tensor | float, norm: Tensor) -> Tensor:
    """The number of iterations after which the bound of conjugate gradients meets the tolerance rtol, per item.

    It is ``log(2 / rtol) ||A|| / (2 damp)``, with the default rtol of the direct methods.

    Args:
        A: the operator.
        damp: the damping, > 0, a number or one per batch item.
        norm: an upper bound of ``||A||``, per item.
    """
    return 0.5 * norm / torch.as_tensor(damp, dtype=torch.float64, device=A.device) * math.log(2 / direct_rtol(A.dtype))
