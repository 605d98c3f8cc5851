"""Matrices per frequency against plain contractions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import symbol
from lsconv.operators.convolution import Conv1d, Conv2d


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 1), (1, 4), (2, 3), (5, 6)])  # elementwise, and batched products
def test_frequency_matrices_multiply_like_einsum(rows: int, columns: int, real: bool) -> None:
    grid = Grid((4, 5), real=real)
    matrices = torch.randn(2, *grid.frequencies, rows, columns, dtype=torch.complex128)
    spectra = torch.randn(3, 2, columns, *grid.frequencies, dtype=torch.complex128)
    S = FrequencyMatrices(grid, matrices)
    torch.testing.assert_close(S(spectra), torch.einsum("bxyij,rbjxy->rbixy", matrices, spectra))
    back = torch.randn(3, 2, rows, *grid.frequencies, dtype=torch.complex128)
    torch.testing.assert_close(S.H(back), torch.einsum("bxyij,rbixy->rbjxy", matrices.conj(), back))


def test_real_matrices_multiply_complex_spectra() -> None:
    grid = Grid((6,), real=True)
    matrices = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    spectra = torch.randn(3, 2, 5, 4, dtype=torch.complex128)
    expected = torch.einsum("bxij,rbjx->rbix", matrices.to(torch.complex128), spectra)
    torch.testing.assert_close(FrequencyMatrices(grid, matrices)(spectra), expected)


def test_kernel_is_the_first_block_column() -> None:
    A = Conv1d(torch.randn(2, 3, 3, dtype=torch.float64), in_size=6, padding=1, padding_mode="circular")
    kernel = symbol(A).kernel()
    assert kernel.shape == (1, 2, 3, 6)
    impulse = torch.zeros(3, 3, 6, dtype=torch.float64)
    impulse[range(3), range(3), 0] = 1
    torch.testing.assert_close(kernel[0].movedim(1, 0), A(impulse))


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3), real=st.booleans())
def test_weights_count_every_frequency_once(sizes: list[int], real: bool) -> None:
    """Parseval: the weighted energy of the kept frequencies is that of all of them."""
    grid = Grid(tuple(sizes), real=real)
    x = torch.randn(sizes, dtype=torch.float64 if real else torch.complex128)
    weights = grid.weights(x.device, torch.float64)
    assert float(weights.sum()) == math.prod(sizes)
    energy = (grid.transform(x).abs() ** 2 * weights).sum() / math.prod(sizes)
    torch.testing.assert_close(energy, x.abs().square().sum())
    torch.testing.assert_close(grid.inverse(grid.transform(x)), x)


def test_both_multiplication_layouts_agree() -> None:
    A = Conv2d(torch.randn(3, 4, 3, 3, dtype=torch.float64), in_size=(6, 6), padding=1, padding_mode="circular")
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    S = symbol(A)
    results = [
        FrequencyMatrices(S.grid, S.matrices, elementwise=elementwise).on_grid(x.unsqueeze(1)).squeeze(1)
        for elementwise in (True, False)
    ]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], A(x))
