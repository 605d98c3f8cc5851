"""Reflect and replicate padding, damped: the border against LSMR with the circulant preconditioner.

Both are lsconv's; no other package preconditions these. The blurs are those of the deblurring benchmark, the error and
the targets too: the gradient of the damped problem, measured in float64, at 1e-8.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

import lsconv
from benchmarks import peers
from benchmarks.deblurring import TARGET, Case, border, label, problem
from benchmarks.runner import Answer, Table, reach, reached, run_times, times_faster
from lsconv.inverse.route import route

_LSMR = "LSMR, circulant N"
_LEAD = 100  # so many times the time of the border is what LSMR has


def measure(case: Case, most: float, repeats: int) -> dict[str, Any]:
    """One row."""
    kernel, size, boundary, relative_damp, dtype = case
    A, y = problem(kernel, size, boundary, dtype)
    damp = relative_damp * float(lsconv.norm(A))
    error = functools.partial(peers.relative_gradient, A, y, damp)
    ours = border(A, y, damp)

    def solve(tolerance: float, max_iter: int | None) -> Answer:
        solution = route(A, damp, method="lsmr").solve(y, rtol=tolerance, max_iter=max_iter)
        return Answer(solution.x, int(solution.iterations))

    lsmr = {_LSMR: reach(solve, error, TARGET[dtype], seconds=min(most, _LEAD * ours.seconds))}
    times = run_times(lsmr, {"in all": ours.run}, repeats=repeats, patience=2.0)
    return label(case) | {
        "in all s": times["in all"],
        "border its": ours.answer.iterations,
        "gradient": f"{ours.error:.1e}{'' if ours.arrived else ' !'}",
        _LSMR: reached(times[_LSMR], lsmr[_LSMR]),
        "LSMR / in all": times_faster(lsmr, times, times["in all"]),
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    kernels, size, most = (("gaussian",), 96, 0.5) if quick else (("gaussian", "box", "motion"), 256, 15.0)
    cases: list[Case] = [
        (kernel, size, boundary, damp, torch.float64)
        for kernel in kernels
        for boundary in ("reflect", "replicate")
        for damp in ((1e-1, 1e-3) if quick else (1e-1, 1e-2, 1e-3))
    ]
    yield Table(
        "Reflect and replicate padding: the border against LSMR with the circulant preconditioner",
        [measure(case, most, 1 if quick else 3) for case in cases],
        f"In all: a fresh plan and its first solve. LSMR has {_LEAD} times that, and at most {most:g} s; 'only': what "
        "it had reached by then.",
    )
