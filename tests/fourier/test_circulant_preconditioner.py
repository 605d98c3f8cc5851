"""The FFT-diagonal preconditioner: definite for everything it takes, exact on circulants, and it changes no answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lsconv
from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError, MethodError, ShapeError
from lsconv.fourier.circulant_preconditioner import CirculantPreconditioner
from lsconv.operators.base import LinearOperator
from lsconv.operators.convolution import Conv1d, Conv2d, Convolution
from lsconv.operators.difference import Gradient, Laplacian
from lsconv.operators.elementary import Crop, Dense, Diagonal, Identity, Mask
from lsconv.operators.padding import Pad

F64 = torch.float64


def _eigenvalues(M: LinearOperator) -> Tensor:
    """The eigenvalues of M, after making sure that it is Hermitian."""
    matrix = M.to_dense()
    assert float((matrix - matrix.mH).abs().max()) < 1e-12 * float(matrix.abs().max())
    return torch.linalg.eigvalsh(matrix)


def _normal_matrix(A: LinearOperator, side: str, damp: float | Tensor) -> Tensor:
    D = A.to_dense()
    gram = D @ D.mH if side == "residual" else D.mH @ D
    shift = torch.as_tensor(damp, dtype=F64).square()[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    return gram + shift


def _random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


# ------------------------------------------------------------------ what it is


@pytest.mark.parametrize("side", ["residual", "solution"])
@given(data=st.data(), damp=st.sampled_from([1e-3, 0.3, 5.0]))
def test_on_a_circulant_it_is_the_inverse_of_the_normal_operator(
    circular_convolutions: Any, data: st.DataObject, damp: float, side: str
) -> None:
    A = data.draw(circular_convolutions())
    M = CirculantPreconditioner(A, damp, side=side)
    product = M.to_dense() @ _normal_matrix(A, side, damp)
    identity = torch.eye(product.shape[-1], dtype=product.dtype).expand_as(product)
    torch.testing.assert_close(product, identity, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["residual", "solution"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@given(data=st.data(), damp=st.sampled_from([None, 0.0, 0.1]))
def test_the_preconditioner_is_hermitian_positive_definite_within_bounds_of_the_circulant(
    zero_padded_convolutions: Any, data: st.DataObject, damp: float | None, padding_mode: str, side: str
) -> None:
    A = data.draw(zero_padded_convolutions())
    limit = 1 if padding_mode == "reflect" else 0
    padding = [
        tuple(min(p, n - limit) if padding_mode in ("reflect", "circular") else p for p in pair)
        for pair, n in zip(A.padding, A.spatial_in, strict=True)
    ]
    if any(n + sum(p) < e for n, p, e in zip(A.spatial_in, padding, A.kernel_extent, strict=True)):
        padding = list(A.padding)
        padding_mode = "zeros"
    A = Convolution(A.weight, A.spatial_in, A.stride, padding, A.dilation, A.groups, padding_mode)
    M = CirculantPreconditioner(A, damp, side=side)
    assert M.in_shape == M.out_shape == (A.out_shape if side == "residual" else A.in_shape)
    values = _eigenvalues(M)
    assert bool((values > 0).all())
    rounding = 0.1 if damp == 0 else 1e-6  # at the floor the setup keeps about two digits of the range
    upper = M.damp.square().reciprocal()
    assert bool((values <= upper[..., None] * (1 + rounding)).all())
    # sigma_max of the circulant is at most the sum of the kernel's absolute values, over every channel
    size = A.weight.abs().sum((*range(-A.ndim, 0), -A.ndim - 1)).amax(-1) * A.weight.abs().sum(
        (*range(-A.ndim, 0), -A.ndim - 2)
    ).amax(-1)
    lower = (size + M.damp.square()).reciprocal()
    assert bool((values >= lower[..., None] * (1 - rounding)).all())


@given(data=st.data())
def test_valid_convolution_preconditioned_has_no_eigenvalue_below_one(
    zero_padded_convolutions: Any, data: st.DataObject
) -> None:
    """The compression of an inverse is at least the inverse of the compression, when only outputs are cropped."""
    A = data.draw(zero_padded_convolutions())
    size = [n + e for n, e in zip(A.spatial_in, A.kernel_extent, strict=True)]
    A = Convolution(A.weight, size, A.stride, 0, A.dilation, A.groups)
    if A.out_numel > 200:
        return
    M = CirculantPreconditioner(A, 0.5, side="residual")
    values = torch.linalg.eigvals(M.to_dense() @ _normal_matrix(A, "residual", 0.5)).real
    assert float(values.min()) > 1 - 1e-8


def test_the_side_is_the_smaller_one_unless_asked_for() -> None:
    wide, tall = Conv1d(_random(1, 2, 3), 8), Conv1d(_random(3, 1, 3), 8)
    assert (CirculantPreconditioner(wide).side, CirculantPreconditioner(tall).side) == ("residual", "solution")
    assert CirculantPreconditioner(wide, side="solution").in_shape == wide.in_shape
    assert CirculantPreconditioner(tall.H).side == "residual"


def test_damping_is_floored_so_that_float32_stays_definite() -> None:
    t = torch.exp(-(torch.linspace(-2, 2, 9) ** 2))
    A = Conv2d((t[:, None] * t / t.sum() ** 2)[None, None], (16, 16))
    M = CirculantPreconditioner(A, 0.0)
    assert float(M.damp) == pytest.approx(10 * torch.finfo(torch.float32).eps ** 0.5, rel=1e-3)  # sigma_max is 1
    matrix = M.to_dense().double()
    assert float(torch.linalg.eigvalsh((matrix + matrix.T) / 2).min()) > 0
    assert CirculantPreconditioner(A.to(F64)).damp == pytest.approx(1e-3, rel=1e-6)


def test_a_damp_per_item_and_kernels_of_their_own() -> None:
    A = Conv1d(_random(3, 2, 2, 3), 7, padding=1)
    damps = torch.tensor([[0.1], [2.0]], dtype=F64)
    M = CirculantPreconditioner(A, damps)
    y = _random(2, 3, *A.out_shape)
    for i in range(2):
        for j in range(3):
            own = CirculantPreconditioner(Conv1d(A.weight[j], 7, padding=1), float(damps[i, 0]))
            torch.testing.assert_close(M(y)[i, j], own(y[i, j]))


def test_the_zero_operator_has_one_too() -> None:
    assert bool((_eigenvalues(CirculantPreconditioner(Conv1d(torch.zeros(1, 1, 3, dtype=F64), 8))) > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_dtype_and_conversion(dtype: torch.dtype) -> None:
    A = Conv1d(_random(2, 3, 3, dtype=dtype), 8, padding=1)
    M = CirculantPreconditioner(A, 0.2)
    assert M(torch.ones(A.out_shape, dtype=dtype)).dtype == dtype
    assert M.dot_test() < (1e-5 if dtype in (torch.float32, torch.complex64) else 1e-12)
    double = torch.complex128 if dtype.is_complex else F64
    wider = M.to(double)
    assert wider.dtype == double
    expected = CirculantPreconditioner(A.to(double), 0.2).to_dense()
    torch.testing.assert_close(wider.to_dense(), expected)
    assert M.parameters() == ()


# ------------------------------------------------------------------ operators made of convolutions

_CONV = Conv2d(torch.randn(2, 3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(3)), (6, 7), padding=1)
_TALL = Conv2d(torch.randn(5, 3, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(6)), (6, 7), padding=1)
_MASK = torch.rand(_CONV.out_shape, generator=torch.Generator().manual_seed(4)) > 0.4
_WEIGHTS = torch.rand(_CONV.out_shape, dtype=F64, generator=torch.Generator().manual_seed(5))
_TALL_MASK = torch.rand(_TALL.out_shape, dtype=F64, generator=torch.Generator().manual_seed(7)) > 0.2
_COMPOSITIONS: dict[str, tuple[Callable[[], LinearOperator], str]] = {
    "scaled": (lambda: -3 * _CONV, "residual"),
    "scaled per item": (lambda: torch.tensor([0.5, 2.0], dtype=F64) * _CONV, "residual"),
    "adjoint": (lambda: _CONV.H, "solution"),
    "mask": (lambda: Mask(_MASK, dtype=F64) @ _CONV, "residual"),
    "mask, other side": (lambda: Mask(_TALL_MASK, dtype=F64) @ _TALL, "solution"),
    "nothing kept": (lambda: Mask(torch.zeros_like(_MASK), dtype=F64) @ _CONV, "residual"),
    "crop": (lambda: Crop(_CONV.out_shape, (1, 2), (4, 4), dtype=F64) @ _CONV, "residual"),
    "zero extension of the input": (lambda: _TALL @ Crop(_TALL.in_shape, (1, 2), (4, 4), dtype=F64).H, "solution"),
    "zero padding of the output": (lambda: Pad(_CONV.out_shape, (1, 2), dtype=F64) @ _CONV, "residual"),
    "diagonal": (lambda: Diagonal(_WEIGHTS + 0.2) @ _CONV, "residual"),
    "diagonal with zeros": (lambda: Diagonal(_WEIGHTS * _MASK) @ _CONV, "residual"),
    "diagonal, other side": (lambda: Diagonal(_TALL_MASK + torch.tensor(0.5, dtype=F64)) @ _TALL, "solution"),
    "padding": (lambda: Conv2d(_CONV.weight, (8, 9)) @ Pad((3, 6, 7), (1, 1), "reflect", dtype=F64), "residual"),
    "padding, on its side": (
        lambda: Conv2d(_TALL.weight, (8, 9)) @ Pad((3, 6, 7), (1, 1), "reflect", dtype=F64), "solution"),
    "product of several": (lambda: 2 * (Mask(_MASK[:, :4, :4], dtype=F64)
                                        @ Crop(_CONV.out_shape, (0, 0), (4, 4), dtype=F64) @ _CONV), "residual"),
    "vstack with a gradient": (lambda: lsconv.vstack([_CONV, 0.5 * Gradient((3, 6, 7), dtype=F64)]), "solution"),
    "vstack of convolutions": (lambda: lsconv.vstack([_CONV, 2 * Conv2d(_CONV.weight.flip(0), (6, 7))]), "solution"),
    "vstack of a masked convolution": (
        lambda: lsconv.vstack([Mask(_TALL_MASK, dtype=F64) @ _TALL, 0.5 * Identity((3, 6, 7), dtype=F64)]), "solution"),
    "hstack": (lambda: lsconv.hstack([_CONV, Conv2d(_CONV.weight[:, :1], (6, 7), padding=1)]), "residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_COMPOSITIONS))
def test_compositions_are_definite_and_improve_the_spectrum(name: str) -> None:
    """The middle 80 % of the eigenvalues move together: their ratio falls, or was small already."""
    make, side = _COMPOSITIONS[name]
    A, damp = make(), 0.05
    M = CirculantPreconditioner(A, damp, side=side)
    assert M.side == side
    assert bool((_eigenvalues(M) > 0).all())
    normal = _normal_matrix(A, side, damp)
    before = torch.linalg.eigvalsh(normal)
    after = torch.linalg.eigvals(M.to_dense() @ normal).real.sort(dim=-1).values
    assert bool((after > 0).all())
    # a reflection folded back adds to the cells near the border, of which a small image mostly consists: no gain there
    factor = 1.1 if name == "padding, on its side" else 0.7
    for b, a in zip(before.reshape(-1, before.shape[-1]), after.reshape(-1, after.shape[-1]), strict=True):
        tenth = len(a) // 10
        assert float(a[-1 - tenth] / a[tenth]) <= max(1.01, factor * float(b[-1 - tenth] / b[tenth]))


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), ((1, 2), 3), (2, 3)])
@pytest.mark.parametrize("penalty", [Gradient, Laplacian])
def test_periodic_stack_with_a_difference_operator_is_inverted_exactly(
    stride: Any, groups: int, penalty: type[Gradient | Laplacian]
) -> None:
    """[A; c L] of full rate L and strided A is block-circulant over the polyphase channels."""
    strides = (stride, stride) if isinstance(stride, int) else stride
    A = Conv2d(_random(3, 3 // groups, 3, 3), (6, 8), stride, tuple((1, 1) if s == 1 else (1, 0) for s in strides),
               groups=groups, padding_mode="circular")  # fmt: skip
    L = penalty((3, 6, 8), boundary="periodic", spacing=(1.0, 2.0), dtype=F64)
    stack = lsconv.vstack([A, 0.7 * L, 0.1 * Identity((3, 6, 8), dtype=F64)])
    N = CirculantPreconditioner(stack, 0.3)
    product = N.to_dense() @ _normal_matrix(stack, "solution", 0.3)
    torch.testing.assert_close(product, torch.eye(144, dtype=F64), rtol=0, atol=1e-9)


def test_a_mask_over_a_circulant_leaves_the_missing_entries_to_the_damping() -> None:
    M = CirculantPreconditioner(Mask(_MASK, dtype=F64) @ _CONV, 0.5)
    missing = torch.where(_MASK, 0.0, _random(*_CONV.out_shape))
    torch.testing.assert_close(M(missing), missing / 0.25)


# ------------------------------------------------------------------ it changes the path, not the answer


def _gauss(size: int, sigma: float) -> Tensor:
    t = torch.exp(-((torch.arange(size, dtype=F64) - (size - 1) / 2) ** 2) / (2 * sigma**2))
    return (t[:, None] * t / t.sum() ** 2)[None, None]


@pytest.mark.parametrize("padding_mode, padding", [("zeros", 0), ("zeros", 4), ("reflect", 4), ("replicate", 4)])
def test_damped_lsqr_on_a_blur_needs_fewer_iterations_for_the_same_answer(padding_mode: str, padding: int) -> None:
    A = Conv2d(_gauss(9, 2.0), (32, 32), padding=padding, padding_mode=padding_mode)
    y = _random(2, *A.out_shape)
    damp = 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        plain = lsconv.lsqr(A, y, damp=damp, rtol=1e-9)
        M = CirculantPreconditioner(A, damp)
        preconditioned = lsconv.lsqr(A, y, damp=damp, rtol=1e-9, M=M)
    assert bool(plain.converged.all())
    error = (preconditioned.x - plain.x).norm() / plain.x.norm()
    assert float(error) < 1e-5
    saving = 0.6 if padding_mode == "zeros" else 0.9
    assert int(preconditioned.iterations.max()) < saving * int(plain.iterations.max())


def test_conjugate_gradients_on_the_normal_operator_need_fewer_iterations() -> None:
    A = Conv2d(_random(4, 4, 3, 3), (20, 20))
    damp = 0.05
    normal = A @ A.H + damp**2 * Identity(A.out_shape, dtype=F64)
    b = _random(*A.out_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        plain = lsconv.cg(normal, b, rtol=1e-9)
        preconditioned = lsconv.cg(normal, b, rtol=1e-9, M=CirculantPreconditioner(A, damp))
    assert bool(preconditioned.converged)
    exact = torch.linalg.solve(_normal_matrix(A, "residual", damp), b.flatten())
    assert float((preconditioned.x.flatten() - exact).norm() / exact.norm()) < 1e-6
    assert int(preconditioned.iterations) < 0.7 * int(plain.iterations)


def test_tall_least_squares_keeps_its_answer_with_the_solution_side() -> None:
    A = Conv2d(_random(3, 2, 3, 3), (16, 16), padding=1)
    y = _random(*A.out_shape)  # inconsistent
    plain, N = lsconv.lsqr(A, y, rtol=1e-9), CirculantPreconditioner(A)
    preconditioned = lsconv.lsqr(A, y, rtol=1e-9, N=N)
    exact = torch.linalg.lstsq(A.to_dense(), y.flatten()[:, None]).solution.flatten()
    torch.testing.assert_close(preconditioned.x.flatten(), exact, rtol=0, atol=1e-5)
    assert int(preconditioned.iterations) < int(plain.iterations)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Dense(torch.ones(2, 2)), "no convolution"),
        (lambda: Dense(_random(5, 84), in_shape=_CONV.out_shape) @ _CONV, "stands between"),
        (lambda: Identity((4,)), "no convolution"),
        (lambda: Pad(_CONV.out_shape, 1, "replicate", dtype=F64) @ _CONV, "stands between"),
        (lambda: lsconv.vstack([_CONV, Dense(_random(4, 126), in_shape=_CONV.in_shape)]), "supported"),
        (lambda: lsconv.vstack([_CONV, Conv2d(_random(2, 3, 3, 3), (6, 7), 2, 1)]), "strides"),
    ],
)
def test_operators_without_a_usable_convolution_are_refused(make: Callable[[], LinearOperator], words: str) -> None:
    A = make()
    with pytest.raises(MethodError, match=words):
        CirculantPreconditioner(A, side="residual" if not isinstance(A, lsconv.operators.algebra.VStack) else None)


def test_a_stack_on_the_wrong_side_is_told_the_right_one() -> None:
    with pytest.raises(MethodError, match="side='solution'"):
        CirculantPreconditioner(lsconv.vstack([_CONV, _CONV]), side="residual")
    with pytest.raises(MethodError, match="side='residual'"):
        CirculantPreconditioner(lsconv.hstack([_CONV, _CONV]), side="solution")


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ArgumentError, match="side"):
        CirculantPreconditioner(_CONV, side="left")
    with pytest.raises(ArgumentError, match="damp"):
        CirculantPreconditioner(_CONV, -1.0)
    with pytest.raises(ArgumentTypeError, match="LinearOperator"):
        CirculantPreconditioner(torch.ones(2, 2))  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="float16"):
        CirculantPreconditioner(_CONV.to(torch.float16))
    with pytest.raises(ShapeError, match="damp"):
        CirculantPreconditioner(Conv1d(torch.randn(3, 1, 1, 3), 8), torch.ones(2))
