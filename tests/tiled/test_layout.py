"""Overlapping tiles are a partition of unity."""

from __future__ import annotations

import torch

from lsconv.tiled.schwarz import SchwarzInverse
from tests.tiled.varying import F64, field


def test_squares_of_the_windows_sum_to_one() -> None:
    for mode, padding in (("zeros", 0), ("circular", "same")):
        M = SchwarzInverse(field(41, padding, mode), torch.tensor(0.1, dtype=F64), core=(13, 13))
        ones = torch.ones(1, 41, 41, dtype=F64)
        total = torch.zeros_like(ones)
        for group in M.groups:
            for start, window in zip(group.starts.tolist(), group.windows, strict=True):
                for i, j in ((i, j) for i in range(window.shape[1]) for j in range(window.shape[2])):
                    margin = M.layout.axes[0].margin
                    total[0, (start[0] + i - margin) % 41, (start[1] + j - margin) % 41] += window[0, i, j] ** 2
        torch.testing.assert_close(total, ones)
