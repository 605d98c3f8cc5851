"""The base of the plans that compute all singular values of A: the rank, the certificate and the interface."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lsconv.errors import PlanMemoryError
from lsconv.krylov.loop.batched_scalars import scalar_dtype
from lsconv.krylov.loop.certificate import NormBounds, RankThreshold
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.plan import Plan
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, over_items
from lsconv.operators.dtypes import ROUNDING, double

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "CONTRACTION",
    "WORK_ARRAYS",
    "DirectPlan",
    "Rank",
    "RefinedPlan",
    "in_double",
    "inverse_values",
    "refinements",
]

# The memory of matrix, factors and LAPACK's work array, relative to the matrix.
WORK_ARRAYS = 6
# If a step of refinement leaves more of the error than this, the problem is too badly conditioned, and is refused.
CONTRACTION = 0.1


@dataclass(frozen=True)
class Rank:
    """The numerical rank of A, from its singular values ``(*batch, *coefficients)`` and a threshold.

    Attributes:
        values: the singular values; those below rounding are zero.
        kept: True where they exceed the threshold.
        rank: the number of these, ``batch``.
        undecided: True where one equals the threshold up to rounding, ``batch``.
        largest: the largest singular value, ``batch``.
    """

    values: Tensor
    kept: Tensor
    rank: Tensor
    undecided: Tensor
    largest: Tensor

    @classmethod
    def of(cls, values: Tensor, ndim: int, rcond: float, size: int) -> Rank:
        """Decide the rank of these singular values.

        Args:
            values: the singular values.
            ndim: number of dimensions of the coefficients.
            rcond: values up to ``rcond`` times the largest count as zero.
            size: the larger side of the decomposed matrix, to which its rounding is proportional.
        """
        batch = values.shape[: values.ndim - ndim]
        flat = values.reshape(*batch, -1)
        largest = flat.amax(-1) if flat.shape[-1] else values.new_zeros(batch)
        top = over_items(largest, ndim)
        eps = torch.finfo(values.dtype).eps
        # a zero is computed as rounding, which a tiny damp would amplify
        values = torch.where(values > size * eps * top, values, 0.0)
        kept = values > rcond * top
        near = ((values - rcond * top).abs() <= ROUNDING * eps * top) & (values > ROUNDING * eps * top)
        return cls(values, kept, kept.reshape(*batch, -1).sum(-1), near.reshape(*batch, -1).any(-1), largest)


def inverse_values(values: Tensor, kept: Tensor, mu: Tensor, power: int = 1) -> Tensor:
    """``values^power / (values^2 + mu)``; zero where mu is zero and the value is not kept."""
    keep = (mu > 0) | kept
    return torch.where(keep, values**power / torch.where(keep, values.square() + mu, 1.0), 0.0)


def refinements(contraction: float, rtol: float) -> int:
    """The number of steps, each reducing the error by ``contraction``, that bring it below a hundredth of rtol."""
    if contraction == 0:
        return 0
    return max(0, math.ceil(math.log(0.01 * rtol) / math.log(contraction)) - 1)


class DirectPlan(Plan):
    """The setup of a direct solve in double precision; subclasses provide the factors and the three maps.

    Args:
        A: the operator.
        damp: the damping, a number or one per batch item.
        rcond: where damp is 0, singular values of at most ``rcond`` times the largest of the item count as zero.
        rtol: default tolerance of the certificate.
        allowed: bytes that the plan may use.

    Attributes:
        rank: the number of singular values above the threshold, ``A.batch_shape``.
        undecided: the items of A with a singular value that equals the threshold up to rounding.
        norm: an upper bound of ``||A||``, up to rounding, ``A.batch_shape``.
    """

    never_misses = True
    rtol: float
    rank: Tensor
    undecided: Tensor
    norm: Tensor

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
        self.A, self.rcond, self.rtol = A, rcond, rtol
        self.damp = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device)
        self.precise = in_double(A)
        needed = self._bytes()
        if allowed is not None and needed > allowed:
            raise PlanMemoryError(
                f"{self._factors_name} of {A!r} needs about {needed:.3g} bytes, "
                f"and {allowed:.3g} are allowed (memory_limit=)"
            )
        self._factorise()

    # ------------------------------------------------------------------ what a subclass provides, in double precision

    _factors_name: str  # the name of the factors in the message that they do not fit in memory

    def _bytes(self) -> int:
        """The bytes of the factors."""
        raise NotImplementedError

    def _factorise(self) -> None:
        """Make the factors, and decide the rank."""
        raise NotImplementedError

    def _adapt(self) -> None:
        """Make the part of the factors that depends on the damping."""
        self._factorise()

    def _inverse(self, y: Tensor) -> Tensor:
        """``(A^H A + mu)^+ A^H y``."""
        raise NotImplementedError

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        """``A (A^H A + mu)^+ v``."""
        raise NotImplementedError

    def _normal(self, g: Tensor) -> Tensor:
        """``(A^H A + mu)^+ g``."""
        raise NotImplementedError

    def _damped(self, x: Tensor) -> Tensor:
        """``damp^2 x``."""
        return x * over_items(self.damp.square(), len(self.A.in_shape))

    @torch.no_grad()
    def with_damp(self, damp: Tensor | float) -> Self:
        """The plan for another damping, sharing the factors that do not depend on it."""
        plan = copy.copy(self)
        plan.damp = torch.as_tensor(damp, dtype=self.damp.dtype, device=self.A.device)
        plan._adapt()
        return plan

    # ------------------------------------------------------------------ answers

    @torch.no_grad()
    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y`` of shape ``(*batch, *out_shape)``; ``max_iter`` has no effect."""
        A, precise = self.A, self.precise
        data = y.detach().to(double(A.dtype))
        x = self._inverse(data).to(precise.dtype).contiguous()
        given = x.shape[: x.ndim - len(A.in_shape)]
        batch = broadcast_shapes(given, y.shape[: y.ndim - len(A.out_shape)], self.damp.shape)
        data, damp = data.to(precise.dtype).expand(*batch, *A.out_shape), self.damp.expand(batch)
        tolerances = self.tolerances(rtol, atol)

        judge = Judge(
            precise,
            tolerances,
            damp,
            A.dtype,
            norm=NormBounds(upper=self.norm),
            rank=RankThreshold(self.rcond, truncated=True),
        )
        x = x.expand(*batch, *A.in_shape)
        solution = judge.solution(x, data).with_rank(self.rank, self.undecided)
        if solution.all_converged:
            return solution
        # With a damping far below ||A|| the rounding of the factors shows in the gradient: one step of refinement is
        # taken.
        items = (*batch, *(1 for _ in A.in_shape))
        gradient = precise.adjoint(data - precise.apply(x)) - damp.square().reshape(items) * x
        refined = x + self._normal(gradient.to(double(A.dtype))).to(precise.dtype)
        refined = torch.where(solution.converged.reshape(items), x, refined)
        return judge.solution(refined, data).with_rank(self.rank, self.undecided)

    @torch.no_grad()
    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, without a certificate."""
        return self._inverse(y.to(double(self.A.dtype))).to(self.A.dtype).contiguous()

    @torch.no_grad()
    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self._inverse_adjoint(v.to(double(self.A.dtype))).to(self.A.dtype).contiguous()

    @torch.no_grad()
    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, and ``(A^H A)^+ g`` without damping."""
        return self._normal(g.to(double(self.A.dtype))).to(self.A.dtype).contiguous()

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^+ g``."""
        return self.normal_solve(g, rtol=rtol)

    def __repr__(self) -> str:
        name, A = type(self).__name__, self.A
        return f"{name}({A.in_shape} -> {A.out_shape}, rcond={self.rcond:g}, {A.device})"


class RefinedPlan(DirectPlan):
    """The setup of a direct solve with an operator near A, whose answers are refined by residuals of A.

    Subclasses provide the factors and the three maps of the operator near A, or two where every answer is refined.
    """

    _steps: int  # the number of refinement steps, see :func:`refinements`

    def _near_inverse(self, y: Tensor) -> Tensor:
        """``(B^H B + mu)^+ B^H y``, B being the operator near A."""
        raise NotImplementedError

    def _near_inverse_adjoint(self, v: Tensor) -> Tensor:
        """``B (B^H B + mu)^+ v``."""
        raise NotImplementedError

    def _near_normal(self, g: Tensor) -> Tensor:
        """``(B^H B + mu)^+ g``."""
        raise NotImplementedError

    def _inverse(self, y: Tensor) -> Tensor:
        x = self._near_inverse(y)
        for _ in range(self._steps):
            gradient = self.precise.adjoint(y - self.precise.apply(x))
            x = x + self._near_normal(gradient - self._damped(x))
        return x

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        return self.precise.apply(self._normal(v)) if self._steps else self._near_inverse_adjoint(v)

    def _normal(self, g: Tensor) -> Tensor:
        v = self._near_normal(g)
        for _ in range(self._steps):
            v = v + self._near_normal(g - self.precise.adjoint(self.precise.apply(v)) - self._damped(v))
        return v


def in_double(A: LinearOperator) -> LinearOperator:
    """Convert A to double precision; an A that does not convert is returned unchanged."""
    if double(A.dtype) == A.dtype:
        return A
    try:
        return A.to(dtype=double(A.dtype))
    except NotImplementedError:
        return A
