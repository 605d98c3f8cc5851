"""What a gradient costs: the backward pass in units of the forward solve, and memory against the iterations.

``python -m benchmarks.gradients`` prints, for 8 channels of 128x128 in float32 and a batch of 4, the median time of the
forward solve and of the backward pass (to data, weight and damping), interleaved in one run; then the bytes that the
graph keeps after 10 and after 1000 iterations of LSMR.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import lsconv

ROUNDS = 7
Solve = Callable[[lsconv.LinearOperator, Tensor, Tensor], Tensor]


def problem(padding: int, padding_mode: str) -> tuple[lsconv.LinearOperator, Tensor, Tensor]:
    """An operator with noisy data and a damping, all of which require grad."""
    weight = torch.randn(8, 8, 5, 5) / 14
    A = lsconv.Conv2d(weight.requires_grad_(), in_size=(128, 128), padding=padding, padding_mode=padding_mode)
    y = A(torch.randn(4, *A.in_shape)).detach()
    y = y + 0.01 * torch.randn_like(y)
    return A, y.requires_grad_(), torch.full((4,), 0.1).requires_grad_()


def seconds(A: lsconv.LinearOperator, y: Tensor, damp: Tensor, solve: Solve) -> tuple[float, float]:
    """Seconds of one forward solve and of its backward pass."""
    start = time.perf_counter()
    x = solve(A, y, damp)
    middle = time.perf_counter()
    torch.autograd.grad(x, [y, *A.parameters()], torch.randn_like(x), allow_unused=True)
    return middle - start, time.perf_counter() - middle


def kept_bytes(iterations: int) -> int:
    """Bytes of the tensors that the graph of an LSMR solve saves."""
    A, y, damp = problem(2, "zeros")
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lsconv.lsmr(A, y, damp=damp, max_iter=iterations, rtol=0.0)
    return sum(sizes.values())


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print(f"4 x 8 channels, 128x128, 5x5, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| solve | forward | backward | backward / forward |\n|-------|---------|----------|--------------------|")
    rows: list[tuple[str, int, str, Solve]] = [
        ("lstsq, damp, border", 0, "zeros", lambda A, y, damp: lsconv.lstsq(A, y, damp=damp).x),
        ("lstsq, damp, fourier", 2, "circular", lambda A, y, damp: lsconv.lstsq(A, y, damp=damp).x),
        ("lsmr, damp", 2, "zeros", lambda A, y, damp: lsconv.lsmr(A, y, damp=damp).x),
        ("lsqr, damp", 2, "zeros", lambda A, y, damp: lsconv.lsqr(A, y, damp=damp).x),
        ("lstsq, fourier", 2, "circular", lambda A, y, damp: lsconv.lstsq(A, y).x),
    ]
    for name, padding, mode, solve in rows:
        A, y, damp = problem(padding, mode)
        seconds(A, y, damp, solve)
        times = [seconds(A, y, damp, solve) for _ in range(ROUNDS)]
        ratio = statistics.median(back / forth for forth, back in times)
        forth, back = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {1e3 * forth:.0f} ms | {1e3 * back:.0f} ms | {ratio:.2f} |")
    few, many = kept_bytes(10), kept_bytes(1000)
    print(f"\nkept for the backward pass: {few} bytes after 10 iterations, {many} bytes after 1000")


if __name__ == "__main__":
    main()
