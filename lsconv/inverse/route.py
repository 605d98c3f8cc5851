"""Which method answers which (operator, damping): one table in one function, and one for problems with a penalty."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.memory import allowed_bytes
from lsconv.border.plan import BorderPlan
from lsconv.border.reflected_padding import Mirror
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    MethodError,
    PlanMemoryError,
    warn,
)
from lsconv.factored.batch_axes import Reduction
from lsconv.factored.direct_plan import DirectPlan
from lsconv.factored.kronecker import Factors, SeparablePlan
from lsconv.factored.normal_equations import NormalEquationsPlan
from lsconv.factored.patch_matrix import PatchPlan
from lsconv.factored.singular_values import SingularValuePlan
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.fourier.dtypes import default_rcond, direct_rtol
from lsconv.fourier.embedding import Embedding
from lsconv.inverse.plans import (
    KRYLOV,
    LEAST_SQUARES,
    SQUARE,
    FourierPlan,
    KrylovPlan,
    KrylovStack,
    Plan,
)
from lsconv.inverse.reduced_plan import ReducedPlan, core
from lsconv.krylov.loop.stopping import default_rtol
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.convolution import Convolution

__all__ = ["BORDER_PLANS", "METHODS", "fallback", "penalty_plan", "route"]

METHODS = ("auto", "matrix", "separable", "normal", "fourier", "border", "svd", *KRYLOV)
BORDER_PLANS = (BorderPlan, CapacitancePlan)
# Of random 5x5 kernels, 8 to 8 channels, 64², float32, damp 0.1, the border takes four times as long as LSMR. In three
# dimensions, damp 1e-2, 16³, its iteration gets stuck.
_MIRRORED_CHANNELS = 4
# Unknowns or equations up to which the dense decomposition, of about a second, answers what other methods leave open.
_SMALL = 512
# Operations of dense matrices that take the time of an answer of the border (of one of hundreds of iterations), in
# those of a Fourier transform of the field: benchmarks/routes.py shows both sides of the choice.
_BORDER_TRANSFORMS, _KRYLOV_TRANSFORMS = 200, 2000
# Operations of dense matrices that take no longer than the calls which any other answer consists of.
_FREE_OPERATIONS = 5e7
_NOT_LINEAR = '"hybrid" chooses the damping by y, so its answer is not linear in y and has no adjoint; use "lsqr"'


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
    convolution with zero padding, or circular with crop        "border"; LSMR where its plan would not fit, or where
                                                                damp = 0 and the shapes imply a null space
    convolution of stride 1, reflect or replicate padding       "border" in one or two dimensions with damp > 0 and at
                                                                most four channels a group, in and out together;
                                                                otherwise LSMR
    any other operator                                          "lsmr", preconditioned where that is safe
    ==========================================================  ==================================================

    Margins of zeros around a kernel are trimmed before.

    An ``rcond`` of the user's goes to "matrix", "separable" and "fourier", to "border" where that is direct, and else to "svd", the dense
    decomposition (:class:`SingularValuePlan`); the iterations decide no rank. For small problems "svd" also gives the
    answers that the others are not sure of (:func:`fallback`).

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

    ``preconditioner="auto"`` gives the first four a :class:`CirculantPreconditioner` when ``damp > 0`` and A is
    made of a convolution. Without damping none is used, because on a rank-deficient operator a preconditioner on the
    solution side selects another solution than the minimum-norm one, and on the residual side weighs inconsistent data.
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
    options: dict[str, Any] = {"memory_limit": memory_limit, "rcond": rcond}
    if isinstance(A, Convolution) and method != "svd":
        smaller = Reduction.trimmed(A)
        if smaller is None and method == "auto" and not (started or PatchPlan.serves(A)):
            smaller = Reduction.without_batch_axes(A)
        if smaller is not None and (smaller.same_shapes or (method == "auto" and not started)):
            asked = {"method": method, "preconditioner": preconditioner, "started": started, **options}
            plan = route(smaller.B, smaller.damp(damp), **asked)
            return plan if smaller.same_shapes else ReducedPlan(smaller, plan, damp)
    if method == "normal":
        return NormalEquationsPlan(A, damp, **_decided(A, memory_limit, rcond))
    if method in ("matrix", "separable"):
        return _factored(A, damp, method, **options)
    structured = A if isinstance(A, Convolution) and Embedding.exists(A) else None
    if method == "auto" and not started and (plan := _cheap_factored(A, damp, **options)) is not None:
        return plan
    if method == "fourier" or (method == "auto" and structured is not None and Embedding(structured).is_circulant):
        return FourierPlan(A, damp, rcond=rcond)
    if method == "svd" or (chosen and method == "auto" and structured is None):
        return _svd(A, damp, memory_limit, rcond)
    if chosen:
        return _with_rcond(A, damp, memory_limit, rcond, method)
    if method == "border":
        return _border(A, damp, memory_limit)
    bordered = structured is not None or _mirrors_well(A, damp)
    if method == "auto" and bordered:
        try:
            return _border(A, damp, memory_limit)
        except MethodError:
            pass  # a null space at damp = 0, which LSMR handles
        except PlanMemoryError as error:
            warn(f"falling back to LSMR. {error}")
    name = "lsmr" if method == "auto" else method
    if name not in LEAST_SQUARES:
        _check_suits(A, damp, name)
        return KrylovPlan(A, damp, name, _own_preconditioner(A, name, preconditioner))
    return KrylovPlan(A, damp, name, _preconditioner(A, damp, preconditioner, name))


def _factored(
    A: LinearOperator, damp: Tensor | float, method: str, *, memory_limit: int | None, rcond: float | None
) -> PatchPlan | SeparablePlan:
    """The plan of small matrices that was asked for."""
    if not isinstance(A, Convolution) or (method == "matrix" and not PatchPlan.serves(A)):
        raise MethodError(
            f'method: "matrix" needs a convolution whose outputs read disjoint patches, "separable" one with a '
            f'separable kernel, got {method!r} and {A!r}; use method="auto"'
        )
    kind = PatchPlan if method == "matrix" else SeparablePlan
    return kind(A, damp, **_decided(A, memory_limit, rcond))


def _decided(A: LinearOperator, memory_limit: int | None, rcond: float | None) -> dict[str, Any]:
    """The options of a direct plan."""
    return {
        "rcond": default_rcond(A.dtype) if rcond is None else float(rcond),
        "rtol": direct_rtol(A.dtype),
        "allowed": allowed_bytes(memory_limit, A.device),
    }


def _cheap_factored(
    A: LinearOperator, damp: Tensor | float, *, memory_limit: int | None, rcond: float | None
) -> DirectPlan | None:
    """The plan of small matrices where A has one that is cheaper than all others."""
    if not isinstance(A, Convolution):
        return None
    options = _decided(A, memory_limit, rcond)
    try:
        if PatchPlan.serves(A):
            return PatchPlan(A, damp, **options)
        if Embedding.exists(A) and Embedding(A).is_circulant:
            return None
        factors = Factors.of(A)
        if factors is not None and _axes_are_cheap(A, damp, factors):
            return SeparablePlan(A, damp, factors=factors, **options)
    except (MethodError, PlanMemoryError):
        pass  # others need less memory, or no separable kernel
    try:
        return NormalEquationsPlan(A, damp, **options) if _unknowns_are_few(A, damp) else None
    except (MethodError, PlanMemoryError):
        return None


def _axes_are_cheap(A: Convolution, damp: Tensor | float, factors: Factors) -> bool:
    """Predict that decomposing the axes costs less than the border, or than iterations where there is none."""
    cells = max(A.in_numel, A.out_numel)
    bordered = Embedding.exists(A) and bool((torch.as_tensor(damp) > 0).all())
    allowed = _BORDER_TRANSFORMS if bordered else _KRYLOV_TRANSFORMS
    return sum(SeparablePlan.flops(A, factors)) <= allowed * 5 * cells * math.log2(2 * cells)


def _unknowns_are_few(A: Convolution, damp: Tensor | float) -> bool:
    """Predict that the normal equations cost less than the border, or than iterations where that is no smaller than x.

    Without damping they are tried where padding makes A regular and the kernel is longer than x.
    """
    damping = torch.as_tensor(damp)
    operations = NormalEquationsPlan.flops(A) * math.prod(broadcast_shapes(A.batch_shape, damping.shape))
    if bool((damping > 0).all()) and operations <= _FREE_OPERATIONS:
        return True
    outputs = A.out_numel
    long = all(k >= n for k, n in zip(A.kernel_size, A.spatial_in, strict=True)) and outputs >= 2 * A.in_numel
    return long and operations <= _KRYLOV_TRANSFORMS * 5 * outputs * math.log2(2 * outputs)


def penalty_plan(
    A: LinearOperator,
    L: LinearOperator,
    damp: Tensor | float,
    *,
    method: str = "auto",
    memory_limit: int | None = None,
) -> StackedPlan | KrylovStack:
    """The plan for a general L and damp > 0: exact where A and L are convolutions on one grid, otherwise LSMR.

    Raises:
        MethodError: the method asked for cannot serve A and L.
        ArgumentError: an unknown method.
        PlanMemoryError: ``method="border"`` or "fourier" was asked for and the plan would not fit.
    """
    if method not in ("auto", "fourier", "border", "lsmr"):
        raise ArgumentError(f'method: with L expected one of "auto", "fourier", "border", "lsmr", got {method!r}')
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
    """Whether reflect or replicate padding is better served by the border than by LSMR."""
    if not (isinstance(A, Convolution) and Mirror.exists(A) and bool((torch.as_tensor(damp) > 0).all())):
        return False
    return A.ndim <= 2 and (A.c_in + A.c_out) // A.groups <= _MIRRORED_CHANNELS


def _check_rcond(rcond: Any, damp: Tensor | float, method: str) -> bool:
    """Whether there is a rank to decide and the user's threshold for it."""
    if rcond is None:
        return False
    if isinstance(rcond, bool) or not isinstance(rcond, numbers.Real) or not 0 <= float(rcond) < 1:
        raise ArgumentError(f"rcond: expected a number in [0, 1) or None, got {rcond!r}")
    chosen = bool((torch.as_tensor(damp) == 0).any())
    if chosen and method in KRYLOV:
        raise MethodError(
            f'rcond: method "{method}" decides no rank; use method="auto", "fourier", "border" or "svd", or damp > 0'
        )
    return chosen


