"""What installing and importing lsconv brings, and what it does not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import pytest

import lsconv

ROOT = Path(__file__).parent.parent


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_the_import_loads_neither_matplotlib_nor_scipys_solvers() -> None:
    code = "import sys, lsconv; print([n for n in sys.modules if n in ('matplotlib', 'scipy.sparse.linalg')])"
    assert in_a_new_process(code) == "[]"


@pytest.mark.slow
def test_the_import_takes_little_beyond_torchs_own() -> None:
    code = (
        "import time, torch; start = time.process_time(); import lsconv; imported = time.process_time(); "
        "lsconv.lstsq; print(imported - start, time.process_time() - imported)"
    )
    times = [[float(part) for part in in_a_new_process(code).split()] for _ in range(3)]
    ours, first = (min(part) for part in zip(*times, strict=True))
    print(f"import lsconv beyond torch: {ours:.3f} s, lsconv.lstsq for the first time: {first:.3f} s")
    assert ours < 0.15


def test_every_public_name_is_imported_from_where_the_type_checker_finds_it() -> None:
    tree = ast.parse((ROOT / "lsconv" / "__init__.py").read_text(encoding="utf-8"))
    checked = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "lsconv")
        for alias in node.names
    }
    assert {*checked, "nn", "psf", "tiled"} == set(lsconv.__all__)
    assert {name: module for name, module in checked.items() if module != "lsconv.errors"} == lsconv._HOME
    assert all(getattr(lsconv, name) is not None for name in lsconv.__all__)
    assert set(lsconv.__all__) <= set(dir(lsconv))
    with pytest.raises(AttributeError, match="module 'lsconv' has no attribute 'inverse_of'"):
        _ = lsconv.inverse_of


@pytest.mark.slow
@pytest.mark.parametrize(
    "calls",
    [
        "lsconv.lsqr(A, y, damp=0.1, max_iter=9); lsconv.tikhonov(A, y, 0.1, L=lsconv.Gradient(A.in_shape)); "
        "lsconv.vstack([A, A])(y); lsconv.deconvolve(y[0, 0], torch.ones(3, 3) / 9, damp=0.1)",
        "V = lsconv.Conv3d(torch.rand(1, 1, 3, 5, 5), in_size=(8, 24, 24)); lsconv.lstsq(V, torch.ones(V.out_shape)); "
        "V = lsconv.Conv3d(torch.rand(1, 1, 3, 5, 5), (8, 24, 24), padding=(1, 2, 2)); lsconv.pinv(V, damp=0.1)",
        "lsconv.choose_damp(A, y); lsconv.total_variation(A, y[0], weight=0.1); print(lsconv.explain(A, damp=0.1))",
    ],
)
def test_the_first_calls_do_not_import_sympy(calls: str) -> None:
    code = (
        "import sys, warnings, torch, lsconv; warnings.simplefilter('ignore'); "
        "A = lsconv.Conv2d(torch.ones(1, 1, 3, 3), in_size=(8, 8), padding=1); y = torch.ones(2, 1, 8, 8); "
        f"lsconv.lstsq(A, y, damp=0.1); {calls}; print('sympy' in sys.modules)"
    )
    assert in_a_new_process(code).split()[-1] == "False"


def test_shapes_are_broadcast_without_sympy() -> None:
    used = [file.name for file in (ROOT / "lsconv").rglob("*.py") if "torch.broadcast_shapes(" in file.read_text()]
    assert used == []


def test_types_and_data_are_in_the_package() -> None:
    package = resources.files("lsconv")
    assert (package / "py.typed").is_file()
    assert (package / "app" / "data" / "astronaut-256.png").is_file()
    assert "public domain" in (package / "app" / "data" / "README.md").read_text(encoding="utf-8")


def test_citation_and_changelog_are_of_this_version() -> None:
    found = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found[1] == version("lsconv")
    assert f"\n## {version('lsconv')} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_is_short_and_links_to_pages_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_page_of_the_gallery_has_its_place() -> None:
    folder = ROOT / "docs" / "gallery_scripts"
    assert sorted((folder / "order.txt").read_text(encoding="utf-8").split()) == sorted(
        path.name for path in folder.glob("*.py")
    )


def test_the_ci_script_runs_readmes_test_command() -> None:
    readme, script = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        (ROOT / ".ci" / "run").read_text(encoding="utf-8"),
    )
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest\n' in readme
    assert re.search(r"^pip install .*-c constraints\.txt -e \"\.\[dev\]\"$", script, re.MULTILINE)
    assert re.search(r"^check pytest( --durations=\d+)?$", script, re.MULTILINE)
