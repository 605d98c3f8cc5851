"""Whether the values of a tensor are finite, where they can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from lsconv.errors import NonFiniteError
from lsconv.operators.transforms import hidden_by_vmap, untraced

__all__ = ["require_finite"]


@untraced
def require_finite(tensor: Tensor, name: str, item_ndim: int) -> None:
    """Raise :class:`NonFiniteError` naming the batch items of ``tensor`` that hold NaN or infinity.

    The last ``item_ndim`` dimensions are the item's, those before them are batch dimensions.
    """
    if hidden_by_vmap(tensor) or tensor.is_meta:
        return
    # NaN and infinity survive a sum: one pass clears nearly every tensor. The sum of finite numbers may overflow.
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
