"""A = Q B P^H: the smaller convolution between its selections is the convolution itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.factored.batch_axes import Reduction

FOLDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "rows": ((1, 1, 1, 3), (5, 7), {"padding": (0, 1)}),
    "columns of several channels, in groups": ((4, 2, 3, 1), (6, 5), {"groups": 2}),
    "stride along the folded axis": ((2, 3, 3, 1), (6, 7), {"stride": (1, 2)}),
    "outputs that read nothing": ((2, 3, 3, 1), (6, 7), {"padding": (1, 2)}),
    "stride and padding": ((1, 1, 3, 1), (6, 7), {"padding": (1, 3), "stride": (2, 2)}),
    "middle of three axes": ((2, 1, 3, 1, 2), (5, 4, 6), {}),
    "two of three axes": ((2, 1, 1, 1, 2), (5, 4, 6), {"padding": (1, 0, 1)}),
    "reflecting beside": ((1, 1, 3, 1), (6, 7), {"padding": (1, 0), "padding_mode": "reflect"}),
}
NOT_FOLDED: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((1, 1, 1, 1), {}),
    ((1, 1, 3, 3), {}),
    ((1, 1, 1, 3), {"padding": 1, "padding_mode": "reflect"}),
)
MARGINS: dict[str, tuple[tuple[tuple[int, int], ...], dict[str, Any]]] = {
    "same": (((2, 1), (0, 3)), {"padding": ((3, 3), (2, 4))}),
    "valid, so that inputs are not read": (((2, 1), (0, 3)), {}),
    "stride": (((2, 0), (1, 1)), {"stride": 2, "padding": 1}),
    "dilation": (((1, 0), (0, 1)), {"dilation": 2, "padding": 1}),
    "reflect": (((1, 2), (2, 1)), {"padding": 2, "padding_mode": "reflect"}),
    "reflect, with wider margins than padding": (((3, 0), (0, 3)), {"padding": 1, "padding_mode": "reflect"}),
    "circular": (((1, 2), (2, 1)), {"padding": ((2, 3), (3, 2)), "padding_mode": "circular"}),
    "circular, with wider margins than padding": (((3, 0), (0, 3)), {"padding": 1, "padding_mode": "circular"}),
    "replicate": (((1, 2), (2, 1)), {"padding": 2, "padding_mode": "replicate"}),
}


def check(way: Reduction) -> None:
    """``A = Q B P^H`` by the matrices, and the adjoints of the selections."""
    A, generator = way.A, torch.Generator().manual_seed(0)
    own = A.batch_shape
    x = torch.randn(2, *own, *A.in_shape, dtype=A.dtype, generator=generator)
    y = torch.randn(2, *own, *A.out_shape, dtype=A.dtype, generator=generator)
    torch.testing.assert_close(way.extend_outputs(way.B(way.restrict_inputs(x))), A(x))
    torch.testing.assert_close(way.extend_inputs(way.B.H(way.restrict_outputs(y))), A.H(y))
    for select, place, z in (
        (way.restrict_inputs, way.extend_inputs, x),
        (way.restrict_outputs, way.extend_outputs, y),
    ):
        torch.testing.assert_close(select(place(select(z))), select(z))
    read = bool((A.H(torch.ones_like(y)).abs() > 0).all())
    assert way.reads_all or not read


def margined(margins: tuple[tuple[int, int], ...], geometry: dict[str, Any]) -> lsconv.Convolution:
    weight = torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pads = [size for pair in reversed(margins) for size in pair]
    return lsconv.Conv2d(torch.nn.functional.pad(weight, pads), (11, 12), **geometry)


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("own", [(), (2,)])
def test_folded_axes_are_batch_dimensions(name: str, own: tuple[int, ...]) -> None:
    shape, size, geometry = FOLDED[name]
    weight = torch.randn(*own, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).abs()
    way = Reduction.without_batch_axes(lsconv.Convolution(weight, size, **geometry))
    assert way is not None
    assert way.folded
    assert all(taps > 1 for taps in way.B.kernel_size)
    assert way.drops_outputs == (name in ("outputs that read nothing", "stride and padding", "two of three axes"))
    check(way)


@pytest.mark.parametrize(("shape", "geometry"), NOT_FOLDED)
def test_axes_that_do_something_stay(shape: tuple[int, ...], geometry: dict[str, Any]) -> None:
    assert Reduction.without_batch_axes(lsconv.Conv2d(torch.ones(shape), (5, 6), **geometry)) is None


@pytest.mark.parametrize("name", MARGINS)
def test_trimming_leaves_the_map_as_it_is(name: str) -> None:
    A = margined(*MARGINS[name])
    way = Reduction.trimmed(A)
    assert way is not None
    assert sum(way.B.kernel_size) < sum(A.kernel_size)
    check(way)
    if "wider" not in name:
        assert way.B.kernel_size == (2, 3)


def test_nothing_is_trimmed_where_there_is_nothing_to_trim() -> None:
    weight = torch.zeros(1, 1, 3, 3)
    assert Reduction.trimmed(lsconv.Conv2d(weight, (8, 8))) is None  # it has no first tap
    weight[..., 0, 1] = weight[..., 2, 1] = weight[..., 1, 0] = weight[..., 1, 2] = 1.0
    assert Reduction.trimmed(lsconv.Conv2d(weight, (8, 8))) is None


def test_the_margins_are_those_that_all_kernels_share() -> None:
    weight = torch.zeros(2, 1, 1, 1, 5)
    weight[0, ..., 1], weight[1, ..., 3] = 1.0, 1.0
    way = Reduction.trimmed(lsconv.Conv2d(weight, (4, 9), padding=(0, 2)))
    assert way is not None
    assert way.B.kernel_size == (1, 3)
    check(way)
