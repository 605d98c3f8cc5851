"""What does an iteration on the border cost beyond its transforms, and where does the time of a solve go?

The floor is one forward and one inverse transform of the grid and one product per frequency, each measured alone on
contiguous tensors and added. Everything is timed in one race. Where there is a GPU, a second table compares the
iteration for many right-hand sides with the time that the device takes to move the bytes of the floor, at the speed at
which it copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import lsconv
from benchmarks import deblurring
from benchmarks.runner import Table, race
from lsconv.border.normal_inverse import BorderInverse
from lsconv.border.plan import BorderPlan
from lsconv.border.system.border_krylov import border_cg, border_gmres

_STEPS = 20


Case = tuple[int, int, torch.dtype, float]  # channels, size, dtype, damp relative to sigma_max


def operator(channels: int, size: int, dtype: torch.dtype, device: str = "cpu") -> lsconv.Convolution:
    """One channel: the Gaussian of the deblurring benchmark; more: a random 3×3 kernel. Valid."""
    if channels == 1:
        kernel = deblurring.kernels()["gaussian"].to(dtype)[None, None]
    else:
        kernel = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lsconv.Conv2d(kernel.to(device), in_size=(size, size))


def measure(case: Case, repeats: int, *, batch: int = 1, device: str = "cpu") -> dict[str, Any]:
    """One row, for ``batch`` right-hand sides."""
    channels, size, dtype, relative_damp = case
    A = operator(channels, size, dtype, device)
    y = torch.randn(batch, *A.out_shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    plan = BorderPlan(A, relative_damp * float(lsconv.norm(A)))
    # the outer products keep the dtype of the data; the factors may have another
    inverse = plan.inverse
    assert isinstance(inverse, BorderInverse)
    Q, grid, schwarz = inverse.Q, inverse.Q.grid, inverse.begin_iteration().schwarz
    lead, inner = (batch, inverse.embedding.blocks), inverse.convolution.dtype
    b = torch.randn(*lead, inverse.border.size, dtype=inner, device=device)
    flexible = schwarz.problem.restricted or inverse.form == "saddle"
    image = torch.randn(*lead, Q.columns, *grid.sizes, dtype=inner, device=device)
    spectrum = grid.transform(image)

    check_every = 1 if device == "cpu" else 10
    apply, precondition = inverse.begin_iteration(), inverse.begin_iteration().schwarz

    def iterate() -> Any:  # to no tolerance, so that all the steps are taken
        if flexible:
            return border_gmres(apply, precondition, b, 0.0 * b[..., :1], _STEPS, check_every, 100)
        return border_cg(apply, precondition, b, 0.0, _STEPS, check_every)

    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: grid.transform(image),
        "inverse": lambda: grid.inverse(spectrum),
        "product": lambda: Q(spectrum),
        "system": lambda: inverse.begin_iteration()(b),
        "preconditioner": lambda: schwarz(b),
        "iterations": iterate,
        "solve": lambda: plan.solve(y),
    }
    times = race(parts, repeats=repeats, patience=10.0)
    floor = sum(times[name].median for name in ("forward", "inverse", "product"))
    iteration = times["iterations"].median / max(1, int(times["iterations"].result[1].max()))
    solution = times["solve"].result
    iterations = int(solution.iterations.max())
    entry = b.element_size()
    # the symbol once, and the image read and written by three passes, in real or half-complex form
    moved = Q.nbytes + 6 * batch * channels * math.prod(grid.sizes) * entry
    return {
        "case": f"{'' if batch == 1 else f'{batch} × '}{channels} × {size}², {str(dtype)[6:]}",
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


def traffic(case: Case, repeats: int, *, batch: int, device: str) -> dict[str, Any]:
    """One row of the iteration against the time in which ``device`` copies as many bytes as the floor moves."""
    row = measure(case, repeats, batch=batch, device=device)
    block = torch.zeros(2**25 if device == "cpu" else 2**28, dtype=torch.uint8, device=device)
    copy = race({"copy": lambda: block.clone()}, repeats=max(5, repeats))["copy"].median
    bandwidth = 2 * block.nbytes / copy
    least = row["moved MiB"] * 2**20 / bandwidth
    return {name: row[name] for name in ("case", "factors", "floor ms", "system ms", "iteration ms", "moved MiB")} | {
        "copy GB/s": bandwidth / 1e9,
        "traffic ms": 1e3 * least,
        "iteration / traffic": row["iteration ms"] / (1e3 * least),
        "solve ms": row["solve ms"],
        "border its": row["border its"],
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table; two where there is a GPU."""
    cases: list[Case] = [
        (1, size, dtype, 1e-3)
        for size in ((64,) if quick else (256, 512, 1024))
        for dtype in (torch.float32, torch.float64)
    ]
    cases += [(8, 32, torch.float32, 1e-2)] if quick else [
        (channels, 128, dtype, 1e-2) for channels in (8, 32) for dtype in (torch.float32, torch.float64)
    ]  # fmt: skip
    yield Table(
        "An iteration on the border against its transforms and its product",
        [measure(case, 3 if quick else 7) for case in cases],
        "Floor: forward + inverse + product, each alone. System: the same between a scatter to the grid and a gather "
        "from it. Iteration: the "
        f"mean of {_STEPS} iterations, preconditioner and orthogonalisation included. Moved: the least bytes that the "
        "floor reads and writes. Solve: from the data to the certificate, beyond the border iterations two or three "
        "products with A and the inverse in every outer step. Gaussian 15×15 at damp 1e-3 σ_max, or a random 3×3 "
        "kernel at 1e-2.",
    )
    if not torch.cuda.is_available():
        return
    many: list[tuple[Case, int]] = [
        ((1, 64 if quick else 1024, dtype, 1e-3), 16) for dtype in (torch.float32, torch.float64)
    ]
    many += [
        ((1, 256, torch.float32, 1e-3), 1),
        ((8, 128, torch.float32, 1e-2), 16),
        ((32, 128, torch.float32, 1e-2), 16),
    ]
    yield Table(
        f"On {torch.cuda.get_device_name()}, against the traffic of its memory",
        [traffic(case, 3 if quick else 7, batch=batch, device="cuda") for case, batch in many],
        "Case: right-hand sides × channels × size. Traffic: the time in which the device moves the bytes of the floor, "
        "at the speed of its own copies. The other columns as above; small problems replay CUDA graphs.",
    )
