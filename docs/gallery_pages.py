"""The order of the gallery's pages, and what each of them starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot

_STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 90,
    "figure.constrained_layout.use": True,
    "image.cmap": "gray",
    "axes.titlesize": 10,
}


class Order:
    """The order in which ``gallery_scripts/order.txt`` names the pages."""

    def __init__(self, _folder: str) -> None:
        file = Path(__file__).parent / "gallery_scripts" / "order.txt"
        self.names = file.read_text(encoding="utf-8").split()

    def __call__(self, name: str) -> int:
        """The place of a page."""
        return self.names.index(name)


def reset(_configuration: dict[str, Any], _page: str) -> None:
    """Give every page the same random numbers and the same style of figures."""
    torch.manual_seed(0)
    pyplot.rcParams.update(pyplot.rcParamsDefault | _STYLE)