def _svd(A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None) -> SingularValuePlan:
    """The dense decomposition."""
    return SingularValuePlan(A, damp, **_decided(A, memory_limit, rcond))


def _with_rcond(
    A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None, method: str
) -> CapacitancePlan | SingularValuePlan:
    """A plan that takes the user's threshold: the dense decomposition of a small A, else the direct border."""
    if method == "auto" and _is_small(A):
        return _svd(A, damp, memory_limit, rcond)
    damping = torch.as_tensor(damp)
    try:
        if bool((damping == 0).all()):
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=memory_limit, rcond=rcond)
        raise MethodError("some items have damp > 0")
    except (MethodError, PlanMemoryError) as error:
        if method == "border":
            raise MethodError(
                f'rcond: method="border" decides a rank where it is direct, and here it is not ({error}); use '
                f'method="svd", or damp > 0'
            ) from None
    return _svd(A, damp, memory_limit, rcond)


def _is_small(A: LinearOperator) -> bool:
    """Tell whether the dense decomposition of A, and of all items of its batch, takes a second or less."""
    small = min(A.in_numel, A.out_numel) <= _SMALL and max(A.in_numel, A.out_numel) <= 4 * _SMALL
    return small and math.prod(A.batch_shape) * A.in_numel * A.out_numel <= 4 * _SMALL**2


