"""What does a gradient cost: the backward pass in units of the forward solve, and memory against the iterations?"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks.memory import forget_peak, resident
from benchmarks.runner import Table, timed

Solve = Callable[["Problem"], Tensor]


@dataclass
class Problem:
    """An operator with noisy data and a damping, all of which require grad."""

    A: lsconv.Convolution
    y: Tensor
    damp: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are asked for."""
        return [self.y, self.damp, self.A.weight]


@dataclass
class Case:
    """A solve, and the convolution that it is timed on."""

    name: str
    solve: Solve
    out_channels: int = 8
    in_channels: int = 8
    padding: int = 0
    padding_mode: str = "zeros"

    def problem(self, size: int, batch: int) -> Problem:
        """Channels as above, 5x5, float32."""
        weight = torch.randn(self.out_channels, self.in_channels, 5, 5) / 14
        A = lsconv.Conv2d(
            weight.requires_grad_(), in_size=(size, size), padding=self.padding, padding_mode=self.padding_mode
        )
        y = A(torch.randn(batch, *A.in_shape)).detach()
        y = y + 0.01 * torch.randn_like(y)
        return Problem(A, y.requires_grad_(), torch.full((batch,), 0.1).requires_grad_())


def _penalised(p: Problem) -> Tensor:
    return lsconv.tikhonov(p.A, p.y, p.damp, L=lsconv.Gradient(p.A.in_shape, ndim=2)).x


def cases() -> list[Case]:
    """What is timed."""
    return [
        Case("lstsq, border, valid", lambda p: lsconv.lstsq(p.A, p.y, damp=p.damp).x),
        Case("lstsq, border, same", lambda p: lsconv.lstsq(p.A, p.y, damp=p.damp).x, padding=2),
        Case("lstsq, border, full", lambda p: lsconv.lstsq(p.A, p.y, damp=p.damp).x, padding=4),
        Case("tikhonov, gradient, border", _penalised),
        Case("lstsq, fourier", lambda p: lsconv.lstsq(p.A, p.y, damp=p.damp).x, padding=2, padding_mode="circular"),
        Case("lstsq, reflect", lambda p: lsconv.lstsq(p.A, p.y, damp=p.damp).x, 8, 8, 2, "reflect"),
        Case("lsmr", lambda p: lsconv.lsmr(p.A, p.y, damp=p.damp).x, padding=2),
        Case("lsqr", lambda p: lsconv.lsqr(p.A, p.y, damp=p.damp).x, padding=2),
        Case("lstsq, border, no damping, 2 to 8 channels", lambda p: lsconv.lstsq(p.A, p.y).x, 8, 2),
        Case("lstsq, border, no damping, 8 to 2 channels", lambda p: lsconv.lstsq(p.A, p.y).x, 2, 8),
        Case("lstsq, fourier, no damping", lambda p: lsconv.lstsq(p.A, p.y).x, 8, 8, 2, "circular"),
        Case("lsmr, no damping, 2 to 8 channels", lambda p: lsconv.lsmr(p.A, p.y).x, 8, 2, 2),
        Case("lsmr, no damping, 8 to 2 channels", lambda p: lsconv.lsmr(p.A, p.y).x, 2, 8, 2),
    ]


def measure(case: Case, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Forward and backward interleaved, so that a load that comes and goes meets both."""
    problem = case.problem(size, batch)
    samples: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        forward, x = timed(lambda: case.solve(problem))
        g = torch.randn_like(x)
        backward, _ = timed(lambda x=x, g=g: torch.autograd.grad(x, problem.inputs, g, allow_unused=True))  # type: ignore[misc]
        samples.append((forward, backward))
    del samples[0]
    forward, backward = (statistics.median(column) for column in zip(*samples, strict=True))
    ratio = statistics.median(back / forth for forth, back in samples)
    return {
        "solve": case.name,
        "forward ms": 1e3 * forward,
        "backward ms": 1e3 * backward,
        "backward / forward": ratio,
        "at most 1.5": ratio <= 1.5,
    }


def peak(iterations: int) -> dict[str, Any]:
    """What a forward and a backward pass of LSMR add to the peak of this process; meant for a fresh one."""
    warnings.simplefilter("ignore", lsconv.ConvergenceWarning)

    def problem(size: int) -> Problem:  # a blur that takes more than 1000 iterations
        weight = torch.ones(8, 1, 5, 5, dtype=torch.float64).div_(25).requires_grad_()
        A = lsconv.Conv2d(weight, in_size=(size, size), padding=2, groups=8)
        damp = torch.full((), 1e-6, dtype=torch.float64).requires_grad_()
        return Problem(A, torch.randn(A.out_shape, dtype=torch.float64).requires_grad_(), damp)

    def solve(p: Problem) -> lsconv.Solution:
        return lsconv.lsmr(p.A, p.y, damp=p.damp, rtol=0.0, max_iter=iterations)

    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    small, large = problem(16), problem(96)
    torch.autograd.grad(solve(small).x.sum(), small.inputs)  # libraries loaded, pools made
    before = forget_peak()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        solution = solve(large)
    torch.autograd.grad(solution.x.sum(), large.inputs)
    return {
        "iterations": int(solution.iterations),
        "saved for the backward pass MiB": sum(saved.values()) / 2**20,
        "peak of both passes MiB": (resident()["peak"] - before) / 2**20,
    }


def tables(quick: bool) -> Iterator[Table]:
    """Time, then memory, a fresh process a row."""
    warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
    size, batch, rounds = (16, 1, 1) if quick else (64, 4, 5)
    chosen = cases()[:1] if quick else cases()
    yield Table(
        "Time of the backward pass",
        [measure(case, size, batch, rounds) for case in chosen],
        f"Batch {batch}, {size}², 8 to 8 channels unless said otherwise, 5×5, float32, damp 0.1; gradients to data, "
        "weight and damping; medians, the ratio's of interleaved pairs. The forward solve includes the setup.",
    )
    root, rows = Path(__file__).parents[1], []
    # large tensors go back to the system at once, so that the resident size is that of what lives
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for iterations in (10,) if quick else (10, 1000):
        command = [sys.executable, "-m", "benchmarks.gradients", json.dumps(iterations)]
        rows.append(
            json.loads(
                subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
            )
        )
    yield Table(
        "Memory against the iterations",
        rows,
        "LSMR, 8 channels of 96², float64. Saved: the tensors that autograd keeps. Peak: of the process's resident "
        "size, above that before the forward solve.",
    )


if __name__ == "__main__":
    print(json.dumps(peak(json.loads(sys.argv[1]))))
