"""Solves on a CPU, a large batch in groups of items whose vectors stay in the caches.

Small items are solved together, because they share the overhead of every call. Many large ones would not fit in the
caches, and every pass over the vectors would read them from memory; and the items of a group end when its last one
does, where in a whole batch of different damping all would iterate as long as the slowest. ``python -m benchmarks
krylov_overhead`` times both.

A batch is not split where the operator (a matrix, a preconditioner) is larger than the vectors, since it is then read
once for all items, nor where there is a callback or a progress bar, which watch all items.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from lsconv.krylov.loop.batched_scalars import Scalar, scalar_dtype
from lsconv.krylov.loop.certificate import LENGTH_LIMIT, RankThreshold
from lsconv.krylov.loop.iteration import iterate
from lsconv.krylov.loop.judge import Judge
from lsconv.krylov.loop.lagrange_multipliers import collect_multipliers, pass_multipliers
from lsconv.krylov.loop.method import Method
from lsconv.krylov.loop.null_space import verify_null_space
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import Problem
from lsconv.krylov.loop.solution import History, Solution, report
from lsconv.operators.base import LinearOperator
from lsconv.operators.batch_layout import CACHE_BYTES, broadcast_shapes
from lsconv.operators.transforms import transforming

__all__ = ["Setup", "group_size", "in_groups", "solve", "unmodified"]


# A function of a problem that returns (a function that starts the method, a function that extracts x of its iterate).
Setup = Callable[[Problem], tuple[Callable[["Tensor | None", Scalar], Method], Callable[[Tensor], Tensor]]]


def unmodified(method: Callable[[Problem, Tensor | None, Scalar], Method]) -> Setup:
    """Return the setup of a method that works on the problem as it is, and whose iterate is x."""
    return lambda problem: (lambda x, running: method(problem, x, running), lambda z: z)


def solve(problem: Problem, options: Options, build: Setup, *, square: bool = False, name: str = "") -> Solution:
    """Solve by :func:`iterate`, all items at once or one group after the other.

    Args:
        problem, options, square, name: as for :func:`iterate`.
        build: builds the method for a group.
    """
    size, items = group_size(problem, options, torch.get_num_threads()), math.prod(problem.batch)
    if size >= items:
        start, extract = build(problem)
        solution = iterate(problem, options, start, extract=extract, square=square, name=name, quiet=True)
        solution = _verified_null_space(solution, problem, options, build)
        report(solution, name, raise_on_failure=options.raise_on_failure)
        return solution
    solutions, multipliers = [], []
    for first in range(0, items, size):
        part = _group(problem, first, min(first + size, items))
        start, extract = build(part)
        with collect_multipliers(problem.multipliers) as collected:
            solutions.append(iterate(part, options, start, extract=extract, square=square, name=name, quiet=True))
        multipliers.append(collected.of(solutions[-1].x))
    solution = _concatenate(solutions, problem.batch)
    found = [z for z in multipliers if z is not None]
    if len(found) == len(solutions):
        pass_multipliers(solution.x, torch.cat(found).reshape(*problem.batch, *problem.A.out_shape))
    solution = _verified_null_space(solution, problem, options, build)
    report(solution, name, raise_on_failure=options.raise_on_failure)
    return solution


def _verified_null_space(solution: Solution, problem: Problem, options: Options, build: Setup) -> Solution:
    """Compare the items that may have a part in the null space of A with the shortest solution."""
    tolerances = options.tolerances
    judge = Judge(problem.A, tolerances, solution.damp, rounding=tolerances.rounding,
                  rank=RankThreshold(length_limit=LENGTH_LIMIT))  # fmt: skip
    certify = functools.partial(judge.solution, y=problem.y, iterations=solution.iterations)
    shortest = functools.partial(_shortest, problem, options, build)
    return verify_null_space(solution, solution.x, problem.y, problem.A, tolerances, shortest, certify)


def _shortest(problem: Problem, options: Options, build: Setup, y: Tensor, rtol: float) -> Tensor:
    """The least-norm solution for consistent data, by the same method without damping, preconditioner and start."""
    none = torch.zeros_like(problem.nonfinite)
    plain = replace(problem, y=y, damp=None, M=None, N=None, x0=None, nonfinite=none, multipliers=False)
    start, extract = build(plain)
    exact = replace(options.tolerances, rtol=rtol, atol=0.0)
    silent = replace(options, tolerances=exact, callback=None, progress=False)
    return iterate(plain, silent, start, extract=extract, quiet=True).x


def group_size(problem: Problem, options: Options, threads: int) -> int:
    """Return the number of items to solve at once, by so many threads."""
    A, items = problem.A, math.prod(problem.batch)
    watched = options.callback is not None or options.progress
    if watched or problem.M is not None or problem.N is not None:
        return items
    return _items_per_group(A, problem.y, items, threads)


def _items_per_group(A: LinearOperator, y: Tensor, items: int, threads: int) -> int:
    """Return the number of items whose vectors fit in the caches; all of them where splitting does not pay."""
    numel = max(A.in_numel, A.out_numel)
    limit = CACHE_BYTES * min(threads, 4)  # more threads share the bandwidth of the memory
    if A.device.type != "cpu" or items == 1 or numel * A.dtype.itemsize * items <= limit:
        return items
    if type(y) is not Tensor or transforming() or torch.compiler.is_compiling():
        return items
    # The batch is split only if A is made of small tensors that all items share.
    only_tensors = A.capturable and math.prod(A.batch_shape) == 1
    if not only_tensors or sum(tensor.numel() for tensor in A.parameters()) > numel:
        return items
    size = limit // (numel * A.dtype.itemsize)
    return size if size > 2 else 1  # one item has Python numbers for scalars, which is faster than two items together


def in_groups(
    A: LinearOperator, y: Tensor, damp: Tensor | float, answer: Callable[[Tensor, Tensor], Solution]
) -> Solution:
    """Solve for all data, group by group, by a function that returns certified solutions.

    Args:
        A: the operator.
        y: right-hand sides ``(*batch, *out_shape)``.
        damp: the damping, a number or one per batch item.
        answer: a function of the data and the damping of a group that returns its solution.
    """
    damping = torch.as_tensor(damp, dtype=scalar_dtype(A.device), device=A.device)
    item = len(A.out_shape)
    batch = broadcast_shapes(y.shape[: y.ndim - item], damping.shape, A.batch_shape)
    items = math.prod(batch)
    size = _items_per_group(A, y, items, torch.get_num_threads())
    if size >= items:
        return answer(y, damping)
    y, damping = y.expand(*batch, *A.out_shape).flatten(0, -item - 1), damping.expand(batch).flatten()
    return _concatenate([answer(*part) for part in zip(y.split(size), damping.split(size), strict=True)], batch)


def _group(problem: Problem, first: int, last: int) -> Problem:
    """The problem of the items from ``first`` to ``last``, with one batch dimension."""
    lead = len(problem.batch)

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1, *tensor.shape[lead:])[first:last]

    damp = part(problem.damp)
    values = {name: part(getattr(problem, name)) for name in ("y", "x0", "nonfinite")}
    return replace(
        problem,
        **values,  # type: ignore[arg-type]
        damp=damp if damp is not None and bool((damp > 0).any()) else None,
        batch=torch.Size((last - first,)),
        host_scalars=last - first == 1,
    )


def _concatenate(solutions: list[Solution], batch: torch.Size) -> Solution:
    """Concatenate the solutions of groups to one of all items."""

    def join(name: str) -> Tensor | None:
        values: list[Tensor | None] = [getattr(solution, name) for solution in solutions]
        if any(value is None for value in values):
            return None
        joined = torch.cat(values)  # type: ignore[arg-type]
        return joined.reshape(*batch, *joined.shape[1:])

    names = [field.name for field in fields(Solution) if field.name not in ("history", "selection")]
    histories = [solution.history for solution in solutions if solution.history is not None]
    columns = {}
    for field in fields(History):
        rows = [getattr(history, field.name) for history in histories]
        length = max(len(row) for row in rows)
        padded = [torch.nn.functional.pad(row, (0, 0, 0, length - len(row)), value=math.nan) for row in rows]
        columns[field.name] = torch.cat(padded, 1).reshape(length, *batch)
    return Solution(**{name: join(name) for name in names}, history=History(**columns))  # type: ignore[arg-type]
