"""The choice of a preconditioner for a Krylov method, which is refused where it solves another problem."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, MethodError
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.inverse.plans.krylov_plan import LEAST_SQUARES, SQUARE, KrylovPlan
from lsconv.krylov.loop.certificate import default_rtol
from lsconv.operators.algebra import Adjoint, HStack, Product, Scaled, VStack
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Convolution

__all__ = ["krylov_plan"]


def krylov_plan(
    A: LinearOperator, damp: Tensor | float, method: str, preconditioner: LinearOperator | str | None = "auto"
) -> KrylovPlan:
    """Plan a Krylov method with its preconditioner.

    Args:
        A: the operator.
        damp: the damping.
        method: a name of :data:`~lsconv.inverse.plans.krylov_plan.KRYLOV`.
        preconditioner: "auto", "circulant", None or an operator.

    Raises:
        MethodError: the method would answer another problem, or has no use for the preconditioner.
        ArgumentTypeError: the preconditioner is none.
    """
    if method in LEAST_SQUARES:
        return KrylovPlan(A, damp, method, _preconditioner(A, damp, preconditioner, method))
    _check_suits(A, damp, method)
    return KrylovPlan(A, damp, method, _square_preconditioner(A, method, preconditioner))


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
    """Tell whether A and A^H agree on a random vector up to rounding; True where there is no adjoint."""
    generator = torch.Generator().manual_seed(0)
    shape = (*A.batch_shape, *A.in_shape)
    v = torch.randn(shape, generator=generator, dtype=torch.promote_types(A.dtype, torch.float32)).to(A.device)
    image = A.apply(v)
    try:
        adjoint_image = A.adjoint(v)
    except NotImplementedError:
        return True
    tolerance = torch.finfo(A.dtype).eps ** 0.5
    return bool(torch.dist(image, adjoint_image) <= tolerance * torch.linalg.vector_norm(image))


def _square_preconditioner(
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
    """Choose M and N for a method."""
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
    damping = torch.as_tensor(damp, dtype=torch.float64, device=A.device)
    # with damping, craig solves with [A, damp I], whose inputs are more than those of A: no N has their shape
    side = "residual" if method == "craig" and bool((damping > 0).any()) else None
    rounding = torch.finfo(A.dtype).eps / default_rtol(A.dtype)
    if preconditioner == "auto":
        # on layers the iterations that the circulant saves cost less than its matrix per frequency
        if not bool((damping > 0).all()) or _mixes_channels(A):
            return None, None
        try:
            circulant = CirculantPreconditioner(A, damp, side=side)
        except MethodError:
            return None, None
        # Below this damping the gradient does not show the null-space part that N has added to x; and M divides the
        # rounding of the residual's part outside the range of A by damp.
        smallest_damp = (rounding**0.5 if circulant.side == "solution" else rounding) * circulant.norm
        if not bool((damping >= smallest_damp).all()):
            return None, None
    else:
        damped = bool((damping > 0).all())
        circulant = CirculantPreconditioner(A, damp if damped else None, side=side)
        if side is None and damped and not bool((damping >= rounding * circulant.norm).all()):
            circulant = CirculantPreconditioner(A, damp, side="solution")
    return (circulant, None) if circulant.side == "residual" else (None, circulant)


def _mixes_channels(A: LinearOperator) -> bool:
    """Tell whether a convolution in A has several input or output channels a group."""
    if isinstance(A, Convolution):
        return (A.c_in + A.c_out) // A.groups > 2
    if isinstance(A, (Adjoint, Scaled)):
        return _mixes_channels(A.operator)
    return isinstance(A, (Product, VStack, HStack)) and any(_mixes_channels(part) for part in A.operators)
