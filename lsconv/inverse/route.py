"""Which method answers which (operator, damping): one table in one function, and one for problems with a penalty."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import torch
from torch import Tensor

from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.plan import BorderPlan
from lsconv.border.reflected_padding import Mirror
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import (
    ArgumentError,
    DtypeError,
    MethodError,
    PlanMemoryError,
    warn,
)
from lsconv.factored.axis_channels import AxisAsChannels
from lsconv.factored.singular_values import SingularValuePlan
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.adjoint_plan import AdjointPlan
from lsconv.inverse.plans.dense_stack import DenseStack
from lsconv.inverse.plans.fourier_plan import FourierPlan
from lsconv.inverse.plans.krylov_choice import krylov_plan
from lsconv.inverse.plans.krylov_plan import KRYLOV, KrylovPlan, KrylovStack
from lsconv.inverse.plans.masks_per_item import MasksPerItemPlan
from lsconv.inverse.plans.missing import MissingBorderPlan, MissingPlan, are_scattered
from lsconv.inverse.plans.planes import Planes
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.plans.small_matrices import (
    SMALL_MATRICES,
    cheap_small_matrices,
    rank_options,
    reduction,
    small_matrices,
)
from lsconv.inverse.plans.trial_plan import TrialPlan, trial
from lsconv.inverse.plans.varying import VaryingPlan
from lsconv.inverse.plans.weighted import WeightedPlan
from lsconv.krylov.plan import PATIENCE, LastResort, PenalisedPlan, Plan
from lsconv.operators.algebra import Adjoint, Product, Scaled
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.observed import MeasuredRows

__all__ = ["METHODS", "fallback", "penalty_fallback", "penalty_plan", "route"]

METHODS = ("auto", *SMALL_MATRICES, "fourier", "border", "svd", *KRYLOV)
# Channels of a group, in and out together, up to which reflected padding goes to the border; of more LSMR is faster.
_MIRRORED_CHANNELS = 4


def route(
    A: LinearOperator,
    damp: Tensor | float = 0.0,
    *,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    memory_limit: int | None = None,
    rcond: float | None = None,
    started: bool = False,
) -> Plan:
    r"""The plan that solves :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|x\|^2`.

    With ``method="auto"``:

    ==========================================================  ==================================================
    operator                                                    method
    ==========================================================  ==================================================
    kernel that reads disjoint patches (1x1, or no larger than  "matrix": one small matrix per group
    the stride), or reads all of the input at once
    kernel of extent one along some axes                        that of the kernel without these axes, which become
                                                                batch dimensions
    circular convolution that nothing crops                     "fourier"
    separable kernel, any padding mode, stride and dilation     "separable", where the decomposition of the axes costs
                                                                less than the alternatives
    kernel longer than x (deconvolution for a short response),  "normal": the normal equations, where they are not too
    or few unknowns, damped                                     ill-conditioned
    damped layer (several channels), or blur with a kernel of   "lsmr" for as many iterations as cost what the setup
    the size of the field, whose border takes long to set up;   of the border does, then "border" for what is left, and
    other blurs strongly damped, of a stride or of a volume     for blurs "border" once all solves have cost as much,
    less so; undamped where rows and columns differ much;       or a batch is expected to; preconditioned in the last
    damped: a long kernel in one dimension, volumes without     two cases
    padding
    convolution with zero padding, or circular with crop        "border"; LSMR where its plan would not fit, or where
                                                                damp = 0 and the shapes imply a null space
    convolution of stride 1, reflect or replicate padding       "border" in one or two dimensions with damp > 0 and at
                                                                most four channels a group, in and out together;
                                                                otherwise LSMR
    mask, crop or constant diagonal before one of these,        the plan of the whole, and conjugate gradients on the
    damped, that leaves out less than 40 % and no large gap     outputs left out (:class:`MissingPlan`); or these as
                                                                cells of the border (:class:`MissingBorderPlan`), a
                                                                border for each mask of a batch
                                                                (:class:`MasksPerItemPlan`)
    adjoint of one of these (a transposed convolution)          the adjoint of its plan (:class:`AdjointPlan`)
    varying diagonal before a convolution, damped               conjugate gradients, preconditioned by the border of the
                                                                mean weight (:class:`WeightedPlan`)
    convolution whose kernel varies, damped, with such a row    conjugate gradients, preconditioned by tiles with local
    or not                                                      kernels (:class:`VaryingPlan`), where that pays
    any other operator                                          "lsmr", preconditioned where that is safe
    ==========================================================  ==================================================

    Margins of zeros around a kernel are trimmed before.

    An ``rcond`` of the user's goes to "matrix", "separable", "normal" and "fourier", to "border" where that is direct,
    and else to "svd", the dense decomposition (:class:`SingularValuePlan`); the iterations decide no rank. For small
    problems "svd" also gives the answers that the others are not sure of (:func:`fallback`).

    "border" is direct (:class:`CapacitancePlan`) for ``damp = 0`` and a square operator whose border can be factorised
    in the time of some two hundred iterations, and otherwise iterates on the border (:class:`BorderPlan`).

    A Krylov method is used as asked for, where it solves the problem posed:

    =========================  ======================================================================================
    method                     serves
    =========================  ======================================================================================
    "lsmr", "lsqr", "cgls"     every operator, every damping
    "craig"                    consistent systems, and every operator with damping
    "cg"                       square Hermitian positive definite A, ``damp = 0``
    "minres"                   square Hermitian A, ``damp = 0``
    "gmres"                    square A, ``damp = 0``
    "hybrid"                   every operator; it chooses the damping itself, so none may be given
    =========================  ======================================================================================

    ``preconditioner="auto"`` gives the first four a :class:`CirculantPreconditioner` when A is made of a convolution
    and damp is not too small for its side in this dtype; "circulant" takes the solution side where M is not served.
    Without damping none is used, because on a rank-deficient operator a preconditioner on the solution side selects
    another solution than the minimum-norm one, and on the residual side weighs inconsistent data.
    The square methods use an operator given as ``preconditioner`` as their M; "hybrid" takes none.

    With ``started`` the caller has options that only a Krylov method takes (a start, a callback), and "auto" leaves out
    the small matrices.

    Raises:
        MethodError: the method cannot serve the operator; the message names one that can.
        PlanMemoryError: the method was asked for and its plan would not fit.
    """
    if method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if A.dtype in (torch.float16, torch.bfloat16):
        raise DtypeError(f"A: {A.dtype} can be applied, not inverted; convert with A.to(dtype=torch.float32)")
    chosen = _check_rcond(rcond, damp, method)
    auto = method == "auto" and not started
    smaller = None if method == "svd" else reduction(A, keep_shapes=not auto)
    if smaller is not None:
        plan = route(
            smaller.B,
            smaller.damp(damp),
            method=method,
            preconditioner=preconditioner,
            memory_limit=memory_limit,
            rcond=rcond,
            started=started,
        )
        return plan if smaller.same_shapes else ReducedPlan(smaller, plan, damp)
    if method in ("auto", "border") and not started and not chosen:
        composed = (
            _with_rows(A, damp, method, memory_limit)
            or _transposed(A, damp, method, memory_limit)
            or _varying(A, damp, method)
        )
        if composed is not None:
            return composed
    decided = rank_options(A, memory_limit, rcond)
    if method in SMALL_MATRICES:
        return small_matrices(A, damp, method, **decided)
    structured = A if isinstance(A, Convolution) and Embedding.exists(A) else None
    direct = cheap_small_matrices(A, damp, **decided) if auto else None
    if direct is not None:
        return direct
    if method == "fourier" or (method == "auto" and structured is not None and Embedding(structured).is_circulant):
        try:
            return FourierPlan(A, damp, rcond=rcond, memory_limit=memory_limit)
        except PlanMemoryError as error:
            if method == "fourier" or chosen:
                raise
            warn(f"falling back to LSMR. {error}")
            return KrylovPlan(A, damp, "lsmr")
    if method == "svd" or (chosen and method == "auto" and structured is None):
        return _svd(A, damp, memory_limit, rcond)
    if chosen:
        return _with_rcond(A, damp, memory_limit, rcond, method)
    if method == "border":
        return _border(A, damp, memory_limit)
    bordered = structured is not None or _mirrors_well(A, damp)
    first = trial(A, damp) if auto and structured is not None else None
    if first is not None:
        return first
    if method == "auto" and bordered:
        try:
            return _border(A, damp, memory_limit)
        except MethodError:
            pass  # a null space at damp = 0, which LSMR handles
        except PlanMemoryError as error:
            warn(f"falling back to LSMR. {error}")
    name = "lsmr" if method == "auto" else method
    return krylov_plan(A, damp, name, preconditioner)


def penalty_plan(
    A: LinearOperator,
    L: LinearOperator,
    damp: Tensor | float,
    *,
    method: str = "auto",
    memory_limit: int | None = None,
) -> PenalisedPlan:
    """The plan for a general L and damp > 0: exact where A and L are convolutions on one grid, otherwise LSMR.

    Raises:
        MethodError: the method asked for cannot serve A and L.
        ArgumentError: an unknown method.
        PlanMemoryError: ``method="border"`` or "fourier" was asked for and the plan would not fit.
    """
    if method not in ("auto", "fourier", "border", "lsmr"):
        raise ArgumentError(f'method: with L expected one of "auto", "fourier", "border", "lsmr", got {method!r}')
    if method in ("auto", "border"):
        composed = _with_rows(A, damp, method, memory_limit, L) or _varying(A, damp, method, L)
        if composed is not None:
            return composed
    smaller = reduction(A, keep_shapes=True)
    A = A if smaller is None else smaller.B
    damping = torch.as_tensor(damp)
    if method != "lsmr" and bool((damping > 0).all()):
        try:
            plan = StackedPlan(A, L, damp, memory_limit=memory_limit)
        except (MethodError, PlanMemoryError) as error:
            if method != "auto":
                raise
            if isinstance(error, PlanMemoryError):
                warn(f"falling back to LSMR. {error}")
        else:
            if method == "fourier" and plan.inverse.form != "circulant":
                raise MethodError(f'method: "fourier" needs A and L circular, here {plan!r}; use method="border"')
            return plan
    elif method in ("fourier", "border"):
        raise MethodError(f'method: {method!r} with L needs damp > 0 in every item; use method="lsmr"')
    return KrylovStack(A, L, damp)


def _mirrors_well(A: LinearOperator, damp: Tensor | float) -> bool:
    """Tell whether reflect or replicate padding is better served by the border than by LSMR."""
    if not (isinstance(A, Convolution) and Mirror.exists(A) and bool((torch.as_tensor(damp) > 0).all())):
        return False
    return A.ndim <= 2 and (A.c_in + A.c_out) // A.groups <= _MIRRORED_CHANNELS


def _check_rcond(rcond: Any, damp: Tensor | float, method: str) -> bool:
    """Tell whether there is a rank to decide and the user's threshold for it."""
    if rcond is None:
        return False
    if isinstance(rcond, bool) or not isinstance(rcond, numbers.Real) or not 0 <= float(rcond) < 1:
        raise ArgumentError(f"rcond: expected a number in [0, 1) or None, got {rcond!r}")
    chosen = bool((torch.as_tensor(damp) == 0).any())
    if chosen and method in KRYLOV:
        raise MethodError(
            f'rcond: method "{method}" decides no rank; use method="auto", "separable", "fourier", "border" or "svd", '
            f"or damp > 0"
        )
    return chosen


def _svd(A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None) -> SingularValuePlan:
    """The dense decomposition."""
    return SingularValuePlan(A, damp, **rank_options(A, memory_limit, rcond))


def _with_rcond(
    A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None, method: str
) -> CapacitancePlan | SingularValuePlan:
    """A plan that takes the user's threshold: the dense decomposition of a small A, else the direct border."""
    if method == "auto" and SingularValuePlan.is_quick(A):
        return _svd(A, damp, memory_limit, rcond)
    damping = torch.as_tensor(damp)
    try:
        if bool((damping == 0).all()):
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=memory_limit, rcond=rcond)
        raise MethodError("some items have damp > 0")
    except (MethodError, PlanMemoryError) as error:
        if method == "border":
            circulant = isinstance(A, Convolution) and Embedding.exists(A) and Embedding(A).is_circulant
            raise MethodError(
                f'rcond: method="border" decides a rank where it is direct, and here it is not ({error}); use '
                f'method="{"fourier" if circulant else "svd"}", or damp > 0'
            ) from None
    return _svd(A, damp, memory_limit, rcond)


def fallback(A: LinearOperator, damp: Tensor | float, plan: Plan, rcond: float | None) -> Plan | None:
    """The plan that is asked about the items that "auto" leaves unconverged; None where there is no other way.

    A dense decomposition knows every singular value, and for small problems costs no more than a failed iteration.
    """
    resort = plan.worker.fallback
    if resort is LastResort.NOTHING:
        return None
    if SingularValuePlan.is_quick(A):
        return _svd(A, damp, None, rcond)
    if resort is LastResort.BORDER:
        try:
            return _border(A, damp, None)
        except (MethodError, PlanMemoryError):
            return krylov_plan(A, damp, "lsmr")
    if resort is LastResort.DENSE or rcond is not None:
        return None
    if resort is LastResort.PRECONDITIONED_LSMR:
        return TrialPlan(A, damp, None, preconditioned=True)
    # LSMR is no last resort where another iteration of A has failed
    return KrylovPlan(A, damp, "lsmr", max_iter=None if plan.worker.iterates else PATIENCE)


def penalty_fallback(A: LinearOperator, L: LinearOperator, damp: Tensor | float, plan: Plan) -> PenalisedPlan | None:
    """The plan that is asked about items with a penalty that "auto" leaves unconverged; None where there is none."""
    if DenseStack.is_quick(A, L, damp):
        return DenseStack(A, L, damp)
    return KrylovStack(A, L, damp) if plan.worker.fallback is LastResort.LSMR else None


def _transposed(A: LinearOperator, damp: Tensor | float, method: str, memory_limit: int | None) -> AdjointPlan | None:
    """The plan of the adjoint of a convolution; None for other operators, and where an iteration would serve it."""
    if not (isinstance(A, Adjoint) and isinstance(A.operator, Convolution)):
        return None
    plan = route(A.operator, damp, method=method, memory_limit=memory_limit)
    return None if plan.worker.iterates else AdjointPlan(A, plan, damp)


def _with_rows(
    A: LinearOperator, damp: Tensor | float, method: str, memory_limit: int | None, L: LinearOperator | None = None
) -> MissingPlan | WeightedPlan | None:
    """The plan of a convolution behind a mask, crop or diagonal, through that of the convolution; None without one."""
    damping, rows = torch.as_tensor(damp, dtype=torch.float64), None
    if isinstance(A, (Product, Scaled)) and bool((damping > 0).all()):
        rows = MeasuredRows.of(A)
    if rows is None or not isinstance(rows.core, Convolution):
        return None
    weight = rows.uniform()
    if weight is not None and not are_scattered(rows.scale == 0, rows.core.ndim):
        return None
    try:
        if weight is None:
            return WeightedPlan(A, rows, damping, L)
        core_damp, B = damping / weight.double().sqrt(), rows.core.to(dtype=double(A.dtype))
        if L is None:
            inner: Plan = route(B, core_damp, method=method, memory_limit=memory_limit)
        else:
            inner = penalty_plan(B, L.to(dtype=B.dtype), core_damp, method=method, memory_limit=memory_limit)
    except MethodError:
        return None
    if inner.worker.iterates:
        return None
    if isinstance(inner.worker, (BorderPlan, StackedPlan)):
        inverse = inner.worker.inverse
        # with the missing outputs in the border an answer costs about two on the border alone
        if inverse.unknowns and inverse.factorise_if_cheaper(tuple(inverse.embedding.batch_shape), solves=2) is None:
            for plan in (MissingBorderPlan, MasksPerItemPlan):
                with contextlib.suppress(MethodError):
                    return plan(A, rows, damping, L)
    return MissingPlan(A, rows, inner, damping, L)


def _varying(
    A: LinearOperator, damp: Tensor | float, method: str, L: LinearOperator | None = None
) -> VaryingPlan | None:
    """The plan of a convolution whose kernel varies; None for other operators, and where LSMR should be faster."""
    if not bool((torch.as_tensor(damp) > 0).all()):
        return None
    try:
        return VaryingPlan(A, damp, L, refuse_if_slower=method == "auto")
    except MethodError:
        return None


def _border(A: LinearOperator, damp: Tensor | float, memory_limit: int | None) -> Plan:
    """The border method: direct where it can be and that is worth it, else by iteration."""
    volume = Planes.of(A, damp, memory_limit)
    if volume is not None and isinstance(A, Convolution):
        way = AxisAsChannels.of(A, volume.axis)
        with contextlib.suppress(MethodError, PlanMemoryError):  # the volume's own takes less memory
            return ReducedPlan(way, BorderPlan(way.B, damp, memory_limit=memory_limit), damp)
    damping = torch.as_tensor(damp)
    if bool((damping == 0).all()):
        try:
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=memory_limit, refuse_if_slower=True)
        except (MethodError, PlanMemoryError):
            pass  # the iteration needs neither a square symbol nor the memory of a dense matrix
    return BorderPlan(A, damp, memory_limit=memory_limit)
