"""The reach of the methods: of the well-posed problems, those that a method promises to solve.

A problem that is well-posed (:mod:`benchmarks.certificates.judge`) is *within reach* of

- every direct method, "auto", "border" and ``pinv``;
- an iteration, alone or inside ``refine``, where the condition number is at most ``MOST_CONDITION``: it has ``4 n``
  steps, and its bound takes as many as the condition number;
- "craig", "cg" and "gmres" without damping, where y is consistent to the tolerance ("cg" and "gmres": where A is
  definite or regular besides, to 1e-3), and the same for "cg" and "minres" on the normal equations: these solve
  consistent systems;
- "craig" and whatever takes M, with damping, where y is consistent, or ``damp >= eps / rtol ||A||``: they find
  ``(y - A x) / damp`` along with x, whose rounding is eps times its length;
- the circulant preconditioner, with damping, where ``damp >= 1e-3 ||A||``: it is no surrogate of an A that is nearly
  singular;
- a bare plan of the border, which nothing stands behind, where ``damp >= 1e-4 ||A||``, or A has full rank and no
  damping.
"hybrid" chooses the damping itself and promises no x.
"""

from __future__ import annotations

import numpy as np

from benchmarks.certificates.judge import Judgement
from benchmarks.certificates.problems import Problem

__all__ = ["BARE_PLANS", "MOST_CONDITION", "NOTE", "within_reach"]

MOST_CONDITION = 1e3
BARE_PLANS = ("border, plan", "border, iterated", "border, factored", "capacitance")
NOTE = (
    f"Well-posed is within the reach of the method (`benchmarks/certificates/reach.py`): iterations up to a condition "
    f"of {MOST_CONDITION:.0e}, those for consistent systems on such, M with damp >= eps / rtol ||A||, circulants with "
    f"damp >= 1e-3 ||A||, bare plans of the border with damp >= 1e-4 ||A|| or full rank. The column *beyond reach* "
    f"counts the uncertified cases that are well-posed otherwise."
)
_ITERATIONS = ("lsmr", "lsqr", "cgls", "craig", "cg", "minres", "gmres", "refine", "tikhonov, lsmr", "trial")
_NORMAL = ("cg, normal", "minres, normal")


def within_reach(name: str, problem: Problem, item: int, damp: float, tol: float, judged: Judgement) -> bool:
    """Tell whether the method of this name promises to solve this item.

    Args:
        name: the way.
        problem: the problem.
        item: which of its items.
        damp: its damping.
        tol: the tolerance of the method.
        judged: the judge's word on all items.
    """
    if name == "hybrid" or (name.startswith(_ITERATIONS) and judged.condition[item] > MOST_CONDITION):
        return False
    which = item % len(problem.dense)
    s = problem.dense.s[which]
    share = damp / s[0] if s.size and s[0] > 0 else np.inf
    consistent = bool(judged.inconsistent[item] <= tol)
    if name in BARE_PLANS:
        full = bool(judged.rank[item] == s.size) and bool(judged.ranks[1, item] == s.size)
        return bool(share >= 1e-4) if damp > 0 else full
    if name in _NORMAL:  # of data beside the range of A, A^H leaves rounding
        return problem.items[item] != "left null" and consistent
    if damp == 0 and name in ("cg", "gmres"):
        definite = name == "gmres" or np.linalg.eigvalsh(problem.dense.matrices[which])[0] > 0
        return bool(s[-1] > 1e-3 * s[0]) and bool(definite)
    if name.startswith("craig") and damp == 0:
        return consistent
    if name.endswith("circulant") and damp > 0 and not share >= 1e-3:
        return False
    if name.startswith("craig") or name.endswith("circulant"):
        return consistent or bool(share >= (2.0**-23 if problem.bits == 32 else 2.0**-52) / tol)
    return True
