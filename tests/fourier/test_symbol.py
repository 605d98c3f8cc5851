"""The symbol against the Fourier sum it stands for."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import MethodError
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices, Grid
from lsconv.fourier.symbol import gram, saddle_inverse, symbol
from lsconv.operators.convolution import Conv1d, Conv2d, Convolution


def _fourier_sum(A: Convolution, grid: tuple[int, ...], frequency: tuple[int, ...]) -> torch.Tensor:
    """S(w) = sum_t K[t] exp(i w (d t - l)) of a convolution with stride 1 and one group."""
    S = torch.zeros(A.c_out, A.c_in, dtype=torch.complex128)
    for taps in itertools.product(*(range(k) for k in A.kernel_size)):
        phase = sum(
            2 * math.pi * w / n * (d * t - left)
            for w, n, d, t, (left, _) in zip(frequency, grid, A.dilation, taps, A.padding, strict=True)
        )
        S += A.weight[(slice(None), slice(None), *taps)] * torch.exp(torch.tensor(1j * phase, dtype=torch.complex128))
    return S


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("padding_mode", ["circular", "zeros"])
def test_symbol_is_the_fourier_sum_of_the_kernel(dtype: torch.dtype, padding_mode: str) -> None:
    A = Conv2d(torch.randn(3, 2, 3, 2, dtype=dtype), in_size=(6, 5), padding=((1, 3), (1, 0)), dilation=(2, 1),
               padding_mode=padding_mode)  # fmt: skip
    S = symbol(A)
    grid = Embedding(A).grid
    assert S.matrices.shape == (1, *S.grid.frequencies, 3, 2)
    for frequency in itertools.product(*(range(n) for n in S.grid.frequencies)):
        expected = _fourier_sum(A, grid, frequency)
        torch.testing.assert_close(S.matrices[(0, *frequency)], expected, rtol=1e-12, atol=1e-12)


@given(data=st.data())
def test_symbol_diagonalises_the_dense_matrix(circular_convolutions: Any, data: st.DataObject) -> None:
    """Applying the adjoint after the operator, per frequency, is the dense A^H A."""
    A = data.draw(circular_convolutions())
    embedding, S = Embedding(A), symbol(A)
    dense = A.to_dense()
    gram = FrequencyMatrices(S.grid, S.matrices.mH @ S.matrices)
    eye = torch.eye(A.in_numel, dtype=A.dtype).reshape(A.in_numel, *(1 for _ in A.batch_shape), *A.in_shape)
    batch, _ = embedding.split_batch((A.in_numel, *(1 for _ in A.batch_shape)))
    columns = embedding.inputs_from_grid(gram.on_grid(embedding.inputs_to_grid(eye)), batch).flatten(-A.ndim - 1)
    torch.testing.assert_close(columns.movedim(0, -1), dense.mH @ dense, rtol=1e-10, atol=1e-10)


def test_operators_without_a_periodic_grid_have_no_symbol() -> None:
    A = Conv1d(torch.ones(1, 1, 3), in_size=8, padding=1, padding_mode="reflect")
    with pytest.raises(MethodError, match="reflect"):
        symbol(A)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("sizes", "axes"), [((9,), (0,)), ((8, 6), (1,)), ((7, 9), (0,)), ((8, 7), (0, 1)),
                                             ((6, 5, 8), (2,)), ((4, 6, 7), (0, 2)), ((5, 4, 6), (0, 1))])  # fmt: skip
def test_many_channels_take_the_same_symbol_and_kernel_without_a_transform_of_the_grid(
    sizes: tuple[int, ...], axes: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 5, 4, *(3 for _ in sizes), dtype=dtype)
    A = Convolution(weight, in_size=sizes, padding=1, padding_mode="circular")
    S = symbol(A)
    grid = Grid(sizes, real=not dtype.is_complex)
    kernel = Embedding(A).kernel_to_grid(weight)
    plain = grid.transform(kernel.conj().resolve_conj()).conj().resolve_conj().movedim((1, 2), (-2, -1))
    torch.testing.assert_close(S.matrices, plain, rtol=0, atol=1e-12)

    lags = [torch.tensor([sizes[a] - 1, 0, 2]) for a in axes]
    others = Grid(tuple(n for a, n in enumerate(sizes) if a not in axes), real=grid.real)
    spatial = FrequencyMatrices(grid, plain).kernel()
    for a, places in zip(axes, lags, strict=True):
        spatial = spatial.index_select(3 + a, places)
    spatial = spatial.movedim([3 + a for a in axes], list(range(3, 3 + len(axes))))
    expected = others.transform(spatial).movedim((1, 2), (-2, -1))  # blocks, *lags, *others, rows, columns
    expected = expected.movedim(list(range(1, 1 + len(axes))), list(range(-2 - len(axes), -2)))
    torch.testing.assert_close(S.at_lags(axes, lags), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_saddle_inverse_is_that_of_the_saddle_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    S = torch.randn(3, 5, 4, rows, columns, dtype=dtype)
    mu = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
    squared = gram(S, "residual" if rows <= columns else "solution")
    inverse, smaller = saddle_inverse(S, squared, mu)
    eye = torch.eye(rows + columns, dtype=dtype)
    saddle = torch.zeros(*S.shape[:-2], rows + columns, rows + columns, dtype=dtype)
    saddle[..., :rows, rows:], saddle[..., rows:, :rows] = S, S.mH
    signs = torch.cat([-torch.ones(rows), torch.ones(columns)]).to(dtype)
    saddle = saddle + mu.sqrt() * torch.diag(signs)
    torch.testing.assert_close(saddle @ inverse, eye.expand_as(saddle), rtol=0, atol=1e-12)
    small = torch.eye(min(shape), dtype=dtype)
    torch.testing.assert_close((squared + mu * small) @ smaller, small.expand_as(squared), rtol=0, atol=1e-12)
