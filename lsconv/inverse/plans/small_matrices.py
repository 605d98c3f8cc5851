"""Convolutions that are made of small matrices, where decomposing these costs less than iterations or the border."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from lsconv.border.cost_model import CALL_WORK, direct_plan_cost
from lsconv.errors import MethodError, PlanMemoryError
from lsconv.factored.batch_axes import Reduction
from lsconv.factored.direct_plan import DirectPlan
from lsconv.factored.kronecker import Factors, SeparablePlan
from lsconv.factored.normal_equations import NormalEquationsPlan
from lsconv.factored.patch_matrix import PatchPlan
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.cosine_plan import CosinePlan
from lsconv.inverse.plans.route_costs import iteration_work
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution
from lsconv.operators.memory import allowed_bytes
from lsconv.operators.padding_modes import MODES

__all__ = [
    "SMALL_MATRICES",
    "SeparableThenBorderPlan",
    "cheap_small_matrices",
    "reduction",
    "separable_factors",
    "small_matrices",
]

SMALL_MATRICES = ("matrix", "separable", "normal")
# The times of a solve by the border, and of one by hundreds of iterations, in Fourier transforms of the field. One of n
# numbers counts as 5 n log2(2n) operations of dense matrices (benchmarks/routes.py compares both sides of the choice).
_BORDER_TRANSFORMS, _KRYLOV_TRANSFORMS = 200, 2000


def reduction(A: LinearOperator, *, keep_shapes: bool) -> Reduction | None:
    """Reduce A to a smaller convolution; None where it is none.

    Args:
        A: the operator.
        keep_shapes: take only a reduction that leaves the shapes of inputs and outputs as they are.
    """
    if not isinstance(A, Convolution):
        return None
    smaller = Reduction.trimmed(A)
    if smaller is None and not (keep_shapes or PatchPlan.serves(A)):
        smaller = Reduction.without_batch_axes(A)
    return smaller if smaller is None or smaller.same_shapes or not keep_shapes else None


def small_matrices(A: LinearOperator, damp: Tensor | float, method: str, **rank_options: Any) -> DirectPlan:
    """Make the plan of the method "matrix", "separable" or "normal" for A.

    Raises:
        MethodError: A is not made of such matrices.
    """
    if method == "normal":
        return NormalEquationsPlan(A, damp, **rank_options)
    if method == "separable" and isinstance(A, Convolution):
        return SeparablePlan(A, damp, **rank_options)
    if method == "matrix" and isinstance(A, Convolution) and PatchPlan.serves(A):
        return PatchPlan(A, damp, **rank_options)
    needed = "a separable kernel" if method == "separable" else "outputs that read disjoint patches"
    raise MethodError(f'method: "{method}" needs a convolution with {needed}, got {A!r}; use method="auto"')


def cheap_small_matrices(A: LinearOperator, damp: Tensor | float, **rank_options: Any) -> DirectPlan | None:
    """The plan of small matrices where A has one that is cheaper than all others."""
    if not isinstance(A, Convolution):
        return None
    for plan in (_patch_plan, _separable_plan, _normal_equations_plan, _cosine_plan):
        with contextlib.suppress(MethodError, PlanMemoryError):  # another kind of matrices may serve
            found = plan(A, damp, rank_options)
            if found is not None:
                return found
    return None


def _patch_plan(A: Convolution, damp: Tensor | float, rank_options: dict[str, Any]) -> DirectPlan | None:
    """The matrix of the patches, where decomposing it should cost less than iterations."""
    if not PatchPlan.serves(A):
        return None
    rows, columns = A.c_out // A.groups, A.c_in // A.groups * math.prod(A.kernel_size)
    setup = 20 * A.groups * math.prod(A.batch_shape) * min(rows, columns) ** 2 * max(rows, columns)
    iteration = 4 * rows * columns * A.groups * math.prod(A.spatial_out)
    if setup > max(CALL_WORK, _KRYLOV_TRANSFORMS * iteration):
        return None
    return PatchPlan(A, damp, **rank_options)


def separable_factors(A: Convolution, *, damped: bool) -> Factors | None:
    """The kernel's factors along the axes, where decomposing them should cost less than the border or iterations do."""
    bordered = Embedding.serves(A)
    factors = None if bordered and Embedding(A).is_circulant else Factors.of(A)
    if factors is None:
        return None
    cells = max(A.in_numel, A.out_numel)
    allowed = (_BORDER_TRANSFORMS if bordered and damped else _KRYLOV_TRANSFORMS) * 5 * cells * math.log2(2 * cells)
    return factors if sum(SeparablePlan.flops(A, factors)) <= max(CALL_WORK, allowed) else None


