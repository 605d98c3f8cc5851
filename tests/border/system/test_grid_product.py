"""The product on the border over the whole grid."""

from __future__ import annotations

import pytest
import torch

from lsconv.border.border_set import Border
from lsconv.border.system.grid_product import GridProduct
from lsconv.fourier.symbol import FrequencyMatrices, Grid


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_the_dense_operator_between_the_border_cells(channels: int, dtype: torch.dtype) -> None:
    grid = Grid((7, 6), real=not dtype.is_complex)
    kernel = torch.randn(2, channels, channels, 7, 6, dtype=dtype)
    matrices = FrequencyMatrices(grid, grid.transform(kernel).movedim((1, 2), (-2, -1)))
    border = Border((7, 6), [[[0, 1, 6], [4, 5]], [[2, 3], [0]]][:channels], torch.device("cpu"))
    cells = border.mask.nonzero()
    dense = torch.zeros(2, border.size, border.size, dtype=dtype)
    for i, (c, *p) in enumerate(cells.tolist()):
        for j, (d, *q) in enumerate(cells.tolist()):
            dense[:, i, j] = kernel[:, c, d, (p[0] - q[0]) % 7, (p[1] - q[1]) % 6]
    u = torch.randn(3, 2, border.size, dtype=dtype)
    torch.testing.assert_close(GridProduct(matrices, border)(u), torch.einsum("bij,rbj->rbi", dense, u))
