"""The cells of a border, and vectors on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from lsconv.border.border_set import Border


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
