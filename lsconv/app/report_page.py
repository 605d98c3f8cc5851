"""The page that ``lsconv deblur --report FOLDER`` writes: a line and a picture for every file."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import lsconv
from lsconv.app.batch import Outcome
from lsconv.app.image_io import atomically

__all__ = ["write_page"]

_STYLE = "body{font:15px sans-serif;margin:2em auto;max-width:70em}img{max-width:100%;border:1px solid #ccc}" \
         ".amiss{color:#a00}"  # fmt: skip


def write_page(folder: Path, outcomes: Sequence[Outcome], targets: Sequence[Path], command: str) -> Path:
    """Write ``index.html`` beside the pictures that were drawn for the files.

    Args:
        folder: where the pictures lie.
        outcomes: what came of every file.
        targets: the files written, one for every outcome.
        command: the words that asked for it.
    """
    failed = sum(outcome.line is None for outcome in outcomes)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>lsconv deblur</title>",
        f"<style>{_STYLE}</style><h1>{len(outcomes) - failed} of {len(outcomes)} files restored</h1>",
        f"<p><code>{html.escape(command)}</code>, lsconv {lsconv.__version__}</p>",
    ]
    for outcome, target in zip(outcomes, targets, strict=True):
        parts.append(f"<h2>{html.escape(outcome.image.name)}</h2>")
        parts += [f"<p class=amiss>{html.escape(remark)}</p>" for remark in outcome.remarks]
        if outcome.line is not None:
            name = quote(os.fsencode(f"{target.name}.png"))
            parts.append(f"<p>{html.escape(outcome.line)}</p><a href='{name}'><img src='{name}' alt='report'></a>")
    page = folder / "index.html"
    with atomically(page) as file:
        file.write("\n".join(parts).encode(errors="backslashreplace"))  # names of files need not be text
    return page
