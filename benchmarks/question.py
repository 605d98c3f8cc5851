"""The question that began it: is the right answer as fast as the circular pseudo-inverse, which is not the answer?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Table, race
from lsconv.fourier.border import BorderPlan

BATCH = 16


def circular_pinv(weight: Tensor, y: Tensor, size: int) -> Tensor:
    """The pseudo-inverse of the circular convolution, one ``pinv`` per frequency, applied to the zero-extended y."""
    kernel = weight.new_zeros(*weight.shape[:2], size, size)
    kernel[..., : weight.shape[-2], : weight.shape[-1]] = weight
    inverse = torch.linalg.pinv(torch.fft.fft2(kernel).conj().permute(2, 3, 0, 1))
    extended = torch.nn.functional.pad(y, (0, size - y.shape[-1], 0, size - y.shape[-2]))
    spectrum = torch.fft.fft2(extended).permute(1, 2, 0).unsqueeze(-1)
    return torch.fft.ifft2((inverse @ spectrum).squeeze(-1).permute(2, 0, 1)).real


def measure(channels: int, size: int, repeats: int) -> list[dict[str, object]]:
    """One row a contestant."""
    weight = torch.randn(channels, channels, 3, 3)
    A = lsconv.Conv2d(weight, in_size=(size, size))
    precise = A.to(dtype=torch.float64)
    y = A.apply(torch.randn(A.in_shape))
    many = torch.stack([A.apply(torch.randn(A.in_shape)) for _ in range(BATCH)])
    plan = BorderPlan(A)
    exact = BorderPlan(precise).solve(y.double()).x  # of minimum norm, to 1e-10
    times = race(
        {
            "circular pinv": lambda: circular_pinv(weight, y, size),
            "lsconv setup + solve": lambda: BorderPlan(A).solve(y).x,
            "lsconv setup": lambda: BorderPlan(A),
            "lsconv solve, plan kept": lambda: plan.solve(y).x,
            f"lsconv solve, batch of {BATCH}, per item": lambda: plan.solve(many).x,
        },
        repeats=repeats,
        patience=120.0,
    )
    reference = times["circular pinv"].median
    rows: list[dict[str, object]] = []
    for name, timing in times.items():
        items = BATCH if "per item" in name else 1
        row: dict[str, object] = {
            "method": name,
            "seconds": timing.median / items,
            "/ circular": timing.median / items / reference,
        }
        x = timing.result
        if isinstance(x, Tensor):
            data = (many if items > 1 else y).double()
            row["residual"] = float((precise.apply(x.double()) - data).norm() / data.norm())
            if items == 1:
                # the part of x in the null space of A: what the float64 solve of A x leaves of it
                x = x.double()
                seen = BorderPlan(precise).solve(precise.apply(x)).x
                row["null-space part"] = float((x - seen).norm() / x.norm())
                row["difference"] = float((x - exact).norm() / exact.norm())
        rows.append(row)
    return rows


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    channels, size = (8, 32) if quick else (32, 128)
    yield Table(
        f"{channels} -> {channels} channels, 3x3, {size}², valid, float32, damp 0",
        measure(channels, size, 2 if quick else 5),
        "Residual: ||A x - y|| / ||y||, computed in float64 by the benchmark. Null-space part: what a float64 solve of "
        "A x does not give back of x. Difference: from the minimum-norm solution in float64.",
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for table in tables(quick=False):
        print(table.markdown())
