"""Convolution against torch.nn.functional and dense matrices, over every argument of its signature."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lsconv.errors import ShapeError
from lsconv.operators.convolution import Conv1d, Conv2d, Conv3d, Convolution, norm_bound
from lsconv.operators.padding_modes import MODES

CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
DOUBLE = (torch.float64, torch.complex128)
KERNEL_BATCHES = ((2,), (3, 1), (2, 3), (1,))
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def tolerance(dtype: torch.dtype) -> float:
    """Rounding of a few hundred additions."""
    return 300 * torch.finfo(dtype).eps


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one convolution that has an output."""

    weight: torch.Tensor
    in_size: tuple[int, ...]
    arguments: dict[str, Any]
    batch: tuple[int, ...]

    def operator(self, **changes: Any) -> Convolution:
        return Convolution(self.weight, self.in_size, **{**self.arguments, **changes})

    def pairs(self) -> list[tuple[int, int]]:
        return [(p, p) if isinstance(p, int) else p for p in self.arguments["padding"]]

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """Torch's result for one kernel and a batch of inputs."""
        a = self.arguments
        rest = (a["stride"], a["padding"], a["dilation"], a["groups"])
        conv = CONV[len(self.in_size)]
        if a["padding_mode"] == "zeros" and all(isinstance(p, int) for p in a["padding"]):
            return conv(x, self.weight, None, *rest)
        amounts = [amount for pair in reversed(self.pairs()) for amount in pair]
        mode = "constant" if a["padding_mode"] == "zeros" else a["padding_mode"]
        padded = functional.pad(x, amounts, mode) if any(amounts) else x
        return conv(padded, self.weight, None, a["stride"], 0, a["dilation"], a["groups"])


