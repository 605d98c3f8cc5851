r"""The part of x in the null space of A that a method leaves, where the certificate cannot tell.

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

from lsconv.krylov.loop.batched_scalars import ItemSpace, divide
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.krylov.loop.stopping import Tolerances
from lsconv.operators.base import LinearOperator

__all__ = ["LOST_SHARE", "misses_null_part", "settle_null_space"]

# Where less than this part of the share that a null vector has in a random vector is lost, rounding lost it.
LOST_SHARE = 1e-3


def misses_null_part(A: LinearOperator, batch: torch.Size, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Tell in which items A has a null space, by random vectors that do not come back from ``A x``, ``batch``.

    Args:
        A: the operator.
        batch: the batch dimensions.
        solve: the method, from data to x.
    """
    generator = torch.Generator(device=A.device).manual_seed(0)
    # the share of a null vector in one random vector is below LOST_SHARE of the expected one once in a thousand times
    w = torch.randn(2, *batch, *A.in_shape, dtype=A.dtype, device=A.device, generator=generator)
    space = ItemSpace(A.in_shape, A.dtype, A.device)
    lost = space.norm(solve(A.apply(w)) - w)
    return ~(lost <= LOST_SHARE / math.sqrt(A.in_numel) * space.norm(w)).all(0)


def settle_null_space(
    solution: Solution,
    x: Tensor,
    y: Tensor,
    A: LinearOperator,
    tolerances: Tolerances,
    shortest: Callable[[Tensor, float], Tensor],
    judge: Callable[[Tensor], Solution],
) -> Solution:
    """Settle the items in doubt of a solution by the shortest solution of ``A x' = A x``.

    An item with x next to x' has converged as it is. Where x' is another vector, it takes the place of x if it has
    converged, and ``A x' = A x`` to the tolerance. With damping the null-space part of x is also that of ``d = x - A^H
    (y - A x) / damp^2``, which is next to nothing, so that fewer digits of the shortest solution of ``A d' = A d`` do.

    Args:
        solution: items in doubt have the status :attr:`Status.RANK_DEFICIENT`.
        x: the x that it was made of, in the dtype of A.
        y: the data.
        A: the operator.
        tolerances: of the solve.
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
    clear = torch.zeros_like(doubtful)
    damped = doubtful & (solution.damp > 0)
    if bool(damped.any()):
        mu = space.broadcast(torch.where(damped, solution.damp.square(), 1.0))
        d = torch.where(space.broadcast(damped).bool(), x - A.adjoint(y - A.apply(x)) / mu, 0)
        digits = torch.where(damped, divide(allowed, space.safe_norm(d)), 1.0).amin()
        d = d - shortest(A.apply(d), min(max(0.1 * float(digits), 10 * tolerances.eps), 0.1))
        clear = damped & (space.safe_norm(d) <= allowed)
    x = torch.where(space.broadcast(clear).bool(), 0, x)
    # going on to rounding would fit the rounding of A x
    other = x if bool((clear == doubtful).all()) else shortest(A.apply(x), 0.1 * tolerances.rtol)
    clear = clear | (doubtful & (space.safe_norm(other - x) <= allowed))
    answer, outputs = judge(other), ItemSpace(A.out_shape, A.dtype, A.device)
    # an iteration that small singular values have ended early is shorter because it leaves a part of A x
    faithful = outputs.safe_norm(A.apply(other - x)) <= tolerances.rtol * outputs.safe_norm(y)
    replaced = doubtful & ~clear & answer.converged & faithful
    solution = solution.replaced(replaced, answer)
    codes = torch.where(clear, Status.GRADIENT.code, solution.codes)
    return replace(solution, codes=codes, converged=solution.converged | clear)
