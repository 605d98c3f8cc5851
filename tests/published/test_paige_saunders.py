"""LSQR and LSMR against the iterates that their authors' own programs printed."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch

from lsconv.krylov.craig import craig
from lsconv.krylov.lsmr import lsmr
from lsconv.krylov.lsqr import lsqr
from lsconv.operators.elementary import FromFunctions

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "paige-saunders.json").read_text())
SOLVERS = {"lsqr": lsqr, "lsmr": lsmr}
# "4 pi" as the published programs had it: a float32 constant in LSQR's, a float64 one in LSMR's.
FOUR_PI = {"lsqr": float(np.float32(4 * 3.141592)), "lsmr": 4 * 3.141592}


def householder(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return v - 2 * (v @ h).unsqueeze(-1) * h


def paige_saunders(case: dict[str, Any], angle: float) -> tuple[FromFunctions, torch.Tensor, torch.Tensor]:
    """The problem P(m, n, nd, npower, damp): its operator, right-hand side and solution (m >= n)."""
    m, n, nd = case["m"], case["n"], case["nd"]
    i_m = torch.arange(1, m + 1, dtype=torch.float64)
    i_n = torch.arange(1, n + 1, dtype=torch.float64)
    h_y, h_z = -torch.sin(i_m * angle / m), -torch.cos(i_n * angle / n)
    h_y, h_z = h_y / h_y.norm(), h_z / h_z.norm()
    d = (torch.div(i_n - 1 + nd, nd, rounding_mode="floor") * nd / n) ** case["npower"]

    def apply(x: torch.Tensor) -> torch.Tensor:
        return householder(h_y, torch.nn.functional.pad(d * householder(h_z, x), (0, m - n)))

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        return householder(h_z, d * householder(h_y, y)[..., :n])

    x = 0.1 * i_n
    r = torch.ones(m, dtype=torch.float64)
    r[:n] = case["damp"] ** 2 * householder(h_z, x) / d
    A = FromFunctions((n,), (m,), apply, adjoint, dtype=torch.float64)
    return A, householder(h_y, r) + apply(x), x


def published_rounding(method: str, case: dict[str, Any]) -> list[float]:
    """How far the published x(1) are off by the rounding of the published program itself.

    The rows beyond n of a tall problem are orthogonal to the range of A, so in exact arithmetic the problem with m = n
    has the same iterates x. Where the two tables differ in x(1), they differ by rounding.
    """
    twins = [t for t in PUBLISHED[method] if all(t[key] == case[key] for key in ("n", "nd", "npower", "damp"))]
    columns = zip(*([row[1] for row in twin["iterates"]] for twin in twins), strict=True)
    return [max(column) - min(column) for column in columns]


CASES = [(method, case) for method in SOLVERS for case in PUBLISHED[method]]


@pytest.mark.parametrize(
    "method, case", CASES, ids=[f"{method}-{case['m']}x{case['n']}-power{case['npower']}" for method, case in CASES]
)
@pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")
def test_iterates_are_the_published_ones(method: str, case: dict[str, Any]) -> None:
    A, b, _ = paige_saunders(case, FOUR_PI[method])
    seen: list[tuple[int, float, float]] = []
    SOLVERS[method](
        A, b, damp=case["damp"], rtol=0, max_iter=11, check_every=1,
        callback=lambda state: seen.append((state.iteration, float(state.x[0]), float(state.residual_norm))),
    )  # fmt: skip
    printed = published_rounding(method, case)
    # Later iterates of the steeper problems amplify rounding: no two correct programs agree on them.
    last = 10 if case["npower"] <= 4 else 5
    for (k, x1, rnorm), published in zip(seen[: last + 1], case["iterates"], strict=False):
        assert k == published[0]
        assert x1 == pytest.approx(published[1], rel=2e-9, abs=1e-9 + 2 * printed[k])
        assert rnorm == pytest.approx(published[2], rel=2e-9)
    assert len(seen) > last


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")
def test_printed_norms_are_those_of_the_iterates(method: str) -> None:
    """What the programs print beside x(1): the norms of the damped residual and of its gradient, step by step."""
    case = {"m": 200, "n": 100, "nd": 4, "npower": 2, "damp": 1e-2}
    A, b, _ = paige_saunders(case, FOUR_PI[method])
    rows: list[tuple[float, float, float, float]] = []

    def look(state: Any) -> None:
        r = b - A(state.x)
        gradient = A.H(r) - case["damp"] ** 2 * state.x
        rows.append((float(torch.hypot(r.norm(), case["damp"] * state.x.norm())), float(state.residual_norm),
                     float(gradient.norm()), float(state.gradient_norm)))  # fmt: skip

    SOLVERS[method](A, b, damp=case["damp"], rtol=0, max_iter=15, check_every=1, callback=look)
    assert len(rows) >= 15
    for r_true, r_printed, g_true, g_printed in rows:
        assert r_printed == pytest.approx(r_true, rel=1e-9)
        assert g_printed == pytest.approx(g_true, rel=1e-7)


@pytest.mark.parametrize("solver", [lsqr, lsmr, craig])
def test_wide_problem_ends_at_its_least_norm_solution(solver: Any) -> None:
    """P(m, n) with m < n: x is first projected onto the row space of A."""
    m, n = 60, 90
    angle = FOUR_PI["lsmr"]
    i_m, i_n = torch.arange(1, m + 1, dtype=torch.float64), torch.arange(1, n + 1, dtype=torch.float64)
    h_y, h_z = -torch.sin(i_m * angle / m), -torch.cos(i_n * angle / n)
    h_y, h_z = h_y / h_y.norm(), h_z / h_z.norm()
    d = (torch.div(i_m - 1 + 4, 4, rounding_mode="floor") * 4 / m) ** 2

    def apply(x: torch.Tensor) -> torch.Tensor:
        return householder(h_y, d * householder(h_z, x)[..., :m])

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        return householder(h_z, torch.nn.functional.pad(d * householder(h_y, y), (0, n - m)))

    A = FromFunctions((n,), (m,), apply, adjoint, dtype=torch.float64)
    x = householder(h_z, 0.1 * i_n)
    x[m:] = 0
    x = householder(h_z, x)
    solution = solver(A, A(x), rtol=1e-13, conlim=1e12)
    assert solution.converged
    assert torch.dist(solution.x, x) < 1e-8 * x.norm()
