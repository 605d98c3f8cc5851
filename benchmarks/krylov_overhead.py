"""What does an iteration cost beyond its A and A^H, beside SciPy's loop, and with many right-hand sides?

All times are CPU times of one thread, which other work on the machine does not lengthen, and ratios are taken within a
round: medians over rounds in which the contestants take turns. Operators are float32, 8 channels to 8, 'same'.

What an iteration adds is passes over memory: 14 vectors read or written by LSQR, 17 by LSMR, 11 by CGLS (and 1 more
every eighth time), of 2 MB each at 256 x 256, and 20 us of Python. The column "passes" is a floor: the same additions
and norms as bare calls of torch between the same A and A^H, with no method around them. At 3x3 they alone take more
than 10 %. Nor would one pass for every group of additions that share a vector, which torch does not have, take much
less: its fused step of stochastic gradient descent happens to be LSQR's x and w, reads and writes five vectors in
place of six, and takes 0.95 of the time. Vectors that the last A has driven out of the nearest cache come back at 60
to 80 GB/s.

Tried and not kept: passes in blocks of 64 KB to 1 MB (as fast at 1 MB, 10 to 80 % slower below: the calls cost more
than the cache gives), backwards too; norms by dot products (a quarter faster, wrong in the sixth digit) and by matrix
products (slower), norms of longer rows (no faster); matrix-vector products for sums of scaled vectors (slower than two
passes); hence also x from several w at once, or x and w from several v (1.4 to 1.7 times the time of x and w, and up
to 8 vectors more); a convolution that accumulates into its output by oneDNN (65 us less for each, but a private
operator of torch, and a kernel rounded anew at every step); u, v, w and x in huge pages (1 %). Torch's switch
THP_MEM_ALLOC_ENABLE=1 once took a third off; now that freed pages are kept (lsconv/krylov/loop/malloc.py), it takes
nothing. Fewer scalings of u and v, by a wider range of their lengths (0.2 of a point, and other roundings).
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lsconv
from benchmarks.peers import one_blas_thread
from benchmarks.runner import Table

METHODS = {"cgls": lsconv.cgls, "lsqr": lsconv.lsqr, "lsmr": lsconv.lsmr}


def tables(quick: bool) -> Iterator[Table]:
    """Overhead of an iteration, whole solves beside SciPy's, and batches beside single solves."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the iteration limit is meant
            yield overhead(quick)
            yield beside_scipy(quick)
            yield right_hand_sides(quick)
    finally:
        torch.set_num_threads(threads)


