"""The FFT backend: its lengths, its cache, and when it is chosen. Its numbers are tested with the convolutions."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.errors import LsconvError
from lsconv.operators.convolution import Conv1d, Conv2d, Convolution
from lsconv.operators.fft_convolution import FrequencyGrid, good_fft_length, inverse_transform


@given(st.integers(1, 5000))
def test_good_length_is_the_next_with_small_factors(n: int) -> None:
    powers = itertools.product(range(14), range(9), range(7), range(6))
    smooth = (2**a * 3**b * 5**c * 7**d for a, b, c, d in powers)
    step = 1 if n == 1 else 2 if n <= 16 else 4
    assert good_fft_length(n) == min(length for length in smooth if length >= n and length % step == 0)


def counted(A: Convolution) -> mock.MagicMock:
    """Counts how often the kernels of A are transformed."""
    return mock.patch.object(FrequencyGrid, "spectrum", autospec=True, side_effect=FrequencyGrid.spectrum)


def test_kernel_is_transformed_once() -> None:
    A = Conv2d(torch.randn(1, 1, 9, 9), (32, 32), backend="fft")
    with counted(A) as transforms:
        A.H(A(torch.randn(1, 32, 32)))
        A(torch.randn(3, 1, 32, 32))
    assert transforms.call_count == 1


def test_changed_weights_are_noticed() -> None:
    A = Conv2d(torch.randn(1, 1, 9, 9, dtype=torch.float64), (32, 32), backend="fft")
    x = torch.randn(1, 32, 32, dtype=torch.float64)
    before = A(x)
    A.weight.mul_(2)
    torch.testing.assert_close(A(x), 2 * before)
    A.weight = A.weight / 2
    torch.testing.assert_close(A(x), before)


def test_copies_do_not_inherit_the_spectrum() -> None:
    A = Conv2d(torch.randn(1, 1, 9, 9, dtype=torch.float64), (32, 32), backend="fft")
    x = torch.randn(1, 32, 32, dtype=torch.float64)
    y = A(x)
    torch.testing.assert_close(A.with_parameters([3 * A.weight])(x), 3 * y)
    assert not any(name.startswith("_cached") for name in vars(A.to(torch.float32)))


def test_spectrum_is_not_kept_while_autograd_follows_the_weight() -> None:
    weight = torch.randn(1, 1, 9, 9, requires_grad=True)
    A = Conv2d(weight, (32, 32), backend="fft")
    x = torch.randn(1, 32, 32)
    for _ in range(2):  # a kept graph would fail the second time
        A(x).square().sum().backward()
    with torch.no_grad():
        A(x)
    weight.grad = None
    A(x).square().sum().backward()
    expected = torch.autograd.grad(Conv2d(weight, (32, 32), backend="direct")(x).square().sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-2)


def test_inference_mode_leaves_no_trace() -> None:
    A = Conv2d(torch.randn(1, 1, 9, 9), (32, 32), backend="fft")
    with torch.inference_mode():
        A(torch.randn(1, 32, 32))
    x = torch.randn(1, 32, 32, requires_grad=True)
    A(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_function_transforms_see_through_the_operator(backend: str) -> None:
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 6, 7, dtype=torch.float64)
    A = Conv2d(weight, (6, 7), padding=1, padding_mode="reflect", backend=backend)
    torch.testing.assert_close(torch.func.vmap(A)(x), A(x))
    torch.testing.assert_close(torch.func.grad(lambda v: A(v).square().sum())(x), 2 * A.H(A(x)))
    scaled = torch.func.vmap(lambda w: A.with_parameters([w])(x))(torch.stack([weight, 2 * weight]))
    torch.testing.assert_close(scaled[1], 2 * A(x))


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    A = Conv2d(torch.randn(2, 2, 3, 3), (6, 7), padding=1, padding_mode="reflect", backend=backend)
    compiled = torch.compile(A.apply, backend="eager", fullgraph=True)
    x = torch.randn(4, 2, 6, 7)
    torch.testing.assert_close(compiled(x), A(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_auto_keeps_small_kernels_direct_and_sends_large_ones_to_the_fft(transposed: bool) -> None:
    small = Conv2d(torch.randn(32, 32, 3, 3), (128, 128))
    large = Conv2d(torch.randn(1, 1, 15, 15, dtype=torch.float64), (512, 512))
    short = Conv1d(torch.randn(1, 1, 3), 64)
    assert not small._uses_fft(1, transposed)
    assert not short._uses_fft(1, transposed)
    assert large._uses_fft(1, transposed)
    assert not Conv2d(large.weight.half(), (512, 512), backend="fft")._uses_fft(1, transposed)


def test_prime_circular_grid_is_exact_too() -> None:
    weight = torch.randn(1, 1, 5, 5, dtype=torch.float64)
    direct, by_fft = (
        Conv2d(weight, (127, 13), padding=2, padding_mode="circular", backend=backend) for backend in ("direct", "fft")
    )
    x = torch.randn(1, 127, 13, dtype=torch.float64)
    torch.testing.assert_close(by_fft(x), direct(x))
    torch.testing.assert_close(by_fft.H(x), direct.H(x))


def test_unknown_backend_is_an_lsconv_error() -> None:
    with pytest.raises(LsconvError, match="backend"):
        Conv1d(torch.ones(1, 1, 1), 3, backend="winograd")


def test_items_in_groups_are_what_they_are_together() -> None:
    A = Conv2d(torch.randn(4, 3, 3, 3, dtype=torch.float64), (10, 9), stride=2, padding=1, backend="fft")
    grid, spectrum = A._grid, A._spectrum()
    x, y = (torch.randn(7, *shape, dtype=torch.float64) for shape in (A.in_shape, A.out_shape))
    torch.testing.assert_close(grid.apply(x, spectrum, work_bytes=2**14), grid.apply(x, spectrum))
    torch.testing.assert_close(grid.adjoint(y, spectrum, work_bytes=2**14), grid.adjoint(y, spectrum))


# ---------------------------------------------------------------------- the inverse transform, a part at a time


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4), (1, 7, 1)])
@pytest.mark.parametrize("sizes", [(6,), (5, 4), (3, 4, 5)])
def test_parts_make_the_whole(lead: tuple[int, ...], sizes: tuple[int, ...], real: bool) -> None:
    x = torch.randn(*lead, *sizes, dtype=torch.float64 if real else torch.complex128)
    dims = tuple(range(-len(sizes), 0))
    spectra = (torch.fft.rfftn if real else torch.fft.fftn)(x, dim=dims)
    torch.testing.assert_close(inverse_transform(spectra, sizes, real=real, work_bytes=100), x)


def test_parts_have_gradients_and_can_be_batched() -> None:
    z = torch.randn(6, 5, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: inverse_transform(z, (5, 4), real=True, work_bytes=100), z)
    batched = torch.func.vmap(lambda z: inverse_transform(z, (5, 4), real=True, work_bytes=100))(z.detach())
    torch.testing.assert_close(batched, torch.fft.irfftn(z.detach(), s=(5, 4), dim=(-2, -1)))


def test_no_axes_are_no_transform() -> None:
    z = torch.randn(3)
    assert inverse_transform(z, (), real=True) is z


def test_a_last_axis_of_one_cell_is_transformed_as_any_other() -> None:
    spectra = torch.fft.rfftn(torch.randn(3, 2, 12, 1, dtype=torch.float64), dim=(-2, -1))
    expected = torch.fft.irfftn(spectra, s=(12, 1), dim=(-2, -1))
    found = inverse_transform(spectra, (12, 1), real=True)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
