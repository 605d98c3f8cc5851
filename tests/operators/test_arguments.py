"""Every refused argument: the message names the argument, what was expected and what was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lsconv.errors import ArgumentError, ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.convolution import Conv1d, Conv2d, Conv3d, Convolution

WEIGHT = torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"in_size": (2, 9)}, ShapeError, r"in_size: \(2, 9\) .*\(\(0, 0\), \(0, 0\)\).*\(3, 3\).*empty"),
        ({"dilation": 5}, ShapeError, r"in_size: \(8, 8\) .*extent \(11, 11\).*dilation \(5, 5\)"),
        ({"in_size": (8, 0)}, ShapeError, r"in_size: expected positive ints, got \(8, 0\)"),
        ({"in_size": (8,)}, ArgumentError, r"in_size: expected an int or 2 ints, got \(8,\)"),
        ({"in_size": 8.0}, ArgumentTypeError, r"in_size: expected an int or 2 ints, got 8.0"),
        ({"stride": 0}, ArgumentError, r"stride: expected positive ints, got 0"),
        ({"stride": (1, 2, 3)}, ArgumentError, r"stride: expected an int or 2 ints, got \(1, 2, 3\)"),
        ({"stride": True}, ArgumentTypeError, r"stride: expected an int or 2 ints, got True"),
        ({"dilation": -1}, ArgumentError, r"dilation: expected positive ints, got -1"),
        ({"groups": 3}, ArgumentError, r"groups: 3 does not divide the 4 output channels"),
        ({"groups": 0}, ArgumentError, r"groups: expected positive ints, got 0"),
        ({"padding": "full"}, ArgumentError, r"padding: expected 'valid', 'same', .* got 'full'"),
        ({"padding": "same", "stride": 2}, ArgumentError, r"padding: 'same' needs stride 1, got stride \(2, 2\)"),
        ({"padding": -1}, ArgumentError, r"padding: amounts must not be negative, got -1"),
        ({"padding": (1, 2, 3)}, ArgumentError, r"padding: expected .*, got \(1, 2, 3\)"),
        ({"padding": ((1, 2, 3), 1)}, ArgumentTypeError, r"padding: expected .*, got \(\(1, 2, 3\), 1\)"),
        ({"padding": 1.5}, ArgumentTypeError, r"padding: expected .*, got 1.5"),
        ({"padding": 8, "padding_mode": "reflect"}, ArgumentError, r"'reflect' .* allow at most \(7, 7\) per side"),
        ({"padding": 9, "padding_mode": "circular"}, ArgumentError, r"'circular' .* allow at most \(8, 8\) per side"),
        ({"padding_mode": "mirror"}, ArgumentError, r"padding_mode: expected one of 'zeros', .* got 'mirror'"),
        ({"backend": "cudnn"}, ArgumentError, r"backend: expected one of 'auto', 'direct', 'fft', got 'cudnn'"),
        ({"weight": [[1.0]]}, ArgumentTypeError, r"weight: expected a torch.Tensor of shape .*, got list"),
        ({"weight": WEIGHT[0]}, ShapeError, r"weight: expected .*c_out, c_in // groups, .*, got shape \(2, 3, 3\)"),
        ({"weight": WEIGHT[:0]}, ShapeError, r"weight: expected a non-empty tensor"),
        ({"weight": WEIGHT.int()}, DtypeError, r"weight: expected one of .*, got torch.int32"),
        ({"weight": WEIGHT / 0}, NonFiniteError, r"weight: contains NaN or infinity"),
    ],
)
def test_refused_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Conv2d(**{"weight": WEIGHT, "in_size": (8, 8), **changes})


def test_non_finite_kernels_are_named_by_item() -> None:
    weight = torch.ones(3, 1, 1, 3)
    weight[1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"weight: .* batch item\(s\) 1"):
        Conv1d(weight, (8,))
    assert Conv1d(weight, (8,), check_finite=False).batch_shape == (3,)


def test_one_axis_needs_nested_pairs_and_says_so() -> None:
    with pytest.raises(ArgumentError, match=r"padding: .*written \(\(1, 2\),\)"):
        Conv1d(torch.ones(1, 1, 3), 8, padding=(1, 2))
    assert Conv1d(torch.ones(1, 1, 3), 8, padding=((1, 2),)).spatial_out == (9,)


def test_dimension_comes_from_in_size_or_class() -> None:
    assert Convolution(torch.ones(1, 1, 1, 3), (4, 5)).ndim == 2
    assert Convolution(torch.ones(1, 1, 3, 3), (5,)).batch_shape == (1,)
    assert Conv3d(torch.ones(1, 1, 1, 1, 1), 4).spatial_in == (4, 4, 4)
    assert Conv2d(WEIGHT, (np.int64(8), 9), padding=[np.int32(1), (0, 1)]).spatial_out == (8, 8)
    with pytest.raises(ArgumentTypeError, match=r"in_size: expected a tuple of 1, 2 or 3 ints, got 8"):
        Convolution(WEIGHT, 8)


def test_wrong_inputs_are_refused() -> None:
    A = Conv2d(torch.ones(5, 4, 2, 3, 3), (8, 8))
    with pytest.raises(ShapeError, match=r"x: shape \(5, 2, 8, 9\) .*in_shape \(2, 8, 8\) .*understood: \(5,\)"):
        A(torch.ones(5, 2, 8, 9))
    with pytest.raises(ShapeError, match=r"x: batch dimensions \(4,\) .*batch_shape \(5,\)"):
        A(torch.ones(4, 2, 8, 8))
    with pytest.raises(ShapeError, match=r"too few dimensions"):
        A(torch.ones(8, 8))
    with pytest.raises(DtypeError, match=r"x: dtype torch.float64 .*torch.float32"):
        A(torch.ones(2, 8, 8).double())
    with pytest.raises(DeviceError, match=r"x: device meta .*cpu"):
        A(torch.ones(2, 8, 8, device="meta"))
    with pytest.raises(ArgumentTypeError, match=r"x: expected a torch.Tensor .*got ndarray"):
        A(np.ones((2, 8, 8)))
