"""The choice of a plan in words: the one that "auto" takes, why, and the others beside it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.border.influence import EXACT_UNKNOWNS
from lsconv.border.normal_inverse import BorderInverse
from lsconv.errors import LsconvError
from lsconv.inverse.plans.small_matrices import SMALL_MATRICES
from lsconv.inverse.route import penalty_plan, route
from lsconv.krylov.loop.problem import accept_operator
from lsconv.krylov.plan import FALLBACK_AFTER, Plan
from lsconv.operators.base import LinearOperator

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The plan that answers a problem, and why; ``print`` it.

    Attributes:
        plan: the plan, in the words of its ``repr``.
        reasons: why it was taken, a sentence for each decision.
        measured: the seconds of setup and of one answer by every method that serves, or why it does not; empty where
            nothing was measured.
    """

    plan: str
    reasons: tuple[str, ...]
    measured: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.measured), default=0)
        measured = [f"  {name:<{width}}  {text}" for name, text in self.measured.items()]
        return "\n".join([self.plan, *(f"  because {reason}" for reason in self.reasons), *measured])


@torch.no_grad()
def explain(
    A: Any,
    damp: float | Tensor = 0.0,
    L: LinearOperator | None = None,
    *,
    measure: bool = False,
    memory_limit: int | None = None,
) -> Explanation:
    r"""Say which method answers :math:`\min_x \|Ax - y\|^2 + \mathrm{damp}^2 \|Lx\|^2`, and why.

    Args:
        A: the operator.
        damp: the damping, as in :func:`lsconv.lstsq`.
        L: the penalty, as in :func:`lsconv.tikhonov`; None: the identity.
        measure: time setup and one answer of every method that serves, on random data; the Krylov methods stop after
            some hundred iterations, and matrices are written out where they are small.
        memory_limit: bytes that a plan may use, as in :func:`lsconv.lstsq`.

    Returns:
        An :class:`Explanation`.

    Raises:
        LsconvError: what :func:`lsconv.lstsq` raises for the same arguments.

    Example:
        >>> A = lsconv.Conv2d(torch.ones(1, 1, 1, 1), in_size=(4, 4))
        >>> print(lsconv.explain(A).reasons[0])
        the outputs read disjoint patches, or all of the input at once: one small matrix per group
    """
    A = accept_operator(A)
    numbers = torch.Generator().manual_seed(0)
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=A.dtype, generator=numbers).to(A.device)

    def plan_by(method: str) -> Any:
        # "normal" and "svd" are measured where their matrix is no larger than the largest dense factor of a border
        limit = 16 * EXACT_UNKNOWNS**2 if memory_limit is None and method in ("normal", "svd") else memory_limit
        if L is None:
            return route(A, damp, method=method, memory_limit=limit)
        return penalty_plan(A, L, damp, method=method, memory_limit=limit)

    methods: tuple[str, ...] = ("auto", *SMALL_MATRICES, "fourier", "border", "svd", "lsmr")
    if L is not None:
        methods = ("auto", "fourier", "border", "lsmr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = plan_by("auto")
        measured = {method: _measured(plan_by, method, y) for method in methods} if measure else {}
    return Explanation(repr(plan), tuple(_reasons(plan)), measured)


def _reasons(plan: Plan) -> list[str]:
    """The reasons of this plan and those inside it, and of the border's factors."""
    inverse = getattr(plan.innermost, "inverse", None)
    return [*plan.reasons(), *([_outlook(inverse)] if isinstance(inverse, BorderInverse) else [])]


def _outlook(inverse: BorderInverse) -> str:
    """Say whether the border is factorised or iterated on, with both costs in iterations."""
    if inverse.direct is not None or inverse.dense is not None:
        return "its factors are made"
    cost, expected, fits = inverse.policy.forecast(1)
    if not fits:
        return "the factors of the border do not fit in memory: it is iterated on"
    how = "are made at once" if cost <= expected else "are made when iterations have cost as much"
    return f"the factors of the border cost {cost:.0f} of its iterations, {expected:.0f} are expected: they {how}"


def _measured(plan_by: Any, method: str, y: Tensor) -> str:
    """Time a method, or say why it does not serve."""
    limit = {"max_iter": FALLBACK_AFTER} if method == "lsmr" else {}
    start = time.perf_counter()
    try:
        plan = plan_by(method)
        setup, start = time.perf_counter() - start, time.perf_counter()
        converged = bool(plan.solve(y, **limit).converged.all())
    except LsconvError as error:
        return f"does not serve: {error}"
    return f"setup {setup:.3g} s, an answer {time.perf_counter() - start:.3g} s{'' if converged else ', not converged'}"
