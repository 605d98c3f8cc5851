"""The tables of README.md and docs/benchmarks.md, made from the results that ``python -m benchmarks`` has written.

A block between ``<!-- table: NAME -->`` and ``<!-- end -->`` holds the tables that :data:`BLOCKS` makes of a file of
results, and below them how they were measured. Nothing in a block is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runner import Table, described, slope

__all__ = ["BLOCKS", "PAGES", "block", "filled"]

Content = Mapping[str, Any]  # of a JSON file
Row = Mapping[str, Any]

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """The text of a page with all its blocks made anew from the JSON files in the folder ``results``."""

    def anew(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise ValueError(f"no table {name!r}; known: {', '.join(sorted(BLOCKS))}")
        source = BLOCKS[name][0]
        return f"{match[1]}{block(name, json.loads((results / f'{source}.json').read_text()))}{match[3]}"

    return _BLOCK.sub(anew, text)


def block(name: str, content: Content) -> str:
    """The Markdown of a block."""
    tables = BLOCKS[name][1](content)
    command = f"python -m benchmarks {content['benchmark']}{' --quick' if content['quick'] else ''}"
    stopped = "" if content["complete"] else "; stopped before its end"
    measured = f"`{command}`{stopped}; {described(content['machine'])}.\n"
    return "\n".join([*(table.markdown("**{}**") for table in tables), measured])


# ------------------------------------------------------------------ what a block shows


def _chosen(rows: Iterable[Row], columns: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in columns} for row in rows]


def _question(content: Content) -> list[Table]:
    columns = {
        "no padding": (
            "method",
            "seconds",
            "/ circular fft2",
            "/ circular rfft2",
            "/ lsconv",
            "residual",
            "null-space part",
        ),
        "circular padding": ("method", "seconds", "/ circular fft2", "/ circular rfft2", "residual", "error of x"),
        "padding=1": ("method", "seconds", "/ lsconv", "residual", "error of x"),
    }
    return [
        Table(t["title"], _chosen(t["rows"], next(names for kind, names in columns.items() if kind in t["title"])))
        for t in content["tables"]
        if not t["title"].startswith("8 -> 8")
    ]


def _headline(content: Content) -> list[Table]:
    columns = ("method", "seconds", "/ lsconv", "residual", "null-space part")
    first = content["tables"][0]
    return [Table(first["title"], _chosen(first["rows"], columns))]


def _deblurring(content: Content) -> list[Table]:
    columns = (
        "case",
        "damp/σ",
        "in all s",
        "kept s",
        "gradient",
        "best foreign peer",
        "peer / in all",
        "own CG / in all",
    )
    heats, *cross = content["tables"]
    rows = [row for t in cross for row in t["rows"] if row["damp/σ"] in ("1e-01", "1e-03")]
    return [
        Table("Damped deblurring to a gradient of 1e-8 in float64, 1e-6 in float32", _chosen(rows, columns)),
        Table("The heats that the best foreign peer has won", list(heats["rows"])),
    ]


def _whole(content: Content) -> list[Table]:
    return [Table(t["title"], list(t["rows"])) for t in content["tables"]]


def _scaling(content: Content) -> list[Table]:
    rows = []
    for table in content["tables"]:
        lines = table["rows"]
        values = [float(row["value"]) for row in lines]
        rows.append(
            {
                "cost against the": table["title"].removeprefix("Cost against the "),
                "values": " ".join(str(row["value"]) for row in lines),
                "setup ~": f"value^{slope(values, [row['setup s'] for row in lines]):.2f}",
                "solve ~": f"value^{slope(values, [row['solve s'] for row in lines]):.2f}",
                "solve s": f"{lines[0]['solve s']:.3g} to {lines[-1]['solve s']:.3g}",
                "per unit, last / first": float(lines[-1]["against the first"]),
            }
        )
    return [Table("How the time grows", rows)]


def _overhead(content: Content) -> list[Table]:
    return [Table(t["title"], list(t["rows"])) for t in content["tables"] if "SciPy" in t["title"]]


def _gradients(content: Content) -> list[Table]:
    table = content["tables"][0]
    return [Table(table["title"], _chosen(table["rows"], ("solve", "forward ms", "backward ms", "backward / forward")))]


def _restoration(content: Content) -> list[Table]:
    columns = ("scene", "blurred", "skimage", "PyLops", "gradient, automatic", "TV, automatic", "TV, oracle")
    return [
        Table("Restored pictures, PSNR in dB; skimage and PyLops at the parameter that the truth shows to be best",
              _chosen(t["rows"], columns))
        for t in content["tables"] if t["title"].startswith("In short")
    ]  # fmt: skip


def _kept_plan(content: Content) -> list[Table]:
    columns = ("case", "dtype", "damp", "pair ms", "setup", "first", "kept", "kept, of 8", "MiB", "gradient")
    return [Table(f"{t['title']}, in transforms of the image", _chosen(t["rows"], columns)) for t in content["tables"]]


def _routes(content: Content) -> list[Table]:
    columns = ("case", "damp/σ", "way", "auto s", "best other", "its s", "ratio", "memory ratio", "deciding s")
    return [Table(t["title"], _chosen(t["rows"], columns)) for t in content["tables"]]


def _deepinv_prox(content: Content) -> list[Table]:
    columns = (
        "blur", "image", "gamma", "error", "kept ms", "deepinv error", "deepinv ms", "at equal error ms", "times",
    )  # fmt: skip
    return [Table(t["title"], _chosen(t["rows"], columns)) for t in content["tables"]]


def _semi_blind(content: Content) -> list[Table]:
    return [Table(t["title"], list(t["rows"])) for t in content["tables"] if "Every case" not in t["title"]]


# Of each block the file of results, and what makes tables of it.
BLOCKS: dict[str, tuple[str, Callable[[Content], list[Table]]]] = {
    "headline": ("question", _headline),
    "question": ("question", _question),
    "deblurring": ("deblurring", _deblurring),
    "mirrored": ("mirrored", _whole),
    "scaling": ("scaling", _scaling),
    "krylov_overhead": ("krylov_overhead", _overhead),
    "gradients": ("gradients", _gradients),
    "restoration": ("restoration", _restoration),
    "photons": ("photons", _whole),
    "kept_plan": ("kept_plan", _kept_plan),
    "routes": ("routes", _routes),
    "uncertainty": ("uncertainty", _whole),
    "deepinv_prox": ("deepinv_prox", _deepinv_prox),
    "missing": ("missing", _whole),
    "varying": ("varying", _whole),
    "semi_blind": ("semi_blind", _semi_blind),
    "stacks": ("stacks", _whole),
    "scale_out": ("scale_out", _whole),
}
PAGES = ("README.md", "docs/benchmarks.md")
