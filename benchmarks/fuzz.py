"""Which certified answers are wrong? Problems drawn from the whole signature, each answer held against a dense oracle.

``python -m benchmarks fuzz --cases N --seed S [--jobs J]`` searches; ``--only SEED`` replays one problem and says what
is wrong; ``--sum FOLDER ...`` adds up what several searches have written. A *case* is one batch item solved by one way;
a problem, drawn from one integer, has up to 24 items and is solved by several ways. What is right, well-posed and
minimum-norm is defined in :mod:`benchmarks.certificates.judge`.

The columns: *certified wrong* are converged and right at no rank; *uncertified well-posed* did not converge although
the problem has one solution that its dtype can tell and the method promises to find, and *beyond reach* those that it
does not promise to find (:mod:`benchmarks.certificates.reach`); *false alarms* are uncertified well-posed ones whose
answer meets the tolerance, and warnings about answers that all converged; *crashes* are exceptions other than a refusal
of a method by name.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import runner
from benchmarks.certificates.problems import draw
from benchmarks.certificates.reach import BARE_PLANS, NOTE
from benchmarks.certificates.ways import WAYS, Case, solve

__all__ = ["cases", "main", "problem_cases", "search", "tables"]

_LANE = 1_000_000  # problems of a lane: seed S draws S * 10^6, S * 10^6 + 1, ...
_WAYS_EACH = 7
_QUESTION = "Which certified answers are wrong?"


def problem_cases(seed: int, *, every_way: bool = False) -> list[Case]:
    """All cases of the problem of this seed, by a few of the ways that serve it, drawn as well."""
    torch.set_num_threads(1)
    problem = draw(seed)
    if problem is None:
        return []
    torch.manual_seed(seed)
    serving = [name for name, way in WAYS.items() if way.serves(problem)]
    rng = np.random.default_rng([seed, 1])
    if not every_way and len(serving) > _WAYS_EACH:
        weights = np.array([WAYS[name].weight for name in serving])
        chosen = rng.choice(len(serving), _WAYS_EACH, replace=False, p=weights / weights.sum())
        serving = [serving[i] for i in sorted(chosen)]
    return [case for name in serving for case in solve(problem, name)]


def cases(count: int, seed: int, jobs: int = 1) -> Iterator[list[Case]]:
    """The cases of one problem after the other, until ``count`` have been solved."""
    seeds = range(seed * _LANE, (seed + 1) * _LANE)
    done = 0
    if jobs == 1:
        for part in map(problem_cases, seeds):
            yield part
            done += sum(case.outcome != "refused" for case in part)
            if done >= count:
                return
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for part in pool.imap(problem_cases, seeds, chunksize=4):
            yield part
            done += sum(case.outcome != "refused" for case in part)
            if done >= count:
                pool.terminate()
                return


def search(count: int, *seeds: int, jobs: int = 1) -> tuple[list[runner.Table], list[Case]]:
    """The tables of ``count`` cases of each seed, and the cases that are wrong, false alarms or crashes."""
    start = time.perf_counter()
    rows: dict[tuple[str, str], Counter[str]] = {}
    kinds: dict[tuple[str, str], Counter[str]] = {}
    bad: list[Case] = []
    for part in itertools.chain.from_iterable(cases(count, seed, jobs) for seed in seeds):
        for case in part:
            for counts in (rows.setdefault((case.way, case.damping), Counter()),
                           kinds.setdefault((case.kind, case.damping), Counter())):  # fmt: skip
                _count(counts, case)
            if (
                case.wrong
                or case.false_alarm
                or case.outcome == "crash"
                or (case.well_posed and case.outcome == "uncertified")
            ):
                bad.append(case)
    total = sum((counts for counts in rows.values()), Counter())
    whole = sum((counts for (way, _), counts in rows.items() if way not in BARE_PLANS), Counter())
    seconds = time.perf_counter() - start
    order = list(WAYS)
    by_way = [_row({"way": way, "damping": damping}, rows[way, damping])
              for way, damping in sorted(rows, key=lambda key: (order.index(key[0]), key[1]))]  # fmt: skip
    by_kind = [_row({"kernel": kind, "damping": damping}, kinds[kind, damping]) for kind, damping in sorted(kinds)]
    listed = ", ".join(map(str, seeds))
    note = f"{total['cases'] / seconds:.0f} cases/s, {seconds:.0f} s, {jobs} process(es) of one thread. {NOTE}"
    return [
        runner.Table(
            f"{total['cases']} cases of seed {listed}, by method",
            [*by_way, _row({"way": "all but bare plans"}, whole), _row({"way": "all"}, total)],
            note,
        ),
        runner.Table("The same, by kernel", by_kind),
    ], bad


def _count(counts: Counter[str], case: Case) -> None:
    if case.outcome in ("refused", "crash"):
        counts[case.outcome] += 1
        counts["cases"] += case.outcome == "crash"
        return
    counts["cases"] += 1
    counts[case.outcome] += 1
    counts["wrong"] += case.wrong
    counts["well-posed"] += case.well_posed
    counts["missed"] += case.well_posed and case.outcome == "uncertified"
    counts["beyond"] += case.posed and not case.well_posed and case.outcome == "uncertified"
    counts["alarm"] += case.false_alarm


def _row(head: dict[str, str], counts: Counter[str]) -> dict[str, object]:
    return {
        **head,
        "cases": counts["cases"],
        "certified": counts["certified"],
        "certified wrong": counts["wrong"],
        "uncertified": counts["uncertified"],
        "well-posed": counts["well-posed"],
        "uncertified well-posed": counts["missed"],
        "false alarms": counts["alarm"],
        "beyond reach": counts["beyond"],
        "crashes": counts["crash"],
        "refused": counts["refused"],
    }


def summed(folders: Sequence[Path]) -> list[runner.Table]:
    """The tables of several searches, whose results are in these folders, as those of one."""
    found = [json.loads((folder / "fuzz.json").read_text())["tables"] for folder in folders]
    added: list[dict[tuple[str, ...], Counter[str]]] = [{}, {}]
    for tables in found:
        for rows, table in zip(added, tables, strict=True):
            for row in table["rows"]:
                head = tuple(value for value in row.values() if isinstance(value, str))
                rows.setdefault(head, Counter()).update({k: v for k, v in row.items() if not isinstance(v, str)})
    whole = [("all but bare plans",), ("all",)]
    added[0][whole[0]] = Counter()
    for head, rows in added[0].items():
        if head not in whole and head[0] not in BARE_PLANS:
            added[0][whole[0]].update(rows)
    ways = sorted(added[0], key=lambda head: whole.index(head) + 1 if head in whole else 0)
    by_way = [dict(zip(("way", "damping"), head, strict=False)) | added[0][head] for head in ways]
    by_kind = [dict(zip(("kernel", "damping"), head, strict=True)) | added[1][head] for head in sorted(added[1])]
    searched = "; ".join(tables[0]["title"].partition(" cases of ")[2].removesuffix(", by method") for tables in found)
    title = f"{added[0]['all',]['cases']} cases of {searched}, by method"
    return [runner.Table(title, by_way, NOTE), runner.Table("The same, by kernel", by_kind)]


def tables(quick: bool) -> Iterator[runner.Table]:
    """The tables of one lane."""
    yield from search(2_000 if quick else 20_000, 0, jobs=len(os.sched_getaffinity(0)))[0]


def _print_bad(bad: Sequence[Case], most: int) -> None:
    groups = {
        "certified wrong": [c for c in bad if c.wrong],
        "crashes": [c for c in bad if c.outcome == "crash"],
        "false alarms": [c for c in bad if c.false_alarm],
        "uncertified well-posed": [c for c in bad if c.well_posed and c.outcome == "uncertified" and not c.false_alarm],
    }
    for title, found in groups.items():
        if found:
            print(f"\n{title}: {len(found)}")
        together: dict[tuple[int, str], list[Case]] = {}
        for case in found:
            together.setdefault((case.seed, case.way), []).append(case)
        for (seed, way), some in list(together.items())[:most]:
            worst = max(some, key=lambda case: case.merit)
            print(f"  --only {seed}  {way}, {worst.kind}, {len(some)} item(s), {worst.item}: {worst.text[:150]}")
        if len(together) > most:
            print(f"  and {len(together) - most} more")


def main(arguments: Sequence[str] | None = None) -> int:
    """Search, or replay one problem; 1 where an answer was certified and wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20_000, help="how many of a seed, at least; 20000 by default")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="the lanes; 0 by default")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--only", type=int, metavar="SEED", help="replay the problem of this seed, by every way")
    parser.add_argument(
        "--show", type=int, default=40, help="how many faults of each sort are listed, a problem and a way on each line"
    )
    parser.add_argument("--sum", type=Path, nargs="+", help="run nothing: add up the results in these folders")
    parser.add_argument("--output", type=Path, help="folder for the tables as JSON and Markdown")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only is not None:
        problem = draw(options.only)
        print(problem)
        if problem is not None:
            for s in problem.dense.s / np.where(problem.dense.norm > 0, problem.dense.norm, 1)[:, None]:
                print("singular values:", " ".join(f"{v:.1e}" for v in (s if s.size < 25 else [*s[:5], *s[-20:]])))
        found = problem_cases(options.only, every_way=True)
        for case in found:
            mark = "WRONG" if case.wrong else "alarm" if case.false_alarm else case.outcome
            posed = ", well-posed" if case.well_posed else ""
            print(f"{mark:12} {case.way}, item {case.item}{posed}: {case.text}")
        return int(any(case.wrong for case in found))
    if options.sum is not None:
        done = summed(options.sum)
        for table in done:
            print(table.markdown())
        if options.output is not None:
            runner.write("fuzz", _QUESTION, done, options.output, quick=False, seconds=0, complete=True)
        return 0
    start = time.perf_counter()
    done, bad = search(options.cases, *options.seed, jobs=options.jobs)
    for table in done:
        print(table.markdown())
    _print_bad(bad, options.show)
    if options.output is not None:
        runner.write("fuzz", _QUESTION, done, options.output, quick=False,
                     seconds=time.perf_counter() - start, complete=True)  # fmt: skip
    return int(any(case.wrong for case in bad))


if __name__ == "__main__":
    raise SystemExit(main())
