"""What an iteration of a Krylov method costs beyond the one A and the one A^H in it.

``python -m benchmarks.krylov_overhead`` prints, for 8 channels of 256×256 in float32, the median time of an iteration
in units of one application of A and one of its adjoint, everything interleaved in one run.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch

import lsconv

ITERATIONS = 20
ROUNDS = 15


def seconds(function: Callable[[], object]) -> float:
    """The duration of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def overhead(kernel: int) -> dict[str, float]:
    """Overhead over A and A^H per method, 0.1 meaning 10 %: the median over rounds of ratios within a round."""
    A = lsconv.Conv2d(torch.randn(8, 8, kernel, kernel), in_size=(256, 256), padding=kernel // 2)
    x, y = torch.randn(A.in_shape), torch.randn(A.out_shape)
    methods = {"cgls": lsconv.cgls, "lsqr": lsconv.lsqr, "lsmr": lsconv.lsmr}

    def pair() -> None:
        for _ in range(ITERATIONS):
            A.apply(x)
            A.adjoint(y)

    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            # the difference of two lengths leaves the start and the certificate out
            long = seconds(lambda m=method: m(A, y, max_iter=2 * ITERATIONS, rtol=0.0))  # type: ignore[misc]
            short = seconds(lambda m=method: m(A, y, max_iter=ITERATIONS, rtol=0.0))  # type: ignore[misc]
            ratios[name].append((long - short) / seconds(pair))
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"8 channels, 256x256, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| kernel | cgls | lsqr | lsmr |\n|--------|------|------|------|")
    for kernel in (3, 5, 7, 15):
        print(f"| {kernel}x{kernel} | " + " | ".join(f"{100 * v:.0f} %" for v in overhead(kernel).values()) + " |")


if __name__ == "__main__":
    main()
