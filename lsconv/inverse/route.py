"""The choice of a method for an operator and its damping: the first rule of a list that has a plan decides."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import torch
from torch import Tensor

from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.plan import BorderPlan
from lsconv.border.reflected_padding import CopiedPadding
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import ArgumentError, DtypeError, MethodError, PlanMemoryError, warn
from lsconv.factored.axis_channels import AxisAsChannels
from lsconv.factored.dense_svd import SingularValuePlan
from lsconv.fourier.circulant import FourierPlan
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans.adjoint_plan import AdjointPlan
from lsconv.inverse.plans.composed import measured_rows, reduced, transposed, trimmed, varying
from lsconv.inverse.plans.krylov_choice import krylov_plan
from lsconv.inverse.plans.krylov_plan import KRYLOV, KrylovPlan, KrylovStack
from lsconv.inverse.plans.lsmr_then_border import lsmr_then_border
from lsconv.inverse.plans.reduced_plan import ReducedPlan
from lsconv.inverse.plans.request import PlanRequest, Rule
from lsconv.inverse.plans.route_costs import Planes
from lsconv.inverse.plans.small_matrices import SMALL_MATRICES, cheap_small_matrices, small_matrices
from lsconv.krylov.plan import PenalisedPlan, Plan
from lsconv.operators.algebra import Adjoint
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution
from lsconv.operators.dtypes import default_rcond, direct_rtol
from lsconv.operators.memory import allowed_bytes

__all__ = ["METHODS", "border_plan", "penalty_plan", "route", "singular_value_plan"]

METHODS = ("auto", *SMALL_MATRICES, "fourier", "border", "svd", *KRYLOV)
# Up to this many channels a group, in and out together, reflected padding goes to the border; beyond, LSMR is faster.
_COPIED_PADDING_CHANNELS = 4


def route(
    A: LinearOperator,
    damp: Tensor | float = 0.0,
    *,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    memory_limit: int | None = None,
    rcond: float | None = None,
    needs_krylov: bool = False,
) -> Plan:
    r"""The plan that solves :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|x\|^2`.

    The rules are asked in this order; with ``method="auto"`` they decide:

    ==============  ====================================================  ============================================
    rule            operator                                              method
    ==============  ====================================================  ============================================
    reduced         kernel of extent one along some axes, or with         that of the kernel without these axes, which
                    margins of zeros                                      become batch dimensions, or without margins
    measured_rows   mask, crop or constant diagonal before a              the plan of the convolution, and conjugate
                    convolution, damped, that leaves out less than 40 %   gradients on the outputs left out
                    and no large gap                                      (:class:`MissingPlan`); or these as cells of
                                                                          the border (:class:`MissingBorderPlan`)
                    varying diagonal before a convolution, damped; a      conjugate gradients, preconditioned by the
                    mask per item where the border is iterated on         border of the mean weight
                                                                          (:class:`WeightedPlan`)
    transposed      adjoint of a convolution (a transposed convolution)   the adjoint of its plan
                                                                          (:class:`AdjointPlan`), LSMR first as there
    varying         convolution whose kernel varies, damped, behind a     conjugate gradients, preconditioned by tiles
                    mask or diagonal or not                               with local kernels (:class:`VaryingPlan`),
                                                                          where that pays
    small           kernel that reads disjoint patches (1x1, or no        "matrix": one small matrix per group
                    larger than the stride), or all of the input at once
                    separable kernel, any padding mode, stride and        "separable", where that costs less; kept and
                    dilation                                              damped, the border's factors once they pay
                    kernel longer than x (deconvolution for a short       "normal": the normal equations, where they
                    response), or few unknowns, damped                    are not too ill-conditioned
                    even kernel of one channel, reflect padding that      an iteration in the basis of cosines
                    keeps the size; undamped where the rank is certain    (:class:`CosinePlan`)
    circulant       circular convolution that nothing crops               "fourier"
    dense           no convolution, and an ``rcond`` of the user's        "svd" (:class:`SingularValuePlan`)
    thresholded     convolution, and an ``rcond`` of the user's           "svd" where that is quick, else "border"
                                                                          where that is direct, else "svd"
    bordered        of those of the next row: layers (several channels    "lsmr" for as many iterations as cost what
                    a group); blurs with so much damping that LSMR        the setup of the border does, then "border"
                    should converge before the border is set up;          for what has not converged
                    undamped ones only where outputs are 1.5 times as     (:class:`LsmrThenBorderPlan`); "border" alone
                    many as inputs, or the reverse, and blurs with a      once all solves have cost as much.
                    stride                                                Preconditioned for damped lines and volumes
                                                                          without padding
                    convolution with zero padding, or circular with crop  "border"; where its plan would not fit, or
                                                                          where damp = 0 and the shapes imply a null
                                                                          space, the rules below
                    convolution of stride 1, reflect or replicate         "border" in one or two dimensions with
                    padding                                               damp > 0 and at most four channels a group,
                                                                          in and out together
    iterated        any other operator                                    "lsmr", preconditioned where that is safe
    ==============  ====================================================  ============================================

    An ``rcond`` of the user's goes to "matrix", "separable", "normal" and "fourier" too; the iterations decide no rank.
    For small problems "svd" also solves for the items that the others leave unconverged
    (:mod:`lsconv.inverse.fallback`).

    A volume of one channel a group and few planes along an axis goes to "border" as an image whose channels are these
    planes (:class:`Planes`). "border" is direct (:class:`CapacitancePlan`) for ``damp = 0`` and a square operator whose
    border can be factorised in the time of some two hundred iterations; otherwise it solves by factors of the border
    where these cost less than iterations on it, and iterates elsewhere (:class:`BorderPlan`).

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

    ``preconditioner="auto"`` gives the first four a :class:`CirculantPreconditioner` when A is made of blurs (one
    channel a group) and damp is not too small for its side in this dtype; "circulant" takes the solution side where M
    is not served. Without damping none is used, because on a rank-deficient operator a preconditioner on the solution
    side selects another solution than the minimum-norm one, and on the residual side weighs inconsistent data.
    The square methods use an operator given as ``preconditioner`` as their M; "hybrid" takes none.

    With ``needs_krylov`` the caller has options that only a Krylov method takes (a start, a callback), and "auto"
    leaves out the small matrices.

    Raises:
        MethodError: the method cannot serve the operator; the message names one that can.
        PlanMemoryError: the method was asked for and its plan would not fit.
    """
    if method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if A.dtype in (torch.float16, torch.bfloat16):
        raise DtypeError(f"A: {A.dtype} can be applied, not inverted; convert with A.to(dtype=torch.float32)")
    request = PlanRequest(
        _first,
        damp,
        method,
        preconditioner=preconditioner,
        memory_limit=memory_limit,
        rcond=rcond,
        needs_krylov=needs_krylov,
    )
    if rcond is not None:
        _check_rcond(request)
    plan: Plan = _first(A, request)
    return plan


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
    plan: PenalisedPlan = _first(A, PlanRequest(_first, damp, method, L, memory_limit=memory_limit))
    return plan


# ---------------------------------------------------------------------- the rules


def small(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The plan of small matrices that the user asked for, or one that is cheaper than all other plans."""
    if request.method not in SMALL_MATRICES and not request.any_method:
        return None
    options = _rank_options(A, request.memory_limit, request.rcond)
    if request.any_method:
        return cheap_small_matrices(A, request.damp, **options)
    return small_matrices(A, request.damp, request.method, **options)


def circulant(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The inverse of every frequency's matrix, where nothing crops the circulant."""
    if request.method != "fourier" and not (request.method == "auto" and _is_circulant(A)):
        return None
    try:
        return FourierPlan(A, request.damp, rcond=request.rcond, memory_limit=request.memory_limit)
    except PlanMemoryError as error:
        if request.method == "fourier" or request.decides_rank:
            raise
        warn(f"falling back to LSMR. {error}")
        return KrylovPlan(A, request.damp, "lsmr")


def dense(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The singular values of the matrix, where they are asked for, or where no other plan decides the rank of A."""
    if request.method == "svd" or (request.method == "auto" and request.decides_rank and not _is_embedded(A)):
        return singular_value_plan(A, request.damp, request.memory_limit, request.rcond)
    return None


def thresholded(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """A plan that takes the user's threshold: the dense decomposition of a small A, else the direct border."""
    if not request.decides_rank:
        return None
    damp, limit, rcond = request.damp, request.memory_limit, request.rcond
    if request.method == "auto" and SingularValuePlan.is_quick(A):
        return singular_value_plan(A, damp, limit, rcond)
    damping = torch.as_tensor(damp)
    try:
        if bool((damping == 0).all()):
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=limit, rcond=rcond)
        raise MethodError("some items have damp > 0")
    except (MethodError, PlanMemoryError) as error:
        if request.method == "border":
            raise MethodError(
                f'rcond: method="border" decides a rank where it is direct, and here it is not ({error}); use '
                f'method="{"fourier" if _is_circulant(A) else "svd"}", or damp > 0'
            ) from None
    return singular_value_plan(A, damp, limit, rcond)


def bordered(A: LinearOperator, request: PlanRequest) -> Plan | None:
    """The border method where it is asked for, or serves A and fits; LSMR first where its setup should take longer."""
    damp, limit = request.damp, request.memory_limit
    if request.method == "border":
        return border_plan(A, damp, limit, Planes.of(A, damp, limit))
    if request.method != "auto" or not (_is_embedded(A) or _copied_padding_serves(A, request)):
        return None
    planes = Planes.of(A, damp, limit)
    if request.any_method and isinstance(A, Convolution) and _is_embedded(A):
        lsmr_first = lsmr_then_border(A, damp, planes)
        if lsmr_first is not None:
            return lsmr_first
    try:
        return border_plan(A, damp, limit, planes)
    except MethodError:
        return None  # with damp = 0 the border refuses an A that has a null space, for which LSMR serves
    except PlanMemoryError as error:
        warn(f"falling back to LSMR. {error}")
        return None


def iterated(A: LinearOperator, request: PlanRequest) -> Plan:
    """The Krylov method that the user asked for, or LSMR."""
    name = "lsmr" if request.method == "auto" else request.method
    return krylov_plan(A, request.damp, name, request.preconditioner)


def stacked(A: LinearOperator, request: PlanRequest) -> PenalisedPlan | None:
    """The border or the frequencies of A and L together, where they are convolutions on one grid."""
    method, L = request.method, request.L
    assert L is not None
    if method == "lsmr" or not request.damped:
        if method in ("fourier", "border"):
            raise MethodError(f'method: {method!r} with L needs damp > 0 in every item; use method="lsmr"')
        return None
    try:
        plan = StackedPlan(A, L, request.damp, memory_limit=request.memory_limit)
    except (MethodError, PlanMemoryError) as error:
        if method != "auto":
            raise
        if isinstance(error, PlanMemoryError):
            warn(f"falling back to LSMR. {error}")
        return None
    if method == "fourier" and plan.inverse.form != "circulant":
        raise MethodError(f'method: "fourier" needs A and L circular, here {plan!r}; use method="border"')
    return plan


def iterated_stack(A: LinearOperator, request: PlanRequest) -> PenalisedPlan:
    """LSMR on the stack of A and L."""
    assert request.L is not None
    return KrylovStack(A, request.L, request.damp)


RULES: tuple[Rule, ...] = (
    reduced, measured_rows, transposed, varying, small, circulant, dense, thresholded, bordered, iterated,
)  # fmt: skip
PENALTY_RULES: tuple[Rule, ...] = (measured_rows, varying, trimmed, stacked, iterated_stack)


def _first(A: LinearOperator, request: PlanRequest) -> Any:
    """The plan of the first rule that has one; the last always does."""
    plans = (rule(A, request) for rule in (RULES if request.L is None else PENALTY_RULES))
    return next(plan for plan in plans if plan is not None)


# ---------------------------------------------------------------------- tests and plans of the rules


def _is_embedded(A: LinearOperator) -> bool:
    """Tell whether A is a convolution that truncates a block-circulant operator."""
    return isinstance(A, Convolution) and Embedding.serves(A)


def _is_circulant(A: LinearOperator) -> bool:
    """Tell whether A is a convolution whose circulant nothing crops."""
    return isinstance(A, Convolution) and Embedding.serves(A) and Embedding(A).is_circulant


def _copied_padding_serves(A: LinearOperator, request: PlanRequest) -> bool:
    """Tell whether reflect or replicate padding is better served by the border than by LSMR."""
    if not (isinstance(A, Convolution) and CopiedPadding.serves(A) and request.damped):
        return False
    return A.ndim <= 2 and (A.c_in + A.c_out) // A.groups <= _COPIED_PADDING_CHANNELS


def _check_rcond(request: PlanRequest) -> None:
    """Refuse an rcond that is no threshold, and one for a method that decides no rank."""
    rcond: Any = request.rcond
    if isinstance(rcond, bool) or not isinstance(rcond, numbers.Real) or not 0 <= float(rcond) < 1:
        raise ArgumentError(f"rcond: expected a number in [0, 1) or None, got {rcond!r}")
    if request.decides_rank and request.method in KRYLOV:
        raise MethodError(
            f'rcond: method "{request.method}" decides no rank; use method="auto", "separable", "fourier", "border" or '
            f'"svd", or damp > 0'
        )


def _rank_options(A: LinearOperator, memory_limit: int | None, rcond: float | None) -> dict[str, Any]:
    """The options that every direct plan takes."""
    return {
        "rcond": default_rcond(A.dtype) if rcond is None else float(rcond),
        "rtol": direct_rtol(A.dtype),
        "allowed": allowed_bytes(memory_limit, A.device),
    }


def singular_value_plan(
    A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None
) -> SingularValuePlan:
    """The dense decomposition."""
    return SingularValuePlan(A, damp, **_rank_options(A, memory_limit, rcond))


def border_plan(A: LinearOperator, damp: Tensor | float, memory_limit: int | None, planes: Planes | None) -> Plan:
    """The border method: on the planes of a volume where these are given, else direct where that is faster.

    BorderPlan serves where neither can be made. The adjoint of a convolution is served by the plan of the convolution.
    """
    if isinstance(A, Adjoint):
        return AdjointPlan(A, border_plan(A.operator, damp, memory_limit, planes), damp)
    if planes is not None and isinstance(A, Convolution):
        with contextlib.suppress(MethodError, PlanMemoryError):  # the border may serve the volume itself
            image = AxisAsChannels.of(A, planes.axis)
            return ReducedPlan(image, BorderPlan(image.B, damp, memory_limit=memory_limit), damp)
    damping = torch.as_tensor(damp)
    if bool((damping == 0).all()):
        try:
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=memory_limit, refuse_if_slower=True)
        except (MethodError, PlanMemoryError):
            pass  # BorderPlan needs neither a square symbol nor the memory of a dense matrix
    return BorderPlan(A, damp, memory_limit=memory_limit)
