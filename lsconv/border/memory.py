"""The bytes that a plan needs, and those that a device has left."""

from __future__ import annotations

import math
import os

import torch

from lsconv.border.cost_model import DEFAULT_LIMITS
from lsconv.border.penalty import Penalty
from lsconv.border.reflected_padding import Mirror
from lsconv.errors import ArgumentError, PlanMemoryError
from lsconv.fourier.embedding import Embedding
from lsconv.operators.convolution import Convolution

__all__ = ["allowed_bytes", "check_fits", "free_bytes", "plan_bytes", "together"]

# Bytes of the work arrays of right-hand sides solved for together on a CPU; glibc maps larger ones anew on every use.
_WORK_BYTES = 2**25


def plan_bytes(convolution: Convolution, damp_shape: tuple[int, ...] = (), penalty: Penalty | None = None) -> int:
    """An estimate of the bytes at the peak of a border plan's setup: symbol, normal inverse, border system, subdomains.

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
    # a small border, and otherwise the corners, are dense subdomains: the inverse and the work space of making it
    inside = [math.prod(n - len(along) for n, along in zip(embedding.grid, axes, strict=True)) for axes in positions]
    total += 3 * min(DEFAULT_LIMITS.subdomain_entries(len(embedding.grid)), sum(cells - n for n in inside) ** 2)
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


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        # and what torch holds without using it
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def allowed_bytes(limit: int | None, device: torch.device) -> int:
    """The bytes that a plan may use: ``limit``, or 60 % of what is free on the device.

    Raises:
        ArgumentError: the limit is negative.
    """
    if limit is not None and limit < 0:
        raise ArgumentError(f"memory_limit: expected a number of bytes >= 0 or None, got {limit}")
    return int(0.6 * free_bytes(device)) if limit is None else limit


def together(arrays: int, vectors: int, device: torch.device) -> int:
    """The number of right-hand sides that are solved for at once.

    On a CPU as many as have arrays that its allocator reuses, elsewhere as many as half of the free memory holds with
    the six arrays that there are at a time.

    Args:
        arrays: bytes of a work array of one of them.
        vectors: bytes of the border vectors that its iteration keeps.
        device: where they are.
    """
    if device.type == "cpu":
        return max(1, _WORK_BYTES // arrays)
    return max(1, free_bytes(device) // 2 // (6 * arrays + vectors))
