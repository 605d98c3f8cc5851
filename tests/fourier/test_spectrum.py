"""Singular values, norms and condition numbers against dense linear algebra."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import ArgumentError, ConvergenceWarning, DtypeError, MethodError
from lsconv.fourier import spectrum
from lsconv.fourier.spectrum import cond, norm, singular_values
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Conv1d, Conv2d
from lsconv.operators.elementary import Crop, Dense, FromFunctions


@given(data=st.data())
def test_singular_values_are_those_of_the_matrix_with_their_multiplicity(
    circular_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(circular_convolutions())
    expected = torch.linalg.svdvals(A.to_dense())
    actual = singular_values(A)
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(norm(A), expected[..., 0], rtol=1e-12, atol=1e-12)


def test_cells_of_the_grid_that_are_no_inputs_add_no_singular_values() -> None:
    """Stride 3 over 7 inputs needs a grid of 9 cells."""
    A = Conv1d(torch.randn(3, 1, 1, dtype=torch.float64), 7, stride=3)
    expected = torch.linalg.svdvals(A.to_dense())
    assert expected.shape == (7,)
    torch.testing.assert_close(singular_values(A), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(cond(Conv1d(A.weight[:1], 7, stride=3)), torch.tensor(1.0, dtype=torch.float64))


# ------------------------------------------------------------------ norm and cond of any operator


@given(data=st.data())
def test_norm_of_a_truncated_circulant_is_the_largest_singular_value(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    A = data.draw(zero_padded_convolutions())
    expected = torch.linalg.matrix_norm(A.to_dense(), 2)
    actual = norm(A, rtol=1e-7)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_norm_of_a_blur_in_every_padding_mode(padding_mode: str) -> None:
    t = torch.exp(-(torch.linspace(-2, 2, 9, dtype=torch.float64) ** 2))
    weight = (t[:, None] * t / t.sum() ** 2)[None, None]
    A = Conv2d(weight, (24, 20), padding=4, padding_mode=padding_mode)
    torch.testing.assert_close(norm(A), torch.linalg.matrix_norm(A.to_dense(), 2), rtol=1e-6, atol=0)


def test_norm_serves_products_adjoints_and_matrices() -> None:
    A = Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64), (6, 6), padding=1)
    B: LinearOperator = Crop(A.out_shape, (1, 1), (3, 4), dtype=torch.float64) @ A
    for operator in (B, B.H, Dense(torch.randn(4, 3, 5, 7, dtype=torch.complex128))):
        expected = torch.linalg.matrix_norm(operator.to_dense(), 2)
        torch.testing.assert_close(norm(operator), expected, rtol=1e-8, atol=0)


def test_norm_of_zero_and_of_an_orthogonal_operator() -> None:
    assert float(norm(Dense(torch.zeros(3, 4)))) == 0
    assert float(norm(Conv1d(torch.zeros(1, 1, 3), 5))) == 0
    rotation = FromFunctions((5,), (5,), lambda x: x.flip(-1), lambda y: y.flip(-1))
    torch.testing.assert_close(norm(rotation), torch.tensor(1.0))


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_norm_scales(scale: float) -> None:
    weight = torch.randn(2, 2, 3, 3)
    small, large = (norm(Conv2d(w, (9, 9))) for w in (weight, weight * scale))
    torch.testing.assert_close(large / scale, small, rtol=1e-5, atol=0)


def test_norm_that_does_not_converge_warns_and_is_a_lower_bound() -> None:
    matrix = torch.diag(torch.linspace(0.99, 1.0, 400, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match="lower bound"):
        value = norm(Dense(matrix), rtol=1e-12, max_iter=5)
    assert 0.99 < float(value) < 1.0


def test_norm_is_reproducible_and_leaves_the_random_state_alone() -> None:
    A = Conv2d(torch.randn(2, 3, 3, 3), (9, 9))
    state = torch.get_rng_state()
    first, second = norm(A), norm(A)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@given(data=st.data())
def test_cond_is_that_of_the_matrix(circular_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(circular_convolutions())
    values = torch.linalg.svdvals(A.to_dense())
    actual, expected = cond(A), torch.where(values[..., -1] > 0, values[..., 0] / values[..., -1], torch.inf)
    # taps that cancel are a zero, or its rounding
    some = values[..., 0] > 1e-12 * A.weight.abs().flatten(-A.ndim - 2).sum(-1)
    reliable = some & (expected < 1e10)  # beyond, both are the rounding of a zero
    torch.testing.assert_close(actual[reliable], expected[reliable], rtol=1e-4, atol=0)
    assert bool((actual[some & ~reliable] > 1e9).all())


def test_cond_of_small_operators_is_dense_and_of_large_ones_refused() -> None:
    A = Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64), (6, 6))
    torch.testing.assert_close(cond(A), torch.linalg.cond(A.to_dense()))
    with pytest.raises(MethodError, match=r"svdvals\(A\.to_dense\(\)\)"):
        cond(Conv2d(torch.randn(2, 2, 3, 3), (64, 64)))


SEPARABLE = {
    "valid": ({}, 1),
    "same, strided, dilated": ({"padding": 2, "stride": 2, "dilation": 2}, 1),
    "reflected": ({"padding": 1, "padding_mode": "reflect"}, 1),
    "channels": ({"padding": 1}, 3),
    "groups": ({"groups": 2}, 1),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_kernel_has_the_products_of_its_axes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, channels = SEPARABLE[name]
    rows, columns = torch.randn(2, 3, dtype=torch.float64)
    mixed = torch.randn(2, channels, 1, 1, dtype=torch.float64)
    A = Conv2d(mixed * torch.outer(rows, columns), (9, 8), **options)
    expected = torch.linalg.svdvals(A.to_dense())
    monkeypatch.setattr(spectrum, "DENSE_ENTRIES", 0)  # no way round
    torch.testing.assert_close(singular_values(A), expected, rtol=0, atol=1e-12 * float(expected[0]))
    torch.testing.assert_close(singular_values(A, 3), expected[:3], rtol=1e-12, atol=0)


def test_small_operators_are_written_out_and_large_ones_refused() -> None:
    A = Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64), (6, 5))
    torch.testing.assert_close(singular_values(A), torch.linalg.svdvals(A.to_dense()))
    with pytest.raises(MethodError, match=r"svdvals\(A\.to_dense\(\)\)"):
        singular_values(Conv2d(torch.randn(2, 2, 3, 3), (64, 64)))
    with pytest.raises(ArgumentError, match="k: expected"):
        singular_values(A, 0)


def test_half_precision_and_wrong_arguments_are_refused() -> None:
    A = Conv1d(torch.ones(1, 1, 3), 8, padding=1, padding_mode="circular")
    for function in (singular_values, norm, cond):
        with pytest.raises(DtypeError, match="bfloat16"):
            function(A.to(torch.bfloat16))
    with pytest.raises(ArgumentError, match="rtol"):
        norm(A, rtol=0.0)


def test_results_have_the_real_dtype_of_the_operator() -> None:
    A = Conv1d(torch.randn(2, 2, 3, dtype=torch.complex64), 6, padding=1, padding_mode="circular")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for function in (singular_values, norm, cond):
            assert function(A).dtype == torch.float32
