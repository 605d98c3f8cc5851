"""The page that ``lsconv deblur --report FOLDER`` writes: a line and a figure for every file."""

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

_STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:76em;padding:0 1em}img{max-width:100%}"
    ".amiss{color:#a00}.report{border:1px solid #ccc}.pair{display:flex;gap:6px;margin:0}"
    ".pair div{flex:1;overflow:hidden;cursor:grab;touch-action:none}"
    ".pair img{display:block;width:100%;image-rendering:pixelated;transform-origin:0 0}"
)
# Both images of a pair share scale and offset: the wheel zooms, dragging moves, a double click resets.
_SCRIPT = """
for (const pair of document.querySelectorAll('.pair')) {
  let scale = 1, x = 0, y = 0;
  const images = pair.querySelectorAll('img');
  const show = () => {
    const {clientWidth: w, clientHeight: h} = images[0].parentElement;
    x = Math.min(0, Math.max(w * (1 - scale), x));
    y = Math.min(0, Math.max(h * (1 - scale), y));
    images.forEach(image => image.style.transform = `translate(${x}px,${y}px) scale(${scale})`);
  };
  pair.addEventListener('wheel', event => {
    const next = Math.min(32, Math.max(1, scale * Math.exp(-event.deltaY / 300)));
    if (next === scale) return;  // the page scrolls
    event.preventDefault();
    const box = event.target.closest('div').getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    [x, y, scale] = [left - (left - x) * next / scale, top - (top - y) * next / scale, next];
    show();
  }, {passive: false});
  pair.addEventListener('pointermove', event => {
    if (event.buttons & 1) { x += event.movementX; y += event.movementY; show(); }
  });
  pair.addEventListener('dragstart', event => event.preventDefault());
  pair.addEventListener('dblclick', () => { [scale, x, y] = [1, 0, 0]; show(); });
}
"""


def write_page(folder: Path, outcomes: Sequence[Outcome], targets: Sequence[Path], command: str) -> Path:
    """Write ``index.html`` beside the figures that were drawn for the files.

    Args:
        folder: the folder of the figures.
        outcomes: the outcome of every file.
        targets: the files written, one for every outcome.
        command: the command line, shown at the top.

    Returns:
        The page's path.
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
            parts.append(f"<p>{html.escape(outcome.line)}</p>")
            name = quote(os.fsencode(target.name))
            if (folder / f"{target.name}.data.png").exists():
                pair = (f"<div><img src='{name}.{kind}.png' alt='{kind}'></div>" for kind in ("data", "restoration"))
                parts.append(f"<figure class=pair>{''.join(pair)}</figure>")
                parts.append("<p>Data and restoration on one scale: the wheel zooms both, dragging moves them.</p>")
            parts.append(f"<a href='{name}.png'><img class=report src='{name}.png' alt='report'></a>")
    parts.append(f"<script>{_SCRIPT}</script>")
    page = folder / "index.html"
    with atomically(page) as file:
        file.write("\n".join(parts).encode(errors="backslashreplace"))  # names of files need not be valid text
    return page
