"""The shared transform on one rank: that of torch, its inverse, and the symbol of a convolution."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import symbol
from lsconv.tiled.pencil_grid import PencilGrid, share_size
from lsconv.tiled.ranks import Ranks

F64 = torch.float64
CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes, inputs", [((8, 6), (8, 6)), ((9, 8), (7, 5)), ((4, 5, 6), (4, 3, 5))])
def test_the_share_of_one_rank_is_the_transform_and_its_inverse_the_field(
    sizes: tuple[int, ...], inputs: tuple[int, ...]
) -> None:
    grid = PencilGrid(sizes, inputs, Ranks(None, CPU))
    field = torch.randn(1, 2, *inputs, dtype=F64, generator=torch.Generator().manual_seed(0))
    exact = torch.fft.fftn(field, s=sizes, dim=tuple(range(2, 2 + len(sizes))))[:, :, :, : sizes[1] // 2 + 1]
    share = grid.transform(field)
    torch.testing.assert_close(share, exact)
    torch.testing.assert_close(grid.inverse(share), field)
    power = (share.abs().square() * grid.weights(CPU).reshape(-1, *(1 for _ in sizes[2:]))).sum()
    torch.testing.assert_close(power / torch.tensor(sizes).prod(), field.square().sum())


def test_the_symbol_is_that_of_the_convolution_with_the_other_axis_halved() -> None:
    A = lsconv.Conv2d(torch.randn(2, 3, 3, 2, dtype=F64), (6, 8), padding="same", padding_mode="circular")
    embedding = Embedding(A, (6, 8))
    grid = PencilGrid(embedding.grid, A.spatial_in, Ranks(None, CPU))
    full = torch.fft.fft2(torch.fft.irfft2(symbol(A, embedding).matrices, s=embedding.grid, dim=(1, 2)), dim=(1, 2))
    torch.testing.assert_close(grid.symbol(A, embedding).matrices, full[:, :, : embedding.grid[1] // 2 + 1])


def test_the_shares_of_all_ranks_hold_the_grid() -> None:
    for ranks in (1, 2, 3, 5):
        assert ranks * share_size((12, 10), ranks) >= 12 * 6
