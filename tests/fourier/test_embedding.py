"""A = R_out C R_in^T: the periodic grid carries the convolution, and its border is what it is declared to be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import symbol
from lsconv.operators.convolution import Conv1d, Conv2d, Convolution


def _random(A: Convolution, shape: tuple[int, ...], *batch: int) -> torch.Tensor:
    return torch.randn(*batch, *shape, dtype=A.dtype)


def _through_the_grid(A: Convolution, x: torch.Tensor, embedding: Embedding) -> torch.Tensor:
    batch, _ = embedding.split_batch(tuple(x.shape[: x.ndim - len(A.in_shape)]))
    y = symbol(A, embedding).on_grid(embedding.inputs_to_grid(x))
    return embedding.outputs_from_grid(y, batch)


@given(data=st.data())
def test_zero_padded_convolution_is_a_truncated_circulant(zero_padded_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(zero_padded_convolutions())
    x = _random(A, A.in_shape, 3, *A.batch_shape)
    expected = A(x)
    actual = _through_the_grid(A, x, Embedding(A))
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(data=st.data())
def test_circular_convolution_is_the_circulant(circular_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(circular_convolutions())
    assert Embedding.serves(A)
    assert Embedding(A).is_circulant
    x = _random(A, A.in_shape, 2, *A.batch_shape)
    torch.testing.assert_close(_through_the_grid(A, x, Embedding(A)), A(x), rtol=1e-11, atol=1e-11)


@given(data=st.data())
def test_adjoint_runs_backwards_through_the_grid(zero_padded_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(zero_padded_convolutions())
    embedding = Embedding(A)
    y = _random(A, A.out_shape, *A.batch_shape)
    batch, _ = embedding.split_batch(A.batch_shape)
    x = embedding.inputs_from_grid(symbol(A, embedding).H.on_grid(embedding.outputs_to_grid(y)), batch)
    torch.testing.assert_close(x, A.H(y), rtol=1e-11, atol=1e-11)


@given(data=st.data(), extra=st.integers(0, 5))
def test_larger_grid_carries_the_same_operator(zero_padded_convolutions: Any, data: st.DataObject, extra: int) -> None:
    A = data.draw(zero_padded_convolutions())
    embedding = Embedding(A, tuple(n + extra for n in Embedding(A, (1,) * A.ndim).grid))
    x = _random(A, A.in_shape, *A.batch_shape)
    torch.testing.assert_close(_through_the_grid(A, x, embedding), A(x), rtol=1e-11, atol=1e-11)


@given(data=st.data())
def test_cropping_undoes_embedding_and_embedding_is_an_isometry(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(zero_padded_convolutions())
    embedding = Embedding(A)
    for shape, there, back in (
        (A.in_shape, embedding.inputs_to_grid, embedding.inputs_from_grid),
        (A.out_shape, embedding.outputs_to_grid, embedding.outputs_from_grid),
    ):
        x = _random(A, shape, 2, *A.batch_shape)
        on_grid = there(x)
        assert torch.equal(back(on_grid, embedding.split_batch((2, *A.batch_shape))[0]), x)
        torch.testing.assert_close(on_grid.norm(), x.norm())


@pytest.mark.parametrize("batch", [(3,), (1, 3), (2, 3), (4, 2, 1), (4, 1, 3)])
def test_kernel_batch_broadcasts_with_the_inputs(batch: tuple[int, ...]) -> None:
    A = Conv1d(torch.randn(2, 1, 2, 1, 3, dtype=torch.float64), 6, padding=1, groups=2)
    x = _random(A, A.in_shape, *batch)
    torch.testing.assert_close(_through_the_grid(A, x, Embedding(A)), A(x), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ the border


@given(data=st.data())
def test_outside_outputs_and_border_the_grid_reads_only_zeros(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(zero_padded_convolutions())
    embedding = Embedding(A)
    x = _random(A, A.in_shape, *A.batch_shape)
    y = symbol(A, embedding).on_grid(embedding.inputs_to_grid(x))
    allowed = torch.ones(embedding.grid, dtype=torch.bool)
    for a, axis in enumerate(embedding.axes):
        silent = sorted(set(range(axis.n_out, axis.grid)) - set(axis.border_out))
        allowed.movedim(a, 0)[silent] = False
    assert float(y.abs()[..., ~allowed].sum()) <= 1e-11 * (1 + float(y.abs().sum()))


@given(data=st.data())
def test_every_border_output_reads_an_input(zero_padded_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(zero_padded_convolutions())
    for a in range(A.ndim):
        line = Conv1d(torch.ones(1, 1, A.kernel_size[a], dtype=torch.float64), A.spatial_in[a], A.stride[a],
                      (A.padding[a],), A.dilation[a])  # fmt: skip
        embedding = Embedding(line)
        y = symbol(line, embedding).on_grid(embedding.inputs_to_grid(torch.ones(line.in_shape, dtype=torch.float64)))
        axis = embedding.axes[0]
        border = axis.border_out
        assert set(border).isdisjoint(range(axis.n_out))
        if axis.constrained:
            assert all(float(y[..., position]) > 0.5 for position in border)


@given(data=st.data())
def test_unconstrained_outputs_do_not_depend_on_cells_that_are_no_inputs(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(zero_padded_convolutions())
    size = [max(n, extent) for n, extent in zip(A.spatial_in, A.kernel_extent, strict=True)]
    A = Convolution(A.weight, size, A.stride, 0, A.dilation, A.groups)
    embedding = Embedding(A)
    assert not any(axis.constrained for axis in embedding.axes)
    assert not any(places for channel in embedding.input_border() for places in channel)
    x = _random(A, A.in_shape, *A.batch_shape)
    inside = embedding.inputs_to_grid(torch.ones_like(x)) != 0
    z = torch.where(inside, embedding.inputs_to_grid(x), _random(A, inside.shape))
    y = embedding.outputs_from_grid(symbol(A, embedding).on_grid(z), A.batch_shape)
    torch.testing.assert_close(y, A(x), rtol=1e-11, atol=1e-11)


@given(data=st.data())
def test_constrained_input_border_is_exactly_the_cells_without_an_input(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(zero_padded_convolutions())
    for a in range(A.ndim):
        padding = (A.kernel_extent[a], A.kernel_extent[a])  # outputs that read beyond every input
        line = Conv1d(torch.ones(1, 1, A.kernel_size[a]), A.spatial_in[a], A.stride[a], (padding,), A.dilation[a])
        embedding = Embedding(line)
        assert embedding.axes[0].constrained
        ones = embedding.inputs_to_grid(torch.ones(line.in_shape))[0, 0]
        for cells, (places,) in zip(ones, embedding.input_border(), strict=True):
            assert places == (cells == 0).nonzero().flatten().tolist()


def test_valid_convolution_has_a_border_of_kernel_width_on_the_output_side_only() -> None:
    embedding = Embedding(Conv2d(torch.ones(1, 1, 3, 5), in_size=(16, 20)))
    assert embedding.grid == (16, 20)
    assert [axis.border_out for axis in embedding.axes] == [[14, 15], [16, 17, 18, 19]]
    assert not any(axis.constrained for axis in embedding.axes)


def test_full_convolution_has_a_border_on_the_input_side_only() -> None:
    embedding = Embedding(Conv1d(torch.ones(1, 1, 3), in_size=14, padding=2), (1,))
    assert embedding.axes[0].border_out == []
    assert embedding.axes[0].border_in(0) == list(range(14, embedding.grid[0]))


# ------------------------------------------------------------------ which operators it serves


def test_serves_and_is_circulant_tell_the_kinds_apart() -> None:
    def kinds(size: int, kernel: int = 3, **arguments: Any) -> tuple[bool, bool]:
        A = Conv1d(torch.ones(1, 1, kernel), in_size=size, **arguments)
        serves = Embedding.serves(A)
        return serves, serves and Embedding(A).is_circulant

    assert kinds(8, padding=1, padding_mode="circular") == (True, True)
    assert kinds(8, padding=0, padding_mode="circular") == (True, False)  # cropped outputs
    assert kinds(8, padding=2, padding_mode="circular") == (False, False)  # more outputs than inputs
    assert kinds(8, padding=1, padding_mode="circular", stride=2) == (True, True)
    assert kinds(9, padding=1, padding_mode="circular", stride=2) == (False, False)
    assert kinds(8, padding=1) == (True, False)
    assert kinds(8, kernel=1) == (True, True)  # pointwise
    assert kinds(8, padding=1, padding_mode="reflect") == (False, False)


@pytest.mark.parametrize("batch_shape", [(2,), (2, 1), (1,)])
def test_batch_shape_gives_items_blocks_of_their_own(batch_shape: tuple[int, ...]) -> None:
    A = Conv1d(torch.randn(4, 1, 3), in_size=6, padding=1, groups=2)
    embedding = Embedding(A, batch_shape=batch_shape)
    assert embedding.blocks == math.prod(batch_shape) * 2
    y = torch.randn(2, 3, *A.out_shape)
    grid = embedding.outputs_to_grid(y[:, :1] if batch_shape == (2, 1) else y[:, 0])
    assert grid.shape[1] == embedding.blocks


@given(data=st.data())
def test_observed_inputs_are_those_that_outputs_read(
    zero_padded_convolutions: Any, circular_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(st.one_of(zero_padded_convolutions(), circular_convolutions()))
    ones = A.with_parameters([torch.ones_like(A.weight)])
    counts = ones.H(torch.ones(*A.batch_shape, *A.out_shape, dtype=A.dtype)).real.flatten(0, -A.ndim - 1)
    read = Embedding(A).observed_inputs()
    assert torch.equal(counts.amax(0) > 0.5, torch.ones(A.spatial_in, dtype=torch.bool) if read is None else read)


def test_observed_inputs_of_a_cropped_circle_wrap() -> None:
    A = Conv1d(torch.ones(1, 1, 3), in_size=3, padding=1, dilation=2, padding_mode="circular")
    assert A.out_shape == (1, 1)
    read = Embedding(A).observed_inputs()
    assert read is None or torch.equal(read, A.H(torch.ones(A.out_shape))[0] > 0)
