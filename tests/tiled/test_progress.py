"""Progress: a bar of the first rank that counts tiles, and nothing of the others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lsconv.tiled.progress import Progress


def plan(rank: int) -> SimpleNamespace:
    return SimpleNamespace(ranks=SimpleNamespace(rank=rank), passes=SimpleNamespace(step=2, tick=None))


@pytest.mark.filterwarnings("ignore")
def test_the_first_rank_counts_tiles_and_says_which_step() -> None:
    pytest.importorskip("tqdm")
    first = plan(0)
    with Progress(first, shown=True) as progress:
        for _ in range(3):
            progress.tick("residual")
        assert progress.bar.n == 3
        assert progress.bar.desc.startswith("step 2, residual")
    first.passes.tick("after the end")  # of a pass by another solve


@pytest.mark.parametrize("rank, shown", [(1, True), (0, False)])
def test_no_bar_is_made_on_other_ranks_or_unasked(rank: int, shown: bool) -> None:
    with Progress(plan(rank), shown) as progress:
        progress.tick("residual")
        assert progress.bar is None
