"""To and from ``scipy.sparse.linalg.LinearOperator``, and so to everything that speaks it (PyLops among others).

SciPy's operators act on flattened numpy vectors on the host. Tensors on the CPU share their memory with numpy; tensors
on other devices are copied there and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Dense

if TYPE_CHECKING:
    import scipy.sparse as scipy_sparse
    import scipy.sparse.linalg as scipy_linalg

__all__ = ["OperatorLike", "from_scipy", "to_operator", "to_scipy"]

# The types that every function accepts for A: an operator, a dense or sparse matrix, or SciPy's of either kind.
OperatorLike: TypeAlias = (
    "LinearOperator | Tensor | scipy_linalg.LinearOperator | scipy_sparse.sparray | scipy_sparse.spmatrix"
)


def to_scipy(A: LinearOperator) -> scipy_linalg.LinearOperator:
    r"""``A`` as a ``scipy.sparse.linalg.LinearOperator`` of shape ``(out_numel, in_numel)``.

    Vectors are items flattened in C order. ``matmat`` applies the operator to all columns as one batch.

    Args:
        A: an operator without batch dimensions of its own.

    Raises:
        ArgumentError: ``A`` has a ``batch_shape``, so that it is not one matrix.
        DtypeError: numpy has no such dtype (bfloat16).

    Example:
        >>> import numpy, scipy.sparse.linalg
        >>> A = lsconv.Conv1d(torch.tensor([[[1.0, 2.0]]]), in_size=3, padding=((0, 1),))
        >>> scipy.sparse.linalg.lsqr(A.to_scipy(), numpy.ones(3))[0].round(3)
        array([ 3., -1.,  1.])
        >>> A.to_scipy() @ numpy.array([1.0, 0.0, 0.0])
        array([1., 0., 0.], dtype=float32)
    """
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if A.batch_shape:
        raise ArgumentError(
            f"A: expected an operator that is one matrix, got batch_shape {A.batch_shape}; pick an item"
        )
    if A.dtype == torch.bfloat16:
        raise DtypeError("A: numpy has no bfloat16; convert with A.to(torch.float32)")
    dtype = torch.empty(0, dtype=A.dtype).numpy().dtype

    def forward(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _multiply(A, columns, dtype)

    def backward(columns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return _multiply(A.H, columns, dtype)

    return ScipyOperator(
        (A.out_numel, A.in_numel), matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
    )


def _multiply(A: LinearOperator, columns: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """``A`` applied to a vector ``(n,)`` or to the columns of a matrix ``(n, k)``."""
    if np.iscomplexobj(columns) and not A.is_complex:
        return _multiply(A, columns.real, dtype) + 1j * _multiply(A, columns.imag, dtype)
    items = np.ascontiguousarray(columns.T, dtype=dtype)
    if not items.flags.writeable:  # torch warns about memory that it must not write to
        items = items.copy()
    x = torch.from_numpy(items)
    with torch.no_grad():
        y = A.apply(x.to(A.device).reshape(*items.shape[:-1], *A.in_shape))
    result = y.reshape(*items.shape[:-1], A.out_numel).cpu().resolve_conj().resolve_neg()
    if result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        result = result.clone()  # the caller may go on to overwrite its vector
    array: np.ndarray[Any, Any] = result.numpy().T
    return array


def from_scipy(
    operator: Any,
    in_shape: Sequence[int] | None = None,
    out_shape: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> LinearOperator:
    """An operator from a ``scipy.sparse.linalg.LinearOperator``, a SciPy sparse matrix or a numpy matrix.

    Batch items become the columns of one ``matmat``. Gradients flow to the operator's argument, not to whatever the
    SciPy operator is made of.

    Args:
        operator: the SciPy operator, of shape ``(m, n)``; anything ``scipy.sparse.linalg.aslinearoperator`` takes.
        in_shape: shape of one input item, of n entries; ``(n,)`` when omitted.
        out_shape: shape of one output item, of m entries; ``(m,)`` when omitted.
        device: where tensors live; the operator itself runs on the host.

    Raises:
        ArgumentTypeError: ``operator`` is nothing that SciPy takes for an operator.
        ArgumentError: the shapes do not have n and m entries.

    Example:
        >>> import scipy.sparse
        >>> A = lsconv.from_scipy(scipy.sparse.diags([[1.0, 2.0, 3.0, 4.0]], [0]), in_shape=(2, 2), out_shape=(2, 2))
        >>> A(torch.ones(2, 2, dtype=torch.float64))
        tensor([[1., 2.],
                [3., 4.]], dtype=torch.float64)
    """
    from scipy.sparse.linalg import aslinearoperator

    try:
        operator = aslinearoperator(operator)
    except TypeError:
        raise ArgumentTypeError(
            f"operator: expected a scipy.sparse.linalg.LinearOperator or a matrix, got {type(operator).__name__}"
        ) from None
    return FromScipy(operator, in_shape, out_shape, device)


class FromScipy(LinearOperator):
    """An operator that SciPy applies; made by :func:`from_scipy`."""

    def __init__(
        self,
        operator: Any,
        in_shape: Sequence[int] | None,
        out_shape: Sequence[int] | None,
        device: torch.device | str,
    ) -> None:
        m, n = operator.shape
        dtype = np.result_type(np.float64 if operator.dtype is None else operator.dtype, np.float16)
        super().__init__(
            (n,) if in_shape is None else in_shape,
            (m,) if out_shape is None else out_shape,
            dtype=torch.from_numpy(np.empty(0, dtype)).dtype,
            device=device,
        )
        if (self.out_numel, self.in_numel) != (m, n):
            raise ArgumentError(
                f"operator: shape {(m, n)} does not map in_shape {self.in_shape} ({self.in_numel} entries) "
                f"to out_shape {self.out_shape} ({self.out_numel} entries)"
            )
        self.operator = operator

    def apply(self, x: Tensor) -> Tensor:
        """``A x``, by SciPy."""
        result: Tensor = _Multiplication.apply(x, self, False)
        return result

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y``, by SciPy."""
        result: Tensor = _Multiplication.apply(y, self, True)
        return result

    def multiply(self, x: Tensor, adjoint: bool) -> Tensor:
        """The product with A or its adjoint, outside autograd."""
        source, target = (self.out_shape, self.in_shape) if adjoint else (self.in_shape, self.out_shape)
        batch = x.shape[: x.ndim - len(source)]
        items = x.detach().reshape(math.prod(batch), math.prod(source)).cpu().resolve_conj().numpy()
        if len(items) == 1:
            columns = (self.operator.rmatvec if adjoint else self.operator.matvec)(items[0])
        else:
            columns = (self.operator.rmatmat if adjoint else self.operator.matmat)(items.T)
        result = np.array(columns.T, order="C")  # a copy, because the operator may hand out its own memory
        return torch.from_numpy(result).to(self.device, self.dtype).reshape(*batch, *target)


