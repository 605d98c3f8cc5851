"""The operators that are not convolutions: identity, diagonal, crop, mask, a matrix, and a pair of functions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, DtypeError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import on_parts
from lsconv.operators.checks import require_finite

if TYPE_CHECKING:
    # Self is in typing from Python 3.11 on only.
    from typing_extensions import Self

__all__ = ["Crop", "Dense", "Diagonal", "FromFunctions", "Identity", "Mask"]

_SPARSE = (torch.sparse_csr, torch.sparse_csc, torch.sparse_coo)


class Identity(LinearOperator):
    """The identity, ``y = x``.

    Args:
        shape: shape of one item.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.
        device: device of inputs and outputs.

    Example:
        >>> (2 * lsconv.Identity((3,)))(torch.ones(3))
        tensor([2., 2., 2.])
    """

    _only_torch = True

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(shape, shape, dtype=dtype, device=device)

    def apply(self, x: Tensor) -> Tensor:
        """``x``."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """``y``."""
        return y


class Diagonal(LinearOperator):
    """Multiplication by a tensor, entry by entry: ``y = d * x``; the adjoint multiplies by ``conj(d)``.

    Args:
        diagonal: the factors, of shape ``(*batch_shape, *shape)``.
        batch_ndim: how many leading dimensions of ``diagonal`` are batch dimensions.

    Raises:
        ArgumentTypeError: ``diagonal`` is no tensor.
        ShapeError: ``batch_ndim`` exceeds the dimensions of ``diagonal``.
        NonFiniteError: ``diagonal`` contains NaN or infinity.

    Example:
        >>> D = lsconv.Diagonal(torch.tensor([1.0, 2.0, 3.0]))
        >>> D(torch.ones(2, 3))
        tensor([[1., 2., 3.],
                [1., 2., 3.]])
    """

    _only_torch = True

    def __init__(self, diagonal: Tensor, batch_ndim: int = 0) -> None:
        shape, batch_shape = _split_shape("diagonal", diagonal, batch_ndim)
        super().__init__(shape, shape, dtype=diagonal.dtype, device=diagonal.device, batch_shape=batch_shape)
        require_finite(diagonal, "diagonal", len(shape))
        self.diagonal = diagonal

    def apply(self, x: Tensor) -> Tensor:
        """``d * x``."""
        return self.diagonal * x

    def adjoint(self, y: Tensor) -> Tensor:
        """``conj(d) * y``."""
        return self.diagonal.conj() * y


class Mask(LinearOperator):
    """Multiplication by a 0/1 mask: entries where ``mask`` is False become zero. An orthogonal projection.

    Entries are *selected*, not multiplied, so whatever stands where the mask is False (NaN for missing data) is
    ignored; in the data of a solve with ``Mask @ A`` too, where it counts neither in x nor in the residual.

    Args:
        mask: bool tensor of shape ``(*batch_shape, *shape)``, True where entries are kept.
        batch_ndim: how many leading dimensions of ``mask`` are batch dimensions.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.

    Raises:
        ArgumentTypeError: ``mask`` is no tensor.
        DtypeError: ``mask`` is not of dtype bool.

    Example:
        >>> M = lsconv.Mask(torch.tensor([True, False, True]))
        >>> M(torch.tensor([1.0, float("nan"), 3.0]))
        tensor([1., 0., 3.])
    """

    _only_torch = True

    def __init__(self, mask: Tensor, batch_ndim: int = 0, *, dtype: torch.dtype | None = None) -> None:
        shape, batch_shape = _split_shape("mask", mask, batch_ndim)
        if mask.dtype != torch.bool:
            raise DtypeError(f"mask: expected dtype torch.bool, got {mask.dtype}; write mask != 0")
        super().__init__(shape, shape, dtype=dtype, device=mask.device, batch_shape=batch_shape)
        self.mask = mask

    def apply(self, x: Tensor) -> Tensor:
        """``x`` where the mask is True, zero elsewhere."""
        return torch.where(self.mask, x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the operator, which is its own adjoint."""
        return torch.where(self.mask, y, 0)


