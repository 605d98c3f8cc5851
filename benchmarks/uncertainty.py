"""Uncertainty: do error bars hold what they say, and what do samples and exact determinants cost?

Times are seconds of the process on all its threads, medians of interleaved rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks.runner import Table
from lsconv.inverse.pseudo_inverse import pinv
from lsconv.inverse.route import penalty_plan

DOUBLE = torch.float64


def seconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of the process for each run, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if number:
                samples[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def gaussian(taps: int, sigma: float) -> Tensor:
    """A kernel ``(1, 1, taps, taps)`` of sum one."""
    line = torch.exp(-((torch.arange(taps, dtype=DOUBLE) - taps // 2) ** 2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum())[None, None]


def noise(shape: tuple[int, ...]) -> Tensor:
    """White noise."""
    return torch.randn(shape, dtype=DOUBLE)


def coverage(count: int) -> list[dict[str, Any]]:
    """How many pixels of truths drawn from the prior lie in their intervals of 90 %."""
    size, sigma, damp = 24, 0.05, 0.1
    rows = []
    for name, mask_share in (("valid", 1.0), ("valid, a fifth masked", 0.8)):
        A0 = lsconv.Conv2d(gaussian(7, 1.5), (size, size))
        mask = torch.rand(A0.out_shape, generator=torch.Generator().manual_seed(0)) < mask_share
        A = lsconv.Mask(mask) @ A0
        L = lsconv.Gradient(A.in_shape, boundary="dirichlet", dtype=DOUBLE)
        factor = torch.linalg.cholesky(L.to_dense().T @ L.to_dense())
        generator = torch.Generator().manual_seed(1)
        white = torch.randn(A.in_numel, count, dtype=DOUBLE, generator=generator) * sigma / damp
        truth = torch.linalg.solve_triangular(factor.T, white, upper=True).T.reshape(count, *A.in_shape)
        y = A(truth) + sigma * torch.randn(count, *A.out_shape, dtype=DOUBLE, generator=generator)
        error = (lsconv.tikhonov(A, y, damp, L=L).x - truth).abs()
        border = torch.ones(1, size, size, dtype=torch.bool)
        border[:, 6:-6, 6:-6] = False
        hidden = torch.nn.functional.pad(~mask, (3, 3, 3, 3))
        for how, exact in (("exact", True), ("128 samples", False)):
            std = lsconv.posterior_std(A, damp, noise_std=sigma, L=L, exact=exact, generator=generator)
            inside = (error <= 1.6448536 * std).double()
            rows.append(
                {
                    "problem": name,
                    "standard deviations": how,
                    "border %": 100 * float(inside[:, border].mean()),
                    "inside %": 100 * float(inside[:, ~border].mean()),
                    "masked %": 100 * float(inside[:, hidden].mean()) if mask_share < 1 else "",
                }
            )
    return rows


def disk(taps: int) -> Tensor:
    """A kernel ``(1, 1, taps, taps)`` of sum one, whose convolution is no product of axes."""
    place = torch.arange(taps, dtype=DOUBLE) - taps // 2
    kernel = (place[:, None] ** 2 + place**2 <= (taps / 2) ** 2).to(DOUBLE)
    return (kernel / kernel.sum())[None, None]


def sampling(name: str, size: int, padding: int, repeats: int) -> dict[str, Any]:
    """A sample against a solve, with the plan made before; one row."""
    A = lsconv.Conv2d(disk(9) if name == "disk" else gaussian(9, 1.5), (size, size), padding=padding)
    L = lsconv.Gradient(A.in_shape, dtype=DOUBLE)
    damp, y, g = torch.tensor(1e-2, dtype=DOUBLE), noise(A.out_shape), noise(A.in_shape)
    inverse, plan = pinv(A, damp=damp), penalty_plan(A, L, damp)
    for _ in range(8):  # until both plans have the factors of a plan that is kept
        inverse(y), plan.solve(y), plan.normal_solve(g)

    def perturbed() -> Tensor:
        prior = noise(A.in_shape) / damp
        return prior + inverse(noise(A.out_shape) - A.apply(prior))

    def pulled() -> Tensor:
        return plan.normal_solve(A.adjoint(noise(A.out_shape)) + damp * L.adjoint(noise(L.out_shape)))

    runs: dict[str, Callable[[], Any]] = {"solve": lambda: inverse(y), "sample": perturbed}
    runs |= {"solve, L": lambda: plan.solve(y), "sample, L": pulled}
    times = seconds(runs, repeats)
    return {
        "problem": f"{name}, {'same' if padding else 'valid'}, {size}²",
        "solve ms": 1e3 * times["solve"],
        "sample ms": 1e3 * times["sample"],
        "sample / solve": times["sample"] / times["solve"],
        "solve with Gradient ms": 1e3 * times["solve, L"],
        "sample with it ms": 1e3 * times["sample, L"],
        "their ratio": times["sample, L"] / times["solve, L"],
    }


def determinant(
    name: str,
    A: lsconv.Convolution,
    exact: Callable[[], Tensor],
    dense: Callable[[Tensor], Tensor],
    estimate: Callable[[], tuple[Tensor, Tensor]] | None,
    repeats: int,
) -> dict[str, Any]:
    """An exact log-determinant with its gradient, an estimate, and a dense one where it fits; one row."""
    x = noise(A.in_shape)
    runs: dict[str, Callable[[], Any]] = {
        "exact": exact,
        "both": lambda: torch.autograd.grad(exact(), A.weight),
        "forward": lambda: A(x),
    }
    if A.in_numel <= 4096:
        runs["dense"] = lambda: dense(A.to_dense())
    if estimate is not None:
        runs["estimate"] = estimate
    times = seconds(runs, repeats)
    value = exact().item()
    row: dict[str, Any] = {
        "problem": name,
        "exact s": times["exact"],
        "with gradient s": times["both"],
        "exact / forward pass": times["exact"] / times["forward"],
        "dense s": times.get("dense", ""),
        "exact - dense": f"{value - dense(A.to_dense()).item():.0e}" if "dense" in times else "",
    }
    if estimate is not None:
        found, error = estimate()
        row |= {"estimate s": times["estimate"], "estimate - exact": found.item() - value}
        row |= {"its standard error": error.item()}
    return row


def square(channels: int, size: int, repeats: int) -> dict[str, Any]:
    """The determinant of a 3×3 "same" layer near the identity."""
    weight = 0.02 * noise((channels, channels, 3, 3))
    weight[:, :, 1, 1] += torch.eye(channels, dtype=DOUBLE)
    A = lsconv.Conv2d(weight.requires_grad_(), (size, size), padding=1)
    return determinant(
        f"slogdet, {channels} channels, 3×3 same, {size}²",
        A,
        lambda: lsconv.slogdet(A).logabsdet,
        lambda M: torch.linalg.slogdet(M).logabsdet,
        None,
        repeats,
    )


def normal(taps: int, size: int, repeats: int, damp: float = 1e-2) -> dict[str, Any]:
    """The determinant of the normal operator of a cropped blur."""
    A = lsconv.Conv2d(gaussian(taps, taps / 6).requires_grad_(), (size, size))
    return determinant(
        f"logdet, {taps}×{taps} valid, {size}²",
        A,
        lambda: lsconv.logdet(A, damp, exact=True),
        lambda M: torch.logdet(M.T @ M + damp**2 * torch.eye(A.in_numel, dtype=DOUBLE)),
        lambda: lsconv.logdet(A, damp, exact=False, return_error=True),
        repeats,
    )


def tables(quick: bool) -> Iterator[Table]:
    """Three tables."""
    repeats = 1 if quick else 3
    yield Table(
        "Coverage of the 90 % interval, truths drawn from the prior",
        coverage(40 if quick else 200),
        "Gaussian blur 7×7 of 24², noise 0.05, damp 0.1, L = Gradient with zeros beyond the border, which is six wide.",
    )
    yield Table(
        "A sample of the posterior against a solve, both with a plan that is kept",
        [
            sampling(name, size, padding, repeats)
            for name in ("disk", "gaussian")
            for size in ((64,) if quick else (256, 512))
            for padding in (0, 4)
        ],
        "Kernels of 9×9, damp 1e-2, float64. The Gaussian without a penalty is solved axis by axis. With a penalty a "
        "solve has its certificate; a sample has none.",
    )
    layers, blurs = (((8, 16),), ((7, 40),)) if quick else (((8, 16), (32, 64)), ((7, 40), (15, 256)))
    yield Table(
        "Exact log-determinants against dense and stochastic ones",
        [square(*case, repeats) for case in layers] + [normal(*case, repeats) for case in blurs],
        "Damp 1e-2. The forward pass is one convolution of one image; estimates have 32 probes on the border.",
    )
