"""The border on shared frequencies, on one rank: its vectors, and the product with a block-circulant operator."""

from __future__ import annotations

import torch

import lsconv
from lsconv.border.normal_inverse import normal_inverse
from lsconv.border.normal_problem import Request
from lsconv.tiled.pencil_border import PencilBorder, strip_cells
from lsconv.tiled.pencil_grid import PencilGrid
from lsconv.tiled.ranks import Ranks

F64 = torch.float64
GRID = (8, 6)
# of one channel: two rows and one column
POSITIONS = [[[6, 7], [5]]]


def border() -> PencilBorder:
    cpu = torch.device("cpu")
    return PencilBorder(PencilGrid(GRID, GRID, Ranks(None, cpu)), POSITIONS, cpu)


def on_grid(border: PencilBorder, u: torch.Tensor) -> torch.Tensor:
    """The border vector laid out by hand."""
    field = torch.zeros(GRID, dtype=F64)
    rows, columns = border.strip_values(u)
    field[[6, 7]] += rows[0]
    field[:, 5] += columns[0, 0]
    return field


def test_cells_in_two_strips_belong_to_the_first() -> None:
    found = border()
    assert strip_cells(POSITIONS, 0) == [(0, 6), (0, 7)]
    ones = found.vector([torch.ones(1, *strip.mask.shape, dtype=F64) for strip in found.strips])
    field = on_grid(found, ones)
    expected = torch.zeros(GRID, dtype=F64)
    expected[[6, 7]] = 1
    expected[:, 5] = 1
    assert torch.equal(field, expected)


def test_the_spectrum_of_a_border_vector_is_that_of_its_cells() -> None:
    found = border()
    pieces = [torch.randn(1, *strip.mask.shape, dtype=F64) for strip in found.strips]
    u = found.vector(pieces)
    spectrum = found.spectrum(u)[0, 0, 0]
    torch.testing.assert_close(spectrum, torch.fft.fft2(on_grid(found, u))[:, : GRID[1] // 2 + 1])


def test_the_border_of_a_pencil_is_that_of_one_process() -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=F64), GRID)
    inverse = normal_inverse(Request.of(A, 0.1, floor=0.0, side="residual"))
    positions = inverse.problem.truncated.out_border
    cpu = torch.device("cpu")
    grid = inverse.embedding.grid
    shared = PencilBorder(PencilGrid(grid, grid, Ranks(None, cpu)), positions, cpu)
    assert sum(int(strip.mask.sum()) for strip in shared.strips) == inverse.unknowns
