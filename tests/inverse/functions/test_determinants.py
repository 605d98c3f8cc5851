"""Determinants and traces of normal and square operators, against dense matrices in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv import Conv1d, Conv2d, Conv3d, Gradient, LinearOperator, Mask, logdet, slogdet, trace_inverse

# torch itself announces the end of torch.jit.script when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _reseeded() -> None:
    GENERATOR.manual_seed(0)  # whatever has run before


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=GENERATOR)


def stacked(A: LinearOperator, damp: Tensor, L: LinearOperator | None) -> Tensor:
    M = A.to_dense()
    P = torch.eye(A.in_numel, dtype=M.dtype) if L is None else L.to_dense()
    parts = [M, damp[..., None, None] * P]
    batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    return torch.cat([part.expand(*batch, *part.shape[-2:]) for part in parts], -2)


def dense_logdet(A: LinearOperator, damp: Tensor, L: LinearOperator | None = None) -> Tensor:
    return 2 * torch.linalg.svdvals(stacked(A, damp, L)).log().sum(-1)


def dense_trace(A: LinearOperator, damp: Tensor, L: LinearOperator | None = None) -> Tensor:
    return torch.linalg.svdvals(stacked(A, damp, L)).pow(-2).sum(-1)


CONVOLUTIONS: dict[str, Callable[[torch.dtype], lsconv.Convolution]] = {
    "valid": lambda t: Conv2d(randn(1, 1, 3, 4, dtype=t), (9, 11)),
    "more outputs": lambda t: Conv2d(randn(3, 2, 3, 3, dtype=t), (9, 8)),
    "same": lambda t: Conv2d(randn(2, 3, 3, 3, dtype=t), (9, 8), padding=1),
    "full": lambda t: Conv2d(randn(3, 2, 3, 3, dtype=t), (9, 8), padding=2),
    "strided": lambda t: Conv2d(randn(4, 2, 3, 3, dtype=t), (9, 8), stride=2, padding=1),
    "unread inputs": lambda t: Conv2d(randn(4, 2, 2, 2, dtype=t), (9, 8), stride=3),
    "groups": lambda t: Conv2d(randn(4, 1, 3, 3, dtype=t), (9, 8), groups=2, padding=1),
    "circular": lambda t: Conv2d(randn(2, 2, 3, 3, dtype=t), (9, 8), padding=1, padding_mode="circular"),
    "lopsided": lambda t: Conv2d(randn(2, 2, 3, 2, dtype=t), (9, 8), padding=((0, 2), (1, 0)), dilation=2),
    "kernels": lambda t: Conv2d(randn(2, 2, 1, 3, 3, dtype=t), (7, 8), padding=1),
    "line": lambda t: Conv1d(randn(3, 2, 4, dtype=t), 20),
    "volume": lambda t: Conv3d(randn(1, 1, 3, 3, 2, dtype=t), (5, 6, 4), padding=1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_determinant_and_trace_of_a_convolution_are_exact(name: str, dtype: torch.dtype) -> None:
    A = CONVOLUTIONS[name](dtype)
    for damp in (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)):
        torch.testing.assert_close(logdet(A, damp, exact=True), dense_logdet(A, damp), rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(trace_inverse(A, damp, exact=True), dense_trace(A, damp), rtol=1e-10, atol=0)


@pytest.mark.parametrize("boundary", ["neumann", "dirichlet"])
@pytest.mark.parametrize("name", ["valid", "same", "more outputs", "full", "groups", "lopsided", "line", "volume"])
def test_determinant_and_trace_with_a_penalty_are_exact(name: str, boundary: str) -> None:
    A = CONVOLUTIONS[name](torch.float64)
    L = Gradient(A.in_shape, ndim=A.ndim, boundary=boundary, dtype=torch.float64)
    damp = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(logdet(A, damp, L, exact=True), dense_logdet(A, damp, L), rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(trace_inverse(A, damp, L, exact=True), dense_trace(A, damp, L), rtol=1e-10, atol=0)


def test_a_batch_of_kernels_and_of_damps_has_a_value_each() -> None:
    A = Conv2d(randn(3, 1, 2, 1, 3, 3), (7, 8), padding=1)
    damp = torch.tensor([0.2, 0.7], dtype=torch.float64)
    value = logdet(A, damp, exact=True)
    assert value.shape == (3, 2)
    torch.testing.assert_close(value, dense_logdet(A, damp), rtol=1e-11, atol=1e-10)
    L = Gradient(A.in_shape, dtype=torch.float64)
    torch.testing.assert_close(trace_inverse(A, damp, L), dense_trace(A, damp, L), rtol=1e-10, atol=0)


@pytest.mark.parametrize("penalty", [False, True])
def test_masked_and_cropped_outputs_are_rows_that_are_not_there(penalty: bool) -> None:
    A0 = Conv2d(randn(2, 2, 3, 3), (9, 8), padding=1)
    L = Gradient(A0.in_shape, dtype=torch.float64) if penalty else None
    damp = torch.tensor(0.3, dtype=torch.float64)
    window = lsconv.Crop(A0.out_shape, start=(1, 2), size=(6, 5), dtype=torch.float64)
    for A in (Mask(torch.rand(A0.out_shape, generator=GENERATOR) < 0.8) @ A0, window @ A0):
        torch.testing.assert_close(logdet(A, damp, L, exact=True), dense_logdet(A, damp, L), rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(trace_inverse(A, damp, L), dense_trace(A, damp, L), rtol=1e-10, atol=0)


def test_weights_matrices_and_adjoints_of_few_unknowns_are_exact() -> None:
    A0 = Conv2d(randn(1, 2, 3, 3), (7, 6))
    damp = torch.tensor(0.3, dtype=torch.float64)
    weighted = lsconv.Diagonal(torch.rand(A0.out_shape, dtype=torch.float64, generator=GENERATOR)) @ A0
    for A in (weighted, lsconv.Dense(randn(5, 9)), lsconv.Dense(randn(9, 5)), A0.H):
        torch.testing.assert_close(logdet(A, damp, exact=True), dense_logdet(A, damp), rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(trace_inverse(A, damp, exact=True), dense_trace(A, damp), rtol=1e-10, atol=0)
    L = Gradient(A0.in_shape, boundary="dirichlet", dtype=torch.float64)
    torch.testing.assert_close(trace_inverse(weighted, damp, L), dense_trace(weighted, damp, L), rtol=1e-10, atol=0)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("function", [logdet, pytest.param(trace_inverse, marks=pytest.mark.slow)])
def test_derivatives_by_kernel_and_damp_are_right(function: Callable[..., Tensor], penalty: bool, padding: int) -> None:
    weight, damp = randn(2, 2, 2, 3).requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def value(weight: Tensor, damp: Tensor, factor: Tensor) -> Tensor:
        A = Conv2d(weight, (5, 4), padding=padding)
        L = factor * Gradient(A.in_shape, boundary="dirichlet", dtype=torch.float64) if penalty else None
        return function(A, damp, L, exact=True)

    assert torch.autograd.gradcheck(value, (weight, damp, factor), check_forward_ad=True, fast_mode=True)
    if function is logdet and not penalty:
        assert torch.autograd.gradgradcheck(value, (weight, damp, factor), fast_mode=True)


@pytest.mark.parametrize("function", [logdet, trace_inverse, lambda A, damp: slogdet(A).logabsdet])
def test_vmap_over_kernels_is_a_batch_of_kernels(function: Callable[..., Tensor]) -> None:
    weights = randn(3, 1, 1, 3, 3)
    mapped = torch.func.vmap(lambda weight: function(Conv2d(weight, (6, 5), padding=1), 0.4))(weights)
    torch.testing.assert_close(mapped, function(Conv2d(weights, (6, 5), padding=1), 0.4), rtol=1e-10, atol=1e-11)


# ------------------------------------------------------------------------------------------------- estimates


def estimated(A: LinearOperator, damp: Tensor, L: LinearOperator | None, function: Callable[..., Tensor]) -> Tensor:
    """The distance of an estimate from the truth in standard errors, which are at most a fifth of the value."""
    truth = (dense_logdet if function is logdet else dense_trace)(A, damp, L)
    value, error = function(A, damp, L, exact=False, probes=64, return_error=True)
    assert 0 < error < 0.2 * value.abs()
    return (value - truth).abs() / error


@pytest.mark.parametrize("function", [logdet, trace_inverse])
@pytest.mark.parametrize("name", ["valid", "same", "more outputs"])
def test_an_estimate_is_within_its_standard_errors(name: str, function: Callable[..., Tensor]) -> None:
    A, damp = CONVOLUTIONS[name](torch.float64), torch.tensor(0.8, dtype=torch.float64)
    assert estimated(A, damp, None, function) < 4
    assert estimated(A, damp, Gradient(A.in_shape, boundary="dirichlet", dtype=torch.float64), function) < 4


def test_an_estimate_with_weights_is_within_its_standard_errors() -> None:
    A0, damp = Conv2d(randn(1, 2, 3, 3), (9, 8)), torch.tensor(0.8, dtype=torch.float64)
    A = lsconv.Diagonal(torch.rand(A0.out_shape, dtype=torch.float64, generator=GENERATOR)) @ A0
    for function in (logdet, trace_inverse):
        assert estimated(A, damp, None, function) < 4


def weighted_value(function: Callable[..., Tensor], weighted: bool, probes: int) -> Callable[..., Tensor]:
    diagonal = torch.linspace(0.5, 1.5, 30, dtype=torch.float64).reshape(1, 6, 5)

    def value(weight: Tensor, damp: Tensor, exact: bool = False) -> Tensor:
        A: LinearOperator = Conv2d(weight, (6, 5), padding=1)
        return function(lsconv.Diagonal(diagonal) @ A if weighted else A, damp, exact=exact, probes=probes)

    return value


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_the_derivative_of_an_estimated_trace_is_that_of_the_estimate(weighted: bool) -> None:
    weight, damp = randn(1, 1, 3, 3).requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    value = weighted_value(trace_inverse, weighted, 4)
    # the quadrature ends at a twentieth of the standard error, the solution in the derivative with it
    assert torch.autograd.gradcheck(value, (weight, damp), check_forward_ad=True, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_derivative_of_an_estimated_determinant_is_an_estimate_of_the_derivative(weighted: bool) -> None:
    weight, damp = randn(1, 1, 3, 3), torch.tensor(0.8, dtype=torch.float64)
    value = weighted_value(logdet, weighted, 2000)
    estimates = torch.func.jacrev(value, argnums=(0, 1))(weight, damp)
    truth = torch.func.jacrev(lambda *inputs: value(*inputs, exact=True), argnums=(0, 1))(weight, damp)
    forward = torch.func.jvp(value, (weight, damp), (weight, damp))[1]
    for estimate, exact in zip(estimates, truth, strict=True):
        torch.testing.assert_close(estimate, exact, rtol=0, atol=0.06 * float(exact.abs().max()))
    torch.testing.assert_close(forward, (weight * estimates[0]).sum() + damp * estimates[1], rtol=1e-9, atol=1e-9)


def test_an_estimate_is_announced_and_can_be_refused() -> None:
    A = Conv2d(randn(1, 1, 3, 3), (80, 80), padding=1, padding_mode="reflect")
    with pytest.warns(UserWarning, match="standard error"):
        logdet(A, 1.0, probes=2)
    with pytest.raises(lsconv.errors.MethodError, match="zero or circular padding"):
        logdet(A, 1.0, exact=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logdet(A, 1.0, probes=2, return_error=True)[1] > 0
        assert trace_inverse(A, 1.0, probes=2, exact=False) > 0


# ------------------------------------------------------------------------------------------------- square

SQUARE: dict[str, Callable[[torch.dtype], lsconv.Convolution]] = {
    "one channel": lambda t: Conv2d(randn(1, 1, 3, 3, dtype=t), (9, 8), padding=1),
    "channels": lambda t: Conv2d(randn(3, 3, 3, 3, dtype=t), (9, 8), padding=1),
    "groups": lambda t: Conv2d(randn(4, 2, 3, 3, dtype=t), (9, 8), padding=1, groups=2),
    "kernels": lambda t: Conv2d(randn(2, 3, 3, 3, 3, dtype=t), (9, 8), padding=1),
    "dilated": lambda t: Conv2d(randn(2, 2, 3, 3, dtype=t), (7, 8), padding=2, dilation=2),
    "line": lambda t: Conv1d(randn(2, 2, 5, dtype=t), 20, padding=2),
    "volume": lambda t: Conv3d(randn(1, 1, 3, 3, 3, dtype=t), (4, 5, 6), padding=1),
    "circular": lambda t: Conv2d(randn(2, 2, 3, 3, dtype=t), (9, 8), padding=1, padding_mode="circular"),
    "strided": lambda t: Conv2d(randn(8, 2, 3, 3, dtype=t), (8, 8), stride=2, padding=1),
    "pointwise": lambda t: Conv2d(randn(2, 2, 1, 1, dtype=t), (9, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("name", SQUARE)
def test_the_determinant_of_a_square_convolution_is_exact(name: str, dtype: torch.dtype) -> None:
    A = SQUARE[name](dtype)
    sign, logabsdet = slogdet(A)
    expected = torch.linalg.slogdet(A.to_dense())
    torch.testing.assert_close(sign, expected.sign, rtol=0, atol=1e-10)
    torch.testing.assert_close(logabsdet, expected.logabsdet, rtol=0, atol=1e-10)


def test_zeros_of_the_symbol_do_not_make_a_regular_convolution_singular() -> None:
    """Differences see no constant, and all frequencies of the grid have this one among them."""
    weight = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]], dtype=torch.float64)
    A = Conv2d(weight[None, None], (9, 8), padding=1)
    assert abs(slogdet(A).logabsdet - torch.linalg.slogdet(A.to_dense()).logabsdet) < 1e-10
    assert slogdet(A).sign == 1


@pytest.mark.slow
def test_derivatives_of_a_square_determinant_are_right() -> None:
    weight = randn(2, 2, 3, 3).requires_grad_()

    def value(weight: Tensor) -> Tensor:
        return slogdet(Conv2d(weight, (5, 4), padding=1)).logabsdet

    assert torch.autograd.gradcheck(value, (weight,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (weight,), fast_mode=True)


def test_an_operator_without_a_determinant_is_refused() -> None:
    with pytest.raises(lsconv.errors.ShapeError, match="square"):
        slogdet(Conv2d(randn(1, 1, 3, 3), (6, 6)))
    with pytest.raises(lsconv.errors.MethodError, match="condition"):
        slogdet(Conv2d(torch.zeros(1, 1, 3, 3, dtype=torch.float64), (6, 6), padding=1))
    with pytest.raises(lsconv.errors.ArgumentError, match="damp"):
        logdet(Conv2d(randn(1, 1, 3, 3), (6, 6)), 0.0)
    with pytest.raises(lsconv.errors.ShapeError, match="L"):
        logdet(Conv2d(randn(1, 1, 3, 3), (6, 6)), 1.0, Gradient((1, 5, 5)))
    A = Conv2d(randn(1, 1, 3, 3), (6, 6))
    with pytest.raises(lsconv.errors.MethodError, match="singular"):
        logdet(A - A, 1.0, Gradient((1, 6, 6)))
