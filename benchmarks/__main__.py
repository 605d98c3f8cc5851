"""``python -m benchmarks [NAME ...] [--quick] [--output DIR] [--threads N] [--pages]``: print and write tables."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import pkgutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import benchmarks
import lsconv
from benchmarks import fuzz, pages, runner

_NO_QUESTION = {"__main__", "certificates", "runner", "peers", "pages"}
_FIRST = ("question", "deblurring", "scaling", "border_iteration")  # what matters most comes first
# a cost model that is fitted, a search, and what needs a package that is no part of the extra bench
ONLY_WHEN_NAMED = {"convolution_backend", "deepinv_prox", "fuzz"}


def names() -> list[str]:
    """The files of this folder that a name on the command line can mean."""
    return sorted(info.name for info in pkgutil.iter_modules(benchmarks.__path__) if info.name not in _NO_QUESTION)


def run(name: str, *, quick: bool, output: Path) -> None:
    """Run one benchmark; its tables are printed and written as they come."""
    module = importlib.import_module(f"benchmarks.{name}")
    question = (inspect.getdoc(module) or name).splitlines()[0]
    print(f"\n## {question}\n", flush=True)
    torch.manual_seed(0)
    start = time.perf_counter()
    done: list[runner.Table] = []

    def write(complete: bool) -> None:
        seconds = time.perf_counter() - start
        runner.write(name, question, done, output, quick=quick, seconds=seconds, complete=complete)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)  # what was reached is measured and shown
        if hasattr(module, "tables"):
            for table in module.tables(quick=quick):
                print(table.markdown(), flush=True)
                done.append(table)
                write(complete=False)
        else:
            done.extend(printed(module.main))
    write(complete=True)
    print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


def printed(main: Callable[[], object]) -> list[runner.Table]:
    """The Markdown tables that a script prints, each titled by the line of text before it."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main()
    print(output.getvalue(), flush=True)
    tables: list[runner.Table] = []
    title, columns, rows = "", [], []
    for line in [*output.getvalue().splitlines(), ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not columns:
                columns = cells
            elif set("".join(cells)) - set("-:"):  # not the rule under the head
                rows.append(dict(zip(columns, cells, strict=True)))
            continue
        if rows:
            tables.append(runner.Table(title, rows))
        columns, rows = [], []
        title = line.strip() or title
    return tables


def chosen(quick: bool) -> list[str]:
    """What runs when nothing is named: all benchmarks, of which the quick round leaves out those that have none."""
    found = [name for name in names() if name not in ONLY_WHEN_NAMED]
    found.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return [name for name in found if not quick or hasattr(importlib.import_module(f"benchmarks.{name}"), "tables")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named, or all; 1 where one of them could not run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["fuzz"]:  # a search has options of its own
        return fuzz.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; all by default. Known: {', '.join(names())}")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="folder of the JSON and Markdown"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice by default")
    parser.add_argument(
        "--pages", action="store_true", help="run nothing: fill the tables of README.md and docs from --output"
    )
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; known: {', '.join(names())}")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads: expected a number >= 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.pages:
        for page in pages.PAGES:
            file = Path(__file__).parents[1] / page
            file.write_text(pages.filled(file.read_text(), options.output))
        return 0
    print(runner.described(runner.machine()))
    failed = False
    for name in options.names or chosen(options.quick):
        try:
            run(name, quick=options.quick, output=options.output)
        except ImportError as error:
            print(f"{name} left out: {error}; pip install -c constraints.txt -e '.[bench,deepinv]'", file=sys.stderr)
            failed = True
        except Exception:  # the others still run, and what this one has measured is written
            traceback.print_exc()
            print(f"{name} failed", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
