"""What an iteration of a Krylov method costs beyond the one A and the one A^H in it, and beside SciPy's.

``python -m benchmarks.krylov_overhead`` prints, for 8 channels in float32, the median CPU time of an iteration over
that of one application of A and one of its adjoint, and the time of a whole solve in units of SciPy's lsqr and lsmr on
the same torch operator, everything interleaved in one run, single-threaded. Below 1 is faster than SciPy.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse.linalg
import torch

import lsconv

ITERATIONS = 20
ROUNDS = 5


def seconds(function: Callable[[], object]) -> float:
    """The CPU time of one call, which other work on the machine does not lengthen."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def convolution(kernel: int, size: int = 256) -> lsconv.Conv2d:
    """8 channels to 8 channels, 'same'."""
    return lsconv.Conv2d(torch.randn(8, 8, kernel, kernel), in_size=(size, size), padding=kernel // 2)


def overhead(kernel: int) -> dict[str, float]:
    """Overhead over A and A^H per method, 0.1 meaning 10 %: the median over rounds of ratios within a round."""
    A = convolution(kernel)
    x, y = torch.randn(A.in_shape), torch.randn(A.out_shape)
    methods = {"cgls": lsconv.cgls, "lsqr": lsconv.lsqr, "lsmr": lsconv.lsmr}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, method in methods.items():
            looks: list[float] = []
            method(A, y, max_iter=ITERATIONS, rtol=0.0, callback=lambda _, at=looks: at.append(time.thread_time()))
            iteration = statistics.median(b - a for a, b in itertools.pairwise(looks))
            pair = statistics.median(seconds(lambda: (A.apply(x), A.adjoint(y))) for _ in range(ITERATIONS))
            ratios[name].append(iteration / pair)
    return {name: statistics.median(values) - 1 for name, values in ratios.items()}


def against_scipy(kernel: int, size: int) -> dict[str, float]:
    """Time of a solve of ``ITERATIONS`` iterations over that of SciPy's, on the same torch operator."""
    A = convolution(kernel, size)
    y = torch.randn(A.out_shape)
    m = math.prod(A.out_shape)
    operator = scipy.sparse.linalg.LinearOperator(
        (m, m),
        matvec=lambda v: A.apply(torch.from_numpy(v).view(A.in_shape)).numpy().ravel(),
        rmatvec=lambda v: A.adjoint(torch.from_numpy(v).view(A.out_shape)).numpy().ravel(),
        dtype=np.float32,
    )
    b = y.numpy().ravel()
    ratios: dict[str, list[float]] = {"lsqr": [], "lsmr": []}
    options = {"atol": 0.0, "btol": 0.0, "conlim": 0.0}
    for _ in range(ROUNDS):
        for name in ratios:
            ours = seconds(lambda n=name: getattr(lsconv, n)(A, y, max_iter=ITERATIONS, rtol=0.0))  # type: ignore[misc]
            limit = {"iter_lim" if name == "lsqr" else "maxiter": ITERATIONS}
            theirs = seconds(lambda n=name, k=limit: getattr(scipy.sparse.linalg, n)(operator, b, **options, **k))  # type: ignore[misc]
            ratios[name].append(ours / theirs)
    return {name: statistics.median(values) for name, values in ratios.items()}


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"8 channels, 256x256, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| kernel | cgls | lsqr | lsmr |\n|--------|------|------|------|")
    for kernel in (3, 5, 7, 15):
        print(f"| {kernel}x{kernel} | " + " | ".join(f"{100 * v:.0f} %" for v in overhead(kernel).values()) + " |")
    print(f"\nTime over SciPy {scipy.__version__}'s, {ITERATIONS} iterations, certificate included")
    print("| size | kernel | lsqr | lsmr |\n|------|--------|------|------|")
    for size in (64, 128, 256):
        for kernel in (3, 7):
            ratios = " | ".join(f"{v:.2f}" for v in against_scipy(kernel, size).values())
            print(f"| {size}x{size} | {kernel}x{kernel} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
