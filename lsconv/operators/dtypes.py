"""Dtype and device of an operator beside those of what it meets: adopted, made complex, or refused with advice."""

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
    "remedy",
]

# So many eps of the largest singular value is what a decomposition may be off by in the others.
ROUNDING = 8


def for_dtype(A: LinearOperator, dtype: torch.dtype, *, once: bool = False) -> LinearOperator:
    """A for tensors of ``dtype``; see :meth:`LinearOperator.for_dtype`.

    Args:
        A: the operator.
        dtype: of the tensors.
        once: it is for one application, so that a copy of its tensors in a complex dtype is not worth it.
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
    """Tell whether A, or all that it is made of, was made without a dtype."""
    parts = A._parts()
    return A._dtype_omitted or (bool(parts) and all(map(adopts_dtype, parts)))


def _converts(A: LinearOperator) -> bool:
    """Tell whether A can be made to act on complex tensors by ``A.to``: operators of others may not."""
    known = type(A).__dict__.get("_only_torch", False) and type(A)._map.__qualname__ == "LinearOperator._map"
    return known and all(map(_converts, A._parts()))


def of_one_dtype(where: str, operators: Sequence[LinearOperator]) -> tuple[LinearOperator, ...]:
    """Convert operators to one dtype: the common one of those that were given theirs."""
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
    """Advice about two dtypes that differ, by which no digit and no imaginary part is lost."""
    both = torch.promote_types(given, operator_dtype)
    if both == operator_dtype:
        return f"convert with {name}.to(dtype={both})"
    if both == given:
        return f"convert the operator with {other}.to(dtype={both})"
    return f"convert both, with {name}.to(dtype={both}) and {other}.to(dtype={both})"


def double(dtype: torch.dtype) -> torch.dtype:
    """The double-precision dtype of the same kind, real or complex."""
    return torch.complex128 if dtype.is_complex else torch.float64


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

    Rounding the data to float32 changes them by 6e-8: what a smaller singular value makes of that would drown the rest
    of x. In float64 the factors themselves are not known better.
    """
    return 1e-7 if torch.finfo(dtype).bits == 32 else 1e-12
