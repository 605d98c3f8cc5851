"""The choice of tiles, overlap and path: said with its reason, and within the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import ArgumentError, DtypeError, MethodError, PlanMemoryError, ShapeError
from tests.tiled.problems import F64, check, problem


def test_the_plan_says_what_it_does_and_why() -> None:
    A, _ = problem("gauss", "valid", (97, 118))
    text = repr(lsconv.tiled.Plan(A, damp=0.1, tile=40))
    assert "path='tiles' because beyond" in text
    assert "2 x 3 tiles" in text
    assert "MiB" in text


def test_an_inverse_that_reaches_too_far_goes_to_the_whole_where_that_fits() -> None:
    A, y = problem("motion", "valid", (97, 118))
    plan, _ = check(A, y, 1e-2, tile=40)
    assert plan.path == "whole"
    assert "steps of tiles" in plan.why
    assert lsconv.tiled.Plan(A, damp=0.5, tile=40).path == "tiles"


@pytest.mark.slow
def test_a_wider_overlap_leaves_less() -> None:
    A, y = problem("gauss", "circular", (160, 160))
    steps = [int(lsconv.tiled.Plan(A, damp=0.1, tile=40, overlap=o).solve(y).iterations) for o in (16, 24)]
    assert steps[0] > steps[1]


def test_memory_is_stated_and_bounds_the_tiles() -> None:
    A, _ = problem("gauss", "valid", (2000, 2100))
    large, small = (lsconv.tiled.Plan(A, damp=0.1, max_memory=m, storage="unused") for m in (2**31, 2**29))
    assert small.memory <= 2**29
    assert small.passes.tile_regions.size < large.passes.tile_regions.size
    with pytest.raises(PlanMemoryError, match="max_memory"):
        lsconv.tiled.Plan(A, damp=0.1, max_memory=2**20)


def test_arguments_that_do_not_fit_are_refused() -> None:
    kernel = torch.ones(3, 3) / 9
    A = lsconv.Conv2d(kernel[None, None], (40, 40))
    refused: list[tuple[Any, str, Any, dict[str, Any]]] = [
        (ArgumentError, "damp: expected a number > 0", A, {"damp": 0.0}),
        (ArgumentError, "in_size: needed", kernel, {"damp": 1.0}),
        (ArgumentError, "tile: expected", A, {"damp": 1.0, "tile": (1, 2, 3)}),
        (ArgumentError, "overlap: expected", A, {"damp": 1.0, "overlap": "wide"}),
        (MethodError, "stride", lsconv.Conv2d(kernel[None, None], (40, 40), stride=2), {"damp": 1.0}),
        (MethodError, "a kernel per batch item", lsconv.Conv2d(kernel[None, None, None], (40, 40)), {"damp": 1.0}),
        (MethodError, "as many outputs as inputs",
         lsconv.Conv2d(kernel[None, None], (40, 40), padding=2, padding_mode="circular"), {"damp": 1.0}),
        (MethodError, "no border plan in 3 dimensions",
         lsconv.Conv3d(torch.ones(1, 1, 3, 3, 3), (9, 9, 9), padding=1, padding_mode="reflect"), {"damp": 1.0}),
        (MethodError, "L: tiles serve penalties", lsconv.Conv2d(kernel[None, None], (40, 40), padding=1,
         padding_mode="reflect"), {"damp": 1.0, "L": lsconv.Gradient((1, 40, 40))}),
        (ShapeError, "observed", A, {"damp": 1.0, "observed": torch.ones(3, 3)}),
    ]  # fmt: skip
    for kind, text, operator, options in refused:
        with pytest.raises(kind, match=text):
            lsconv.tiled.Plan(operator, **options)
    plan = lsconv.tiled.Plan(A, damp=1.0)
    with pytest.raises(ShapeError, match="y: expected"):
        plan.solve(torch.zeros(1, 40, 40))
    with pytest.raises(ShapeError, match="out: expected"):
        plan.solve(torch.zeros(1, 38, 38), out=torch.zeros(40, 40))
    with pytest.raises(DtypeError, match="y: float64"):
        plan.solve(torch.zeros(1, 38, 38, dtype=F64))