@st.composite
def convolutions(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    kernel_batches: tuple[tuple[int, ...], ...] = ((),),
    modes: tuple[str, ...] = tuple(MODES),
    asymmetric: bool = True,
) -> Case:
    ndim = draw(st.sampled_from([1, 2, 2, 2, 3]))
    mode = draw(st.sampled_from(modes))
    sizes, kernels, strides, dilations, paddings = [], [], [], [], []
    for _ in range(ndim):
        size = draw(st.integers(1, 9 if ndim < 3 else 5))
        limit = MODES[mode].widest(size)
        most = 5 if limit is None else min(limit, 5)
        left = draw(st.integers(0, most))
        right = draw(st.integers(0, most)) if asymmetric and draw(st.booleans()) else left
        dilation = draw(st.integers(1, 3))
        kernels.append(draw(st.integers(1, min(5, (size + left + right - 1) // dilation + 1))))
        sizes.append(size)
        dilations.append(dilation)
        strides.append(draw(st.integers(1, 4)))
        paddings.append(left if left == right else (left, right))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c_out, c_in = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel_batch = draw(st.sampled_from(kernel_batches))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(*kernel_batch, groups * c_out, c_in, *kernels, dtype=dtype, generator=generator)
    arguments = {
        "stride": tuple(strides),
        "padding": tuple(paddings),
        "dilation": tuple(dilations),
        "groups": groups,
        "padding_mode": mode,
    }
    return Case(weight, tuple(sizes), arguments, draw(st.sampled_from([(), (2,), (2, 3)])))


def random(*shape: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(*shape, dtype=like.dtype)


@given(convolutions())
@settings(max_examples=150)
def test_forward_is_torchs_convolution_bit_for_bit(case: Case) -> None:
    A = case.operator(backend="direct")
    x = random(2, *A.in_shape, like=case.weight)
    expected = case.reference(x)
    if case.arguments["padding_mode"] != "zeros" or all(isinstance(p, int) for p in case.arguments["padding"]):
        assert torch.equal(A(x), expected)
    else:  # torch has no asymmetric padding of its own: rounding may differ from padding first
        torch.testing.assert_close(A(x), expected, rtol=0, atol=tolerance(case.weight.dtype) * 10)


@given(convolutions(DOUBLE, ((), *KERNEL_BATCHES)))
@settings(max_examples=150)
def test_adjoint_is_exact(case: Case) -> None:
    assert case.operator(backend="direct").dot_test() <= 1e-12


@given(convolutions(DOUBLE, asymmetric=False), st.booleans())
@settings(max_examples=60)
def test_dense_matrix_is_that_of_torchs_convolution(case: Case, by_fft: bool) -> None:
    A = case.operator(backend="fft" if by_fft else "direct")
    basis = torch.eye(A.in_numel, dtype=A.dtype).reshape(-1, *A.in_shape)
    matrix = case.reference(basis).reshape(A.in_numel, A.out_numel).mT
    torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(A.H.to_dense(), matrix.mH, rtol=0, atol=1e-12)


@given(convolutions(kernel_batches=((), *KERNEL_BATCHES)))
@settings(max_examples=150)
def test_backends_agree(case: Case) -> None:
    direct, by_fft = case.operator(backend="direct"), case.operator(backend="fft")
    x = random(*case.batch, *direct.batch_shape, *direct.in_shape, like=case.weight)
    y = random(*case.batch, *direct.batch_shape, *direct.out_shape, like=case.weight)
    scale = float(case.weight.abs().square().sum().sqrt()) * 10
    bound = {"rtol": 0, "atol": tolerance(case.weight.dtype) * scale}
    torch.testing.assert_close(by_fft(x), direct(x), **bound)
    torch.testing.assert_close(by_fft.H(y), direct.H(y), **bound)


@given(convolutions(DOUBLE, KERNEL_BATCHES), st.booleans())
@settings(max_examples=100)
def test_a_kernel_per_item_is_a_loop_over_items(case: Case, by_fft: bool) -> None:
    A = case.operator(backend="fft" if by_fft else "direct")
    x = random(*case.batch, *A.batch_shape, *A.in_shape, like=case.weight)
    y = random(*case.batch, *A.batch_shape, *A.out_shape, like=case.weight)
    ax, ahy = A(x), A.H(y)
    for index in torch.cartesian_prod(*map(torch.arange, (*A.batch_shape, 1)))[:, :-1].tolist():
        single = Convolution(case.weight[tuple(index)], case.in_size, **case.arguments)
        here = (slice(None),) * len(case.batch) + tuple(index)
        torch.testing.assert_close(ax[here], single(x[here]), rtol=0, atol=1e-11)
        torch.testing.assert_close(ahy[here], single.H(y[here]), rtol=0, atol=1e-11)


def test_batch_dimensions_broadcast_with_the_kernels() -> None:
    A = Conv2d(torch.randn(2, 1, 4, 3, 3, 3), (6, 7))
    x = torch.randn(5, 1, 3, 3, 6, 7)
    assert A(x).shape == (5, 2, 3, *A.out_shape)
    torch.testing.assert_close(A(x)[4, 1, 2], functional.conv2d(x[4, 0, 2], A.weight[1, 0]))
    assert A(x[0, 0, 0]).shape == (2, 1, *A.out_shape)


def test_empty_batch_gives_empty_batch() -> None:
    A = Conv2d(torch.randn(4, 3, 3, 3), (6, 7))
    assert A(torch.zeros(0, 3, 6, 7)).shape == (0, *A.out_shape)
    assert A.H(torch.zeros(2, 0, *A.out_shape)).shape == (2, 0, *A.in_shape)


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_memory_layout_of_the_input_does_not_matter(backend: str) -> None:
    A = Conv2d(torch.randn(4, 3, 5, 5, dtype=torch.float64), (16, 18), stride=2, padding=2, backend=backend)
    x = torch.randn(2, 3, 16, 18, dtype=torch.float64)
    strided = torch.randn(2, 3, 32, 54, dtype=torch.float64)[:, :, ::2, ::3].copy_(x)
    for same in (x.to(memory_format=torch.channels_last), strided, x.mT.contiguous().mT):
        assert not same.is_contiguous()
        torch.testing.assert_close(A(same), A(x), rtol=0, atol=1e-12)
    y = A(x).to(memory_format=torch.channels_last)
    torch.testing.assert_close(A.H(y), A.H(y.contiguous()), rtol=0, atol=1e-12)


# On a processor with AMX oneDNN 3.12 crashes on the first two and gives garbage for the third.
HALF_PRECISION_FAULTS = [
    ((2, 3, 1, 8), (3, 3, 2, 3), (1, 1), (2, 4), (3, 3), 1, torch.bfloat16),
    ((2, 3, 4, 1), (3, 3, 3, 3), (4, 2), (1, 5), (1, 2), 1, torch.float16),
    ((2, 6, 9, 2), (9, 2, 1, 4), (1, 4), (0, 3), (3, 2), 3, torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dilation", "groups", "dtype"), HALF_PRECISION_FAULTS)
def test_half_precision_is_right_where_onednn_is_not(
    shape: tuple[int, ...], kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any, groups: int, dtype: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*s, generator=generator).to(dtype) for s in (kernel, shape))
    A = Convolution(weight, shape[2:], stride=stride, padding=padding, dilation=dilation, groups=groups)
    exact = functional.conv2d(x.double(), weight.double(), None, stride, padding, dilation, groups)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(A(x).double(), exact, rtol=eps, atol=1e-5)
    y = exact.to(dtype)
    torch.testing.assert_close(A.H(y).double(), A.to(dtype=torch.float64).H(y.double()), rtol=eps, atol=1e-5)


@given(convolutions((torch.float16, torch.bfloat16)))
@settings(max_examples=40)
def test_half_precision_is_rounded_once(case: Case) -> None:
    A = case.operator(backend="fft")  # half types are direct whatever is asked for
    x, y = (random(2, *shape, like=case.weight) for shape in (A.in_shape, A.out_shape))
    exact = Convolution(case.weight.double(), case.in_size, **case.arguments)
    eps = torch.finfo(case.weight.dtype).eps
    torch.testing.assert_close(A(x).double(), exact(x.double()), rtol=eps, atol=1e-4)
    # the adjoint of the padding adds up what has been rounded
    torch.testing.assert_close(A.H(y).double(), exact.H(y.double()), rtol=40 * eps, atol=40 * eps)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of the reference
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 4), (2, 5), (1, 6)])
def test_padding_by_name_is_torchs(kernel: tuple[int, int], padding: str) -> None:
    weight, x = torch.randn(2, 3, *kernel), torch.randn(4, 3, 9, 13)
    A = Conv2d(weight, (9, 13), padding=padding, dilation=(2, 1))
    assert torch.equal(A(x), functional.conv2d(x, weight, padding=padding, dilation=(2, 1)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", [1, "same", (1, 0)])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_from_module_is_the_module_without_its_bias(mode: str, padding: int | str | tuple[int, int]) -> None:
    module = torch.nn.Conv2d(4, 6, (3, 2), padding=padding, groups=2, padding_mode=mode, dilation=(1, 2))
    x = torch.randn(2, 4, 8, 9)
    A = Conv2d.from_module(module, (8, 9))
    assert A.weight is module.weight
    torch.testing.assert_close(A(x), module(x) - module.bias[:, None, None])
    A(x).sum().backward()
    assert module.weight.grad is not None


def test_from_module_takes_the_class_of_its_dimension_only() -> None:
    assert Conv1d.from_module(torch.nn.Conv1d(1, 2, 3), 9).out_shape == (2, 7)
    assert Conv3d.from_module(torch.nn.Conv3d(1, 2, 3), (5, 5, 5)).out_shape == (2, 3, 3, 3)
    assert Convolution.from_module(torch.nn.Conv1d(1, 2, 3), (9,)).out_shape == (2, 7)
    with pytest.raises(TypeError, match=r"module: expected a torch.nn.Conv2d or ConvTranspose2d, got Conv1d"):
        Conv2d.from_module(torch.nn.Conv1d(1, 2, 3), (9, 9))
    with pytest.raises(TypeError, match=r"module: .* got Linear"):
        Convolution.from_module(torch.nn.Linear(2, 2), (9, 9))


@given(convolutions(DOUBLE, ((), (2,))), st.booleans())
@settings(max_examples=15)
def test_gradients_reach_input_and_weight(case: Case, by_fft: bool) -> None:
    A = case.operator(backend="fft" if by_fft else "direct")
    x = random(*A.batch_shape, *A.in_shape, like=case.weight).requires_grad_()
    y = random(*A.batch_shape, *A.out_shape, like=case.weight).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: A.with_parameters([w])(x), (x, weight), fast_mode=True)
    assert torch.autograd.gradcheck(lambda y, w: A.with_parameters([w]).H(y), (y, weight), fast_mode=True)


def test_conversion_converts_the_weight() -> None:
    A = Conv2d(torch.randn(2, 1, 3, 3), (5, 5))
    assert A.to(torch.complex128).weight.dtype == A.to(dtype=torch.complex128).dtype == torch.complex128
    assert A.weight.dtype == torch.float32


def test_repr_names_what_differs_from_the_default() -> None:
    A = Conv2d(torch.randn(4, 2, 3, 3), (8, 8), stride=2, padding=(1, 2), groups=2, padding_mode="circular")
    assert repr(A) == (
        "Conv2d((4, 8, 8) -> (4, 4, 5), kernel=(3, 3), stride=(2, 2), padding=(1, 2), groups=2, "
        "padding_mode='circular', torch.float32, cpu)"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("c_in, c_out, groups", [(4, 2, 1), (2, 4, 1), (4, 6, 2)])
def test_adjoint_by_flipped_kernels_is_the_transposed_convolution(
    dtype: torch.dtype, c_in: int, c_out: int, groups: int
) -> None:
    """Which of the two serves depends on channels and dtype; neither stride nor too much padding may be flipped."""
    weight = torch.randn(c_out, c_in // groups, 3, 2, dtype=dtype)
    for stride, padding in ((1, 0), (1, 1), (1, (5, 4)), (2, 1)):
        A = Conv2d(weight, (7, 6), stride=stride, padding=padding, groups=groups, backend="direct")
        y = torch.randn(A.out_shape, dtype=dtype)
        matrix = A.to_dense()
        bound = tolerance(dtype)
        torch.testing.assert_close(A.H(y).flatten(), matrix.mH @ y.flatten(), rtol=bound, atol=bound)
        assert A._flips == (stride == 1 and padding != (5, 4) and (dtype != torch.float64 or c_out <= c_in))


def test_flipped_kernels_are_forgotten_when_the_weight_changes() -> None:
    weight = torch.randn(1, 2, 3, 3)
    A = Conv2d(weight, (6, 6), backend="direct")
    y = torch.randn(A.out_shape)
    before = A.H(y)
    weight.mul_(2)
    torch.testing.assert_close(A.H(y), 2 * before)


def test_kernels_are_replaced_by_one_per_item_only_where_that_is_asked_for() -> None:
    A = Conv2d(torch.randn(4, 1, 3, 3, dtype=torch.float64), (7, 6), 2, 1, groups=2, padding_mode="reflect")
    weights = torch.randn(5, 4, 1, 3, 3, dtype=torch.float64)
    B = A.with_parameters([weights], per_item=True)
    assert type(B) is Conv2d
    assert (B.batch_shape, B.in_shape, B.out_shape) == ((5,), A.in_shape, A.out_shape)
    for matrix, weight in zip(B.to_dense(), weights, strict=True):
        torch.testing.assert_close(matrix, A.with_parameters([weight]).to_dense())
    for other, per_item in ((weights, False), (weights[..., 1:], True)):
        with pytest.raises(ShapeError, match=r"parameters\[0\]"):
            A.with_parameters([other], per_item=per_item)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_bound_of_the_norm_is_one_and_is_met_by_averages(mode: str, groups: int) -> None:
    """Schur's test; a kernel of equal weights keeps a constant, which nothing exceeds."""
    weight = torch.randn(3, 4, 4 // groups, 3, 2, dtype=torch.float64)
    A = Conv2d(weight, (7, 6), padding=1, padding_mode=mode, groups=groups, stride=2)
    largest = torch.linalg.matrix_norm(A.to_dense(), 2)
    assert norm_bound(A).shape == (3,)
    assert bool((norm_bound(A) >= largest).all())
    average = Conv2d(torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64), (6, 6), padding=1, padding_mode="circular")
    torch.testing.assert_close(norm_bound(average), torch.linalg.matrix_norm(average.to_dense(), 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "padding", "stride"), [(5, 4, 1), (6, 3, 2), (7, (0, 5), 1), (2, 1, 1), (6, 6, 4)])
def test_the_bound_of_the_norm_counts_the_copies_that_padding_makes(
    mode: str, size: int, padding: Any, stride: int
) -> None:
    limit = MODES[mode].widest(size)
    if limit is not None and (padding if isinstance(padding, int) else max(padding)) > limit:
        pytest.skip("more padding than torch makes")
    for weight in (torch.ones(1, 1, 2, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)):
        A = Conv1d(weight, size, padding=(padding,), padding_mode=mode, stride=stride)
        largest = torch.linalg.matrix_norm(A.to_dense(), 2)
        assert largest <= norm_bound(A) * (1 + 1e-12)