def fallback(
    A: LinearOperator, damp: Tensor | float, plan: Plan, rcond: float | None
) -> KrylovPlan | SingularValuePlan | None:
    """The plan that is asked about the items that "auto" leaves unconverged; None where there is no other way.

    A dense decomposition knows every singular value, and for small problems costs no more than a failed iteration.
    """
    plan = core(plan)
    if isinstance(plan, DirectPlan):
        return None
    if _is_small(A):
        return _svd(A, damp, None, rcond)
    return KrylovPlan(A, damp, "lsmr") if isinstance(plan, BORDER_PLANS) and rcond is None else None


def _border(A: LinearOperator, damp: Tensor | float, memory_limit: int | None) -> BorderPlan | CapacitancePlan:
    """The border method: direct where it can be and that is worth it, else by iteration."""
    damping = torch.as_tensor(damp)
    if bool((damping == 0).all()):
        try:
            return CapacitancePlan(A, tuple(damping.shape), memory_limit=memory_limit, worth=True)
        except (MethodError, PlanMemoryError):
            pass  # the iteration needs neither a square symbol nor the memory of a dense matrix
    return BorderPlan(A, damp, memory_limit=memory_limit)


def _check_suits(A: LinearOperator, damp: Tensor | float, method: str) -> None:
    """Refuse what a square method or hybrid would answer wrongly, and say what to use instead."""
    if bool((torch.as_tensor(damp) > 0).any()):
        if method == "hybrid":
            raise MethodError('method: "hybrid" chooses the damping itself, got damp > 0; use "lsqr" or "lsmr" with it')
        raise MethodError(f'method: "{method}" solves A x = y without damping, got damp > 0; use "lsmr" or "cgls"')
    if method == "hybrid":
        return
    if A.in_shape != A.out_shape:
        raise MethodError(f'method: "{method}" needs a square A, got {A.in_shape} -> {A.out_shape}; use "lsmr"')
    if method in ("cg", "minres") and not _is_hermitian(A):
        raise MethodError(f'method: "{method}" needs A = A^H, which a random vector refutes; use "gmres" or "lsmr"')


