"""The memory of a device: what is free, what a plan may use, and a refusal where it needs more."""

from __future__ import annotations

import os

import torch

from lsconv.errors import ArgumentError, PlanMemoryError

__all__ = ["allowed_bytes", "check_fits", "free_bytes"]


def check_fits(needed: int, allowed: int, subject: object, method: str = "border") -> None:
    """Refuse a plan that needs more bytes than are allowed.

    Args:
        needed: bytes of the plan.
        allowed: bytes that it may use.
        subject: the operator, or a part of its plan, for the message.
        method: the name of the method, for the message.

    Raises:
        PlanMemoryError: more are needed than are allowed.
    """
    if needed > allowed:
        raise PlanMemoryError(
            f'method="{method}": the plan for {subject} needs about {needed:.3g} bytes, and {allowed:.3g} are allowed '
            f'(memory_limit=). Use method="lsmr" with CirculantPreconditioner, which needs a few vectors, float32, or '
            f"solve groups of channels separately."
        )


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    if device.type == "cuda":
        # torch reuses what it has reserved and does not use.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        with open("/proc/meminfo", "rb", buffering=0) as file:
            name, amount, _ = file.read(256).splitlines()[2].split()  # the third line, after MemTotal and MemFree
        if name == b"MemAvailable:":
            return int(amount) * 1024
    except (OSError, IndexError, ValueError):
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
