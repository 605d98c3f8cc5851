"""Checks of the tensors that meet an operator: type, shape, dtype, device, and finite values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.batch_layout import broadcast_shapes
from lsconv.operators.dtypes import remedy
from lsconv.operators.transforms import hidden_by_vmap, untraced

if TYPE_CHECKING:
    from lsconv.operators.base import LinearOperator

__all__ = ["check_tensor", "is_numpy", "require_finite"]


@untraced
def require_finite(tensor: Tensor, name: str, item_ndim: int) -> None:
    """Raise :class:`NonFiniteError` naming the batch items of ``tensor`` that hold NaN or infinity.

    The last ``item_ndim`` dimensions are the item's, those before them are batch dimensions.
    """
    if hidden_by_vmap(tensor) or tensor.is_meta:
        return
    # A finite sum shows in one pass that all entries are finite; the sum of finite numbers may still overflow.
    if bool(torch.isfinite(tensor.detach().sum())):
        return
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    batch_ndim = tensor.ndim - item_ndim
    if batch_ndim == 0:
        raise NonFiniteError(f"{name}: contains NaN or infinity")
    bad = (~finite.reshape(*tensor.shape[:batch_ndim], -1).all(-1)).nonzero().tolist()
    shown = ", ".join(str(tuple(index) if batch_ndim > 1 else index[0]) for index in bad[:8])
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    raise NonFiniteError(f"{name}: contains NaN or infinity in batch item(s) {shown}{more}")


def check_tensor(A: LinearOperator, tensor: Any, name: str, which: str, *, finite: bool = False) -> tuple[int, ...]:
    """Check a tensor against an operator, and return its batch dimensions.

    Args:
        A: the operator.
        tensor: the tensor.
        name: the name of the tensor, for messages.
        which: "in_shape" or "out_shape".
        finite: refuse NaN and infinity too.

    Raises:
        ArgumentTypeError, ShapeError, DtypeError, DeviceError, NonFiniteError: it does not fit.
    """
    item_shape: tuple[int, ...] = getattr(A, which)
    if not isinstance(tensor, Tensor):
        hint = f"; convert with torch.from_numpy({name})" if is_numpy(tensor) else ""
        if hasattr(tensor, "mask"):
            hint = f"; convert {name}.data, and give lsconv.Mask(~mask) @ A for A, so that the mask is not lost"
        sizes = ", ".join(map(str, item_shape))
        raise ArgumentTypeError(
            f"{name}: expected a torch.Tensor of shape (*batch, {sizes}), got {type(tensor).__name__}{hint}"
        )
    split = tensor.ndim - len(item_shape)
    if split < 0 or tuple(tensor.shape[split:]) != item_shape:
        found = "too few dimensions" if split < 0 else f"batch dimensions understood: {tuple(tensor.shape[:split])}"
        raise ShapeError(f"{name}: shape {tuple(tensor.shape)} does not end with {which} {item_shape} ({found})")
    if tensor.dtype != A.dtype:
        raise DtypeError(f"{name}: dtype {tensor.dtype} differs from the operator's {A.dtype}; "
                         f"{remedy(name, tensor.dtype, 'A', A.dtype)}")  # fmt: skip
    if tensor.device != A.device:
        text = f"{name}: device {tensor.device} differs from the operator's {A.device}"
        raise DeviceError(f"{text}; move one with .to(device)")
    batch = tuple(tensor.shape[:split])
    if A.batch_shape:
        try:
            broadcast_shapes(batch, A.batch_shape)
        except RuntimeError:
            text = f"{name}: batch dimensions {batch} do not broadcast with the operator's own batch_shape "
            raise ShapeError(text + str(A.batch_shape)) from None
    if finite:
        require_finite(tensor, name, len(item_shape))
    return batch


def is_numpy(value: Any) -> bool:
    """Tell whether a value is of a type of NumPy, without importing NumPy."""
    return type(value).__module__.split(".")[0] == "numpy"
