"""The house as its imports draw it, lazy ones and those for type checking included: floors, and no circles."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import lsconv
import lsconv.app

ROOT = Path(__file__).parents[1]
# The recursion that is meant: A + B makes a Sum, and a real A on complex data a Complexified, so the interface of an
# operator imports the operators made of others.
RECURSION = {f"lsconv.operators.{name}" for name in ("base", "algebra", "checks", "dtypes", "elementary", "scipy")}
# A folder imports from those that come after it.
FLOORS = (
    "napari", "deepinv", "app", "nn", "inverse", "tiled", "border", "fourier", "factored", "krylov", "operators", "psf",
    "errors",
)  # fmt: skip
ROOMS = (
    ("lsconv.krylov.gradients", "lsconv.krylov.loop"),
    ("lsconv.border.system", "lsconv.border.direct"),
    ("lsconv.inverse.damping", "lsconv.inverse.admm"),
)
# Tuning, flags and tables. The number falls as mechanisms go.
MOST_CONSTANTS = 60
# Words that a reader of the field does not know, or knows in another sense, as names in the code.
FORBIDDEN = {
    "Again", "Effort", "GLANCE", "Kept", "Way", "any_followed", "hand_over", "keep_pages", "keeping",
    "made_of", "outgrown", "plainly", "second_opinion", "slab", "strengthen", "in_units", "Verdict",
    "asked", "likeness", "merit", "what",
}  # fmt: skip
# A docstring says what a thing is or does; it does not begin with a question or a reference.
FIRST_WORDS = {"As", "How", "If", "It", "Of", "So", "That", "Those", "What", "Where", "Whether", "Who", "Why"}
# What is left of both, by folder; the counts only fall.
KNOWN_FIRST_WORDS: dict[str, int] = {}
KNOWN_NAMES: dict[str, int] = {}
# Tests of claims that all modules of a folder make together, by folder; others are named after their module.
CLAIMS_OF_ALL = {
    "app": {"deblur", "folders", "interrupt", "odd_inputs"},
    "inverse": {"bad_input", "complex_data", "freed", "gradient_fuzz", "lower_bounds"},
    "krylov": {"blocks", "cost", "faults", "faults_of_scale", "interoperation", "least_squares", "sharded",
               "specification", "square"},
    "krylov/gradients": {"transforms"},
}  # fmt: skip
# Lines of the longest file.
MOST_LINES = 400
LONG_FILES: dict[str, int] = {}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "lsconv").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else str(node.module))
    return names & set(known)


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(edges[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            component = set(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(component) > 1:
                found.append(component)

    for name in edges:
        if name not in index:
            visit(name)
    return found


def floor(name: str) -> int:
    parts = name.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 else -1


def numbers(path: Path) -> Iterator[str]:
    """The names at the top of a file that stand for numbers, alone or in a tuple or table."""
    plain = (ast.Constant, ast.Name, ast.Attribute, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List, ast.Set, ast.Dict)
    for node in tree(path).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        inside = [n for n in ast.walk(node.value) if isinstance(n, ast.expr)]
        values = [n.value for n in inside if isinstance(n, ast.Constant)]
        if all(isinstance(n, plain) for n in inside) and any(type(value) in (int, float) for value in values):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def test_the_only_circle_is_the_recursion_of_the_operators() -> None:
    found = circles(graph())
    assert found == [RECURSION], [sorted(c) for c in found]


def test_a_file_imports_from_its_own_floor_or_a_floor_below() -> None:
    upwards = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if floor(name) >= 0 and 0 <= floor(other) < floor(name)
    ]
    assert not upwards


def test_the_iterations_know_no_convolution() -> None:
    """They know the interface of an operator, and none that has a kernel."""
    kernels = {f"lsconv.operators.{n}" for n in ("convolution", "fft_convolution", "direct_convolution", "difference")}
    known = {name: others & kernels for name, others in graph().items() if name.startswith("lsconv.krylov")}
    assert not {name: others for name, others in known.items() if others}


def test_a_method_knows_nothing_of_its_gradients() -> None:
    methods = [f"lsconv.krylov.{m}" for m in ("cg", "cgls", "craig", "gmres", "hybrid", "lsmr", "lsqr", "minres")]
    edges = graph()
    assert not [(m, o) for m in methods for o in edges[m] if o.startswith("lsconv.krylov.gradients")]


@pytest.mark.parametrize("upper, lower", ROOMS)
def test_a_room_knows_nothing_of_the_one_above(upper: str, lower: str) -> None:
    assert not [n for n, others in graph().items() if n.startswith(lower) for o in others if o.startswith(upper)]


def test_guests_import_the_names_that_lsconv_and_the_app_export() -> None:
    """Not from the modules behind them."""
    guests = {n: p for n, p in modules().items() if n.startswith(("lsconv.napari", "lsconv.deepinv"))}
    found = {}
    for name, path in guests.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lsconv"):
                found[name, node.module] = {alias.name for alias in node.names}
    own = {place for place in found if place[1].startswith(("lsconv.napari", "lsconv.deepinv"))}
    assert {module for _, module in set(found) - own} <= {"lsconv", "lsconv.app"}
    assert {name for place in set(found) - own for name in found[place]} <= {*lsconv.__all__, *lsconv.app.__all__}


def test_the_constants_are_counted() -> None:
    """Numbers at the top of files, app and guests aside: each is a decision that someone has to understand."""
    outside = ("lsconv.app", "lsconv.deepinv", "lsconv.napari")
    counts = {n: list(numbers(p)) for n, p in modules().items() if not n.startswith(outside)}
    total = sum(map(len, counts.values()))
    for name, found in sorted(counts.items(), key=lambda item: -len(item[1]))[:12]:
        print(f"{len(found):4} {name}: {', '.join(found)}")
    print(f"{total:4} in all")
    assert total <= MOST_CONSTANTS


def test_a_circle_is_found_wherever_the_import_stands(tmp_path: Path) -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(edges) == [{"a", "b", "c"}]
    file = tmp_path / "a.py"
    file.write_text("if False:\n    from p import b\n\n\ndef f():\n    import p.c\n    from p.d import g\n")
    assert imports(file, dict.fromkeys(("p.b", "p.c", "p.d", "p"), file)) == {"p.b", "p.c", "p.d"}


def test_the_map_of_the_house_names_every_file_by_its_first_line() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^- `(\S+\.py)` (.+)$", page, re.MULTILINE))
    here = set()
    for path in modules().values():
        docstring = ast.get_docstring(tree(path))
        assert docstring, path
        if path.name != "__init__.py":
            name = path.name if path.parent != ROOT / "lsconv" else path.relative_to(ROOT / "lsconv").as_posix()
            here.add((name, docstring.splitlines()[0]))
    assert listed == here


def test_the_files_that_a_page_names_exist() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
            assert (ROOT / "lsconv" / name).exists() or (ROOT / name).exists(), f"{page.name}: {name}"


def folder(path: Path) -> str:
    return path.parent.relative_to(ROOT / "lsconv").as_posix()


def documented(tree: ast.Module) -> Iterator[str]:
    """Every docstring of a file."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def names_in(tree: ast.Module) -> Iterator[str]:
    """Every name that a file defines: of functions and their parameters, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    found: Counter[str] = Counter()
    for path in modules().values():
        for docstring in documented(tree(path)):
            first = re.match(r"\W*(\w+)", docstring)
            found[folder(path)] += first is not None and first[1] in FIRST_WORDS
    assert {name: count for name, count in found.items() if count > KNOWN_FIRST_WORDS.get(name, 0)} == {}


def test_names_are_words_of_the_field() -> None:
    found: Counter[str] = Counter()
    for path in modules().values():
        for name in names_in(tree(path)):
            found[folder(path)] += name.lstrip("_") in FORBIDDEN
    print({name: count for name, count in found.items() if count})
    assert {name: count for name, count in found.items() if count > KNOWN_NAMES.get(name, 0)} == {}


def test_no_file_is_longer_than_a_reader_follows() -> None:
    lines = {path.relative_to(ROOT / "lsconv").as_posix(): len(path.read_text(encoding="utf-8").splitlines())
             for path in modules().values()}  # fmt: skip
    assert {name: count for name, count in lines.items() if count > LONG_FILES.get(name, MOST_LINES)} == {}


def test_a_file_of_tests_is_named_after_its_module() -> None:
    """Or begins with its name, as ``test_lstsq_rcond.py`` does; what all of a folder claim has a name of its own."""
    misplaced = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        place, claim = path.parent.relative_to(ROOT / "tests").as_posix(), path.stem.removeprefix("test_")
        own = {module.stem for module in (ROOT / "lsconv" / place).glob("*.py")} if place != "." else set()
        if (
            own
            and claim not in CLAIMS_OF_ALL.get(place, ())
            and not any(claim == name or claim.startswith(f"{name}_") for name in own)
        ):
            misplaced.append(path.relative_to(ROOT).as_posix())
    assert misplaced == []


def test_every_public_name_is_listed_once_and_every_error_of_a_docstring_is_public() -> None:
    assert len(set(lsconv.__all__)) == len(lsconv.__all__)
    missing = [name for name in lsconv.__all__ if name not in (lsconv.__doc__ or "")]
    assert missing == []
    named = {name for path in modules().values() for text in documented(tree(path))
             for name in re.findall(r"\b[A-Z]\w+(?:Error|Warning)\b", text)}  # fmt: skip
    here = {name for name in named if hasattr(lsconv.errors, name)}
    assert here
    assert here <= set(lsconv.__all__)


def test_the_page_for_contributors_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.py)`", text):
        if "NAME" not in name and "/" in name:
            assert (ROOT / "lsconv" / name).exists() or (ROOT / name).exists(), name


def test_a_lane_of_few_files_has_all_tests_of_its_mark() -> None:
    """``.ci/run`` names the places of these marks, and collects no others for them."""
    places = {"distributed": "tests/tiled", "deepinv": "tests/test_deepinv.py", "napari": "tests/napari"}
    lanes = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for mark, place in places.items():
        assert re.search(rf'^check pytest -m ("?|".* or ){mark}\b.*{re.escape(place)}', lanes, re.MULTILINE), mark
        marked = [path for path in (ROOT / "tests").rglob("*.py") if f"mark.{mark}" in path.read_text(encoding="utf-8")]
        assert marked
        assert all(str(path.relative_to(ROOT)).startswith(place) for path in marked), mark