def _separable_plan(A: Convolution, damp: Tensor | float, rank_options: dict[str, Any]) -> DirectPlan | None:
    """The plan of one matrix per axis, for a separable kernel where that is cheap."""
    factors = separable_factors(A, damped=bool((torch.as_tensor(damp) > 0).all()))
    return None if factors is None else SeparableThenBorderPlan(A, damp, factors=factors, **rank_options)


def _normal_equations_plan(A: Convolution, damp: Tensor | float, rank_options: dict[str, Any]) -> DirectPlan | None:
    """The plan of the normal equations, where it is cheap.

    It is where the Gram matrix is small and ``damp > 0``; and where the kernel is at least as long as x along every
    axis, so that the border would be no smaller than x, and A has at least twice as many outputs as inputs.
    """
    damping, outputs = torch.as_tensor(damp), A.out_numel
    long = all(k >= n for k, n in zip(A.kernel_size, A.spatial_in, strict=True)) and outputs >= 2 * A.in_numel
    if (not long and A.in_numel**3 / 3 > CALL_WORK) or (Embedding.serves(A) and Embedding(A).is_circulant):
        return None
    operations = NormalEquationsPlan.flops(A) * math.prod(broadcast_shapes(A.batch_shape, damping.shape))
    allowed = _KRYLOV_TRANSFORMS * 5 * outputs * math.log2(2 * outputs) if long else 0.0
    small = bool((damping > 0).all()) and operations <= CALL_WORK
    return NormalEquationsPlan(A, damp, **rank_options) if small or operations <= allowed else None


def _cosine_plan(A: Convolution, damp: Tensor | float, rank_options: dict[str, Any]) -> DirectPlan | None:
    """The plan in the basis of cosines, for an even kernel and a padding that extends x evenly and keeps its size."""
    serves = (
        MODES[A.padding_mode].even
        and not A.is_complex
        and A.c_in == A.c_out == A.groups
        and set(A.stride) == {1}
        and all(left == right for left, right in A.padding)
        and A.spatial_in == A.spatial_out
    )
    return CosinePlan(A, damp, **rank_options) if serves else None


class SeparableThenBorderPlan(SeparablePlan):
    """A :class:`SeparablePlan` that hands over to the border once its factors would have paid.

    A solve axis by axis multiplies by dense matrices; a solve with the factors of the border takes Fourier transforms.
    Where the latter is cheaper, the plan hands over once the work saved so far would have paid for the factors.
    """

    gives_way_to_border = True

    def __init__(self, *args: Any, **options: Any) -> None:
        self.solved = 0
        super().__init__(*args, **options)

    @property
    def exhausted(self) -> bool:  # type: ignore[override]
        """Tell whether solves with the border's factors would by now have saved the cost of making these factors."""
        return self.solved > 0 and self.solved >= self._paying_solves

    @functools.cached_property
    def _paying_solves(self) -> float:
        """The number of right-hand sides after which the factors pay; infinite where they never do, or do not fit."""
        A, precise = self.A, self.precise
        assert isinstance(precise, Convolution)
        if A.ndim > 2 or not Embedding.serves(A) or not bool((self.damp > 0).all()):
            return math.inf
        border = direct_plan_cost(A, tuple(self.damp.shape))
        each = (1 + self._steps) * self.flops(A, self._product)[1] + self._steps * iteration_work(precise)
        if border.solve_work >= each or border.peak_bytes > allowed_bytes(None, A.device):
            return math.inf
        return border.setup_work / (each - border.solve_work)

    def _adapt(self) -> None:
        super()._adapt()
        self.solved = 0
        self.__dict__.pop("_paying_solves", None)

    def _inverse(self, y: Tensor) -> Tensor:
        self.solved += y.numel() // self.A.out_numel
        return super()._inverse(y)

    def _inverse_adjoint(self, v: Tensor) -> Tensor:
        self.solved += v.numel() // self.A.in_numel
        return super()._inverse_adjoint(v)
