"""The tables of README and docs are what the results say, nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_every_table_equals_what_the_results_generate() -> None:
    from benchmarks.pages import BLOCKS, PAGES, filled

    texts = [(ROOT / page).read_text() for page in PAGES]
    assert re.findall("<!-- table: (\\w+) -->", "".join(texts)) == list(BLOCKS)
    assert [filled(text, RESULTS) for text in texts] == texts


def test_a_figure_changed_by_hand_is_undone_and_the_rest_of_the_text_stays() -> None:
    from benchmarks.pages import filled

    text = "before 1.5\n<!-- table: scaling -->\n| forged |\n<!-- end -->\nafter | 2 |\n"
    new = filled(text, RESULTS)
    assert new.startswith("before 1.5\n<!-- table: scaling -->\n**")
    assert new.endswith("<!-- end -->\nafter | 2 |\n")
    assert "forged" not in new
    assert "`python -m benchmarks scaling" in new
    assert filled(new, RESULTS) == new


def test_an_unknown_table_is_refused() -> None:
    from benchmarks.pages import filled

    with pytest.raises(ValueError, match="no table 'nonsense'; known: deblurring"):
        filled("<!-- table: nonsense -->\n<!-- end -->", RESULTS)
