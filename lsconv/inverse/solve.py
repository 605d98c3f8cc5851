"""One solve with a plan, common to the functions of this folder: options, fallback, items without data, report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsconv.errors import ArgumentError, ArgumentTypeError, MethodError, unreported
from lsconv.inverse.fallback import Fallback
from lsconv.inverse.plans.krylov_plan import KRYLOV_ONLY
from lsconv.krylov.gradients.attach import LeastSquares
from lsconv.krylov.loop.solution import Solution, Status, report
from lsconv.krylov.plan import Plan
from lsconv.operators.batch_layout import over_items

__all__ = ["solve", "with_start", "without_items"]

_COMMON = {"rtol", "atol", "max_iter"}


def solve(
    plan: Plan,
    y: Tensor,
    nonfinite: Tensor,
    *,
    fallback: Fallback | None = None,
    raise_on_failure: bool = False,
    **options: Any,
) -> tuple[Solution, Plan]:
    """Solve with a plan, mark the items whose data are not finite, and report those that did not converge.

    Args:
        plan: the plan.
        y: right-hand sides, ``(*batch, *out_shape)``.
        nonfinite: True for the items of y that hold NaN or infinity, ``(*batch)``.
        fallback: solves for the items that the plan leaves unconverged; None: no other plan does.
        raise_on_failure: raise instead of warning.
        options: those of the plan's ``solve``.

    Returns:
        The solution, and the plan that its backward pass uses.
    """
    max_iter = options.get("max_iter")
    if max_iter is not None and (isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 0):
        raise ArgumentError(f"max_iter: expected an integer >= 0 or None, got {max_iter!r}")
    unknown = sorted(set(options) - _COMMON - KRYLOV_ONLY)
    if unknown:
        raise ArgumentTypeError(
            f"{', '.join(unknown)}: no such option; known are {', '.join(sorted(_COMMON | KRYLOV_ONLY))}"
        )
    # the fallback solves alone where the plan's iterations have cost, or for this y would cost, the fallback's setup
    if fallback is not None and plan.innermost.gives_way(y):
        plan = fallback.plan or plan
    extra = sorted(set(options) - _COMMON - plan.options)
    if extra:
        raise MethodError(
            f"{', '.join(extra)}: {plan!r} takes no such option; ask for method='lsmr' or another Krylov method"
        )
    if fallback is not None and max_iter is None:
        # a plan stops early where LSMR may take over its items, which LSMR does not for an rcond of the user's
        options["max_iter"] = fallback.first.innermost.fallback_after if fallback.rcond is None else None
    with unreported():
        solution, backward = plan.solve(y, **options), plan
    if fallback is not None and not solution.all_converged:
        common = {name: options[name] for name in ("rtol", "atol") if name in options}
        solution, backward = fallback.replace_unconverged(solution, y, **common, max_iter=max_iter)
    if bool(nonfinite.any()):
        solution = without_items(solution, nonfinite)
    report(solution, plan, raise_on_failure=raise_on_failure)
    return solution, backward


def with_start(options: dict[str, Any], problem: LeastSquares) -> dict[str, Any]:
    """The options, with the prior of the problem as the start x0: its part in the null space of A stays in x."""
    return options if problem.x_prior is None else {**options, "x0": problem.x_prior}


def without_items(solution: Solution, nonfinite: Tensor) -> Solution:
    """The solution with NaN and :attr:`Status.NON_FINITE` for the items that ``nonfinite``, ``(*batch)``, marks."""
    x = solution.x
    return replace(
        solution,
        x=x.masked_fill(over_items(nonfinite, x.ndim - nonfinite.ndim), torch.nan),
        codes=torch.where(nonfinite, Status.NON_FINITE.code, solution.codes),
        converged=solution.converged & ~nonfinite,
        residual_norm=solution.residual_norm.masked_fill(nonfinite, torch.nan),
        gradient_norm=solution.gradient_norm.masked_fill(nonfinite, torch.nan),
    )
