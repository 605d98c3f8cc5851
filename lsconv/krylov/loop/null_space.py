r"""Whether a method leaves a part of x in the null space of A, where the certificate cannot tell.

With damping the gradient shows a null-space part :math:`\delta` as :math:`\mathrm{damp}^2 \delta`, which for a small
damp is below its rounding. The answer of a method whose iterates leave the range of :math:`A^H` (a preconditioner on
the solution side, a start) is then compared with the shortest solution for the same :math:`Ax`, and a plan with what
it gives back of a random vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import NULL_SHARE
from lsconv.operators.base import LinearOperator

__all__ = ["cleared", "loses_part"]

# The part of the share that one null vector has of a random vector which counts as lost, and how many of these there
# are: of one its share is below a thousandth of what is expected once in a thousand times.
_SEEN, _PROBES = 1e-3, 2


def loses_part(A: LinearOperator, batch: torch.Size, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """The items in which a part of random vectors does not come back from A, ``batch``.

    Args:
        A: the operator.
        batch: the batch dimensions.
        solve: the method, from data to x.
    """
    generator = torch.Generator(device=A.device).manual_seed(0)
    w = torch.randn(_PROBES, *batch, *A.in_shape, dtype=A.dtype, device=A.device, generator=generator)
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    lost = space.norm(solve(A.apply(w)) - w)
    return ~(lost <= _SEEN / math.sqrt(A.in_numel) * space.norm(w)).all(0)


def cleared(solution: Solution, A: LinearOperator, rtol: float, shortest: Callable[[Tensor], Tensor]) -> Solution:
    """The solution, converged also in the items in doubt that are next to the shortest solution of ``A x' = A x``.

    Args:
        solution: items in doubt have the status :attr:`Status.RANK_DEFICIENT`.
        A: the operator.
        rtol: the tolerance of the solve.
        shortest: the least-norm solution for consistent data, by a method that stays in the range of ``A^H``.
    """
    doubtful = solution.codes == Status.RANK_DEFICIENT.code
    if not bool(doubtful.any()):
        return solution
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    x = torch.where(space.spread(doubtful).bool(), solution.x, 0)
    clear = doubtful & (space.norm(shortest(A.apply(x)) - x) <= NULL_SHARE * rtol * space.norm(x))
    codes = torch.where(clear, Status.GRADIENT.code, solution.codes)
    return replace(solution, codes=codes, converged=solution.converged | clear)
