"""Which backend is faster for which convolution, and does ``backend="auto"`` pick it?

Run ``python -m benchmarks.convolution_backend``. One line a case: milliseconds of torch's convolution and of the FFT,
forward and adjoint, medians of interleaved runs on one thread, and what auto takes. The constants of the cost model in
lsconv/operators/fft_convolution.py were fitted to this table. The last lines say how much auto loses at worst.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lsconv.operators.convolution import Convolution

# (c_in, c_out, groups)
_CHANNELS = ((1, 1, 1), (3, 3, 3), (3, 3, 1), (1, 8, 1), (8, 1, 1), (8, 8, 1), (32, 32, 1))
_CHANNELS_1D_3D = ((1, 1, 1), (4, 4, 1))
# Direct convolutions above this many multiplications are left out: nobody waits for them.
_MOST_MULTIPLICATIONS = 2e9


def cases() -> Iterator[tuple[torch.dtype, int, tuple[int, int, int], int, int]]:
    """``(dtype, ndim, channels, size, kernel)`` of every line."""
    for dtype in (torch.float32, torch.float64, torch.complex64):
        for channels, size, kernel in itertools.product(_CHANNELS, (64, 256, 512), (3, 5, 9, 15, 31)):
            yield dtype, 2, channels, size, kernel
        for channels, size, kernel in itertools.product(_CHANNELS_1D_3D, (1024, 65536), (3, 9, 33, 129)):
            yield dtype, 1, channels, size, kernel
        for channels, size, kernel in itertools.product(_CHANNELS_1D_3D, (24, 48), (3, 5, 9)):
            yield dtype, 3, channels, size, kernel


def medians(functions: Sequence[Callable[[], object]], seconds: float = 0.3, most: int = 15) -> list[float]:
    """Median milliseconds of every function, the runs interleaved."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    start = time.perf_counter()
    while len(times[0]) < 3 or (len(times[0]) < most and time.perf_counter() - start < seconds):
        for function, samples in zip(functions, times, strict=True):
            before = time.perf_counter()
            function()
            samples.append(time.perf_counter() - before)
    return [1e3 * statistics.median(samples) for samples in times]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"{'dtype':>10} dim    channels   size kernel   direct      fft  auto | adjoint: direct      fft  auto")
    lost: list[tuple[float, str]] = []
    for dtype, ndim, (c_in, c_out, groups), size, kernel in cases():
        if c_in // groups * c_out * (kernel * size) ** ndim > _MOST_MULTIPLICATIONS:
            continue
        weight = torch.randn(c_out, c_in // groups, *(kernel,) * ndim, dtype=dtype)
        auto = Convolution(weight, (size,) * ndim, padding="same", groups=groups)
        direct = Convolution(weight, (size,) * ndim, padding="same", groups=groups, backend="direct")
        by_fft = Convolution(weight, (size,) * ndim, padding="same", groups=groups, backend="fft")
        x = torch.randn(auto.in_shape, dtype=dtype)
        y = torch.randn(auto.out_shape, dtype=dtype)
        # Arguments are bound now: the loop goes on, the functions are called at once.
        runs = [
            lambda A=direct, x=x: A.apply(x),
            lambda A=by_fft, x=x: A.apply(x),
            lambda A=direct, y=y: A.adjoint(y),
            lambda A=by_fft, y=y: A.adjoint(y),
        ]
        milliseconds = medians(runs)
        line = f"{str(dtype)[6:]:>10} {ndim:>3} {c_in:>4}->{c_out:<2} g={groups} {size:>6} {kernel:>6}"
        for transposed in (False, True):
            times = milliseconds[2 * transposed : 2 * transposed + 2]
            chosen = auto._uses_fft(1, transposed=transposed)
            line += f"{'|' if transposed else '':>3} {times[0]:>{12 if transposed else 6}.3f} {times[1]:>8.3f}"
            line += f"   {'fft' if chosen else '-':>3}"
            lost.append((times[chosen] / min(times), f"{'adjoint' if transposed else 'forward'}: {line}"))
        print(line, flush=True)
    lost.sort(key=lambda entry: -entry[0])
    right = sum(ratio == 1.0 for ratio, _ in lost)
    print(f"\nauto took the faster backend in {right} of {len(lost)} cases; where it did not it lost, at worst,")
    for ratio, line in lost[:8]:
        print(f"{ratio:6.1f} x  {line}")


if __name__ == "__main__":
    main()
