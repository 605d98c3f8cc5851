"""One solve by a Krylov method: the iteration, a look at what it leaves in the null space of A, and the report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import Scalar
from lsconv.krylov.loop.evidence import RankThreshold
from lsconv.krylov.loop.iteration import iterate
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.null_space import settle_null_space
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.loop.solution import Solution, report
from lsconv.krylov.loop.stopping import EXCUSED

__all__ = ["Setup", "solve", "unmodified"]


# A function of a problem that returns two: one builds the method at a start, the other takes x out of its iterate.
Setup = Callable[[Problem], tuple[Callable[["Tensor | None", Scalar], Method], Callable[[Tensor], Tensor]]]


def unmodified(method: Callable[[Problem, Tensor | None, Scalar], Method]) -> Setup:
    """Return the setup of a method that works on the problem as it is, and whose iterate is x."""
    return lambda problem: (lambda x, running: method(problem, x, running), lambda z: z)


def solve(problem: Problem, options: Options, build: Setup, *, square: bool = False, name: str = "") -> Solution:
    """:func:`iterate`; items that may have a part in the null space of A are compared with the shortest solution.

    Args:
        problem, options, square, name: as for :func:`iterate`.
        build: builds the method, here and for the shortest solution.
    """
    start, extract = build(problem)
    solution = iterate(problem, options, start, extract=extract, square=square, name=name, quiet=True)
    tolerances = options.tolerances
    judge = Judge(problem.A, tolerances, solution.damp, rounding=tolerances.rounding,
                  rank=RankThreshold(length_limit=EXCUSED))  # fmt: skip
    certify = functools.partial(judge.solution, y=problem.y, iterations=solution.iterations)
    shortest = functools.partial(_shortest, problem, options, build)
    solution = settle_null_space(solution, solution.x, problem.y, problem.A, tolerances, shortest, certify)
    report(solution, name, raise_on_failure=options.raise_on_failure)
    return solution


def _shortest(problem: Problem, options: Options, build: Setup, y: Tensor, rtol: float) -> Tensor:
    """The least-norm solution for consistent data, by the same method without damping, preconditioner and start."""
    none = torch.zeros_like(problem.nonfinite)
    plain = replace(problem, y=y, damp=None, M=None, N=None, x0=None, nonfinite=none, multipliers=False)
    start, extract = build(plain)
    exact = replace(options.tolerances, rtol=rtol, atol=0.0)
    silent = replace(options, tolerances=exact, callback=None, progress=False)
    return iterate(plain, silent, start, extract=extract, quiet=True).x
