"""The figure that ``lsconv demo`` writes, and the display of an image in any figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from lsconv.app.image_io import atomically

__all__ = ["Panel", "draw_comparison", "hide_ticks", "show_image"]


@dataclass(frozen=True)
class Panel:
    """An image of the comparison, with two lines of title.

    Attributes:
        name: the first line, what is shown.
        subtitle: the second line, its size or PSNR.
        pixels: ``(channels, height, width)``, in [0, 1] (clipped for display).
        enlarged: whether a strip of it is shown enlarged too.
    """

    name: str
    subtitle: str
    pixels: Tensor
    enlarged: bool = False


def draw_comparison(
    path: Path, panels: Sequence[Panel], kernel: Tensor, strip: tuple[slice, slice], caption: str
) -> tuple[int, int]:
    """Draw five panels and, as a sixth, a strip of those marked ``enlarged``; write the figure as PNG.

    Args:
        path: the file, written atomically.
        panels: five; the second is the data, into whose corner the kernel is drawn.
        kernel: the blur, ``(k, k)``.
        strip: rows and columns of the enlarged part.
        caption: one line below the panels.

    Returns:
        Width and height of the file in pixels.
    """
    figure = Figure(figsize=(9, 6.9), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, left=0.01, right=0.99, top=0.93, bottom=0.045, wspace=0.03, hspace=0.16)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(grid[index // 3, index % 3])
        show_image(axes, panel.pixels)
        axes.set_title(f"{panel.name}\n{panel.subtitle}", fontsize=10)
        if panel.enlarged:
            rows, columns = strip
            size = (columns.stop - columns.start, rows.stop - rows.start)
            axes.add_patch(Rectangle((columns.start - 0.5, rows.start - 0.5), *size, fill=False, edgecolor="cyan"))
        if index == 1:
            inset = axes.inset_axes((0.03, 0.03, 0.2, 0.2))
            inset.imshow(kernel.cpu().numpy(), cmap="gray")
            hide_ticks(inset)
    enlarged = [panel for panel in panels if panel.enlarged]
    cells = grid[1, 2].subgridspec(len(enlarged), 1, hspace=0.25)
    for index, panel in enumerate(enlarged):
        axes = figure.add_subplot(cells[index])
        show_image(axes, panel.pixels[:, strip[0], strip[1]])
        axes.set_title(f"enlarged: {panel.name}", fontsize=8)
    figure.text(0.5, 0.015, caption, ha="center", fontsize=8)
    with atomically(path) as file:
        figure.savefig(file, format="png")
    width, height = canvas.get_width_height()
    return width, height


def show_image(axes: Any, image: Tensor) -> None:
    """Show an image, ``(channels, height, width)``: three channels in colour, of any other number the first."""
    shown = torch.nan_to_num(image.detach().float().cpu()).clamp(0, 1)
    shown = shown if shown.shape[0] == 3 else shown[:1].expand(3, -1, -1)
    axes.imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
    hide_ticks(axes)


def hide_ticks(axes: Any) -> None:
    """Remove the ticks of an image's axes."""
    axes.set_xticks([])
    axes.set_yticks([])
