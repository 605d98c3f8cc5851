"""Which method answers which (operator, damping): one table in one function, and the plans it hands out.

A plan is the setup of a method for one operator and damping: ``solve`` gives a certified :class:`Solution`,
``apply`` and ``adjoint`` the bare linear maps that ``pinv`` wears.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.memory import allowed_bytes
from lsconv.border.plan import BorderPlan
from lsconv.border.reflected_padding import Mirror
from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    MethodError,
    PlanMemoryError,
    warn,
)
from lsconv.factored.singular_values import SingularValuePlan
from lsconv.fourier.circulant import CirculantPlan
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.fourier.dtypes import default_rcond, direct_rtol
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.spectrum import norm
from lsconv.krylov.cg import cg
from lsconv.krylov.cgls import cgls
from lsconv.krylov.craig import craig
from lsconv.krylov.gmres import gmres
from lsconv.krylov.gradients.backward_solves import gram_by_cg, normal_by_apply
from lsconv.krylov.hybrid import hybrid
from lsconv.krylov.loop.solution import Solution
from lsconv.krylov.loop.stopping import Tolerances, certified, default_rtol
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.krylov.minres import minres
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution

__all__ = ["BORDER_PLANS", "METHODS", "FourierPlan", "KrylovPlan", "Plan", "fallback", "route"]

_LEAST_SQUARES: dict[str, Callable[..., Solution]] = {"lsmr": lsmr, "lsqr": lsqr, "cgls": cgls, "craig": craig}
_SQUARE: dict[str, Callable[..., Solution]] = {"cg": cg, "minres": minres, "gmres": gmres}
_KRYLOV = {**_LEAST_SQUARES, **_SQUARE, "hybrid": hybrid}
METHODS = ("auto", "fourier", "border", "svd", *_KRYLOV)
BORDER_PLANS = (BorderPlan, CapacitancePlan)
# Of random 5x5 kernels, 8 to 8 channels, 64², float32, damp 0.1, the border takes four times as long as LSMR. In three
# dimensions, damp 1e-2, 16³, its iteration gets stuck.
_MIRRORED_CHANNELS = 4
# Unknowns or equations up to which the dense decomposition, of about a second, answers what other methods leave open.
_SMALL = 512
_NOT_LINEAR = '"hybrid" chooses the damping by y, so its answer is not linear in y and has no adjoint; use "lsqr"'


class Plan(Protocol):
    """The setup of one method for one operator and damping."""

    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``."""

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``, bare."""

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g`` for A of full column rank; None where it would cost more than :meth:`adjoint`."""


def route(
    A: LinearOperator,
    damp: Tensor | float = 0.0,
    *,
    method: str = "auto",
    preconditioner: LinearOperator | str | None = "auto",
    memory_limit: int | None = None,
    rcond: float | None = None,
) -> Plan:
    r"""The plan that solves :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2\|x\|^2`.

    With ``method="auto"``:

    ==========================================================  ==================================================
    operator                                                    method
    ==========================================================  ==================================================
    circular convolution that nothing crops                     "fourier"
    convolution with zero padding, or circular with crop        "border"; LSMR where its plan would not fit, or where
                                                                damp = 0 and the shapes imply a null space
    convolution of stride 1, reflect or replicate padding       "border" in one or two dimensions with damp > 0 and at
                                                                most four channels a group, in and out together;
                                                                otherwise LSMR
    any other operator                                          "lsmr", preconditioned where that is safe
    ==========================================================  ==================================================

    An ``rcond`` of the user's goes to "fourier", to "border" where that is direct, and else to "svd", the dense
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

    Raises:
        MethodError: the method cannot serve the operator; the message names one that can.
        PlanMemoryError: ``method="border"`` was asked for and its plan would not fit.
    """
    if method not in METHODS:
        raise ArgumentError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if A.dtype in (torch.float16, torch.bfloat16):
        raise DtypeError(f"A: {A.dtype} can be applied, not inverted; convert with A.to(dtype=torch.float32)")
    chosen = _check_rcond(rcond, damp, method)
    structured = A if isinstance(A, Convolution) and Embedding.exists(A) else None
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
    if name not in _LEAST_SQUARES:
        _check_suits(A, damp, name)
        return KrylovPlan(A, damp, name, _own_preconditioner(A, name, preconditioner))
    return KrylovPlan(A, damp, name, _preconditioner(A, damp, preconditioner, name))


def _mirrors_well(A: LinearOperator, damp: Tensor | float) -> bool:
    """Whether reflect or replicate padding is better served by the border than by LSMR."""
    if not (isinstance(A, Convolution) and Mirror.exists(A) and bool((torch.as_tensor(damp) > 0).all())):
        return False
    return A.ndim <= 2 and (A.c_in + A.c_out) // A.groups <= _MIRRORED_CHANNELS


def _check_rcond(rcond: Any, damp: Tensor | float, method: str) -> bool:
    """Whether there is a rank to decide and the user's threshold for it."""
    if rcond is None:
        return False
    if isinstance(rcond, bool) or not isinstance(rcond, (int, float)) or not 0 <= rcond < 1:
        raise ArgumentError(f"rcond: expected a number in [0, 1) or None, got {rcond!r}")
    chosen = bool((torch.as_tensor(damp) == 0).any())
    if chosen and method in _KRYLOV:
        raise MethodError(
            f'rcond: method "{method}" decides no rank; use method="auto", "fourier", "border" or "svd", or damp > 0'
        )
    return chosen