class _Multiplication(torch.autograd.Function):
    """The product ``A x`` for autograd, which does not see into SciPy: the backward pass applies ``A^H``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: FromScipy, adjoint: bool) -> Tensor:
        ctx.operator, ctx.adjoint = operator, adjoint
        return operator.multiply(x, adjoint)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Multiplication.apply(gradient, ctx.operator, not ctx.adjoint), None, None


def to_operator(A: OperatorLike, name: str = "A") -> LinearOperator:
    """Return an operator or matrix of any kind as a :class:`LinearOperator`.

    Args:
        A: an lsconv operator, a matrix ``(*batch, m, n)`` as a dense tensor or ``(m, n)`` as a sparse one, a
            ``scipy.sparse.linalg.LinearOperator`` or a SciPy sparse matrix.
        name: the argument's name in error messages.

    Raises:
        ArgumentTypeError: ``A`` is none of these.

    Example:
        >>> from lsconv.operators.scipy import to_operator
        >>> to_operator(torch.eye(3))
        Dense((3,) -> (3,), torch.float32, cpu)
    """
    if isinstance(A, LinearOperator):
        return A
    if isinstance(A, Tensor):
        return Dense(A)
    if isinstance(A, torch.nn.Module):
        raise ArgumentTypeError(
            f"{name}: {type(A).__name__} does not know its input's size; "
            f"use lsconv.Conv2d.from_module({name}, in_size=(H, W)), or lsconv.as_operator({name}, in_shape)"
        )
    if hasattr(A, "matvec") or type(A).__module__.startswith("scipy.sparse"):
        return from_scipy(A)
    hint = f"; convert with torch.from_numpy({name})" if isinstance(A, np.ndarray) else ""
    raise ArgumentTypeError(
        f"{name}: expected a LinearOperator, a matrix as a tensor or a SciPy operator, got {type(A).__name__}{hint}"
    )