class Crop(LinearOperator):
    """A window of the last axes of a tensor; the adjoint writes the window into zeros.

    Args:
        shape: shape of one input item.
        start: first cell kept, one int per cropped axis (counted from the last), or one int for all axes of ``shape``.
        size: number of cells kept, in the same way.
        dtype: dtype of inputs and outputs; when omitted that of what it meets, and torch's default until then.
        device: device of inputs and outputs.

    Raises:
        ShapeError: the window does not lie inside ``shape``.

    Example:
        >>> R = lsconv.Crop((5,), start=(1,), size=(3,))
        >>> R(torch.arange(5.0))
        tensor([1., 2., 3.])
        >>> R.H(torch.ones(3))
        tensor([0., 1., 1., 1., 0.])
    """

    _only_torch = True

    def __init__(
        self,
        shape: Sequence[int],
        start: int | Sequence[int],
        size: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = tuple(int(n) for n in shape)
        axes = next((len(v) for v in (start, size) if isinstance(v, Sequence)), len(shape))
        starts = (start,) * axes if isinstance(start, int) else tuple(start)
        sizes = (size,) * axes if isinstance(size, int) else tuple(size)
        fits = 1 <= axes <= len(shape) and len(starts) == len(sizes) == axes
        if not fits or any(
            first < 0 or kept < 1 or first + kept > n
            for first, kept, n in zip(starts, sizes, shape[-axes:], strict=True)
        ):
            raise ShapeError(f"crop: the window start {start}, size {size} does not lie inside shape {shape}")
        super().__init__(
            shape,
            (*shape[:-axes], *sizes),
            dtype=dtype,
            device=device,
        )
        self.start = starts
        self.size = sizes

    def apply(self, x: Tensor) -> Tensor:
        """The window of ``x``."""
        for axis, (first, kept) in enumerate(zip(self.start, self.size, strict=True), start=-len(self.size)):
            x = x.narrow(axis, first, kept)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """``y`` in the window, zeros around it."""
        amounts: list[int] = []
        for first, kept, n in zip(self.start, self.size, self.in_shape[-len(self.size) :], strict=True):
            amounts = [first, n - first - kept, *amounts]
        return torch.nn.functional.pad(y, amounts)


class Dense(LinearOperator):
    """A matrix as an operator: ``y = M x`` with ``x`` and ``y`` flattened; dense, or sparse (CSR, CSC, COO).

    Args:
        matrix: tensor of shape ``(*batch_shape, m, n)``; a sparse matrix has no batch dimensions.
        in_shape: shape of one input item, of n entries; ``(n,)`` when omitted.
        out_shape: shape of one output item, of m entries; ``(m,)`` when omitted.

    Raises:
        ArgumentTypeError: ``matrix`` is no tensor.
        ShapeError: ``matrix`` has fewer than two dimensions, or the shapes do not have n and m entries.
        NonFiniteError: ``matrix`` contains NaN or infinity.

    Example:
        >>> A = lsconv.Dense(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> A(torch.tensor([1.0, 1.0]))
        tensor([ 3.,  7., 11.])
    """

    _only_torch = True

    def __init__(
        self, matrix: Tensor, in_shape: Sequence[int] | None = None, out_shape: Sequence[int] | None = None
    ) -> None:
        if not isinstance(matrix, Tensor):
            raise ArgumentTypeError(f"matrix: expected a torch.Tensor (*batch, m, n), got {type(matrix).__name__}")
        sparse = matrix.layout in _SPARSE
        if matrix.ndim < 2 or (sparse and matrix.ndim > 2):
            expected = "(m, n)" if sparse else "(*batch, m, n)"
            raise ShapeError(f"matrix: expected shape {expected}, got {tuple(matrix.shape)}")
        if sparse:
            matrix = _to_csr(matrix)
        m, n = matrix.shape[-2:]
        super().__init__(
            (n,) if in_shape is None else in_shape,
            (m,) if out_shape is None else out_shape,
            dtype=matrix.dtype,
            device=matrix.device,
            batch_shape=matrix.shape[:-2],
        )
        if (self.out_numel, self.in_numel) != (m, n):
            raise ShapeError(
                f"matrix: shape {tuple(matrix.shape)} does not map in_shape {self.in_shape} ({self.in_numel} entries) "
                f"to out_shape {self.out_shape} ({self.out_numel} entries)"
            )
        # Detached, because a complex view of a sparse tensor's values asks for the strides that it does not have.
        require_finite(matrix.values().detach() if sparse else matrix, "matrix", 1 if sparse else 2)
        self.matrix = matrix
        self.is_sparse = sparse
        if sparse:
            self.capturable = False  # torch's sparse products may synchronise with the host

    def apply(self, x: Tensor) -> Tensor:
        """``M x``."""
        return self._multiply(self.matrix, x, self.in_shape, self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """``M^H y``."""
        if self.is_sparse:
            return self._multiply(self._sparse_adjoint(), y, self.out_shape, self.in_shape)
        return self._multiply(self.matrix.mH, y, self.out_shape, self.in_shape)

    def with_parameters(self, parameters: Sequence[Tensor], *, per_item: bool = False) -> Self:
        """The operator of another matrix; ``per_item`` lets it have other batch dimensions."""
        same = [p.shape[-2:] for p in parameters] == [self.matrix.shape[-2:]]
        if not (per_item and same) or parameters[0].shape == self.matrix.shape:
            return super().with_parameters(parameters)
        return type(self)(parameters[0], self.in_shape, self.out_shape)

    def _multiply(self, matrix: Tensor, x: Tensor, source: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
        """Multiply a matrix with items of shape ``source``, to items of shape ``target``."""
        if x.is_complex() and not self.is_complex:
            by_parts = lambda part: self._multiply(matrix, part, source, target)
            return on_parts(by_parts, x, len(source), self.batch_shape)
        batch = x.shape[: x.ndim - len(source)]
        # Batch dimensions beyond the matrix's own become the columns of one matrix product.
        extra = max(len(batch) - len(self.batch_shape), 0)
        columns = x.reshape(math.prod(batch[:extra]), *batch[extra:], math.prod(source)).movedim(0, -1)
        product = (matrix @ columns).movedim(-1, 0)
        return product.reshape(*batch[:extra], *product.shape[1:-1], *target)

    def _sparse_adjoint(self) -> Tensor:
        cached: Tensor | None = self.__dict__.get("_cached_adjoint")
        if cached is None:
            cached = _to_csr(self.matrix.to_sparse_coo().transpose(0, 1).conj())
            if not self.matrix.requires_grad:
                self._cached_adjoint = cached
        return cached


class FromFunctions(LinearOperator):
    r"""An operator from two functions, ``apply`` and ``adjoint``.

    The functions take tensors ``(*batch, *in_shape)`` and ``(*batch, *out_shape)`` and must treat leading dimensions
    as independent items. ``A.dot_test()`` tells whether the second is the adjoint of the first.

    Args:
        in_shape: shape of one input item.
        out_shape: shape of one output item.
        apply: ``x -> A x``; called as ``apply(x, *parameters)``.
        adjoint: ``y -> A^H y``; called as ``adjoint(y, *parameters)``.
        dtype: dtype of inputs and outputs; torch's default when omitted.
        device: device of inputs and outputs.
        parameters: tensors that the operator depends on. They are passed to both functions, and are what gradients
            of a solve reach and what ``A.to`` converts; tensors hidden in a closure are neither.
        capturable: promise that a CUDA graph may be recorded from both functions; see
            :attr:`LinearOperator.capturable`.

    Raises:
        ArgumentTypeError: ``apply`` or ``adjoint`` cannot be called, or a parameter is no tensor.

    Example:
        >>> scale = torch.tensor(3.0)
        >>> A = lsconv.FromFunctions((2,), (2,), lambda x, s: s * x, lambda y, s: s * y, parameters=(scale,))
        >>> A(torch.tensor([1.0, 2.0]))
        tensor([3., 6.])
        >>> A.parameters()
        (tensor(3.),)
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        apply: Callable[..., Tensor],
        adjoint: Callable[..., Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        parameters: Sequence[Tensor] = (),
        capturable: bool = False,
    ) -> None:
        for name, function in (("apply", apply), ("adjoint", adjoint)):
            if not callable(function):
                raise ArgumentTypeError(f"{name}: expected a function of a tensor, got {type(function).__name__}")
        for index, tensor in enumerate(parameters):
            if not isinstance(tensor, Tensor):
                raise ArgumentTypeError(f"parameters[{index}]: expected a torch.Tensor, got {type(tensor).__name__}")
        super().__init__(
            in_shape, out_shape, dtype=torch.get_default_dtype() if dtype is None else dtype, device=device
        )
        self._apply_function = apply
        self._adjoint_function = adjoint
        self._tensors = tuple(parameters)
        self.capturable = capturable

    def apply(self, x: Tensor) -> Tensor:
        """The function ``apply`` on ``x``."""
        return self._apply_function(x, *self._tensors)

    def adjoint(self, y: Tensor) -> Tensor:
        """The function ``adjoint`` on ``y``."""
        return self._adjoint_function(y, *self._tensors)


def _to_csr(matrix: Tensor) -> Tensor:
    with warnings.catch_warnings():  # torch warns once that its CSR tensors are in beta, which a caller cannot change
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


def _split_shape(name: str, tensor: Any, batch_ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The item's shape and the batch dimensions of ``tensor``."""
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not 0 <= batch_ndim <= tensor.ndim:
        raise ShapeError(f"batch_ndim: {batch_ndim} does not fit the {tensor.ndim} dimensions of {name}")
    return tuple(tensor.shape[batch_ndim:]), tuple(tensor.shape[:batch_ndim])
