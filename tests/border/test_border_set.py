"""The cells of a border, and vectors on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.border.border_set import Border, between_borders, split_at_gaps
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import symbol
from lsconv.operators.convolution import Conv2d


@st.composite
def _borders(draw: Any) -> tuple[tuple[int, ...], list[list[list[int]]]]:
    grid = tuple(draw(st.lists(st.integers(2, 6), min_size=1, max_size=3)))
    places = st.tuples(*(st.lists(st.integers(0, n - 1), max_size=n - 1, unique=True).map(sorted) for n in grid))
    positions = [[list(p) for p in draw(places)] for _ in range(draw(st.integers(1, 3)))]
    return grid, positions


@given(case=_borders())
def test_border_is_every_cell_marked_along_any_axis(case: Any) -> None:
    grid, positions = case
    border = Border(grid, positions, torch.device("cpu"))
    expected = [
        (channel, *cell)
        for channel, axes in enumerate(positions)
        for cell in torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid)).tolist()
        if any(place in axes[a] for a, place in enumerate(cell))
    ]
    assert [tuple(cell) for cell in border.mask.nonzero().tolist()] == expected
    assert border.size == len(expected)


@given(case=_borders())
def test_gather_is_the_adjoint_and_the_left_inverse_of_scatter(case: Any) -> None:
    grid, positions = case
    border = Border(grid, positions, torch.device("cpu"))
    b = torch.randn(2, 3, border.size, dtype=torch.float64)
    z = torch.randn(2, 3, len(positions), *grid, dtype=torch.float64)
    assert torch.equal(border.gather(border.scatter(b)), b)
    torch.testing.assert_close((border.scatter(b) * z).sum(), (b * border.gather(z)).sum())
    assert border.scatter(b).count_nonzero() == b.count_nonzero()


def test_further_cells_are_numbered_with_the_border_and_parted_by_gaps() -> None:
    border = Border((6, 8), [[[5], [7]], [[], []]], torch.device("cpu"))
    cells = torch.zeros(1, 6, 8, dtype=torch.bool)
    cells[0, 1:3, 1:3] = True
    cells[0, 5, 5] = True  # on the border already
    union = border.with_cells(cells)
    assert union.size == border.size + 4
    (cluster,) = union.clusters
    assert cluster.tolist() == [[0, 1, 1], [0, 1, 2], [0, 2, 1], [0, 2, 2]]
    z = torch.randn(3, 1, 2, 6, 8)
    assert torch.equal(union.scatter(union.gather(z)), torch.where(union.mask, z, 0))
    assert border.clusters == ()


def test_split_at_gaps_stay_together() -> None:
    generator = torch.Generator().manual_seed(0)
    clusters = [
        torch.randint(0, 5, (20, 2), generator=generator) + torch.tensor(at) for at in ([0, 0], [40, 2], [3, 60])
    ]
    places = torch.cat([torch.zeros(60, 1, dtype=torch.int64), torch.cat(clusters)], 1)
    parts = split_at_gaps(places, 25)
    assert sorted(len(part) for part in parts) == [20, 20, 20]
    assert sorted(torch.cat(parts).tolist()) == list(range(60))
    assert {tuple(sorted(part.tolist())) for part in parts} == {tuple(range(s, s + 20)) for s in (0, 20, 40)}
    assert split_at_gaps(places, 1) == []


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_entries_between_borders_are_a_block_of_the_circulant_matrix(stride: int, dtype: torch.dtype) -> None:
    A = Conv2d(torch.randn(3, 2, 3, 3, dtype=dtype), (7, 6), padding=1, stride=stride)
    embedding = Embedding(A)
    C = symbol(A, embedding)
    rows = Border(embedding.grid, embedding.output_border(), A.device)
    columns = Border(embedding.grid, embedding.input_border(), A.device)
    unit = torch.eye(columns.size, dtype=dtype).unsqueeze(1)
    expected = rows.gather(C.on_grid(columns.scatter(unit))).squeeze(1).mT
    torch.testing.assert_close(between_borders(C.kernel(), rows, columns)[0], expected)
