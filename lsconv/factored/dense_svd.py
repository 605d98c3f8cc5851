r"""The exact solve of a small problem by the singular value decomposition of its matrix.

.. math:: A = U \Sigma V^H, \qquad x = V \Sigma (\Sigma^2 + \mathrm{damp}^2)^{-1} U^H y,
          \qquad x = V_k \Sigma_k^{-1} U_k^H y \ \text{ for } \mathrm{damp} = 0

with the k singular values above ``rcond`` times the largest. All arithmetic is in double precision. It serves every
operator whose matrix is small, decides the rank as ``torch.linalg.lstsq`` does, and knows the whole null space.

Golub and Van Loan, Matrix Computations, 4th ed., section 5.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsconv.factored.direct_plan import WORK_ARRAYS, DirectPlan, Rank, inverse_values
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import over_items
from lsconv.operators.dtypes import double

__all__ = ["DENSE_ENTRIES", "SingularValuePlan"]

# The most entries of a matrix for which this plan is chosen automatically.
DENSE_ENTRIES = 2**20


class SingularValuePlan(DirectPlan):
    """Setup of the dense solve for one operator and damping; :meth:`solve` answers right-hand sides.

    The arguments are those of :class:`~lsconv.factored.direct_plan.DirectPlan`, for any operator.

    Raises:
        PlanMemoryError: the decomposition would need more than ``allowed``.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 0.0, 1.0]]]), in_size=5, padding=1)
        >>> plan = SingularValuePlan(A, rcond=1e-7, rtol=1e-6)
        >>> int(plan.rank), bool(plan.solve(torch.ones(1, 5)).converged)
        (4, True)
    """

    reason = "the problem is small: its matrix is decomposed"
    _factors_name = "the singular value decomposition"

    def _bytes(self) -> int:
        return self.bytes_for(self.A)

    def _factorise(self) -> None:
        A = self.A
        matrix = self.precise.to_dense().to(double(A.dtype))
        self.U, values, self.Vh = torch.linalg.svd(matrix, full_matrices=False)
        decided = Rank.of(values, 1, self.rcond, max(matrix.shape[-2:]))
        self.values, self.kept = decided.values, decided.kept
        self.rank, self.undecided, self.norm = decided.rank, decided.undecided, decided.largest

    def _adapt(self) -> None:
        pass

    @staticmethod
    def is_quick(A: LinearOperator) -> bool:
        """Tell whether the decomposition of A, and of all items of its batch, is that of a small matrix."""
        shorter, longer = sorted((A.in_numel, A.out_numel))
        # the work is shorter^2 longer, so that a square matrix may have a fourth of the entries only
        if 4 * shorter**2 > DENSE_ENTRIES or longer**2 > 4 * DENSE_ENTRIES:
            return False
        return math.prod(A.batch_shape) * A.in_numel * A.out_numel <= DENSE_ENTRIES

    @staticmethod
    def bytes_for(A: LinearOperator) -> int:
        """Bytes that the decomposition takes."""
        itemsize = 16 if A.dtype.is_complex else 8
        return WORK_ARRAYS * itemsize * math.prod(A.batch_shape) * A.in_numel * A.out_numel

    def _filtered(self, coefficients: Tensor, power: int) -> Tensor:
        """The coefficients times the filter of the damping, see :func:`inverse_values`."""
        mu = self.damp.square().unsqueeze(-1)
        return coefficients * inverse_values(self.values, self.kept, mu, power)

    def _coefficients(self, matrix: Tensor, v: Tensor, item: tuple[int, ...]) -> Tensor:
        """``matrix v`` for v of shape ``(*batch, *item)``: ``(*batch, k)``."""
        flat = v.reshape(*v.shape[: v.ndim - len(item)], -1).to(matrix.dtype)
        return (matrix @ flat.unsqueeze(-1)).squeeze(-1)

    def _combination(self, matrix: Tensor, coefficients: Tensor, item: tuple[int, ...]) -> Tensor:
        """``matrix c`` for coefficients c of shape ``(*batch, k)``: ``(*batch, *item)``."""
        out = (matrix @ coefficients.unsqueeze(-1)).squeeze(-1)
        return out.reshape(*out.shape[:-1], *item)

    def _inverse(self, y: Tensor) -> Tensor:
        c = self._filtered(self._coefficients(self.U.mH, y, self.A.out_shape), 1)
        return self._combination(self.Vh.mH, c, self.A.in_shape)

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        c = self._filtered(self._coefficients(self.Vh, v, self.A.in_shape), 1)
        return self._combination(self.U, c, self.A.out_shape)

    def _normal(self, g: Tensor) -> Tensor:
        c = self._coefficients(self.Vh, g, self.A.in_shape)
        mu = over_items(self.damp.square(), len(self.A.in_shape))
        # the part in the null space, where the inverse is 1 / damp^2
        outside = g - self._combination(self.Vh.mH, c, self.A.in_shape)
        v = self._combination(self.Vh.mH, self._filtered(c, 0), self.A.in_shape)
        return v + torch.where(mu > 0, outside / torch.where(mu > 0, mu, 1.0), 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        return sum(t.numel() * t.element_size() for t in (self.U, self.values, self.Vh))
