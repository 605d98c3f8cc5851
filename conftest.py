"""What every test and doctest starts from: fixed seeds, no random search, and the names that the examples use.

``pytest`` draws the same examples every time. ``pytest --hypothesis-profile=search`` is the lane that looks for new
ones: random, and five times as many; a failure is red by what it found, and is turned into a test of its own.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from torch import library

import lsconv

# Tests run side by side on all cores (pytest-xdist); threads on top would only wait. On several torch's batched solves,
# which the oracles use, are wrong besides (lsconv/fourier/batched_linalg.py).
torch.set_num_threads(1)

hypothesis.settings.register_profile("fixed", deadline=None, max_examples=40, derandomize=True, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile("fixed")

# Sphinx runs the scripts of the site, and what it has made is in folders that git ignores.
collect_ignore_glob = [
    "docs/*.py",
    "docs/gallery_scripts/*",
    "docs/figures/*",
    "docs/_build/*",
    "docs/api/*",
    "docs/gallery/*",
]

# The doctests of a guest need the package that it is for.
GUESTS = {"deepinv": "lsconv/deepinv.py", "napari": "lsconv/napari/widget.py"}
collect_ignore = [path for package, path in GUESTS.items() if importlib.util.find_spec(package) is None]
if importlib.util.find_spec("napari"):
    with warnings.catch_warnings():  # its modules warn while they are imported, here once and for all
        warnings.simplefilter("ignore")
        importlib.import_module("napari.layers")
if importlib.util.find_spec("deepinv"):
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # beside a CPU build of torch: the package index has torchvision's operators for CUDA only
        for name in ("nms", "qnms"):
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - some test may use it
    torch.manual_seed(0)


_seed()  # data made while test files are imported


def pytest_runtest_setup() -> None:
    _seed()


@pytest.fixture(autouse=True, scope="session")
def _names_for_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace["lsconv"] = lsconv
