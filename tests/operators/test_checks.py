"""Checks of the tensors that meet an operator: every mismatch is named, with the batch dimensions understood."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lsconv
from lsconv.operators.checks import check_tensor, is_numpy, require_finite

A = lsconv.Conv1d(torch.ones(3, 1, 1, 2), in_size=5)  # one kernel per item of a batch of three


def test_the_batch_dimensions_are_what_stands_before_the_item() -> None:
    assert check_tensor(A, torch.zeros(4, 3, 1, 5), "x", "in_shape") == (4, 3)
    assert check_tensor(A, torch.zeros(1, 4), "y", "out_shape") == ()


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        ([1.0], lsconv.ArgumentTypeError, "x: expected a torch.Tensor of shape (*batch, 1, 5), got list"),
        (np.zeros(5), lsconv.ArgumentTypeError, "torch.from_numpy(x)"),
        (np.ma.masked_array(np.zeros(5), True), lsconv.ArgumentTypeError, "lsconv.Mask(~mask) @ A"),
        (torch.zeros(2, 4), lsconv.ShapeError, "batch dimensions understood: ()"),
        (torch.zeros(5), lsconv.ShapeError, "too few dimensions"),
        (torch.zeros(2, 1, 5), lsconv.ShapeError, "do not broadcast with the operator's own batch_shape (3,)"),
        (torch.zeros(1, 5, dtype=torch.float64), lsconv.DtypeError, "convert"),
        (torch.zeros(1, 5, device="meta"), lsconv.DeviceError, "move one with .to(device)"),
        (torch.full((2, 3, 1, 5), torch.nan), lsconv.NonFiniteError, "batch item(s) (0, 0)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        check_tensor(A, tensor, "x", "in_shape", finite=True)
    assert message in str(caught.value)


def test_a_sum_that_overflows_is_not_taken_for_infinity() -> None:
    require_finite(torch.full((4,), 3e38), "x", 1)
    with pytest.raises(lsconv.NonFiniteError, match=r"x: contains NaN or infinity$"):
        require_finite(torch.tensor([1.0, torch.inf]), "x", 1)


def test_numpy_is_known_without_being_imported() -> None:
    assert is_numpy(np.zeros(2))
    assert not is_numpy(torch.zeros(2))
