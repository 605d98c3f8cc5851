"""Setup against solve: after how many right-hand sides does a plan pay?"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

import lsconv
from benchmarks import deblurring, peers
from benchmarks.runner import Answer, Table, reach, run_times
from lsconv.border.plan import BorderPlan

BATCH = 16


def measure(kernel: str, size: int, relative_damp: float, quick: bool) -> dict[str, Any]:
    """One row."""
    A, y = deblurring.problem(kernel, size, "valid", torch.float64)
    damp = relative_damp * float(lsconv.norm(A))
    error = functools.partial(peers.relative_gradient, A, y, damp)
    plan, further = BorderPlan(A, damp), deblurring.further(kernel, size, "valid", torch.float64)
    many = torch.stack([next(further) for _ in range(BATCH)])

    def through_border(tolerance: float, max_iter: int | None) -> Answer:
        return Answer(plan.solve(y, rtol=tolerance, max_iter=max_iter).x)

    ours = reach(through_border, error, 1e-8)
    limit = 0.3 if quick else 5.0
    known = peers.foreign()
    fastest = next(name for name in ("lineax lsmr", "scipy lsmr") if name in known)  # of the heats of ``deblurring``
    others = {
        name: reach(functools.partial(peer, A, y, damp), error, 1e-8, seconds=limit)
        for name, peer in ((fastest, known[fastest]), ("cg", peers.normal_cg))
    }
    times = run_times(
        others,
        {
            "setup": lambda: BorderPlan(A, damp),
            "solve": lambda: plan.solve(next(further), rtol=ours.tolerance),
            "batch": lambda: plan.solve(many, rtol=ours.tolerance),
        },
        repeats=1 if quick else 3,
        patience=0.5 if quick else 3,
    )
    setup, solve = times["setup"], times["solve"]
    arrived = [times[name] for name, arrival in others.items() if arrival.arrived]
    best = min(arrived, default=max(times[name] for name in others))
    pays = "never" if best <= solve else f"{math.ceil(setup / (best - solve))}"
    return {
        "case": f"{kernel} {size}",
        "damp/σ": f"{relative_damp:.0e}",
        "setup s": setup,
        "solve s": solve,
        f"solve s / item, batch of {BATCH}": times["batch"] / BATCH,
        "setup / solve": setup / solve,
        "best peer s": best if arrived else f"> {best:.3g}",
        "pays after": pays,
    }


def tables(quick: bool) -> Iterator[Table]:
    """One table."""
    sizes = (128,) if quick else (256, 512, 1024)
    kernels = ("gaussian",) if quick else ("gaussian", "motion")
    yield Table(
        "Setup against solve, float64, valid, to a relative gradient of 1e-8",
        [measure(kernel, size, damp, quick) for kernel in kernels for size in sizes for damp in (1e-1, 1e-3)],
        "Pays after: the number of right-hand sides from which setup and solves together are faster than the best of "
        "lineax's LSMR (SciPy's where that is missing) and lsconv's own CG with the circulant preconditioner, one "
        "right-hand side after the other; '>': neither arrived within 5 s.",
    )
