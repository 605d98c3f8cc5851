"""A short search finds no certified wrong answer, and a long one would find those that there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import lsconv


def test_every_way_serves_some_problem_and_states_its_tolerance() -> None:
    from benchmarks.certificates.problems import draw
    from benchmarks.certificates.ways import WAYS

    unserved = dict(WAYS)
    for problem in filter(None, map(draw, range(300))):
        for name in [name for name, way in unserved.items() if way.serves(problem)]:
            assert 0 < unserved.pop(name).tolerance(problem, name) < 1e-1
        if not unserved:
            break
    assert not unserved


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=[pytest.mark.slow] if n in (4, 5) or n > 8 else []) for n in range(12)]
)
def test_no_answer_of_a_short_search_is_certified_and_wrong(seed: int) -> None:
    from benchmarks.fuzz import problem_cases

    wrong = [f"{case.way}, item {case.item}: {case.text}" for case in problem_cases(seed) if case.wrong]
    assert not wrong


def test_a_solver_that_certifies_wrong_answers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import fuzz

    right = lsconv.lstsq

    def wrong(*args: Any, **options: Any) -> lsconv.Solution:
        solution = right(*args, **options)
        return dataclasses.replace(solution, x=1.01 * solution.x, converged=torch.ones_like(solution.converged))

    monkeypatch.setattr(lsconv, "lstsq", wrong)
    tables, bad = fuzz.search(200, 0)
    total = tables[0].rows[-1]
    assert total["cases"] >= 200
    assert total["certified wrong"] == sum(case.wrong for case in bad) > 50
    assert {case.seed for case in bad if case.wrong} <= set(range(10))
    replayed = fuzz.problem_cases(next(case.seed for case in bad if case.wrong))
    assert any(case.wrong for case in replayed)


def test_a_crash_is_counted_and_a_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.certificates.problems import draw
    from benchmarks.certificates.ways import solve

    problem = draw(3)
    assert problem is not None
    for error, outcome in ((RuntimeError("broken"), "crash"), (lsconv.errors.MethodError("not this"), "refused")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(lsconv, "lstsq", fail)
        cases = solve(problem, "lsmr")
        assert len(cases) == len(problem.items)
        assert {case.outcome for case in cases} == {outcome}
