"""The rules for operators made of a convolution: masked, weighted, transposed, reduced; they use its plan."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from lsconv.border.plan import BorderPlan
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import MethodError
from lsconv.inverse.plans.adjoint_plan import AdjointPlan
from lsconv.inverse.plans.lsmr_then_border import LsmrThenBorderPlan
from lsconv.inverse.plans.missing import MissingBorderPlan, MissingPlan, are_scattered
from lsconv.inverse.plans.normal_iteration import VaryingPlan, WeightedPlan
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.plans.request import PlanRequest
from lsconv.inverse.plans.small_matrices import reduction
from lsconv.krylov.plan import Plan
from lsconv.operators.algebra import Adjoint, Product, Scaled
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.observed import MeasuredRows
from lsconv.operators.varying_convolution import VaryingConvolution

__all__ = ["measured_rows", "reduced", "transposed", "trimmed", "varying"]


def reduced(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The plan of the smaller convolution that A is: along batch axes, or without the zero margins of its kernel."""
    smaller = None if request.method == "svd" else reduction(A, keep_shapes=not request.any_method)
    if smaller is None:
        return None
    plan: Plan = request.plan(smaller.B, damp=smaller.reshape_damp(request.damp))
    return plan if smaller.same_shapes else ReducedPlan(smaller, plan, request.damp)


def trimmed(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The plan of the convolution without the zero margins of its kernel, which takes and gives what A does."""
    smaller = reduction(A, keep_shapes=True)
    return None if smaller is None else request.plan(smaller.B)


def measured_rows(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The plan of a convolution behind a mask, crop or diagonal, through that of the convolution."""
    damp, L, rows = torch.as_tensor(request.damp, dtype=torch.float64), request.L, None
    if isinstance(A, (Product, Scaled)) and _takes_composed(request) and request.damped:
        rows = MeasuredRows.of(A)
    if rows is None or not isinstance(rows.core, Convolution):
        return None
    weight = rows.uniform_weight()
    if weight is not None and not are_scattered(rows.scale == 0, rows.core.ndim):
        return None
    try:
        if weight is None:
            return WeightedPlan(A, rows, damp, L)
        inner = _of_core(rows.core.to(dtype=double(A.dtype)), damp / weight.double().sqrt(), request)
    except MethodError:
        return None
    if inner.innermost.iterates:
        return None
    if isinstance(inner.innermost, (BorderPlan, StackedPlan)):
        inverse = inner.innermost.inverse
        # a solve with the missing outputs in the border costs about two without: factors pay if they do within two
        if inverse.unknowns and inverse.factorise_if_cheaper(tuple(inverse.embedding.batch_shape), solves=2) is None:
            plan = WeightedPlan if rows.missing(rows.core.groups) is None else MissingBorderPlan
            with contextlib.suppress(MethodError):
                return plan(A, rows, damp, L)
    return MissingPlan(A, rows, inner, damp, L)


def transposed(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The adjoint of the plan of a convolution; where that is LSMR first, then the border, the same with A."""
    if not (isinstance(A, Adjoint) and isinstance(A.operator, Convolution) and _takes_composed(request)):
        return None
    plan = _of_core(A.operator, request.damp, request)
    if isinstance(plan, LsmrThenBorderPlan):
        preconditioned = not (plan.M is None and plan.N is None)
        return LsmrThenBorderPlan(
            A, request.damp, plan.max_iterations, preconditioned=preconditioned, expected=plan.expected
        )
    return None if plan.innermost.iterates else AdjointPlan(A, plan, request.damp)


def varying(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The plan of a convolution whose kernel varies, unless LSMR should be faster."""
    if not isinstance(A, (VaryingConvolution, Product, Scaled)):
        return None
    if not (_takes_composed(request) and VaryingPlan.serves(A) and request.damped):
        return None
    try:
        return VaryingPlan(A, request.damp, request.L, refuse_if_slower=request.method == "auto")
    except MethodError:  # the tiles do not serve L, or LSMR should be faster
        return None


def _takes_composed(request: PlanRequest) -> bool:
    """Tell whether the request can be passed on to the plan of another operator, of which this one is made."""
    return request.method in ("auto", "border") and not request.needs_krylov and not request.decides_rank


def _of_core(core: Convolution, damp: Tensor | float, request: PlanRequest) -> Plan:
    """The plan of the convolution behind A, in its dtype."""
    L = None if request.L is None else request.L.to(dtype=core.dtype)
    plan: Plan = request.plan(core, damp=damp, L=L, preconditioner="auto", rcond=None)
    return plan
