"""A guard against slower algorithms that no clock can blur: how many transforms, convolutions and border iterations."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lsconv
from lsconv.border.cost_model import Factorise, Limits
from lsconv.border.plan import BorderPlan


class Calls(TorchDispatchMode):
    """Counts the numbers that torch transforms, the larger of input and output, and the convolutions it carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name.startswith("_fft"):
            self.counts["fft"] += max(args[0].numel(), result.numel())
        elif "convolution" in name:
            self.counts["convolution"] += 1
        return result


def gaussian() -> lsconv.Convolution:
    profile = torch.exp(-0.5 * ((torch.arange(15, dtype=torch.float64) - 7) / 2) ** 2)
    kernel = profile[:, None] * profile
    return lsconv.Conv2d((kernel / kernel.sum())[None, None], in_size=(128, 128))


def random(c_out: int, c_in: int, dtype: torch.dtype, padding: int) -> lsconv.Convolution:
    kernel = torch.randn(c_out, c_in, 3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return lsconv.Conv2d(kernel, in_size=(64, 64), padding=padding)


# (operator, damp, numbers transformed in the setup and in the first solve, in units of the data, the convolutions of
# the solve and its border iterations, which no factors end), measured with torch 2.13; the first is one image, the
# second has borders on both sides, the third the minimum norm.
CASES = {
    "gaussian 15x15, valid, float64": (gaussian, 1e-3, 1.3, 110.9, 0, 25),
    "8 channels, same, float32": (lambda: random(8, 8, torch.float32, 1), 0.5, 0, 93.2, 6, 20),
    "4 from 8 channels, valid, float64": (lambda: random(4, 8, torch.float64, 0), 0.0, 0, 19.2, 7, 2),
}
# Other processors round otherwise, which moves the last iterations; one outer step more would be far beyond this.
MARGIN = 1.05


@pytest.mark.parametrize("case", CASES)
def test_a_solve_takes_no_more_transforms_convolutions_and_iterations_than_it_did(case: str) -> None:
    make, damp, setup_ffts, ffts, convolutions, iterations = CASES[case]
    A = make()
    y = torch.randn(A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(A.dtype)
    with Calls() as setup:
        plan = BorderPlan(A, damp, limits=Limits(factorise=Factorise.NEVER))
    with Calls() as solve:
        solution = plan.solve(y)
    measured = f"setup {dict(setup.counts)}, solve {dict(solve.counts)}, {int(solution.iterations)} iterations"
    assert bool(solution.converged), measured
    assert setup.counts["fft"] <= MARGIN * setup_ffts * y.numel(), measured
    assert 0 < solve.counts["fft"] <= MARGIN * ffts * y.numel(), measured
    assert solve.counts["convolution"] <= MARGIN * convolutions, measured
    assert 0 < int(solution.iterations) <= MARGIN * iterations, measured


def test_a_batch_transforms_no_more_per_item_than_one_item() -> None:
    A = gaussian()
    plan = BorderPlan(A, 1e-3)
    y = torch.randn(A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan.solve(y)  # the first product with A transforms its kernel
    with Calls() as one:
        plan.solve(y)
    with Calls() as many:
        plan.solve(torch.stack([y, 2 * y, -y]))
    assert many.counts["fft"] == 3 * one.counts["fft"]
    assert many.counts["convolution"] == one.counts["convolution"]
