"""What do missing pixels, and weights that vary, cost beside the same restoration with every pixel measured?

The masked and the unmasked problem race in one round. The peers of the second table solve the masked problem: LSMR, and
ADMM with the mask split off, ``min |M v - y|^2 + damp^2 |x|^2, v = C x`` with C circulant (Almeida and Figueiredo 2013;
Matakos, Ramani and Fessler 2013), in a few lines, with the best of five penalties.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import lsconv
from benchmarks import peers
from benchmarks.deblurring import problem
from benchmarks.runner import Answer, Table, race, reach, reached, run_times, times_faster

F64 = torch.float64


def masks(n: int) -> dict[str, Tensor]:
    """One per cent of dead pixels, two blobs of 16 pixels across (fewer in small images), two dead columns."""
    rows = torch.arange(n)
    blobs, columns = torch.ones(1, n, n, dtype=torch.bool), torch.ones(1, n, n, dtype=torch.bool)
    for down, across in ((n // 3, n // 4), (2 * n // 3, n // 2)):
        blobs &= ((rows[:, None] - down) ** 2 + (rows - across) ** 2 > min(8, n // 16) ** 2)[None]
    columns[:, :, [n // 3, n // 2]] = False
    dead = torch.rand(1, n, n, generator=torch.Generator().manual_seed(0)) > 0.01
    return {"1 % dead": dead, "two blobs": blobs, "two columns": columns}


def masked_and_unmasked(kernel: str, size: int, relative_damp: float, method: str, repeats: int) -> dict[str, Any]:
    """One row of the first table."""
    A, y = problem(kernel, size, "valid", F64)
    damp = relative_damp * float(lsconv.norm(A))
    runs: dict[str, Callable[[], lsconv.Solution]] = {"unmasked": lambda: lsconv.lstsq(A, y, damp=damp, method=method)}
    for name, seen in masks(y.shape[-1]).items():
        runs[name] = functools.partial(lsconv.lstsq, A, y, damp=damp, method=method, observed=seen)
    times = race(runs, repeats=repeats, patience=20.0)
    own = times["unmasked"]
    row = {
        "case": f"{kernel} {size}²",
        "damp": relative_damp,
        "method": method,
        "unmasked s": own.median,
        "its": int(own.result.iterations),
    }
    for name in list(runs)[1:]:
        solution = times[name].result
        note = "" if bool(solution.converged) else " !"
        row[name] = f"{times[name].median / own.median:.1f} x, {int(solution.iterations)} its{note}"
    return row


def batch_and_loop(kernel: str, size: int, relative_damp: float, method: str, repeats: int) -> dict[str, Any]:
    """One row of the table of batches: four images with one per cent of dead pixels, the same ones or others each."""
    A, y = problem(kernel, size, "valid", F64)
    damp = relative_damp * float(lsconv.norm(A))
    stack = torch.stack([y * (1 + item / 4) for item in range(4)])
    seen = torch.rand(stack.shape, generator=torch.Generator().manual_seed(0)) > 0.01
    row: dict[str, Any] = {"case": f"{kernel} {size}²", "damp": relative_damp, "method": method}
    for name, masks in {"the same": seen[:1].expand(seen.shape).clone(), "others each": seen}.items():
        runs: dict[str, Callable[[], list[lsconv.Solution]]] = {
            "batch": lambda masks=masks: [lsconv.lstsq(A, stack, damp=damp, method=method, observed=masks)],  # type: ignore[misc]
            "loop": lambda masks=masks: [  # type: ignore[misc]
                lsconv.lstsq(A, item, damp=damp, method=method, observed=mask)
                for item, mask in zip(stack, masks, strict=True)
            ],
        }
        times = race(runs, repeats=repeats, patience=5.0)
        note = "" if bool(times["batch"].result[0].converged.all()) else " !"
        row[name] = f"{times['batch'].median / times['loop'].median:.2f}{note}"
    return row


def split_mask(A: lsconv.Convolution, y: Tensor, seen: Tensor, damp: float, rho: float, most: int | None) -> Tensor:
    """ADMM with the mask split off, on the periodic grid of the unknown."""
    n, m = A.spatial_in, A.spatial_out
    kernel = torch.zeros(n, dtype=F64)
    kernel[: A.kernel_size[0], : A.kernel_size[1]] = A.weight[0, 0]
    S = torch.fft.rfft2(kernel).conj()
    data, weight = torch.zeros(n, dtype=F64), torch.zeros(n, dtype=F64)
    data[: m[0], : m[1]], weight[: m[0], : m[1]] = torch.where(seen, y, 0)[0], seen[0].double()
    v = u = torch.zeros(n, dtype=F64)
    inverse = S.conj() / (S.abs().square() + damp**2 / rho)
    for _ in range(500 if most is None else most):
        spectrum = inverse * torch.fft.rfft2(v - u)
        blurred = torch.fft.irfft2(S * spectrum, s=n)
        v = (data + rho * (blurred + u)) / (weight + rho)
        u = u + blurred - v
    return torch.fft.irfft2(spectrum, s=n)[None]


def against_peers(
    kernel: str, size: int, relative_damp: float, mask: str, target: float, most: float, repeats: int
) -> dict[str, Any]:
    """One row of the second table."""
    A, y = problem(kernel, size, "valid", F64)
    damp, seen = relative_damp * float(lsconv.norm(A)), masks(y.shape[-1])[mask]
    B, data = lsconv.Mask(seen, dtype=F64) @ A, torch.where(seen, y, 0)
    error = functools.partial(peers.relative_gradient, B, data, damp)

    def ours(tolerance: float, max_iter: int | None) -> Answer:
        solution = lsconv.lstsq(A, y, damp=damp, observed=seen, rtol=tolerance)
        return Answer(solution.x, int(solution.iterations))

    def lsmr(tolerance: float, max_iter: int | None) -> Answer:
        solution = lsconv.lstsq(B, data, damp=damp, method="lsmr", preconditioner=None, rtol=tolerance,
                                max_iter=max_iter)  # fmt: skip
        return Answer(solution.x, int(solution.iterations))

    own = reach(ours, error, target)
    limit = min(most, 100 * own.seconds)
    others = {"LSMR": reach(lsmr, error, target, seconds=limit)}
    best = min(
        (damp**2 * 10.0**power for power in range(5)),
        key=lambda rho: error(split_mask(A, y, seen, damp, rho, 50)),
    )

    def admm(tolerance: float, max_iter: int | None) -> Answer:
        steps = 1
        while True:  # the fewest steps by doubling: it has no test of its own
            x = split_mask(A, y, seen, damp, best, steps)
            if error(x) <= target or (max_iter is not None and steps >= max_iter):
                return Answer(x, steps)
            steps = 2 * steps if max_iter is None else min(2 * steps, max_iter)

    found = admm(target, 1024)
    others["ADMM"] = reach(
        lambda tolerance, most: Answer(
            split_mask(A, y, seen, damp, best, min(found.iterations or 1, most or 1024)), found.iterations
        ),
        error,
        target,
    )
    times = run_times({"lsconv": own, **others}, repeats=repeats, patience=2.0)
    return {
        "case": f"{kernel} {size}², {mask}",
        "damp": relative_damp,
        "to": target,
        "lsconv": reached(times["lsconv"], own),
        **{name: reached(times[name], arrival) for name, arrival in others.items()},
        "best / lsconv": times_faster(others, times, times["lsconv"]),
    }


def varying_weights(kernel: str, size: int, relative_damp: float, ratio: float, repeats: int) -> dict[str, Any]:
    """One row of the third table: weights that vary at random, logarithmically even, and smoothly across the image."""
    A, y = problem(kernel, size, "valid", F64)
    damp = relative_damp * float(lsconv.norm(A))
    generator = torch.Generator().manual_seed(0)
    exponents = {
        "at random": torch.rand(A.out_shape, dtype=F64, generator=generator),
        "across": torch.linspace(0, 1, A.out_shape[-1], dtype=F64).expand(A.out_shape),
    }
    row: dict[str, Any] = {"case": f"{kernel} {size}²", "damp": relative_damp, "ratio": ratio}
    for name, exponent in exponents.items():
        solve = functools.partial(lsconv.lstsq, A, y, damp=damp, weights=ratio**exponent)
        runs = {
            "mean weight": solve,
            "LSMR": functools.partial(solve, method="lsmr", preconditioner=None, max_iter=1000),
        }
        for who, timing in race(runs, repeats=repeats, patience=2.0, warm_up=False).items():
            note = "" if bool(timing.result.converged) else " !"
            row[f"{who}, {name}"] = f"{int(timing.result.iterations)} its, {timing.median:.2f} s{note}"
    return row


def tables(quick: bool) -> Iterator[Table]:
    """Four tables, the first once more for large images."""
    kernels, size = (("gaussian",), 64) if quick else (("gaussian", "box"), 256)
    damps = (1e-1,) if quick else (1e-1, 1e-3)

    def beside_unmasked(size: int, repeats: int) -> Table:
        return Table(
            f"The masked beside the unmasked problem, {size}²",
            [
                masked_and_unmasked(kernel, size, damp, method, repeats)
                for kernel in kernels
                for damp in damps
                for method in ("border", "auto")
            ],
            "A fresh plan and its first solve, to the default tolerance of float64, in units of the unmasked one. Both "
            "blurs are separable: 'auto' solves the unmasked problem, and the answers within a masked one, by the "
            "axes. '!': not converged.",
        )

    yield beside_unmasked(size, 1 if quick else 5)
    yield Table(
        "A batch with masks beside a loop over its items",
        [
            batch_and_loop(kernel, size, damp, method, 1 if quick else 3)
            for kernel in kernels
            for damp in damps
            for method in ("border", "auto")
        ],
        "Time of one solve of four items with a mask each, in units of that of four solves. '!': not converged.",
    )
    yield Table(
        "Weights that vary by a ratio",
        [
            varying_weights(kernel, size, damp, ratio, 1)
            for kernel in kernels
            for damp in damps
            for ratio in ((10.0,) if quick else (2.0, 10.0, 100.0))
        ],
        "Conjugate gradients preconditioned by the border of the mean weight, and LSMR (at most 1000 iterations, '!': "
        "not converged by then).",
    )
    yield Table(
        "Against LSMR and ADMM with the mask split off",
        [
            against_peers(kernel, size, damp, "1 % dead", target, 0.5 if quick else 8.0, 1 if quick else 3)
            for kernel in kernels
            for damp in damps
            for target in (1e-4, 1e-8)
        ],
        "To a relative gradient of the masked problem. ADMM has the best of five penalties, and as many steps as a "
        "power of two, at most 1024, takes it there; 'only': what it had reached by then.",
    )
    if not quick:
        yield beside_unmasked(1024, 1)
