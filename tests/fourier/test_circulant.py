"""The circulant plan against Penrose's conditions and dense least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, DtypeError, MethodError, ShapeError
from lsconv.fourier.circulant import FourierPlan, block_circulant
from lsconv.fourier.frequency_inverse import FactoredInverse
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.operators.convolution import Conv1d, Conv2d, Conv3d, Convolution
from lsconv.operators.dtypes import double
from lsconv.operators.elementary import Dense


def _matrix(plan: FourierPlan, *, adjoint: bool = False) -> Tensor:
    """The matrix of ``plan.apply`` (or of its adjoint), ``(*batch_shape, n, m)``."""
    item, function = (plan.A.in_shape, plan.adjoint) if adjoint else (plan.A.out_shape, plan.apply)
    size = plan.A.in_numel if adjoint else plan.A.out_numel
    eye = torch.eye(size, dtype=plan.A.dtype).reshape(size, *(1 for _ in plan.batch_shape), *item)
    return function(eye).flatten(1 + len(plan.batch_shape)).movedim(0, -1)


def _blur(size: tuple[int, int] = (8, 6), dtype: torch.dtype = torch.float64) -> Conv2d:
    """A blur with a spectrum that does not vanish."""
    weight = torch.tensor([[1.0, 2.0, 0.5], [2.0, 9.0, 1.0], [0.0, 1.5, 1.0]], dtype=dtype)
    return Conv2d(weight[None, None], in_size=size, padding=1, padding_mode="circular")


# ------------------------------------------------------------------ the pseudo-inverse


@given(data=st.data())
def test_the_four_penrose_conditions_hold(circular_convolutions: Any, data: st.DataObject) -> None:
    A = data.draw(circular_convolutions())
    X, D = _matrix(FourierPlan(A)), A.to_dense()
    # taps that fall on one cell and cancel leave a rounding, which the plan rightly takes for zero
    assume(float(D.abs().max()) > 1e-12 * float(A.weight.abs().sum()))
    for left, right, scale in (
        (D @ X @ D, D, D),
        (X @ D @ X, X, X),
        ((D @ X).mH, D @ X, None),
        ((X @ D).mH, X @ D, None),
    ):
        size = 1.0 if scale is None else max(float(scale.abs().max()), 1e-300)
        torch.testing.assert_close(left / size, right / size, rtol=0, atol=1e-10)


@given(data=st.data())
def test_adjoint_of_the_solve_is_its_conjugate_transpose(circular_convolutions: Any, data: st.DataObject) -> None:
    plan = FourierPlan(data.draw(circular_convolutions()), damp=data.draw(st.sampled_from([0.0, 0.3])))
    X, XH = _matrix(plan), _matrix(plan, adjoint=True)
    torch.testing.assert_close(XH, X.mH, rtol=0, atol=1e-12 * max(1.0, float(X.abs().max())))


@pytest.mark.parametrize("size, zeros", [((6, 9), 2 * 9 + 2 * 6 - 4), ((5, 7), 0)])
def test_averages_have_exact_spectral_zeros_and_the_solution_has_nothing_there(
    size: tuple[int, int], zeros: int
) -> None:
    """A 3x3 average annihilates the frequencies 1/3 and 2/3 of an axis whose length 3 divides."""
    A = Conv2d(torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9, size, padding=1, padding_mode="circular")
    y = torch.randn(A.out_shape, dtype=torch.float64)
    x = FourierPlan(A).apply(y)
    reference = torch.linalg.pinv(A.to_dense(), rtol=1e-10) @ y.flatten()
    torch.testing.assert_close(x.flatten(), reference, rtol=1e-10, atol=1e-10)
    vanishing = torch.fft.fft2(x).abs() < 1e-10
    assert int(vanishing.sum()) == zeros


def test_rcond_drops_singular_values_like_a_dense_pinv() -> None:
    A = Conv2d(torch.randn(3, 2, 3, 3, dtype=torch.float64), (5, 4), padding=1, padding_mode="circular")
    for rcond in (0.0, 0.1, 0.3, 0.6):
        expected = torch.linalg.pinv(A.to_dense(), rtol=rcond)
        torch.testing.assert_close(_matrix(FourierPlan(A, rcond=rcond)), expected, rtol=1e-10, atol=1e-10)


def test_rcond_drops_nothing_where_there_is_damping() -> None:
    A = Conv2d(torch.randn(3, 2, 3, 3, dtype=torch.float64), (5, 4), padding=1, padding_mode="circular")
    with_rcond = _matrix(FourierPlan(A, 1e-4, rcond=0.5))
    torch.testing.assert_close(with_rcond, _matrix(FourierPlan(A, 1e-4)))


def test_rcond_is_relative_to_the_largest_singular_value_of_the_item_not_of_its_neighbour() -> None:
    weight = torch.randn(2, 4, 2, 3, dtype=torch.float64) * torch.tensor([1.0, 1e-14]).reshape(2, 1, 1, 1)
    A = Conv1d(weight, 6, padding=1, padding_mode="circular", groups=2)
    expected = torch.linalg.pinv(A.to_dense()[1].mul(1e14)) * 1e14
    torch.testing.assert_close(_matrix(FourierPlan(A))[1], expected, rtol=1e-9, atol=1e-9 * 1e14)
    groups = Conv1d(torch.cat([weight[0, :2], weight[1, 2:]]), 6, padding=1, padding_mode="circular", groups=2)
    solved = _matrix(FourierPlan(groups, rcond=1e-10))  # one item: the faint group is numerically zero
    torch.testing.assert_close(solved, torch.linalg.pinv(groups.to_dense(), rtol=1e-10), rtol=1e-9, atol=1e-9)


def test_a_zero_kernel_gives_the_zero_solution() -> None:
    A = Conv2d(torch.zeros(2, 3, 3, 3), (4, 4), padding=1, padding_mode="circular")
    assert torch.equal(FourierPlan(A).apply(torch.randn(2, 4, 4)), torch.zeros(3, 4, 4))


# ------------------------------------------------------------------ the Tikhonov filter


@given(data=st.data(), exponent=st.integers(-6, 1))
def test_filter_is_the_damped_least_squares_solution(
    circular_convolutions: Any, data: st.DataObject, exponent: int
) -> None:
    """Through [A; damp I], whose condition number is the root of that of the normal equations; Cholesky and SVD."""
    A, damp = data.draw(circular_convolutions()), 10.0**exponent
    D = A.to_dense()
    eye = torch.eye(A.in_numel, dtype=A.dtype).expand(*A.batch_shape, -1, -1)
    below = torch.zeros(*A.batch_shape, A.in_numel, A.out_numel, dtype=A.dtype)
    right = torch.cat([torch.eye(A.out_numel, dtype=A.dtype).expand(*A.batch_shape, -1, -1), below], -2)
    expected = torch.linalg.pinv(torch.cat([D, damp * eye], -2), rtol=1e-16) @ right
    X = _matrix(FourierPlan(A, damp))
    # an exactly singular direction turns the rounding of D, eps ||D||, into eps ||D|| / damp^2
    rounding = 1e-15 * (1 + float(D.abs().sum((-2, -1)).max())) / damp**2
    torch.testing.assert_close(X, expected, rtol=0, atol=1e-10 * float(expected.abs().max()) + rounding)


def test_a_damp_per_item_is_a_plan_per_item() -> None:
    A = Conv2d(torch.randn(3, 2, 3, 3, dtype=torch.float64), (6, 6), padding=1, padding_mode="circular", stride=2)
    damps = torch.tensor([0.0, 1e-5, 0.1, 3.0], dtype=torch.float64)
    y = torch.randn(5, 4, *A.out_shape, dtype=torch.float64)
    x = FourierPlan(A, damps).apply(y)
    for item, damp in enumerate(damps.tolist()):
        torch.testing.assert_close(x[:, item], FourierPlan(A, damp).apply(y[:, item]), rtol=1e-9, atol=1e-9)


def test_a_column_of_damps_meets_a_row_of_right_hand_sides_and_kernels_of_their_own() -> None:
    A = Conv1d(torch.randn(3, 2, 1, 3, dtype=torch.float64), 5, padding=1, padding_mode="circular")
    damps = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    y = torch.randn(3, *A.out_shape, dtype=torch.float64)
    x = FourierPlan(A, damps).apply(y)
    assert x.shape == (2, 3, *A.in_shape)
    for i in range(2):
        for j in range(3):
            own = Conv1d(A.weight[j], 5, padding=1, padding_mode="circular")
            torch.testing.assert_close(x[i, j], FourierPlan(own, float(damps[i, 0])).apply(y[j]))


# ------------------------------------------------------------------ how a solve behaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_dtype_device_and_batch_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    A = Conv3d(torch.randn(2, 2, 1, 2, 2, dtype=dtype), (2, 4, 3), padding=((0, 0), (0, 1), (1, 0)),
               padding_mode="circular")  # fmt: skip
    y = torch.randn(2, 1, 5, *A.out_shape, dtype=dtype)
    x = FourierPlan(A, 0.1).apply(y)
    assert (x.shape, x.dtype, x.device) == ((2, 1, 5, *A.in_shape), dtype, y.device)
    assert FourierPlan(A, 0.1).adjoint(x).dtype == dtype


@pytest.mark.parametrize("damp", [0.0, 1e-3])
def test_float32_carries_float32_rounding_only_once(damp: float) -> None:
    """The matrices come from double precision: the error is a few eps times ||X|| ||y||, not times the condition."""
    A = Conv2d(torch.randn(4, 4, 3, 3), (16, 16), padding=1, padding_mode="circular")
    y = torch.randn(A.out_shape)
    x = FourierPlan(A, damp).apply(y)
    plan = FourierPlan(A.to(torch.float64), damp)
    reference = plan.apply(y.double())
    norm = float(torch.linalg.matrix_norm(plan.inverse.matrices, 2).max())
    assert float((x - reference).norm()) < 10 * torch.finfo(torch.float32).eps * norm * float(y.norm())


@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_scaling_the_kernel_scales_the_solution(scale: float, damp: float) -> None:
    A = _blur(dtype=torch.float32)
    scaled = Conv2d(A.weight * scale, (8, 6), padding=1, padding_mode="circular")
    y = torch.randn(A.out_shape)
    expected = FourierPlan(A, damp).apply(y)
    torch.testing.assert_close(FourierPlan(scaled, damp * scale).apply(y) * scale, expected, rtol=1e-5, atol=1e-6)


def test_one_bad_right_hand_side_stays_alone() -> None:
    A = _blur()
    y = torch.randn(3, *A.out_shape, dtype=torch.float64)
    expected = FourierPlan(A).apply(y)
    y[1, 0, 2, 3] = float("nan")
    x = FourierPlan(A).apply(y)
    assert x[1].isnan().all()
    torch.testing.assert_close(x[[0, 2]], expected[[0, 2]])


def test_memory_layout_of_the_right_hand_side_does_not_matter() -> None:
    A = Conv2d(torch.randn(3, 3, 3, 3), (6, 6), padding=1, padding_mode="circular")
    y = torch.randn(2, 3, 6, 6)
    expected = FourierPlan(A).apply(y)
    torch.testing.assert_close(FourierPlan(A).apply(y.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(FourierPlan(A).apply(torch.cat([y, y])[::2][:1]), expected[:1])


def test_the_solve_is_differentiable_in_the_right_hand_side() -> None:
    A = Conv2d(torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True), (4, 4), padding=1,
               padding_mode="circular")  # fmt: skip
    plan = FourierPlan(A, 0.2)
    y, g = torch.randn(2, 2, 4, 4, dtype=torch.float64).unbind()
    y.requires_grad_()
    plan.apply(y).backward(g)
    assert y.grad is not None
    torch.testing.assert_close(y.grad, plan.adjoint(g))


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "A, names",
    [
        (Conv1d(torch.ones(1, 1, 3), 8, padding=1), "border"),
        (Conv1d(torch.ones(1, 1, 3), 8, padding=1, padding_mode="reflect"), "lsqr"),
        (Conv1d(torch.ones(1, 1, 3), 8, padding=0, padding_mode="circular"), "outputs fill the grid"),
        (Conv1d(torch.ones(1, 1, 3), 9, 2, 1, padding_mode="circular"), "stride"),
        (Dense(torch.ones(2, 2)), "Krylov"),
    ],
)
def test_an_operator_that_is_not_block_circulant_is_sent_to_a_method_that_serves_it(A: Any, names: str) -> None:
    with pytest.raises(MethodError, match=names):
        FourierPlan(A)


@pytest.mark.parametrize("damp", [-1.0, float("nan"), float("inf")])
def test_a_damp_that_is_not_a_number_from_zero_up_is_refused(damp: float) -> None:
    with pytest.raises(ArgumentError, match="damp"):
        FourierPlan(_blur(), damp)


def test_arguments_that_do_not_fit_are_refused() -> None:
    A = _blur()
    with pytest.raises(ShapeError, match="out_shape"):
        FourierPlan(A).apply(torch.randn(1, 8, 7, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="rcond"):
        FourierPlan(A, rcond=-1.0)
    with pytest.raises(ShapeError, match="damp"):
        FourierPlan(Convolution(A.weight.expand(3, 1, 1, 3, 3), (8, 6), padding=1, padding_mode="circular"),
                      torch.ones(2))  # fmt: skip
    with pytest.raises(DtypeError, match="float16"):
        FourierPlan(A.to(torch.float16))


def test_pointwise_convolutions_are_block_circulant_at_any_size_and_padding_mode() -> None:
    A = Conv2d(torch.randn(3, 2, 1, 1, dtype=torch.float64), (67, 13))
    assert block_circulant(A).grid == (67, 13)
    y = torch.randn(A.out_shape, dtype=torch.float64)
    expected = torch.einsum("io,ohw->ihw", torch.linalg.pinv(A.weight[..., 0, 0]), y)
    torch.testing.assert_close(FourierPlan(A).apply(y), expected)


def test_nbytes_counts_the_matrices() -> None:
    plan = FourierPlan(_blur((8, 6)))
    assert isinstance(plan.inverse, FrequencyMatrices)
    assert plan.nbytes == 8 * 4 * 16  # rfft keeps 4 of 6, complex128


def test_a_rank_deficient_symbol_with_a_small_damp_keeps_the_gradient_small() -> None:
    # stride 2 on a single cell leaves a column of zeros: sigma_max^2 / damp^2 = 1e5 is lost twice by a Gram matrix
    torch.manual_seed(1990)
    weight = torch.randn(2, 1, 1, 1, dtype=torch.complex128)
    A = lsconv.Conv2d(weight * (3.1 / weight.norm()), in_size=(1, 1), stride=(1, 2))
    y = torch.randn(2, 1, 1, dtype=torch.complex128)
    assert bool(lsconv.lstsq(A, y, damp=0.01).converged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_factors_give_way_to_singular_values_where_a_frequency_lacks_rank(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = torch.randn(6, 6, 3, dtype=dtype)
    weight[:3, :, 1] -= weight[:3].sum(-1)  # three rows of the matrix of frequency 0 vanish
    A = Conv1d(weight, in_size=8, padding=1, padding_mode="circular")
    plan, D = FourierPlan(A), A.to_dense()
    assert isinstance(plan.inverse, FactoredInverse)
    assert 1 <= len(plan.inverse.replaced) < 8
    assert plan.rank is not None
    assert int(plan.rank) == 6 * 8 - 3
    expected = torch.linalg.pinv(D.to(double(dtype)), rtol=1e-6).to(dtype)
    close = {"rtol": 0, "atol": (1e-4 if dtype == torch.float32 else 1e-11) * float(expected.abs().max())}
    torch.testing.assert_close(_matrix(plan), expected, **close)
    torch.testing.assert_close(_matrix(plan, adjoint=True), expected.mH, **close)
    y = torch.randn(2, 6, 8, dtype=dtype, requires_grad=True)
    v = torch.randn(2, 6, 8, dtype=dtype)
    (gradient,) = torch.autograd.grad(plan.apply(y), y, v)
    torch.testing.assert_close(gradient, plan.adjoint(v), **close)


@pytest.mark.parametrize("channels", [30, 40, 54])
def test_factors_whose_elements_grow_are_replaced(channels: int) -> None:
    """Wilkinson's matrix, of a small condition, whose factors grow by ``2^(n - 1)``."""
    wilkinson = torch.eye(channels, dtype=torch.float64) - torch.ones(channels, channels, dtype=torch.float64).tril(-1)
    wilkinson[:, -1] = 1
    weight = torch.zeros(channels, channels, 2, 2, dtype=torch.float64)
    weight[:, :, 0, 0], weight[:, :, 1, 1] = wilkinson, 0.1 * wilkinson
    A = Conv2d(weight, in_size=(4, 3), padding="same", padding_mode="circular")
    x = torch.randn(A.in_shape, dtype=torch.float64)
    plan = FourierPlan(A)
    assert isinstance(plan.inverse, FactoredInverse)
    torch.testing.assert_close(plan.apply(A(x)), x, rtol=0, atol=1e-11)
    assert lsconv.pinv(A).dot_test() < 1e-12
    assert bool(lsconv.lstsq(A, A(x)).converged)