def convolution(kernel: int, size: int) -> lsconv.Conv2d:
    """8 channels to 8 channels, 'same'."""
    return lsconv.Conv2d(torch.randn(8, 8, kernel, kernel) / kernel, in_size=(size, size), padding=kernel // 2)


def seconds(function: Callable[[], object]) -> float:
    """The CPU time of one call."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


# ---------------------------------------------------------------------- an iteration


class Timed(lsconv.LinearOperator):
    """An operator that keeps when it was called and for how long; nobody else has to watch the iteration."""

    def __init__(self, A: lsconv.LinearOperator) -> None:
        super().__init__(A.in_shape, A.out_shape, dtype=A.dtype, device=A.device)
        self.A = A
        self.calls: list[tuple[float, float]] = []

    def apply(self, x: Tensor) -> Tensor:
        """``A x``."""
        return self._timed(self.A.apply, x)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^H y``."""
        return self._timed(self.A.adjoint, y)

    def _timed(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        start = time.thread_time()
        result = function(v)
        self.calls.append((start, time.thread_time()))
        return result


def iteration(method: Callable[..., Any], A: lsconv.LinearOperator, y: Tensor, count: int) -> tuple[float, float]:
    """Seconds of an iteration, and those of A and A^H in it: medians over the iterations of a solve."""
    timed = Timed(A)
    method(timed, y, max_iter=count, rtol=0.0)
    # A^H once before the first iteration; a few iterations to warm up; the certificate's A and A^H after the last one.
    calls = timed.calls[5 : 2 * count]
    steps = [(third[0] - first[0], first[1] - first[0] + second[1] - second[0])
             for first, second, third in zip(calls[::2], calls[1::2], calls[2::2], strict=False)]  # fmt: skip
    return statistics.median(step[0] for step in steps), statistics.median(step[1] for step in steps)


def passes(name: str) -> Callable[..., None]:
    """The passes over memory of a method's iterations around A and A^H, and nothing else: a floor, and no solver."""

    def solve(A: lsconv.LinearOperator, y: Tensor, max_iter: int, rtol: float) -> None:
        del rtol
        u, v, w, x, h = (torch.randn_like(y) / y.numel() ** 0.5 for _ in range(5))
        A.adjoint(u)
        for _ in range(max_iter):
            av = A.apply(v)
            if name == "cgls":
                norm(av)
            torch.add(u, av, alpha=1e-3, out=u)
            del av
            if name == "cgls":
                torch.add(x, v, alpha=1e-3, out=x)
            else:
                norm(u)
            ahu = A.adjoint(u)
            if name == "cgls":
                norm(ahu)
            torch.add(v, ahu, alpha=1e-3, out=v)
            del ahu
            if name == "cgls":
                continue
            norm(v)
            if name == "lsmr":
                torch.add(h, w, alpha=0.5, out=h)
                torch.add(x, h, alpha=1e-3, out=x)
            else:
                torch.add(x, w, alpha=1e-3, out=x)
            torch.add(v, w, alpha=0.5, out=w)

    return solve


def norm(v: Tensor) -> float:
    """As the methods take it."""
    rows = torch.linalg.vector_norm(v.view(-1, 1024) if v.is_contiguous() else v, dim=-1)
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


def overhead(quick: bool) -> Table:
    """What an iteration takes beyond the A and the A^H that it contains, which are timed where they happen."""
    size, rounds, rows = 64 if quick else 256, 2 if quick else 9, []
    contestants: dict[str, Callable[..., Any]] = {**METHODS, **{f"{name} passes": passes(name) for name in METHODS}}
    for kernel in (3,) if quick else (3, 5, 7, 15):
        A = convolution(kernel, size)
        y = torch.randn(A.out_shape)
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, method in contestants.items():
                samples[name].append(iteration(method, A, y, 20))
        row: dict[str, Any] = {"kernel": f"{kernel}x{kernel}"}
        row["A and A^H ms"] = 1e3 * statistics.median(inside for _, inside in samples["lsmr"])
        for name in METHODS:
            shares = [100 * (whole - inside) / inside for whole, inside in samples[name]]
            floor = [100 * (whole - inside) / inside for whole, inside in samples[f"{name} passes"]]
            row[f"{name} %"], row[f"{name} % least"] = statistics.median(shares), min(shares)
            row[f"{name} passes %"] = statistics.median(floor)
        rows.append(row)
    return Table(
        f"Overhead of an iteration over its A and A^H, {size} x {size}",
        rows,
        "Medians of the rounds, and the least: what an iteration adds is bound by memory, which a busy machine shares "
        "out. Passes: the additions and norms alone, as bare calls of torch.",
    )


# ---------------------------------------------------------------------- beside SciPy


def beside_scipy(quick: bool) -> Table:
    """Time of our solve over that of SciPy's, same number of iterations, same operator, our certificate included."""
    count, rows = 20 if quick else 100, []
    for size, kernel in itertools.product((64,) if quick else (64, 128, 256, 512), (3, 7)):
        A = convolution(kernel, size)
        y = torch.randn(A.out_shape)
        row: dict[str, Any] = {"size": f"{size}x{size}", "kernel": f"{kernel}x{kernel}"}
        for name in ("lsqr", "lsmr"):
            # fewer iterations of the large ones: there the fixed costs do not count
            n = count if size <= 128 else max(10, count // 4)
            theirs = scipy_solve(name, A, y, n)
            ratios = []
            with one_blas_thread():
                for _ in range(2 if quick else 3 if size > 128 else 5):
                    ratios.append(seconds(partial(METHODS[name], A, y, max_iter=n, rtol=0.0)) / seconds(theirs))
            row[name] = statistics.median(ratios)
        rows.append(row)
    return Table(
        "Time of a solve, in units of SciPy's on the same torch operator",
        rows,
        f"{count} iterations, a quarter of that above 128 x 128; below 1 lsconv is faster. Our certificate, one more "
        "A and A^H, is in it.",
    )


def scipy_solve(name: str, A: lsconv.Conv2d, y: Tensor, iterations: int) -> Callable[[], object]:
    """SciPy's loop around A at its leanest: no copies, no checks beyond SciPy's own."""
    import scipy.sparse.linalg

    n = A.in_numel
    operator = scipy.sparse.linalg.LinearOperator(
        (n, n),
        matvec=lambda v: A.apply(torch.from_numpy(v).view(A.in_shape)).numpy().ravel(),
        rmatvec=lambda v: A.adjoint(torch.from_numpy(v).view(A.out_shape)).numpy().ravel(),
        dtype=np.float32,
    )
    limit = {"iter_lim" if name == "lsqr" else "maxiter": iterations}
    b = y.numpy().ravel()
    return lambda: getattr(scipy.sparse.linalg, name)(operator, b, atol=0.0, btol=0.0, conlim=0.0, **limit)


# ---------------------------------------------------------------------- many right-hand sides


def right_hand_sides(quick: bool) -> Table:
    """Time of one solve of a batch of 32 over that of 32 solves, and of one of them 32 times."""
    items, count, rows = 32, 20, []
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device, size, kernel in itertools.product(devices, (16,) if quick else (8, 16, 32, 64, 128), (3, 7)):
        A = convolution(kernel, size).to(device)
        y = torch.randn(items, *A.out_shape, device=device)
        row: dict[str, Any] = {"device": device, "size": f"{size}x{size}", "kernel": f"{kernel}x{kernel}"}
        for name in ("lsqr", "lsmr"):
            method, ratios = METHODS[name], []
            for _ in range(2 if quick or size > 64 else 3):
                solve = partial(method, A, max_iter=count, rtol=0.0)
                ratios.append(wall_or_cpu(partial(solve, y), device) / wall_or_cpu(partial(each, solve, y), device))
            row[name] = statistics.median(ratios)
        rows.append(row)
    return Table(
        f"{items} right-hand sides as one batch, in units of {items} single solves",
        rows,
        "Small problems share the cost of every call; large ones are, on a CPU, solved in groups that the caches hold.",
    )


def each(solve: Callable[[Tensor], object], items: Tensor) -> None:
    """One solve after the other."""
    for item in items:
        solve(item)


def wall_or_cpu(function: Callable[[], object], device: str) -> float:
    """CPU time on the CPU; on a GPU the time until it has finished."""
    if device == "cpu":
        return seconds(function)
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start
