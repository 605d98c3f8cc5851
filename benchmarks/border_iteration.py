"""What does an iteration on the border cost beyond its transforms, and where does the time of a solve go?

The floor is one forward and one inverse transform of the grid and one product per frequency, each measured alone on
contiguous tensors and added. Everything is timed in one race.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import lsconv
from benchmarks import deblurring
from benchmarks.runner import Table, race
from lsconv.fourier.border import BorderPlan
from lsconv.fourier.inner import conjugate_gradients, gmres

_STEPS = 20


def operator(channels: int, size: int, dtype: torch.dtype) -> lsconv.Convolution:
    """One channel: the Gaussian of the deblurring benchmark; more: a random 3×3 kernel. Valid."""
    if channels == 1:
        kernel = deblurring.kernels()["gaussian"].to(dtype)[None, None]
    else:
        kernel = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lsconv.Conv2d(kernel, in_size=(size, size))


def measure(channels: int, size: int, dtype: torch.dtype, relative_damp: float, repeats: int) -> dict[str, Any]:
    """One row."""
    A = operator(channels, size, dtype)
    y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    plan = BorderPlan(A, relative_damp * float(lsconv.norm(A)))
    # the outer products keep the dtype of the data; the factors may have another
    inverse = plan.inverse
    system, grid, schwarz = inverse.system, inverse.system.grid, inverse.schwarz
    b = torch.randn(1, inverse.embedding.blocks, inverse.border.size, dtype=inverse.convolution.dtype)
    flexible = schwarz.restricted or inverse.form == "mixed"
    image = torch.randn(1, inverse.embedding.blocks, system.columns, *grid.sizes, dtype=b.dtype)
    spectrum = grid.transform(image)

    def iterate() -> Any:  # to no tolerance, so that all the steps are taken
        if flexible:
            return gmres(inverse.on_border, schwarz, b, 0.0 * b[..., :1], _STEPS, 1, 100)
        return conjugate_gradients(inverse.on_border, schwarz, b, 0.0, _STEPS, 1)

    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: grid.transform(image),
        "inverse": lambda: grid.inverse(spectrum),
        "product": lambda: system(spectrum),
        "system": lambda: inverse.on_border(b),
        "preconditioner": lambda: schwarz(b),
        "iterations": iterate,
        "solve": lambda: plan.solve(y),
    }
    times = race(parts, repeats=repeats, patience=10.0)
    floor = sum(times[name].median for name in ("forward", "inverse", "product"))
    iteration = times["iterations"].median / max(1, int(times["iterations"].result[1].max()))
    solution = times["solve"].result
    iterations = int(solution.iterations)
    entry = b.element_size()
    # the symbol once, and the image read and written by three passes, in real or half-complex form
    moved = system.nbytes + 6 * channels * math.prod(grid.sizes) * entry
    return {
        "case": f"{channels} × {size}², {str(dtype)[6:]}",
        "factors": str(inverse.convolution.dtype)[6:],
        "forward ms": 1e3 * times["forward"].median,
        "inverse ms": 1e3 * times["inverse"].median,
        "product ms": 1e3 * times["product"].median,
        "floor ms": 1e3 * floor,
        "system ms": 1e3 * times["system"].median,
        "preconditioner ms": 1e3 * times["preconditioner"].median,
        "iteration ms": 1e3 * iteration,
        "system / floor": times["system"].median / floor,
        "iteration / floor": iteration / floor,
        "moved MiB": moved / 2**20,
        "solve ms": 1e3 * times["solve"].median,
        "border its": iterations,
        "solve ms / it": 1e3 * times["solve"].median / max(1, iterations),
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    cases: list[tuple[int, int, torch.dtype, float]] = [
        (1, size, dtype, 1e-3)
        for size in ((64,) if quick else (256, 512, 1024))
        for dtype in (torch.float32, torch.float64)
    ]
    cases += [(8, 32, torch.float32, 1e-2)] if quick else [
        (channels, 128, dtype, 1e-2) for channels in (8, 32) for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    yield Table(
        "An iteration on the border against its transforms and its product",
        [measure(*case, 3 if quick else 7) for case in cases],
        "Floor: forward + inverse + product, each alone. System: the same between a scatter to the grid and a gather "
        "from it. Iteration: the "
        f"mean of {_STEPS} iterations, preconditioner and orthogonalisation included. Moved: the least bytes that the "
        "floor reads and writes. Solve: from the data to the certificate, beyond the border iterations two or three "
        "products with A and the inverse in every outer step. Gaussian 15×15 at damp 1e-3 σ_max, or a random 3×3 "
        "kernel at 1e-2.",
    )
