"""The spectral norm and its derivative, against dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_the_norm_of_a_padded_convolution_has_the_derivative_of_its_largest_singular_value(mode: str) -> None:
    weight = randn(2, 2, 2, 3, 3).requires_grad_()

    def value(weight: Tensor) -> Tensor:
        return lsconv.norm(lsconv.Conv2d(weight, (6, 5), padding=1, padding_mode=mode), rtol=1e-10)

    expected = torch.linalg.matrix_norm(lsconv.Conv2d(weight, (6, 5), padding=1, padding_mode=mode).to_dense(), 2)
    torch.testing.assert_close(value(weight), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(value(weight).sum(), weight)[0], torch.autograd.grad(expected.sum(), weight)[0],
        rtol=1e-7, atol=1e-8,
    )  # fmt: skip
    assert torch.autograd.gradcheck(value, (weight,), check_forward_ad=True, fast_mode=True)


def test_a_limit_that_is_met_is_told() -> None:
    weight = randn(1, 1, 5, 5).requires_grad_()
    with pytest.warns(lsconv.ConvergenceWarning, match="lower bound"):
        lsconv.norm(lsconv.Conv2d(weight, (20, 20), padding=2), rtol=1e-12, max_iter=5)


def test_the_norm_of_nothing_is_zero() -> None:
    weight = torch.zeros(1, 1, 3, requires_grad=True)
    assert lsconv.norm(lsconv.Conv1d(weight, 6)) == 0


@pytest.mark.parametrize("followed", [False, True])
def test_a_tolerance_that_is_not_positive_is_refused(followed: bool) -> None:
    with pytest.raises(lsconv.ArgumentError, match="rtol: expected a positive number"):
        lsconv.norm(lsconv.Conv1d(torch.ones(1, 1, 3, requires_grad=followed), 6), rtol=-1.0)


@pytest.mark.parametrize("size", [1, 2])
def test_the_norm_is_right_where_few_steps_span_all_that_the_start_reaches(size: int) -> None:
    """Disjoint patches of one channel have one singular value: the first step leaves nothing."""
    weight = torch.full((1, 1, size, size), 0.1, dtype=torch.float64, requires_grad=True)
    value = lsconv.norm(lsconv.Conv2d(weight, (4, 4), stride=size, padding=((0, 1), (0, 1))))
    torch.testing.assert_close(value, torch.tensor(0.1 * size, dtype=torch.float64))
    torch.testing.assert_close(torch.autograd.grad(value, weight)[0], weight.detach() / (0.1 * size))
    layer = lsconv.nn.spectral_norm(torch.nn.Conv2d(1, 1, size, stride=size), (4, 4))
    torch.testing.assert_close(torch.linalg.vector_norm(layer.weight.detach()), torch.tensor(1.0))
