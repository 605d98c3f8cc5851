"""Qt without a screen, and a viewer without a canvas, which would need OpenGL."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
collect_ignore = [] if find_spec("napari") else ["test_widget.py"]


@pytest.fixture
def viewer() -> SimpleNamespace:
    """The layers, dims and camera of a viewer, and a window that keeps what is docked in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from napari.components import ViewerModel

    model = ViewerModel()
    docked: dict[str, Any] = {}
    window = SimpleNamespace(
        docked=docked,
        add_dock_widget=lambda widget, name, **_: docked.__setitem__(name, widget),
        remove_dock_widget=lambda widget: None,
    )
    return SimpleNamespace(model=model, layers=model.layers, dims=model.dims, camera=model.camera,
                           add_layer=model.add_layer, window=window)  # fmt: skip
