"""The picture that ``lsconv demo`` writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lsconv.app.arguments import UsageError
from lsconv.app.image_io import atomically

__all__ = ["Panel", "check_output", "draw_comparison"]


@dataclass(frozen=True)
class Panel:
    """A picture of the comparison with the words above it.

    Attributes:
        name: what is shown.
        verdict: a figure about it, or an empty text.
        pixels: ``(channels, height, width)``, in [0, 1] (clipped for display).
        closer: whether the enlarged strip shows it too.
    """

    name: str
    verdict: str
    pixels: Tensor
    closer: bool = False


def draw_comparison(
    path: Path, panels: Sequence[Panel], kernel: Tensor, strip: tuple[slice, slice], caption: str
) -> tuple[int, int]:
    """Draw five panels and, as a sixth, an enlarged strip of those marked ``closer``; write them as PNG.

    Args:
        path: the file, written atomically.
        panels: five of them; the second is the data, and the kernel is drawn into it.
        kernel: the blur, ``(k, k)``.
        strip: rows and columns of the enlarged part.
        caption: one line below the pictures.

    Returns:
        Width and height of the file in pixels.
    """
    figure = Figure(figsize=(9, 6.9), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, left=0.01, right=0.99, top=0.93, bottom=0.045, wspace=0.03, hspace=0.16)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[index // 3, index % 3])
        _show(axes, panel.pixels)
        axes.set_title(f"{panel.name}\n{panel.verdict}", fontsize=10)
        if panel.closer:
            rows, columns = strip
            size = (columns.stop - columns.start, rows.stop - rows.start)
            axes.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), *size, fill=False, edgecolor="cyan"))
        if index == 1:
            inset = axes.inset_axes((0.03, 0.03, 0.2, 0.2))
            inset.imshow(kernel.cpu().numpy(), cmap="gray")
            _bare(inset)
    closer = [panel for panel in panels if panel.closer]
    places = grid[1, 2].subgridspec(len(closer), 1, hspace=0.25)
    for index, panel in enumerate(closer):
        axes = figure.add_subplot(places[index])
        _show(axes, panel.pixels[:, strip[0], strip[1]])
        axes.set_title(f"enlarged: {panel.name}", fontsize=8)
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8)
    with atomically(path) as file:
        figure.savefig(file, format="png")
    width, height = canvas.get_width_height()
    return width, height


def _show(axes: Any, pixels: Tensor) -> None:
    picture = pixels.detach().float().cpu().clamp(0, 1)
    if picture.shape[0] == 1:
        picture = picture.expand(3, -1, -1)
    axes.imshow(torch.nan_to_num(picture).permute(1, 2, 0).numpy(), interpolation="nearest")
    _bare(axes)


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def check_output(path: Path) -> None:
    """Find out before minutes of work whether the picture can be written."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--output {path}: the picture is a PNG file, give a name that ends in .png")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--output {path}: its folder cannot be written to")