def _is_hermitian(A: LinearOperator) -> bool:
    """Whether A and A^H agree on a random vector up to rounding; True where there is no adjoint to compare with."""
    generator = torch.Generator().manual_seed(0)
    shape = (*A.batch_shape, *A.in_shape)
    v = torch.randn(shape, generator=generator, dtype=torch.promote_types(A.dtype, torch.float32)).to(A.device)
    image = A.apply(v)
    try:
        mirrored = A.adjoint(v)
    except NotImplementedError:
        return True
    tolerance = torch.finfo(A.dtype).eps ** 0.5
    return bool(torch.dist(image, mirrored) <= tolerance * torch.linalg.vector_norm(image))


def _own_preconditioner(
    A: LinearOperator, method: str, preconditioner: LinearOperator | str | None
) -> tuple[LinearOperator | None, None]:
    """The M of a square method: the one given, or none."""
    if preconditioner is None or preconditioner == "auto":
        return None, None
    if isinstance(preconditioner, LinearOperator) and method in SQUARE:
        return preconditioner, None
    if isinstance(preconditioner, LinearOperator):
        raise MethodError('preconditioner: "hybrid" takes none; use "lsqr" or "lsmr" with a damp of your own')
    if preconditioner != "circulant":
        raise ArgumentTypeError(
            f'preconditioner: expected "auto", "circulant", None or a LinearOperator, got {preconditioner!r}'
        )
    raise MethodError(
        f'preconditioner: "circulant" approximates (A^H A)^-1, which serves "lsmr", "lsqr", "cgls" and "craig"; '
        f'"{method}" has no use for it'
    )


def _preconditioner(
    A: LinearOperator, damp: Tensor | float, preconditioner: LinearOperator | str | None, method: str
) -> tuple[LinearOperator | None, LinearOperator | None]:
    """M and N."""
    if preconditioner is None:
        return None, None
    if isinstance(preconditioner, LinearOperator):
        side = getattr(preconditioner, "side", None)
        if side is None:
            side = "solution" if preconditioner.in_shape == A.in_shape else "residual"
        return (preconditioner, None) if side == "residual" else (None, preconditioner)
    if preconditioner not in ("auto", "circulant"):
        raise ArgumentTypeError(
            f'preconditioner: expected "auto", "circulant", None or a LinearOperator, got {preconditioner!r}'
        )
    damping = torch.as_tensor(damp)
    # craig's damped problem is that of [A, damp I], which knows no N
    side = "residual" if method == "craig" and bool((damping > 0).any()) else None
    if preconditioner == "auto":
        if not bool((damping > 0).all()):
            return None, None
        try:
            circulant = CirculantPreconditioner(A, damp, side=side)
        except MethodError:
            return None, None
        # N moves x into the null space of A, and below this damping the gradient does not show that it has come back
        least = (torch.finfo(A.dtype).eps / default_rtol(A.dtype)) ** 0.5 * circulant.norm
        if circulant.side == "solution" and not bool((damping >= least).all()):
            return None, None
    else:
        circulant = CirculantPreconditioner(A, damp if bool((damping > 0).all()) else None, side=side)
    return (circulant, None) if circulant.side == "residual" else (None, circulant)