def _svd(A: LinearOperator, damp: Tensor | float, memory_limit: int | None, rcond: float | None) -> SingularValuePlan:
    """The dense decomposition."""
    return SingularValuePlan(
        A,
        damp,
        rcond=default_rcond(A.dtype) if rcond is None else float(rcond),
        rtol=direct_rtol(A.dtype),
        allowed=allowed_bytes(memory_limit, A.device),
    )


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
    if isinstance(plan, SingularValuePlan):
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
    if isinstance(preconditioner, LinearOperator) and method in _SQUARE:
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


class FourierPlan:
    """The exact inverse of a block-circulant operator (:class:`CirculantPlan`), with certificates."""

    def __init__(self, A: LinearOperator, damp: Tensor | float = 0.0, *, rcond: float | None = None) -> None:
        self.plan = CirculantPlan(A, damp, rcond=rcond)  # type: ignore[arg-type]
        self.A = self.plan.A
        self.precise = self.A.to(dtype=torch.complex128 if self.A.is_complex else torch.float64)
        self.norm = norm(self.A.with_parameters([self.A.weight.detach()])).double()

    def solve(
        self, y: Tensor, *, rtol: float | None = None, atol: float = 0.0, max_iter: int | None = None
    ) -> Solution:
        """The certified solution for ``y``; nothing iterates, so ``max_iter`` has no effect."""
        plan, A = self.plan, self.A
        x = plan.solve_unrounded(y.detach())
        batch = x.shape[: x.ndim - len(A.in_shape)]
        tolerances = Tolerances.of(A.dtype, direct_rtol(A.dtype) if rtol is None else rtol, atol)
        solution = certified(
            self.precise,
            x.to(self.precise.dtype),
            y.to(self.precise.dtype).expand(*batch, *A.out_shape),
            plan.damp.expand(batch),
            tolerances=tolerances,
            dtype=A.dtype,
            norm_bound=self.norm,
            rcond=plan.rcond,
            truncated=True,
            rounding=torch.finfo(plan.dtype).eps,
        )
        if plan.rank is None:
            return solution
        return solution.with_rank(plan.rank, plan.undecided)

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``."""
        return self.plan.solve(y)

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`."""
        return self.plan.solve_adjoint(v)

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        return normal_by_apply(self.A, self.plan.damp, lambda y, _: self.plan.solve(y), g, rtol=rtol)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """None: applying twice costs next to nothing."""
        return None

    def __repr__(self) -> str:
        return (
            f"FourierPlan(grid={self.plan.embedding.grid}, factors={self.plan.nbytes / 2**20:.1f} MiB, {self.A.device})"
        )


class KrylovPlan:
    """A Krylov method with its preconditioner; the only setup is that of the preconditioner."""

    def __init__(
        self,
        A: LinearOperator,
        damp: Tensor | float,
        method: str,
        preconditioners: tuple[LinearOperator | None, LinearOperator | None] = (None, None),
    ) -> None:
        self.A, self.damp, self.method = A, damp, method
        self.M, self.N = preconditioners
        self.spent: int | None = None

    def solve(
        self,
        y: Tensor,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        max_iter: int | None = None,
        **options: Any,
    ) -> Solution:
        """The certified solution for ``y``; ``options`` are those of the method.

        Raises:
            MethodError: an option that the method does not have.
        """
        method = _KRYLOV[self.method]
        extra = sorted(set(options) - set(inspect.signature(method).parameters))
        if extra:
            raise MethodError(f'{", ".join(extra)}: method "{self.method}" has no such option')
        terms = self._terms(self.M, self.N)
        solution = method(self.A, y, rtol=rtol, atol=atol, max_iter=max_iter, **terms, **options)
        self.spent = int(solution.iterations.max())
        return solution

    def _terms(self, M: LinearOperator | None, N: LinearOperator | None) -> dict[str, Any]:
        """What the method takes of damping and preconditioners."""
        if self.method in _LEAST_SQUARES:
            return {"damp": self.damp, "M": M, "N": N}
        return {"M": M} if self.method in _SQUARE else {}

    def apply(self, y: Tensor, *, rtol: float | None = None) -> Tensor:
        """The solution for ``y``."""
        return self.solve(y, rtol=rtol).x

    def adjoint(self, v: Tensor, *, rtol: float | None = None) -> Tensor:
        """The adjoint of :meth:`apply`: the same problem for ``A^H``, with the preconditioners' sides exchanged."""
        if self.method in _SQUARE:
            return _KRYLOV[self.method](self.A.H, v, rtol=rtol, **self._terms(self.M and self.M.H, None)).x
        # craig wants a consistent system, and A^H u = v need not be one; hybrid would choose another damping
        method = lsmr if self.method in ("craig", "hybrid") else _LEAST_SQUARES[self.method]
        return method(self.A.H, v, damp=self.damp, M=self.N, N=self.M, rtol=rtol).x

    def normal_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor:
        """``(A^H A + damp^2)^{-1} g``, where ``damp > 0``."""
        return normal_by_apply(self.A, self.damp, lambda y, rtol: self.apply(y, rtol=rtol), g, rtol=rtol)

    def gram_solve(self, g: Tensor, *, rtol: float | None = None) -> Tensor | None:
        """``(A^H A)^{-1} g``."""
        return None if self.method in _SQUARE else gram_by_cg(self.A, g, rtol=rtol, N=self.N, spent=self.spent)

    def __repr__(self) -> str:
        preconditioner = self.M if self.M is not None else self.N
        return (
            f"KrylovPlan({self.method!r}, preconditioner={type(preconditioner).__name__ if preconditioner else None})"
        )
