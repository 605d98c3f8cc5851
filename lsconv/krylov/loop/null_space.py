r"""The part of x in the null space of A, found where the certificate cannot show it.

With damping a null-space part :math:`\delta` of x enters the gradient as :math:`\mathrm{damp}^2 \delta`, which for a
small damp is below rounding. The answer of a method whose iterates leave the range of :math:`A^H` (a preconditioner on
the solution side, a start) is then compared with the shortest solution for the same :math:`Ax`. A plan is tested by
solving for the image of a random vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.certificate import Tolerances
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.base import LinearOperator

__all__ = ["LOST_SHARE", "misses_null_part", "verify_null_space"]

# A random vector loses about 1 / sqrt(n) of its norm per null vector. A loss of less than this part of that is
# rounding.
LOST_SHARE = 1e-3


def misses_null_part(A: LinearOperator, batch: torch.Size, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Mark the items in which A has a null space: those where solving for ``A w`` does not return a random w.

    Args:
        A: the operator.
        batch: the batch dimensions.
        solve: the method, a function from data to x.
    """
    generator = torch.Generator(device=A.device).manual_seed(0)
    # Two vectors, because one has a part below LOST_SHARE of the expected along a null vector once in a thousand times.
    w = torch.randn(2, *batch, *A.in_shape, dtype=A.dtype, device=A.device, generator=generator)
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    lost = space.norm(solve(A.apply(w)) - w)
    return ~(lost <= LOST_SHARE / math.sqrt(A.in_numel) * space.norm(w)).all(0)


def verify_null_space(
    solution: Solution,
    x: Tensor,
    y: Tensor,
    A: LinearOperator,
    tolerances: Tolerances,
    shortest: Callable[[Tensor, float], Tensor],
    judge: Callable[[Tensor], Solution],
) -> Solution:
    """Verify the items whose x may have a part in the null space, by the shortest solution of ``A x' = A x``.

    An item whose x is close to x' has converged. Otherwise x' replaces x if x' has converged and ``A x' = A x`` to the
    tolerance. With damping the null-space part of x is also that of ``d = x - A^H (y - A x) / damp^2``, which is small,
    so that the shortest solution of ``A d' = A d`` is needed to few digits only.

    Args:
        solution: the items to verify have the status :attr:`Status.RANK_DEFICIENT`.
        x: the x of the solution, in the dtype of A.
        y: the data.
        A: the operator.
        tolerances: those of the solve.
        shortest: the least-norm solution for consistent data, to a tolerance, by a method that stays in the range of
            ``A^H``.
        judge: from an x to its certified solution.
    """
    doubtful = solution.codes == Status.RANK_DEFICIENT.code
    if not bool(doubtful.any()):
        return solution
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    x = torch.where(space.broadcast(doubtful).bool(), x, 0)
    allowed = tolerances.null_share * space.safe_norm(x)
    verified = torch.zeros_like(doubtful)
    damped = doubtful & (solution.damp > 0)
    if bool(damped.any()):
        mu = space.broadcast(torch.where(damped, solution.damp.square(), 1.0))
        d = torch.where(space.broadcast(damped).bool(), x - A.adjoint(y - A.apply(x)) / mu, 0)
        digits = torch.where(damped, divide(allowed, space.safe_norm(d)), 1.0).amin()
        d = d - shortest(A.apply(d), min(max(0.1 * float(digits), 10 * tolerances.eps), 0.1))
        verified = damped & (space.safe_norm(d) <= allowed)
    x = torch.where(space.broadcast(verified).bool(), 0, x)
    # a smaller tolerance would fit the rounding of A x
    shortest_x = x if bool((verified == doubtful).all()) else shortest(A.apply(x), 0.1 * tolerances.rtol)
    verified = verified | (doubtful & (space.safe_norm(shortest_x - x) <= allowed))
    answer, outputs = judge(shortest_x), ItemSpace(A.out_shape, A.dtype, A.device)
    # An iteration that small singular values have stopped early gives a shorter x that does not reproduce A x.
    reproduces = outputs.safe_norm(A.apply(shortest_x - x)) <= tolerances.rtol * outputs.safe_norm(y)
    replaced = doubtful & ~verified & answer.converged & reproduces
    solution = solution.replaced(replaced, answer)
    codes = torch.where(verified, Status.GRADIENT.code, solution.codes)
    return replace(solution, codes=codes, converged=solution.converged | verified)
