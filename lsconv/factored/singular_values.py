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

from lsconv.errors import PlanMemoryError
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.loop.stopping import Tolerances, certified
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes

__all__ = ["SingularValuePlan"]

# So many eps of the largest singular value is what LAPACK may be off by in the others, for matrices of this size.
_ROUNDING = 8
# Singular values, both sets of vectors, the matrix and LAPACK's work array, in numbers of the matrix.
_ARRAYS = 6
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class SingularValuePlan:
    """Setup of the dense solve for one operator and damping; :meth:`solve` answers right-hand sides.

    Args:
        A: any operator.
        damp: the damping, a number or one per batch item.
        rcond: where damp is 0, singular values of at most ``rcond`` times the largest of the item count as zero.
        rtol: default tolerance of the certificate.
        allowed: bytes that the plan may use.

    Attributes:
        rank: how many singular values exceed the threshold, ``A.batch_shape``.
        undecided: the items of A one of whose singular values stands on the threshold, up to rounding.

    Raises:
        PlanMemoryError: the decomposition would need more than ``allowed``.

    Example:
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 0.0, 1.0]]]), in_size=5, padding=1)
        >>> plan = SingularValuePlan(A, rcond=1e-7, rtol=1e-6)
        >>> int(plan.rank), bool(plan.solve(torch.ones(1, 5)).converged)
        (4, True)
    """

    @torch.no_grad()
    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float = 0.0,
        *,
        rcond: float,
        rtol: float,
        allowed: int | None = None,
    ) -> None:
        needed = self.bytes_for(A)
        if allowed is not None and needed > allowed:
            raise PlanMemoryError(
                f"the singular value decomposition of {A!r} needs about {needed:.3g} bytes, and {allowed:.3g} are "
                f"allowed (memory_limit=)"
            )
        self.A, self.rcond, self.rtol = A, rcond, rtol
        self.damp = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device)
        self.precise = _in_double(A)
        matrix = self.precise.to_dense().to(_DOUBLE.get(A.dtype, A.dtype))
        self.U, self.values, self.Vh = torch.linalg.svd(matrix, full_matrices=False)
        largest = self.values.amax(-1, keepdim=True) if self.values.shape[-1] else self.values
        # a zero comes out as rounding, of which a tiny damp would make much
        noise = max(matrix.shape[-2:]) * torch.finfo(self.values.dtype).eps * largest
        self.values = torch.where(self.values > noise, self.values, 0.0)
        self.kept = self.values > rcond * largest
        self.rank = self.kept.sum(-1)
        rounding = _ROUNDING * torch.finfo(self.values.dtype).eps * largest
        near = ((self.values - rcond * largest).abs() <= rounding) & (self.values > rounding)
        self.undecided = near.any(-1)
        self.norm = largest.amax(-1) if self.values.shape[-1] else self.rank.double()

    @staticmethod
    def bytes_for(A: LinearOperator) -> int:
        """Bytes that the decomposition takes."""
        itemsize = 16 if A.dtype.is_complex else 8
        return _ARRAYS * itemsize * math.prod(A.batch_shape) * A.in_numel * A.out_numel

    def _filtered(self, coefficients: Tensor, power: int) -> Tensor:
        """``values^power / (values^2 + damp^2)`` times coefficients ``(*batch, k)``; zero for what counts as zero."""
        mu = self.damp.square().unsqueeze(-1)
        keep = (mu > 0) | self.kept
        filtered = torch.where(keep, self.values**power / torch.where(keep, self.values.square() + mu, 1.0), 0.0)
        return coefficients * filtered

    def _to(self, v: Tensor, item: tuple[int, ...], matrix: Tensor) -> Tensor:
        """``matrix v`` for ``(*batch, *item)``, as ``(*batch, k)``."""
        flat = v.reshape(*v.shape[: v.ndim - len(item)], -1).to(matrix.dtype)
        return (matrix @ flat.unsqueeze(-1)).squeeze(-1)

    def _from(self, matrix: Tensor, coefficients: Tensor, item: tuple[int, ...]) -> Tensor:
        out = (matrix @ coefficients.unsqueeze(-1)).squeeze(-1)
        return out.reshape(*out.shape[:-1], *item)

    def _solution(self, y: Tensor) -> Tensor:
        c = self._filtered(self._to(y, self.A.out_shape, self.U.mH), 1)
        return self._from(self.Vh.mH, c, self.A.in_shape)

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y`` of shape ``(*batch, *out_shape)``; ``max_iter`` has no effect."""
        precise = self.precise
        x = self._solution(y.detach()).to(precise.dtype)
        batch = broadcast_shapes(x.shape[: x.ndim - len(self.A.in_shape)], self.damp.shape)
        solution = certified(
            precise,
            x.expand(*batch, *self.A.in_shape),
            y.detach().to(precise.dtype).expand(*batch, *self.A.out_shape),
            self.damp.expand(batch),
            tolerances=Tolerances.of(self.A.dtype, self.rtol if rtol is None else rtol, atol),
            dtype=self.A.dtype,
            norm_bound=self.norm,
            rcond=self.rcond,
            truncated=True,
            rounding=torch.finfo(precise.dtype).eps,
        )
        return solution.with_rank(self.rank, self.undecided)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, bare."""
        return self._solution(y).to(self.A.dtype)

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        c = self._filtered(self._to(v, self.A.in_shape, self.Vh), 1)
        return self._from(self.U, c, self.A.out_shape).to(self.A.dtype)

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, and ``(A^H A)^+ g`` without damping."""
        c = self._to(g, self.A.in_shape, self.Vh)
        mu = self.damp.square().reshape(*self.damp.shape, *(1 for _ in self.A.in_shape))
        outside = g - self._from(self.Vh.mH, c, self.A.in_shape)  # the null space, which only the damping inverts
        v = self._from(self.Vh.mH, self._filtered(c, 0), self.A.in_shape)
        return (v + torch.where(mu > 0, outside / torch.where(mu > 0, mu, 1.0), 0.0)).to(self.A.dtype)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^+ g``."""
        return self.normal_solve(g, rtol=rtol)

    @property
    def nbytes(self) -> int:
        """Bytes of the factors kept."""
        return sum(t.numel() * t.element_size() for t in (self.U, self.values, self.Vh))

    def __repr__(self) -> str:
        return f"SingularValuePlan({self.A.in_shape} -> {self.A.out_shape}, rcond={self.rcond:g}, {self.A.device})"


def _in_double(A: LinearOperator) -> LinearOperator:
    """A in double precision, or as it is where it does not convert."""
    if A.dtype not in _DOUBLE:
        return A
    try:
        return A.to(dtype=_DOUBLE[A.dtype])
    except NotImplementedError:
        return A
