"""The dtype of an operator beside those of others and of tensors: adopted, made complex, or refused with advice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lsconv.errors import DtypeError

if TYPE_CHECKING:
    from lsconv.operators.base import LinearOperator

__all__ = [
    "ROUNDING",
    "adopts_dtype",
    "canonical_device",
    "default_rcond",
    "direct_rtol",
    "double",
    "for_dtype",
    "of_one_dtype",
    "real_dtype",
    "remedy",
]

# The error of a computed singular value is assumed to be at most this many eps times the largest one.
ROUNDING = 8


def for_dtype(A: LinearOperator, dtype: torch.dtype, *, once: bool = False) -> LinearOperator:
    """Convert A for tensors of ``dtype``; see :meth:`LinearOperator.for_dtype`.

    Args:
        A: the operator.
        dtype: the dtype of the tensors.
        once: A will be applied once only, so that its own tensors are not copied to a complex dtype.
    """
    from lsconv.operators.algebra import Complexified

    if dtype == A.dtype or not (dtype.is_floating_point or dtype.is_complex):
        return A
    if adopts_dtype(A):
        return A.to(dtype=dtype)
    if A.is_complex or not dtype.is_complex or dtype.to_real() != A.dtype:
        return A
    return A.to(dtype=dtype) if _converts(A) and not once else Complexified(A)


def adopts_dtype(A: LinearOperator) -> bool:
    """Tell whether A, or every operator that it is made of, was created without a dtype."""
    parts = A._parts()
    return A._dtype_omitted or (bool(parts) and all(map(adopts_dtype, parts)))


def _converts(A: LinearOperator) -> bool:
    """Tell whether ``A.to`` can make A complex: only if all its parts are lsconv's own, which hold only tensors."""
    known = type(A).__dict__.get("_only_torch", False) and type(A)._map.__qualname__ == "LinearOperator._map"
    return known and all(map(_converts, A._parts()))


def of_one_dtype(where: str, operators: Sequence[LinearOperator]) -> tuple[LinearOperator, ...]:
    """Convert operators to one dtype, the one that those created with a dtype promote to."""
    dtypes = [operator.dtype for operator in operators if not adopts_dtype(operator)]
    if not dtypes:
        return tuple(operators)
    dtype = functools.reduce(torch.promote_types, dtypes)
    result = tuple(operator.for_dtype(dtype) for operator in operators)
    for operator in result:
        if operator.dtype != dtype:
            others = " and ".join(dict.fromkeys(map(str, dtypes)))
            raise DtypeError(
                f"{where}: operators have different dtypes, {others}; convert {operator!r} with .to(dtype={dtype})"
            )
    return result


def remedy(name: str, given: torch.dtype, other: str, operator_dtype: torch.dtype) -> str:
    """Advise which of two dtypes to convert, so that neither precision nor an imaginary part is lost."""
    both = torch.promote_types(given, operator_dtype)
    if both == operator_dtype:
        return f"convert with {name}.to(dtype={both})"
    if both == given:
        return f"convert the operator with {other}.to(dtype={both})"
    return f"convert both, with {name}.to(dtype={both}) and {other}.to(dtype={both})"


def double(dtype: torch.dtype) -> torch.dtype:
    """The double-precision dtype of the same kind, real or complex."""
    return torch.complex128 if dtype.is_complex else torch.float64


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and singular values: float32 or float64.

    Raises:
        DtypeError: for half precision, which torch's FFTs and factorisations do not serve.
    """
    if dtype not in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        raise DtypeError(f"dtype: {dtype} operators can be applied, not inverted; convert with A.to(torch.float32)")
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def canonical_device(device: torch.device | str) -> torch.device:
    """``device`` as tensors report it: ``cuda`` becomes ``cuda:<current>``."""
    canonical = torch.device(device)
    index: int | None = canonical.index
    if canonical.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return canonical


def direct_rtol(dtype: torch.dtype, rtol: float | None = None) -> float:
    """The relative tolerance of the direct methods: ``rtol``, or for None 1e-6 in float32, 1e-10 in float64."""
    return (1e-6 if torch.finfo(dtype).bits == 32 else 1e-10) if rtol is None else rtol


def default_rcond(dtype: torch.dtype) -> float:
    """The part of ``||A||`` up to which singular values count as zero: 1e-7 in float32, 1e-12 in float64.

    Rounding to float32 changes the data by 6e-8 of their norm, which a smaller singular value would amplify to more
    than the size of x. In float64 the bound is the accuracy of the factors.
    """
    return 1e-7 if torch.finfo(dtype).bits == 32 else 1e-12
