"""LinearOperator: a linear map between tensors of fixed shape, with its exact adjoint.

A maps ``in_shape`` to ``out_shape``. Both are shapes of *one* item: every tensor may carry any batch dimensions in
front, and an operator built from one kernel per batch item has a ``batch_shape`` of its own, which broadcasts with
them. The adjoint is taken in the standard inner product ``<u, v> = sum(conj(u) * v)`` over the item's dimensions.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, DtypeError, ShapeError
from lsconv.operators.batch_layout import WORK_BYTES
from lsconv.operators.checks import check_tensor, is_numpy
from lsconv.operators.dtypes import adopts_dtype, canonical_device, for_dtype

if TYPE_CHECKING:
    import scipy.sparse.linalg as scipy_linalg
    from typing_extensions import Self

__all__ = ["LinearOperator"]


class LinearOperator:
    r"""A linear map ``y = A x`` between tensors, with its adjoint.

    Subclasses implement :meth:`apply` and :meth:`adjoint`, which trust their argument; calling the operator,
    ``A(x)``, checks it first. Tensors (and operators) held as attributes are found by :meth:`parameters`,
    :meth:`with_parameters` and :meth:`to` without further code.

    Args:
        in_shape: shape of one input item, without batch dimensions.
        out_shape: shape of one output item, without batch dimensions.
        dtype: dtype of inputs and outputs; None: that of what the operator meets (see :meth:`for_dtype`), and torch's
            default until then.
        device: device of inputs and outputs.
        batch_shape: batch dimensions of the operator itself; broadcasts with those of the inputs.

    Example:
        >>> A = lsconv.FromFunctions((4,), (3,), lambda x: x[..., 1:] - x[..., :-1],
        ...                          lambda y: torch.nn.functional.pad(-y, (0, 1)) + torch.nn.functional.pad(y, (1, 0)))
        >>> A(torch.tensor([1.0, 2.0, 4.0, 7.0]))
        tensor([1., 2., 3.])
        >>> A.dot_test() < 1e-6
        True
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    # apply and adjoint of this class, not of a subclass, may be recorded in a CUDA graph; see `capturable`.
    _only_torch: ClassVar[bool] = False

    _dtype_omitted: bool = False  # see `for_dtype`

    # numpy must leave `number * A` to __rmul__ instead of making an array of operators.
    __array_ufunc__ = None

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        *,
        dtype: torch.dtype | None,
        device: torch.device | str,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.in_shape, self.out_shape = (tuple(int(size) for size in shape) for shape in (in_shape, out_shape))
        for name, sizes in (("in_shape", self.in_shape), ("out_shape", self.out_shape)):
            if any(size <= 0 for size in sizes):
                raise ShapeError(f"{name}: every size must be positive, got {sizes}")
        self.batch_shape = tuple(int(size) for size in batch_shape)
        self._dtype_omitted = dtype is None
        self.dtype = dtype = torch.get_default_dtype() if dtype is None else dtype
        self.device = canonical_device(device)
        if not (dtype.is_floating_point or dtype.is_complex):
            raise DtypeError(f"dtype: expected a floating-point or complex dtype, got {dtype}")

    # ------------------------------------------------------------------ what a subclass provides

    def apply(self, x: Tensor) -> Tensor:
        """``A x`` for ``x`` of shape ``(*batch, *in_shape)``, without checking ``x``."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y`` for ``y`` of shape ``(*batch, *out_shape)``, without checking ``y``."""
        raise NotImplementedError

    # ------------------------------------------------------------------ use

    def __call__(self, x: Tensor) -> Tensor:
        """``A x``, after checking shape, dtype and device of ``x``; a real operator takes complex ``x`` too."""
        if isinstance(x, Tensor) and x.dtype != self.dtype:
            self = for_dtype(self, x.dtype, once=True)
        self.check_input(x)
        return self.apply(x)

    @property
    def H(self) -> LinearOperator:  # noqa: N802 - the field's name for the adjoint
        """The adjoint operator ``A^H``."""
        from lsconv.operators.algebra import Adjoint

        return Adjoint(self)

    @property
    def is_complex(self) -> bool:
        """True when the operator maps complex tensors."""
        return self.dtype.is_complex

    @property
    def capturable(self) -> bool:
        """Tell whether a CUDA graph recorded from :meth:`apply` and :meth:`adjoint` may be replayed in their stead.

        A graph repeats the kernels that were launched while it was recorded, on the same memory. So both must launch
        the same operations of torch whenever they are called, never wait for a value on the host, and do nothing else
        that counts (such as counting). lsconv's operators made of tensors do, and so do those composed of such; what
        functions, SciPy, sparse matrices or a class from elsewhere do is not known: False, unless it is set to True.

        Example:
            >>> A = lsconv.Conv2d(torch.randn(1, 1, 3, 3), in_size=(8, 8))
            >>> half = lsconv.FromFunctions(A.out_shape, A.out_shape, lambda y: y / 2, lambda y: y / 2)
            >>> A.capturable, (half @ A).capturable
            (True, False)
            >>> half.capturable = True
            >>> (half @ A).capturable
            True
        """
        given: bool | None = self.__dict__.get("_capturable")
        if given is not None:
            return given
        # Looked up in the class itself, because a subclass may override apply or adjoint.
        return type(self).__dict__.get("_only_torch", False) and all(part.capturable for part in self._parts())

    @capturable.setter
    def capturable(self, value: bool) -> None:
        self._capturable = bool(value)

    def _parts(self) -> list[LinearOperator]:
        """The operators that this one is made of."""
        held: list[Any] = []
        for value in self.__dict__.values():
            held.extend(value if isinstance(value, (list, tuple)) else (value,))
        return [value for value in held if isinstance(value, LinearOperator)]

    @property
    def in_numel(self) -> int:
        """Number of unknowns of one item, ``n``."""
        return math.prod(self.in_shape)

    @property
    def out_numel(self) -> int:
        """Number of equations of one item, ``m``."""
        return math.prod(self.out_shape)

    def check_input(self, x: Any, name: str = "x", *, finite: bool = False) -> tuple[int, ...]:
        """Check ``x`` against ``in_shape``, dtype and device, and return its batch dimensions."""
        return check_tensor(self, x, name, "in_shape", finite=finite)

    def check_output(self, y: Any, name: str = "y", *, finite: bool = False) -> tuple[int, ...]:
        """Check ``y`` against ``out_shape``, dtype and device, and return its batch dimensions."""
        return check_tensor(self, y, name, "out_shape", finite=finite)

    # ------------------------------------------------------------------ tests and conversions

    def dot_test(self, *, generator: torch.Generator | None = None) -> float:
        r"""Relative error of the adjoint identity on random tensors.

        .. math:: |\langle y, Ax\rangle - \langle A^H y, x\rangle| / (\|Ax\|\,\|y\|)

        Returns a number of the order of the dtype's epsilon (times the square root of the size at worst) when
        :meth:`adjoint` is the exact adjoint of :meth:`apply`, and of order one when it is not.

        Args:
            generator: source of the random tensors, on the operator's device.

        Example:
            >>> weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
            >>> lsconv.Conv2d(weight, in_size=(8, 9), padding=1, padding_mode="reflect").dot_test() < 1e-12
            True
        """
        x = self._random(self.in_shape, generator)
        y = self._random(self.out_shape, generator)
        with torch.no_grad():
            ax, ahy = self(x), self.H(y)
            left = torch.sum(y.conj() * ax)
            right = torch.sum(ahy.conj() * x)
            scale = torch.linalg.vector_norm(ax) * torch.linalg.vector_norm(y)
        return float((left - right).abs() / scale.clamp_min(torch.finfo(self.dtype).tiny))

    def _random(self, item_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        shape = (*self.batch_shape, *item_shape)
        return torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)

    def to_dense(self) -> Tensor:
        """The matrix of A, of shape ``(*batch_shape, out_numel, in_numel)``; for small operators and tests.

        Example:
            >>> lsconv.Conv1d(torch.tensor([[[1.0, 10.0]]]), in_size=(3,)).to_dense()
            tensor([[ 1., 10.,  0.],
                    [ 0.,  1., 10.]])
        """
        n = self.in_numel
        basis = torch.eye(n, dtype=self.dtype, device=self.device)
        basis = basis.reshape(n, *(1 for _ in self.batch_shape), *self.in_shape)
        basis = basis.expand(n, *self.batch_shape, *self.in_shape)
        # a few columns at a time, because torch's convolution copies its input once for every tap
        parts = basis.split(max(1, WORK_BYTES // max(1, self.out_numel * self.dtype.itemsize)))
        columns = torch.cat([self.apply(part) for part in parts]) if len(parts) > 1 else self.apply(basis)
        return columns.reshape(n, *self.batch_shape, self.out_numel).movedim(0, -1)

    def to_scipy(self) -> scipy_linalg.LinearOperator:
        """This operator as a ``scipy.sparse.linalg.LinearOperator`` on flattened numpy vectors."""
        from lsconv.operators.scipy import to_scipy

        return to_scipy(self)

    # ------------------------------------------------------------------ the tensors an operator is built from

    def parameters(self) -> tuple[Tensor, ...]:
        """The floating-point and complex tensors this operator is built from, in a fixed order."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() or tensor.is_complex():
                found.append(tensor)
            return tensor

        self._map(collect)
        return tuple(found)

    def with_parameters(self, parameters: Sequence[Tensor], *, per_item: bool = False) -> Self:
        """Rebuild the operator from other tensors, given in the order of :meth:`parameters`.

        Args:
            parameters: tensors of the shapes, dtypes and devices of its own.
            per_item: let them have further leading dimensions, one value per batch item, where the operator takes that;
                a :class:`Convolution` and a :class:`Dense` do.
        """
        count, given = 0, list(parameters)

        def put(old: Tensor) -> Tensor:
            nonlocal count
            if not (old.is_floating_point() or old.is_complex()):
                return old
            index, count = count, count + 1
            if index >= len(given):
                return old
            new = given[index]
            if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
                raise ShapeError(
                    f"parameters[{index}]: expected {old.dtype} {tuple(old.shape)} on {old.device}, "
                    f"got {new.dtype} {tuple(new.shape)} on {new.device}"
                )
            return new

        result = self._map(put)
        if count != len(given):
            raise ArgumentTypeError(f"parameters: expected {count} tensors, got {len(given)}")
        return result

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the operator to another device, or to another dtype, or both; itself where nothing changes.

        A complex operator stays complex: ``dtype`` must then be a complex dtype.
        """
        if isinstance(device, torch.dtype):
            return self.to(dtype=device)
        target_dtype = self.dtype if dtype is None else dtype
        target_device = self.device if device is None else canonical_device(device)
        if self.dtype.is_complex and not target_dtype.is_complex:
            raise DtypeError(f"dtype: a complex operator ({self.dtype}) cannot be converted to {target_dtype}")
        if (target_dtype, target_device) == (self.dtype, self.device) and not adopts_dtype(self):
            return self

        def convert(tensor: Tensor) -> Tensor:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor.to(target_device)
            return tensor.to(target_device, target_dtype)

        return self._map(convert, target_dtype, target_device)

    def for_dtype(self, dtype: torch.dtype) -> LinearOperator:
        """The operator for tensors of ``dtype``, where that loses nothing; otherwise itself.

        One made without a dtype (Identity, Mask, Gradient, ... and what is made of these alone) takes that of what it
        meets. A real operator becomes the same map on complex tensors of its precision.

        Example:
            >>> lsconv.Identity((3,)).for_dtype(torch.float64)
            Identity((3,) -> (3,), torch.float64, cpu)
        """
        return for_dtype(self, dtype)

    def _map(
        self,
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """A copy with ``function`` applied to every tensor held, here and in the operators this one is made of."""
        clone = object.__new__(type(self))
        clone.__dict__ = {
            name: _converted(value, function, dtype, device)
            for name, value in self.__dict__.items()
            if not name.startswith("_cached")
        }
        if dtype is not None:
            clone.dtype, clone._dtype_omitted = dtype, False
        if device is not None:
            clone.device = device
        return clone

    # ------------------------------------------------------------------ algebra

    def __add__(self, other: Any) -> LinearOperator:
        from lsconv.operators.algebra import Sum

        return Sum([self, other]) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator:
        return -1 * self

    def __mul__(self, scalar: Any) -> LinearOperator:
        from lsconv.operators.algebra import Scaled

        return Scaled(self, scalar) if _is_scalar(scalar) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        return self * (1 / scalar) if _is_scalar(scalar) else NotImplemented

    def __matmul__(self, other: Any) -> Any:
        from lsconv.operators.algebra import Product

        if isinstance(other, Tensor) or is_numpy(other):
            return self(other)
        return Product([self, other]) if isinstance(other, LinearOperator) else NotImplemented

    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, Tensor) or is_numpy(other):
            raise ArgumentTypeError("x @ A: an operator stands on the left; write (A.H @ x.conj()).conj()")
        return NotImplemented

    def __repr__(self) -> str:
        batch = f", batch_shape={self.batch_shape}" if self.batch_shape else ""
        return f"{type(self).__name__}({self.in_shape} -> {self.out_shape}, {self.dtype}, {self.device}{batch})"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (numbers.Number, Tensor))


# The types of most attributes, looked up first, because isinstance is slow for tensors and abstract classes.
_PLAIN = frozenset({bool, int, float, str, torch.dtype, torch.device, type(None)})


def _converted(
    value: Any, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None, device: torch.device | None
) -> Any:
    """Apply ``function`` to every tensor in an attribute of an operator: a tensor, an operator, or a list of them."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, LinearOperator):
        return value._map(function, dtype, device)
    if isinstance(value, (list, tuple)):
        for part in value:
            if type(part) not in _PLAIN and isinstance(part, (Tensor, LinearOperator)):
                return type(value)(_converted(v, function, dtype, device) for v in value)
    return value
