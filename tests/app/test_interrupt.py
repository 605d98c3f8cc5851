"""Ctrl-C ends the command in one line with exit status 130, whatever it is doing, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
START = "from lsconv_command import main; print('started', flush=True); main()"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="another kind of interruption")


def begin(arguments: list[str], folder: Path, ignoring: bool = False) -> subprocess.Popen[str]:
    """The command, when Python itself has started."""
    action = signal.SIG_IGN if ignoring else signal.SIG_DFL  # one in the background inherits the former
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.argv = ['lsconv', *{arguments!r}]; {START}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, action),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    return child


def test_the_entry_point_is_the_module_that_imports_nothing_heavy() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^lsconv = "lsconv_command:main"$', text, re.MULTILINE)
    code = "import sys, lsconv_command; print([n for n in ('torch', 'numpy', 'lsconv') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("seconds", [0.1, 0.4, 0.8])
def test_while_modules_are_imported(seconds: float, tmp_path: Path) -> None:
    child = begin(["info"], tmp_path)
    time.sleep(seconds)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert (child.returncode, error) in ((130, "lsconv: interrupted\n"), (0, ""))  # done already on a fast machine


def test_at_work(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((700, 700)))
    (tmp_path / "out").mkdir()
    arguments = ["deblur", "a.npy", "b.npy", "--gaussian", "4", "--prior", "tv", "--weight", "1e-4", "-o", "out"]
    child = begin(arguments, tmp_path)
    time.sleep(6)
    child.send_signal(signal.SIGINT)
    _, error = child.communicate()
    assert child.returncode == 130
    assert error.endswith("lsconv: interrupted\n")
    assert "Traceback" not in error
    assert all(path.suffix == ".npy" for path in (tmp_path / "out").iterdir())


@pytest.mark.slow
def test_an_interrupt_does_not_stop_a_process_in_the_background(tmp_path: Path) -> None:
    child = begin(["info"], tmp_path, ignoring=True)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    output, error = child.communicate()
    assert (child.returncode, error) == (0, "")
    assert "torch" in output
