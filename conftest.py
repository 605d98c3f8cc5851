"""What every test and doctest starts from: a fixed seed, and the names that the examples use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv

# Tests run side by side on all cores (pytest-xdist); threads on top would only wait. On several torch's batched solves,
# which the oracles use, are wrong besides (lsconv/fourier/lu.py).
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _names_for_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace["lsconv"] = lsconv
