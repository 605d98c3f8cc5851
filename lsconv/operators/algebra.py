"""Operators made of operators: adjoint, sum, scalar multiple, product, and the block forms."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, DeviceError, DtypeError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import broadcast_shapes, on_parts, over_items
from lsconv.operators.dtypes import adopts_dtype, of_one_dtype

if TYPE_CHECKING:
    from typing_extensions import Self

# fmt: off
__all__ = ["Adjoint", "BlockDiagonal", "Complexified", "HStack", "Product", "Scaled", "Sum", "VStack", "block_diag",
           "hstack", "vstack"]
# fmt: on


class Adjoint(LinearOperator):
    """``A^H``; made by ``A.H``, and ``A.H.H is A``."""

    _only_torch = True

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.out_shape,
            operator.in_shape,
            dtype=operator.dtype,
            device=operator.device,
            batch_shape=operator.batch_shape,
        )
        self.operator = operator

    def apply(self, x: Tensor) -> Tensor:
        """``A^H x``."""
        return self.operator.adjoint(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A y``."""
        return self.operator.apply(y)

    @property
    def H(self) -> LinearOperator:  # noqa: N802 - the field's name for the adjoint
        """``A`` itself."""
        return self.operator


class Complexified(LinearOperator):
    """A real operator applied to complex tensors, ``A (u + iv) = A u + i A v``; it works for every real A."""

    _only_torch = True

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.in_shape,
            operator.out_shape,
            dtype=operator.dtype.to_complex(),
            device=operator.device,
            batch_shape=operator.batch_shape,
        )
        self.operator = operator

    def apply(self, x: Tensor) -> Tensor:
        """``A u + i A v`` for ``x = u + i v``."""
        return on_parts(self.operator.apply, x, len(self.in_shape), self.batch_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H u + i A^H v`` for ``y = u + i v``."""
        return on_parts(self.operator.adjoint, y, len(self.out_shape), self.batch_shape)

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the operator to another device, or to another complex dtype, or both."""
        if isinstance(device, torch.dtype):
            return self.to(dtype=device)
        if dtype is not None and not dtype.is_complex:
            return super().to(dtype=dtype)  # raises
        return type(self)(self.operator.to(device, None if dtype is None else dtype.to_real()))


class Scaled(LinearOperator):
    """``alpha A``, with ``alpha`` a number or a tensor with one value per batch item."""

    _only_torch = True

    def __init__(self, operator: LinearOperator, alpha: complex | Tensor) -> None:
        real = not alpha.is_complex() if isinstance(alpha, Tensor) else isinstance(alpha, numbers.Real)
        if not (real or operator.is_complex):
            raise DtypeError(
                f"alpha: a complex scalar times a real operator ({operator.dtype}); convert the operator first"
            )
        # The dtype is given at once: a Python float would pass through torch's default dtype and lose its last digits.
        # It keeps all of them beside an operator whose dtype is still to come.
        dtype = operator.dtype if operator.is_complex or not adopts_dtype(operator) else torch.float64
        value = torch.as_tensor(alpha, dtype=dtype, device=operator.device)
        super().__init__(
            operator.in_shape,
            operator.out_shape,
            dtype=operator.dtype,
            device=operator.device,
            batch_shape=_broadcast("alpha", [tuple(value.shape), operator.batch_shape]),
        )
        self.operator = operator
        self.alpha = value

    def apply(self, x: Tensor) -> Tensor:
        """``alpha A x``."""
        if self.in_numel < self.out_numel:
            return self.operator.apply(self._scale(self.alpha, x, self.in_shape))
        return self._scale(self.alpha, self.operator.apply(x), self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """``conj(alpha) A^H y``."""
        if self.out_numel < self.in_numel:
            return self.operator.adjoint(self._scale(self.alpha.conj(), y, self.out_shape))
        return self._scale(self.alpha.conj(), self.operator.adjoint(y), self.in_shape)

    @staticmethod
    def _scale(alpha: Tensor, tensor: Tensor, item_shape: tuple[int, ...]) -> Tensor:
        return over_items(alpha.to(tensor.dtype), len(item_shape)) * tensor


class Sum(LinearOperator):
    """``A + B + ...``, all with the same shapes."""

    _only_torch = True

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = _flatten(operators, Sum)
        first = self.operators[0]
        for other in self.operators[1:]:
            if (other.in_shape, other.out_shape) != (first.in_shape, first.out_shape):
                raise ShapeError(
                    f"sum: operators must map the same shapes, got {first.in_shape} -> {first.out_shape} "
                    f"and {other.in_shape} -> {other.out_shape}"
                )
        super().__init__(first.in_shape, first.out_shape, **_common("sum", self.operators))

    def apply(self, x: Tensor) -> Tensor:
        """``A x + B x + ...``."""
        return _sum([operator.apply(x) for operator in self.operators])

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y + B^H y + ...``."""
        return _sum([operator.adjoint(y) for operator in self.operators])


class Product(LinearOperator):
    """``A B ...``: the last operator acts first."""

    _only_torch = True

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = _flatten(operators, Product)
        for left, right in zip(self.operators[:-1], self.operators[1:], strict=True):
            if left.in_shape != right.out_shape:
                raise ShapeError(
                    f"product: the left operator takes {left.in_shape} but the right one gives {right.out_shape}"
                )
        super().__init__(self.operators[-1].in_shape, self.operators[0].out_shape, **_common("product", self.operators))

    def apply(self, x: Tensor) -> Tensor:
        """``A (B (... x))``."""
        for operator in reversed(self.operators):
            x = operator.apply(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """``... B^H (A^H y)``."""
        for operator in self.operators:
            y = operator.adjoint(y)
        return y


class _Blocks:
    """The layout of the items of several operators side by side in one tensor.

    Shapes that agree except along their first dimension are concatenated along it (feature maps along channels,
    vectors end to end); shapes that do not are flattened and laid end to end.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = tuple(shapes)
        self.along_first = all(shape and shape[1:] == shapes[0][1:] for shape in shapes)
        if self.along_first:
            self.sizes = tuple(shape[0] for shape in shapes)
            self.shape: tuple[int, ...] = (sum(self.sizes), *shapes[0][1:])
        else:
            self.sizes = tuple(math.prod(shape) for shape in shapes)
            self.shape = (sum(self.sizes),)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Put items of the single operators side by side, their batch dimensions broadcast."""
        batch = broadcast_shapes(
            *(part.shape[: part.ndim - len(shape)] for part, shape in zip(parts, self.shapes, strict=True))
        )
        parts = [part.expand(*batch, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.along_first:
            return torch.cat(parts, dim=-len(self.shape))
        return torch.cat(
            [part.flatten(len(batch)) if part.ndim > len(batch) else part[..., None] for part in parts], -1
        )

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Take the items of the single operators apart; undoes :meth:`join`."""
        parts = tensor.split(self.sizes, dim=-len(self.shape))
        if self.along_first:
            return list(parts)
        batch = tensor.shape[:-1]
        return [part.reshape(*batch, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class VStack(LinearOperator):
    """``[A; B; ...]``: one input, the outputs side by side (see :func:`vstack`)."""

    _only_torch = True

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = _operators("vstack", operators)
        for other in self.operators[1:]:
            if other.in_shape != self.operators[0].in_shape:
                raise ShapeError(
                    f"vstack: operators must share in_shape, got {self.operators[0].in_shape} and {other.in_shape}"
                )
        self.blocks = _Blocks([operator.out_shape for operator in self.operators])
        super().__init__(self.operators[0].in_shape, self.blocks.shape, **_common("vstack", self.operators))

    def apply(self, x: Tensor) -> Tensor:
        """``[A x; B x; ...]``."""
        return self.blocks.join([operator.apply(x) for operator in self.operators])

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y1 + B^H y2 + ...``."""
        parts = zip(self.operators, self.blocks.split(y), strict=True)
        return _sum([operator.adjoint(part) for operator, part in parts])

    def split(self, y: Tensor) -> list[Tensor]:
        """The outputs of the single operators inside ``y``."""
        return self.blocks.split(y)


class HStack(LinearOperator):
    """``[A, B, ...]``: the inputs side by side, outputs added (see :func:`hstack`)."""

    _only_torch = True

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = _operators("hstack", operators)
        for other in self.operators[1:]:
            if other.out_shape != self.operators[0].out_shape:
                raise ShapeError(
                    f"hstack: operators must share out_shape, got {self.operators[0].out_shape} and {other.out_shape}"
                )
        self.blocks = _Blocks([operator.in_shape for operator in self.operators])
        super().__init__(self.blocks.shape, self.operators[0].out_shape, **_common("hstack", self.operators))

    def apply(self, x: Tensor) -> Tensor:
        """``A x1 + B x2 + ...``."""
        parts = zip(self.operators, self.blocks.split(x), strict=True)
        return _sum([operator.apply(part) for operator, part in parts])

    def adjoint(self, y: Tensor) -> Tensor:
        """``[A^H y; B^H y; ...]``."""
        return self.blocks.join([operator.adjoint(y) for operator in self.operators])

    def split(self, x: Tensor) -> list[Tensor]:
        """The inputs of the single operators inside ``x``."""
        return self.blocks.split(x)


class BlockDiagonal(LinearOperator):
    """``diag(A, B, ...)``: inputs side by side, outputs side by side (see :func:`block_diag`)."""

    _only_torch = True

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self.operators = _operators("block_diag", operators)
        self.in_blocks = _Blocks([operator.in_shape for operator in self.operators])
        self.out_blocks = _Blocks([operator.out_shape for operator in self.operators])
        super().__init__(self.in_blocks.shape, self.out_blocks.shape, **_common("block_diag", self.operators))

    def apply(self, x: Tensor) -> Tensor:
        """``[A x1; B x2; ...]``."""
        parts = zip(self.operators, self.in_blocks.split(x), strict=True)
        return self.out_blocks.join([operator.apply(part) for operator, part in parts])

    def adjoint(self, y: Tensor) -> Tensor:
        """``[A^H y1; B^H y2; ...]``."""
        parts = zip(self.operators, self.out_blocks.split(y), strict=True)
        return self.in_blocks.join([operator.adjoint(part) for operator, part in parts])


def vstack(operators: Sequence[LinearOperator]) -> VStack:
    r"""Stack operators with a common input: ``x -> [A x; B x; ...]``.

    Output shapes that agree except in their first dimension are concatenated along it; otherwise the outputs are
    flattened and laid end to end. ``result.split(y)`` gives the single outputs back.

    Args:
        operators: operators with equal ``in_shape``, dtype and device.

    Raises:
        ShapeError: when the ``in_shape`` differ.

    Example:
        >>> A = lsconv.vstack([lsconv.Identity((2, 3)), 2 * lsconv.Identity((2, 3))])
        >>> A.in_shape, A.out_shape
        ((2, 3), (4, 3))
    """
    return VStack(operators)


def hstack(operators: Sequence[LinearOperator]) -> HStack:
    r"""Place operators with a common output side by side: ``[x1; x2; ...] -> A x1 + B x2 + ...``.

    The inputs lie side by side by the rule of :func:`vstack`.

    Args:
        operators: operators with equal ``out_shape``, dtype and device.

    Raises:
        ShapeError: when the ``out_shape`` differ.

    Example:
        >>> A = lsconv.hstack([lsconv.Identity((3,)), 2 * lsconv.Identity((3,))])
        >>> A(torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 1.0]))
        tensor([3., 4., 5.])
    """
    return HStack(operators)


def block_diag(operators: Sequence[LinearOperator]) -> BlockDiagonal:
    r"""Block-diagonal operator: ``[x1; x2; ...] -> [A x1; B x2; ...]``.

    Inputs and outputs lie side by side by the rule of :func:`vstack`.

    Args:
        operators: operators with equal dtype and device.

    Example:
        >>> lsconv.block_diag([lsconv.Identity((1,)), 2 * lsconv.Identity((2,))])(torch.ones(3))
        tensor([1., 2., 2.])
    """
    return BlockDiagonal(operators)


def _operators(where: str, operators: Sequence[LinearOperator]) -> tuple[LinearOperator, ...]:
    """Check that there are operators, and convert them to one dtype; ``where`` is the function, for messages."""
    operators = tuple(operators)
    if not operators:
        raise ShapeError(f"{where}: expected at least one operator, got none")
    for index, operator in enumerate(operators):
        if not isinstance(operator, LinearOperator):
            raise ArgumentTypeError(f"{where}: item {index} is {type(operator).__name__}, expected a LinearOperator")
    return of_one_dtype(where, operators)


def _flatten(operators: Sequence[LinearOperator], kind: type[Sum] | type[Product]) -> tuple[LinearOperator, ...]:
    """Replace sums within a sum, or products within a product, by their operators."""
    flat: list[LinearOperator] = []
    for operator in operators:
        flat.extend(operator.operators if isinstance(operator, kind) else [operator])
    return _operators(kind.__name__.lower(), flat)


def _common(where: str, operators: Sequence[LinearOperator]) -> dict[str, Any]:
    """The dtype, device and batch_shape of an operator made of these, as keyword arguments."""
    first = operators[0]
    for other in operators[1:]:
        if other.device != first.device:
            raise DeviceError(f"{where}: operators live on different devices, {first.device} and {other.device}")
    batch_shape = _broadcast(where, [operator.batch_shape for operator in operators])
    return {"dtype": first.dtype, "device": first.device, "batch_shape": batch_shape}


def _broadcast(where: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return tuple(broadcast_shapes(*shapes))
    except RuntimeError:
        raise ShapeError(f"{where}: batch dimensions {list(shapes)} do not broadcast") from None


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
