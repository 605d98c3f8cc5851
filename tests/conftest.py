"""Settings for the tests below this folder."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("lsconv", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("lsconv"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "lsconv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_cuda)
