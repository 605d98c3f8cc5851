"""The choice of a plan in words: the one that "auto" takes, why, and the others beside it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.normal_inverse import BorderInverse
from lsconv.border.plan import BorderPlan
from lsconv.border.stacked_plan import StackedPlan
from lsconv.errors import LsconvError
from lsconv.factored.kronecker import SeparablePlan
from lsconv.factored.normal_equations import NormalEquationsPlan
from lsconv.factored.patch_matrix import PatchPlan
from lsconv.factored.singular_values import SingularValuePlan
from lsconv.inverse.adjoint_plan import AdjointPlan
from lsconv.inverse.missing import MissingPlan
from lsconv.inverse.plans import FourierPlan, KrylovPlan, KrylovStack
from lsconv.inverse.reduced_plan import ReducedPlan
from lsconv.inverse.route import penalty_plan, route
from lsconv.inverse.small_matrices import SMALL_MATRICES
from lsconv.inverse.trial_plan import TrialPlan
from lsconv.inverse.varying import VaryingPlan
from lsconv.inverse.weighted import WeightedPlan
from lsconv.krylov.loop.problem import as_operator
from lsconv.operators.base import LinearOperator

__all__ = ["Explanation", "explain"]

# The first that a plan is one of says why it was taken.
_REASONS: tuple[tuple[type, str], ...] = (
    (PatchPlan, "the outputs read disjoint patches, or all of the input at once: one small matrix per group"),
    (SeparablePlan, "the kernel is a product of one kernel per axis: the singular values of each axis give all others"),
    (NormalEquationsPlan, "x has few unknowns: their normal equations are one small matrix"),
    (SingularValuePlan, "the problem is small: its matrix is decomposed"),
    (FourierPlan, "nothing is cropped from a circular convolution: one small matrix per frequency"),
    (MissingPlan, "outputs are missing: the plan of the whole convolution, and an iteration on what is missing"),
    (WeightedPlan, "the weights vary: an iteration, preconditioned by the border of their mean"),
    (VaryingPlan, "the kernel varies: an iteration, preconditioned by tiles with the kernel of their place"),
    (CapacitancePlan, "a square convolution without damping: the capacitance matrix of its border is factorised"),
    (BorderPlan, "a convolution is a circulant but for its border: the border is solved for"),
    (StackedPlan, "A and L are convolutions of one grid: the border of both is solved for"),
    (TrialPlan, "the setup of the border would cost more than LSMR may need: LSMR first, then the border"),
    (KrylovPlan, "no structure, or a null space that the border does not resolve: an iteration that only applies A"),
    (KrylovStack, "A and L share no grid: LSMR on [A; damp L]"),
)
# Iterations after which a measured Krylov method counts as too slow.
_MOST_ITERATIONS = 300
# Bytes up to which a whole matrix is decomposed to be measured.
_DENSE_BYTES = 2**28


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
    A = as_operator(A)
    numbers = torch.Generator().manual_seed(0)
    y = torch.randn(*A.batch_shape, *A.out_shape, dtype=A.dtype, generator=numbers).to(A.device)

    def plan_by(method: str) -> Any:
        limit = _DENSE_BYTES if memory_limit is None and method in ("normal", "svd") else memory_limit
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


def _reasons(plan: Any) -> list[str]:
    """Why this plan, and those inside it."""
    if isinstance(plan, ReducedPlan):
        return [
            "the kernel has margins of zeros, or an extent of one along some axes, which are a batch",
            *_reasons(plan.plan),
        ]
    if isinstance(plan, AdjointPlan):
        return ["the adjoint of a convolution is solved with by the plan of the convolution", *_reasons(plan.plan)]
    reasons = [next((reason for kind, reason in _REASONS if isinstance(plan, kind)), type(plan).__name__)]
    inverse = getattr(plan, "inverse", None)
    return [*reasons, _outlook(inverse)] if isinstance(inverse, BorderInverse) else reasons


def _outlook(inverse: BorderInverse) -> str:
    """Say whether the border is factorised or iterated on, and why."""
    if inverse.direct is not None:
        return "its factors are made"
    cost, expected, fits = inverse.forecast(inverse.embedding.batch_shape)
    if not fits:
        return "the factors of the border do not fit in memory: it is iterated on"
    how = "are made at once" if cost <= expected else "are made when iterations have cost as much"
    return f"the factors of the border cost {cost:.0f} of its iterations, {expected:.0f} are expected: they {how}"


def _measured(plan_by: Any, method: str, y: Tensor) -> str:
    """How long a method takes, or why it does not serve."""
    limit = {"max_iter": _MOST_ITERATIONS} if method == "lsmr" else {}
    start = time.perf_counter()
    try:
        plan = plan_by(method)
        setup, start = time.perf_counter() - start, time.perf_counter()
        converged = bool(plan.solve(y, **limit).converged.all())
    except LsconvError as error:
        return f"does not serve: {error}"
    return f"setup {setup:.3g} s, an answer {time.perf_counter() - start:.3g} s{'' if converged else ', not converged'}"
