"""How many bytes a plan needs."""

from __future__ import annotations

import math

from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import Mirror
from lsconv.border.system.schwarz import dense_entries
from lsconv.errors import PlanMemoryError
from lsconv.fourier.embedding import Embedding
from lsconv.operators.convolution import Convolution

__all__ = ["check_fits", "plan_bytes"]


def plan_bytes(convolution: Convolution, damp_shape: tuple[int, ...] = (), penalty: Penalty | None = None) -> int:
    """An estimate of the bytes at the peak of a border plan's setup: symbol, normal inverse, border system, patches.

    Args:
        convolution: the operator, in the dtype of the factors.
        damp_shape: the shape of the damping.
        penalty: further rows below the convolution.
    """
    mirror = Mirror(convolution) if Mirror.exists(convolution) else None
    if penalty is not None:
        embedding = penalty.embedding(damp_shape)
        out_border = penalty.border(embedding)
    else:
        held = None if mirror is None else (True,) * convolution.ndim
        inner = convolution if mirror is None else mirror.convolution
        embedding = Embedding(inner, batch_shape=damp_shape, only_read=True, constrained=held)
        out_border = embedding.output_border()
    rows, columns = len(out_border), embedding.in_channels
    cells = math.prod(embedding.grid)
    frequencies = cells if convolution.is_complex else cells // embedding.grid[-1] * (embedding.grid[-1] // 2 + 1)
    item = convolution.dtype.to_complex().itemsize
    in_border = embedding.input_border() if mirror is None else 2 * [mirror.margin for _ in range(columns)]
    has_out, has_in = (any(any(axes) for axes in border) for border in (out_border, in_border))
    size = rows + columns if (has_out and has_in) or mirror is not None else rows if has_out else columns
    # symbol, inverse of the smaller normal operator with its work space, border system and the spatial kernel of it
    entries = rows * columns + 2 * min(rows, columns) ** 2 + 3 * size**2
    total = frequencies * entries
    positions = (out_border if has_out else []) + (in_border if has_in else [])
    # a small border, and otherwise the crossings, are dense patches: the inverse and the work space of making it
    inside = [math.prod(n - len(along) for n, along in zip(embedding.grid, axes, strict=True)) for axes in positions]
    total += 3 * min(dense_entries(len(embedding.grid)), sum(cells - n for n in inside) ** 2)
    for a, n in enumerate(embedding.grid):
        cells_along = sum(len(axes[a]) for axes in positions)
        total += 3 * cells_along**2 * (cells // n)
    return embedding.blocks * total * item


def check_fits(needed: int, allowed: int, what: str, method: str = "border") -> None:
    """Refuse a plan that needs more bytes than are allowed.

    Args:
        needed: bytes of the plan.
        allowed: bytes that it may use.
        what: the plan is for.
        method: the method is.

    Raises:
        PlanMemoryError: it does.
    """
    if needed > allowed:
        raise PlanMemoryError(
            f'method="{method}": the plan for {what} needs about {needed:.3g} bytes, and {allowed:.3g} are allowed '
            f'(memory_limit=). Use method="lsmr" with CirculantPreconditioner, which needs a few vectors, float32, or '
            f"solve groups of channels apart."
        )
