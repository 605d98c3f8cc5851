"""The cost model of the border against the plans whose costs it estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv import psf
from lsconv.border.cost_model import (
    CostModel,
    Factorise,
    Limits,
    direct_plan_cost,
    free_bytes,
    items_at_once,
)
from lsconv.border.normal_inverse import BorderInverse
from lsconv.border.plan import BorderPlan

F64 = torch.float64


@pytest.mark.parametrize(
    ("kernel", "size", "options"),
    [
        (psf.disk(3.0, size=(9, 9))[None, None], (64, 64), {"padding": 4}),
        (torch.randn(1, 1, 9, 9), (64, 64), {"padding": 4}),
        (torch.randn(6, 6, 3, 3), (24, 30), {}),
        (torch.randn(4, 2, 3, 3), (24, 24), {"padding": 1, "stride": 2}),
        (torch.randn(1, 1, 3, 5, 5), (10, 12, 12), {"padding": (1, 2, 2)}),
        (torch.randn(4, 4, 3, 3, 3), (6, 8, 8), {"padding": 1}),
    ],
)
def test_the_price_from_the_shapes_is_that_of_the_plan(
    kernel: torch.Tensor, size: tuple[int, ...], options: Any
) -> None:
    A = lsconv.Convolution(kernel.double(), size, **options)
    inverse = BorderPlan(A, 0.1 * float(kernel.norm())).inverse
    assert isinstance(inverse, BorderInverse)
    own = inverse.model.factor_work(inverse._cost)
    price = direct_plan_cost(A)
    # the plan may take a grid that transforms well and has a larger border
    assert 0.4 * own < price.setup_work < 2.5 * own
    own_bytes = inverse.model.peak_bytes(inverse._cost)
    assert 0.4 * own_bytes < price.peak_bytes < 2.5 * own_bytes


def test_a_tall_image_costs_as_much_to_factorise_as_a_wide_one() -> None:
    weight = psf.disk(3)[None, None]
    tall, wide = (
        BorderPlan(lsconv.Conv2d(weight, in_size), 1e-2, limits=Limits(factorise=Factorise.AFTER_ITERATIONS)).inverse
        for in_size in ((400, 40), (40, 400))
    )
    assert isinstance(tall, BorderInverse)
    assert isinstance(wide, BorderInverse)
    assert tall._cost.setup == pytest.approx(wide._cost.setup, rel=0.05)
    assert tall._cost.entries == pytest.approx(wide._cost.entries, rel=0.05)


def test_definite_systems_cost_less() -> None:
    definite, mixed = (CostModel(2, 100, 3, definite=flag) for flag in (True, False))
    one, two, four, five = (definite.iteration_work(rhs) for rhs in (1, 2, 4, 5))
    assert two - one == pytest.approx(five - four)
    assert 0 < two - one < one < mixed.iteration_work(1)


def test_as_many_right_hand_sides_go_at_once_as_an_allocator_reuses() -> None:
    cpu = torch.device("cpu")
    assert items_at_once(2**20, 2**30, cpu) == 2**5
    assert items_at_once(2**30, 0, cpu) == 1


def test_elsewhere_as_many_go_as_half_of_the_free_memory_holds() -> None:
    device = torch.device("meta")
    free = free_bytes(device)
    least, most = (items_at_once(2**20, 2**20, device) * 7 * 2**20 / (part * free) for part in (0.5, 0.5))
    assert 0.9 < least == most < 1.1
    assert items_at_once(2 * free, 2 * free, device) == 1
