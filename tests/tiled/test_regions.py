"""Regions of a field: every cell and every output is one tile's, and a tile computes what the whole does."""

from __future__ import annotations

import pytest
import torch

import lsconv
from tests.tiled.problems import BOUNDARIES, F64, problem


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_tile_computes_the_outputs_of_the_whole_and_each_is_one_tiles(boundary: str) -> None:
    A, _ = problem("box", boundary, (83, 98))
    x = torch.randn(A.in_shape, dtype=F64)
    y = A(x)
    tiles = lsconv.tiled.Plan(A, damp=1.0, tile=20, overlap=12).passes.tile_regions
    cells, outputs = torch.zeros(A.spatial_in), torch.zeros(A.spatial_out)
    assert len(tiles.all) == 20

    def places(start: int, count: int, n: int) -> torch.Tensor:
        return (torch.arange(start, start + count)) % n  # a field that wraps goes on at its other side

    for region in tiles.all:
        cells[tuple(slice(c, c + n) for c, n in zip(region.core, region.core_size, strict=True))] += 1
        rows, columns = (places(*axis) for axis in zip(region.start, tiles.size, A.spatial_in, strict=True))
        local = tiles.convolution(region.kind)
        found = local(x[:, rows][:, :, columns])
        first, own = tiles.outputs(region), tiles.core_outputs(region)
        rows, columns = (
            places(o + part.start, part.stop - part.start, n)
            for o, part, n in zip(first, own[1:], A.spatial_out, strict=True)
        )
        torch.testing.assert_close(found[own], y[:, rows][:, :, columns])
        outputs[rows[:, None], columns] += 1
    assert torch.equal(cells, torch.ones_like(cells))
    assert torch.equal(outputs, torch.ones_like(outputs))
