"""A convolution whose axis became channels is the same linear map."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.factored.axis_channels import AxisAsChannels
from lsconv.operators.convolution import Convolution

CASES: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("valid", (1, 1, 3, 4, 5), (6, 7, 8), {}),
    ("zeros of one side, stride and dilation", (2, 3, 2, 3, 1), (5, 9, 4), {
        "padding": [(1, 0), (0, 2), (1, 1)], "stride": (2, 1, 3), "dilation": (2, 3, 1)}),
    ("reflect", (1, 2, 3, 3, 3), (4, 5, 6), {"padding": 1, "padding_mode": "reflect"}),
    ("replicate", (3, 1, 3, 3, 2), (4, 5, 6), {"padding": [(2, 1), (1, 0), (0, 3)], "padding_mode": "replicate"}),
    ("circular", (1, 1, 3, 2, 2), (4, 4, 6), {"padding": [(1, 1), (1, 0), (0, 1)], "padding_mode": "circular"}),
    ("groups", (4, 1, 2, 2, 3), (3, 4, 5), {"groups": 2}),
    ("a kernel per item", (2, 3, 1, 1, 2, 3, 2), (4, 4, 3), {}),
    ("an image as a line", (2, 2, 3, 2), (5, 6), {"padding": 1}),
    ("an axis of one", (1, 2, 1, 3, 3), (1, 4, 5), {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("name", "weight", "size", "geometry"), CASES, ids=[case[0] for case in CASES])
def test_every_axis_as_channels_is_the_same_map(
    name: str, weight: tuple[int, ...], size: tuple[int, ...], geometry: dict[str, Any], dtype: torch.dtype
) -> None:
    numbers = torch.Generator().manual_seed(0)
    kernel = torch.randn(weight, dtype=dtype, generator=numbers)
    channels = kernel.shape[-len(size) - 1] * geometry.get("groups", 1)
    if "groups" in geometry:
        kernel = kernel.reshape(4, 1, *weight[2:])
    A = Convolution(kernel, size, **geometry)
    assert A.c_in == channels
    batch = (5, *A.batch_shape)
    x = torch.randn(*batch, *A.in_shape, dtype=dtype, generator=numbers)
    y = torch.randn(*batch, *A.out_shape, dtype=dtype, generator=numbers)
    for axis in range(A.ndim):
        way = AxisAsChannels.of(A, axis)
        assert way.B.ndim == A.ndim - 1
        assert torch.equal(way.extend_inputs(way.restrict_inputs(x)), x)
        assert torch.equal(way.extend_outputs(way.restrict_outputs(y)), y)
        torch.testing.assert_close(way.extend_outputs(way.B(way.restrict_inputs(x))), A(x))
        torch.testing.assert_close(way.extend_inputs(way.B.adjoint(way.restrict_outputs(y))), A.adjoint(y))


def test_the_weight_of_the_image_is_toeplitz_in_the_planes() -> None:
    kernel = torch.arange(1.0, 4.0).reshape(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2).contiguous()
    way = AxisAsChannels.of(lsconv.Conv3d(kernel, (4, 5, 5)), 0)
    expected = torch.tensor([[1.0, 2.0, 3.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert torch.equal(way.B.weight[..., 0, 1], expected)
