"""The product on the border over a large grid, in arrays that are kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lsconv.border.border_set import Border
from lsconv.border.system import grid_product
from lsconv.border.system.grid_product import BorderProduct
from lsconv.fourier.symbol import FrequencyMatrices, Grid

pytestmark = pytest.mark.usefixtures("iterated")

GRID = (20, 30)


@pytest.fixture(autouse=True)
def _keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_product, "_KEPT_BYTES", 0)
    monkeypatch.setattr(grid_product, "_PART_BYTES", 2000)  # a few columns at a time


def _product(channels: int, dtype: torch.dtype, sizes: tuple[int, int] = GRID, blocks: int = 2) -> BorderProduct:
    grid = Grid(sizes, real=not dtype.is_complex)
    matrices = FrequencyMatrices(
        grid, torch.randn(blocks, *grid.frequencies, channels, channels, dtype=dtype.to_complex())
    )
    positions = [[[0, 1, 19], [28, 29]], [[2, 3], [0]]][:channels]
    return BorderProduct(matrices, Border(sizes, positions, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("channels", [1, 2])
def test_it_is_the_operator_between_scatter_and_gather(channels: int, dtype: torch.dtype) -> None:
    product = _product(channels, dtype)
    border, matrices = product.border, product.matrices
    for rest in (1, 3, 3, 1):  # with the arrays of the one before, or others
        u = torch.randn(rest, 2, border.size, dtype=dtype)
        torch.testing.assert_close(product(u), border.gather(matrices.on_grid(border.scatter(u))))
        assert product.nbytes >= 2 * rest * 2 * channels * 600 * dtype.itemsize


def test_threads_do_not_share_the_arrays() -> None:
    product = _product(2, torch.float64, (128, 128))  # long enough for threads to meet
    us = [torch.randn(1, 2, product.border.size, dtype=torch.float64) for _ in range(200)]
    expected = [product.border.gather(product.matrices.on_grid(product.border.scatter(u))) for u in us]
    with ThreadPoolExecutor(8) as pool:
        for found, wanted in zip(pool.map(product, us), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_a_small_grid_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_product, "_KEPT_BYTES", 2**20)
    product = _product(1, torch.float64)
    product(torch.randn(1, 2, product.border.size, dtype=torch.float64))
    assert product.nbytes == 0


def test_arrays_made_in_inference_mode_are_not_kept() -> None:
    product = _product(1, torch.float64)
    with torch.inference_mode():
        product(torch.randn(1, 2, product.border.size, dtype=torch.float64))
    u = torch.randn(1, 2, product.border.size, dtype=torch.float64)
    torch.testing.assert_close(product(u), product.border.gather(product.matrices.on_grid(product.border.scatter(u))))
