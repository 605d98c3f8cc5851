"""Windows of a field: what is read, and that adding up is the adjoint of reading."""

from __future__ import annotations

import pytest
import torch

from lsconv.operators.windows import add_windows, read_windows


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_windows_are_slices_and_their_sum_is_the_adjoint(ndim: int) -> None:
    size, window = (7, 6, 5)[:ndim], (3, 2, 4)[:ndim]
    starts = torch.tensor([[0, 0, 0], [4, 4, 1], [2, 1, 0]])[:, :ndim]
    x, parts = torch.randn(2, 3, *size, dtype=torch.float64), torch.randn(2, 3, 3, *window, dtype=torch.float64)
    read = read_windows(x, starts, window)
    for k, start in enumerate(starts.tolist()):
        cells = tuple(slice(s, s + n) for s, n in zip(start, window, strict=True))
        assert torch.equal(read[:, k], x[(..., *cells)])
    torch.testing.assert_close((read * parts).sum(), (x * add_windows(parts, starts, size)).sum())
