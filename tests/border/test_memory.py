"""How much goes at once."""

from __future__ import annotations

import torch

from lsconv.border.memory import free_bytes, together


def test_as_many_right_hand_sides_go_at_once_as_an_allocator_reuses() -> None:
    cpu = torch.device("cpu")
    assert together(2**20, 2**30, cpu) == 2**5
    assert together(2**30, 0, cpu) == 1


def test_elsewhere_as_many_go_as_half_of_the_free_memory_holds() -> None:
    device = torch.device("meta")
    free = free_bytes(device)
    least, most = (together(2**20, 2**20, device) * 7 * 2**20 / (part * free) for part in (0.5, 0.5))
    assert 0.9 < least == most < 1.1
    assert together(2 * free, 2 * free, device) == 1
