"""Convolution with a varying kernel against its dense matrix, in both forms, by windows and over the whole field."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import lsconv
from lsconv.operators.varying_convolution import VaryingConvolution

FORMS = ("after", "before")
PADDINGS: tuple[tuple[str, Any], ...] = (
    ("zeros", 0),
    ("zeros", "same"),
    ("zeros", (1, 2)),
    ("circular", "same"),
    ("reflect", "same"),
    ("replicate", (2, 1)),
)


def example(
    ndim: int,
    form: str,
    padding: Any,
    mode: str,
    *,
    own_channels: bool,
    dtype: torch.dtype = torch.float64,
    large: bool = False,
) -> VaryingConvolution:
    """Kernels at the corners of the field, so that windows pay in two and three dimensions."""
    generator = torch.Generator().manual_seed(ndim)
    size = ((13,), (9, 8), (7, 6, 5))[ndim - 1] if not large else (13, 11, 9)[:ndim]
    taps = (3, 2, 3)[:ndim]
    padding = (padding,) * ndim if isinstance(padding, tuple) and ndim > 0 else padding
    positions = list(itertools.product(*([1.0, n - (5.0 if large else 3.0)] for n in size)))
    shape = (len(positions), *((2, 3) if own_channels else ()), *taps)
    kernels = torch.randn(shape, dtype=dtype, generator=generator)
    return VaryingConvolution.from_grid(
        kernels, positions, size, form, padding, mode, channels=1 if own_channels else 2
    )


def convolution(A: VaryingConvolution, k: int) -> lsconv.Convolution:
    """One of the convolutions that A is made of."""
    kernel, channels = A.kernels[k], A.in_shape[0]
    weight = kernel if not A.shared else kernel.expand(channels, 1, *kernel.shape).contiguous()
    return lsconv.Convolution(
        weight, A.spatial_in, padding=A.padding, padding_mode=A.padding_mode, groups=channels if A.shared else 1
    )


def dense(A: VaryingConvolution) -> torch.Tensor:
    """The matrix by the definition."""
    shape = (A.out_shape if A.form == "after" else A.in_shape)[0]
    total = torch.zeros(A.out_numel, A.in_numel, dtype=A.dtype)
    for k in range(len(A.kernels)):
        H = convolution(A, k).to_dense()
        w = A.weights[k].expand(shape, *A.weights.shape[1:]).reshape(-1)
        total += w[:, None] * H if A.form == "after" else H * w
    return total


@pytest.mark.parametrize("ndim", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_channels", [False, True])
@pytest.mark.parametrize("mode, padding", PADDINGS)
def test_a_varying_convolution_is_the_sum_of_weighted_convolutions(
    ndim: int, form: str, own_channels: bool, mode: str, padding: Any
) -> None:
    A = example(ndim, form, padding, mode, own_channels=own_channels)
    B = dense(A)
    torch.testing.assert_close(A.to_dense(), B)
    adjoint = A.H.to_dense()
    torch.testing.assert_close(adjoint, B.mH)


@pytest.mark.parametrize("form", FORMS)
def test_windows_and_the_whole_field_give_the_same(form: str) -> None:
    A = example(3, form, (2, 1) if form == "before" else 0, "replicate", own_channels=False, large=True)
    assert A._windows() is not None
    whole = VaryingConvolution(
        A.kernels, A.weights.clone().requires_grad_(), A.spatial_in, form, A.padding, A.padding_mode, channels=2
    )
    assert whole._windows() is None
    x, y = (torch.randn(3, 2, *shape, dtype=A.dtype) for shape in (A.in_shape, A.out_shape))
    torch.testing.assert_close(A(x), whole(x).detach())
    torch.testing.assert_close(A.H(y), whole.H(y).detach())


def test_windows_follow_kernels_and_weights_that_change_in_place() -> None:
    A = example(3, "after", 0, "zeros", own_channels=False, large=True)
    assert A._windows() is not None
    x = torch.randn(A.in_shape, dtype=A.dtype)
    A(x)
    A.kernels.mul_(2)
    A.weights.add_(0.5)
    fresh = VaryingConvolution(A.kernels.clone(), A.weights.clone(), A.spatial_in, channels=2)
    torch.testing.assert_close(A(x), fresh(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own_channels", [False, True])
def test_derivatives_by_argument_kernels_and_weights(form: str, own_channels: bool) -> None:
    A = example(1, form, 1, "zeros", own_channels=own_channels)
    x = torch.randn(2, *A.in_shape, dtype=A.dtype, requires_grad=True)
    y = torch.randn(2, *A.out_shape, dtype=A.dtype, requires_grad=True)
    parameters = [p.clone().requires_grad_() for p in A.parameters()]
    assert len(parameters) == 2
    assert torch.autograd.gradcheck(lambda v, *p: A.with_parameters(p)(v), (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(lambda v, *p: A.with_parameters(p).H(v), (y, *parameters), fast_mode=True)


def test_a_weight_of_zero_has_a_slope() -> None:
    """Windows leave out where a weight is zero, and may not be taken where it is differentiated."""
    A = example(3, "after", 0, "zeros", own_channels=False)
    weights = A.weights.clone().requires_grad_()
    B = A.with_parameters([A.kernels, weights])
    x = torch.randn(A.in_shape, dtype=A.dtype)
    (slope,) = torch.autograd.grad(B(x).sum(), weights)
    expected = torch.stack([convolution(A, k)(x).sum(0) for k in range(len(A.kernels))])
    torch.testing.assert_close(slope, expected)
    assert bool((slope[A.weights == 0] != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_other_dtypes_and_complex_arguments(dtype: torch.dtype) -> None:
    A = example(2, "after", 1, "zeros", own_channels=True, dtype=dtype)
    assert A.dot_test() < 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(A.to_dense(), dense(A))
    wide = A.to(dtype=torch.complex128)
    x = torch.randn(4, *A.in_shape, dtype=torch.complex128)
    torch.testing.assert_close(wide(x), (x.reshape(4, -1) @ dense(wide).mT).reshape(4, *A.out_shape))
    if not dtype.is_complex:
        torch.testing.assert_close(A(x.to(torch.complex64)), wide(x).to(torch.complex64))


def test_one_kernel_with_ones_is_a_convolution() -> None:
    weight = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    A = VaryingConvolution(weight, torch.ones(1, 8, 9, dtype=torch.float64), (10, 11))
    x = torch.randn(5, 3, 10, 11, dtype=torch.float64)
    torch.testing.assert_close(A(x), lsconv.Conv2d(weight[0], (10, 11))(x))
    assert A(x[:0]).shape == (0, 2, 8, 9)


def test_weights_of_a_grid_are_linear_between_and_constant_beyond() -> None:
    kernels = torch.zeros(6, 1, 1, dtype=torch.float64)
    positions = [(y, x) for x in (2.5, 0.5) for y in (8.0, 1.0, 4.0)]
    weights = VaryingConvolution.from_grid(kernels, positions, (10, 4)).weights
    torch.testing.assert_close(weights.sum(0), torch.ones(10, 4, dtype=torch.float64))
    for axis, coordinate in enumerate(torch.tensor(positions, dtype=torch.float64).T):
        cells = torch.arange(weights.shape[axis + 1], dtype=torch.float64)
        found = torch.tensordot(coordinate, weights, 1)  # what is linear is met, what lies beyond is held
        expected = cells.clamp(float(coordinate.min()), float(coordinate.max()))
        torch.testing.assert_close(
            found, expected.reshape(-1, 1).expand(10, 4) if axis == 0 else expected.expand(10, 4)
        )


def test_kernels_that_vary_with_depth_alone() -> None:
    kernels = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    A = VaryingConvolution.from_grid(kernels, [(0, 0, 0), (4, 0, 0), (8, 0, 0)], (9, 5, 5), "before", "same")
    impulse = torch.zeros(1, 9, 5, 5, dtype=torch.float64)
    impulse[0, 4, 2, 2] = 1
    H = lsconv.Conv3d(kernels[1][None, None], (9, 5, 5), padding="same")
    torch.testing.assert_close(A(impulse), H(impulse))


GOOD = (torch.ones(2, 3), torch.ones(2, 6), (8,))


@pytest.mark.parametrize(
    "error, words, kernels, weights, options",
    [
        (lsconv.ArgumentTypeError, "kernels", [1.0], GOOD[1], {}),
        (lsconv.ArgumentTypeError, "weights", GOOD[0], [1.0], {}),
        (lsconv.ShapeError, "kernels", torch.ones(3), GOOD[1], {}),
        (lsconv.ShapeError, "kernels", torch.ones(0, 3), GOOD[1], {}),
        (lsconv.ShapeError, "weights.*outputs", GOOD[0], torch.ones(2, 8), {}),
        (lsconv.ShapeError, "weights.*inputs", GOOD[0], GOOD[1], {"form": "before"}),
        (lsconv.ShapeError, "in_size", torch.ones(2, 9), GOOD[1], {}),
        (lsconv.DtypeError, "weights", GOOD[0], GOOD[1].double(), {}),
        (lsconv.DtypeError, "weight", GOOD[0].int(), GOOD[1], {}),
        (lsconv.ArgumentError, "form", *GOOD[:2], {"form": "between"}),
        (lsconv.ArgumentError, "channels", torch.ones(2, 1, 1, 3), GOOD[1], {"channels": 3}),
        (lsconv.ArgumentError, "padding", *GOOD[:2], {"padding": 9, "padding_mode": "reflect"}),
        (lsconv.NonFiniteError, "kernels", GOOD[0] * torch.nan, GOOD[1], {}),
        (lsconv.NonFiniteError, "weights", GOOD[0], GOOD[1] * torch.inf, {}),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    error: type[Exception], words: str, kernels: Any, weights: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=words):
        VaryingConvolution(kernels, weights, (8,), **options)


def test_positions_that_are_no_grid_are_refused() -> None:
    kernels = torch.ones(3, 3, 3)
    with pytest.raises(lsconv.ArgumentError, match="positions: 3 points are no grid"):
        VaryingConvolution.from_grid(kernels, [(0, 0), (0, 4), (4, 0)], (8, 8))
    with pytest.raises(lsconv.ArgumentError, match="positions"):
        VaryingConvolution.from_grid(kernels[:2], [(1, 1), (1, 1)], (8, 8))
    with pytest.raises(lsconv.ShapeError, match="positions: expected shape"):
        VaryingConvolution.from_grid(kernels, [(0,), (1,), (2,)], (8, 8))
    with pytest.raises(lsconv.NonFiniteError, match="positions"):
        VaryingConvolution.from_grid(kernels[:1], [(float("nan"), 0.0)], (8, 8))
