"""A block-circulant operator restricted to a border, solved by iteration.

Conjugate gradients, or GMRES, with the Schwarz preconditioner of :mod:`lsconv.border.system.schwarz`. Once the
iterations of all solves have cost what factors of the whole border would, :attr:`BorderSystem.use_direct` says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.border.cost_model import FactorCost
from lsconv.border.memory import allowed_bytes
from lsconv.border.system.grid_product import GridProduct
from lsconv.border.system.krylov import conjugate_gradients, gmres
from lsconv.border.system.recycling import Recycling
from lsconv.border.system.schwarz import BorderProblem, Schwarz

__all__ = ["BorderSystem"]

# Basis vectors of GMRES.
_RESTART = 100


class BorderSystem:
    """The system on the border.

    Args:
        problem: the operator, its border, and how it is preconditioned.
        cost: of the factors of the whole border, for each block.

    Attributes:
        use_direct: whether the factors of the whole border are the way to go on.
    """

    def __init__(self, problem: BorderProblem, cost: FactorCost) -> None:
        self.problem, self.use_direct, self._cost = problem, False, cost
        self.schwarz = Schwarz(problem)
        strips = self.schwarz.strips
        self.product = GridProduct(problem.matrices, problem.border) if strips is None else strips
        self._flexible = problem.restricted or not problem.model.definite  # by GMRES
        dtype, real = problem.matrices.matrices.dtype, problem.matrices.grid.real
        vectors = 2 * _RESTART * problem.model.blocks * problem.border.size
        item = (dtype.to_real() if real else dtype.to_complex()).itemsize
        spare = problem.limits.spare_bytes
        self._recycling = Recycling(_RESTART if spare is None or vectors * item <= spare else 0)
        # the work that iterations may still cost before factors take their place
        possible = problem.limits.later and self.schwarz.factors is None
        self._budget = problem.model.factors(cost) if possible else math.inf

    def __call__(self, u: Tensor) -> Tensor:
        """The operator times border vectors ``(rhs, blocks, size)``."""
        return self.product(u)

    def solve(self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The border unknowns to a relative residual of ``tolerance``, from ``start``, and the iterations.

        The unknowns are of no use where the system is to :attr:`use_direct`.
        """
        if self._budget <= 0 and self._factors_fit():
            return torch.zeros_like(b), torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        each = self.problem.model.iteration(b.shape[0])
        limit = max_iter if self._budget == math.inf else min(max_iter, math.ceil(self._budget / each))
        u, count = self._iterate(b, tolerance, limit, start)
        taken = int(count.max())
        self._budget -= max(0.0, taken * each - self.problem.model.reading(self._cost))
        if taken < limit or limit == max_iter or self._factors_fit():
            return u, count
        u, more = self._iterate(b, tolerance, max_iter - taken, u)
        return u, count + more

    def _iterate(
        self, b: Tensor, tolerance: Tensor | float, max_iter: int, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        r = b if start is None else b - self(start)
        bound = tolerance * torch.linalg.vector_norm(b, dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        left = torch.where(norm > bound, bound / norm.clamp_min(torch.finfo(norm.dtype).tiny), 2.0)
        check_every = 1 if b.device.type == "cpu" else 10
        if self._flexible:
            u, count = gmres(self, self.schwarz, r, left, max_iter, check_every, _RESTART, self._recycling)
        else:
            u, count = conjugate_gradients(self, self.schwarz, r, left, max_iter, check_every)
        return u if start is None else start + u, count

    def _factors_fit(self) -> bool:
        """Go over to the factors of the whole border, if there is memory for them; iterate for good if not."""
        allowed = allowed_bytes(self.problem.limits.spare_bytes, self.problem.matrices.matrices.device)
        self.use_direct = self.problem.model.bytes(self._cost) <= allowed
        if not self.use_direct:
            self._budget = math.inf
        return self.use_direct

    def refuse_factors(self) -> None:
        """Iterate, whatever that costs."""
        self._budget, self.use_direct = math.inf, False

    @property
    def work_vectors(self) -> int:
        """The number of border vectors that an iteration keeps for a right-hand side."""
        return 2 * _RESTART if self._flexible else 4

    @property
    def nbytes(self) -> int:
        """Bytes of the operator and of what preconditions it."""
        return sum(part.nbytes for part in (self.problem.matrices, self.schwarz, self._recycling))
