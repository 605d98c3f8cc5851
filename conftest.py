"""What every test and doctest starts from: a fixed seed, and the names that the examples use."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import lsconv

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; more threads than cores only wait for each other


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _names_for_examples(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch
    doctest_namespace["lsconv"] = lsconv
