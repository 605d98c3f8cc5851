"""The command line as the tests of the app run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from lsconv.app import cli


@pytest.fixture(scope="session")
def commands() -> Any:
    """The commands of the app, built once: typer would build them anew for every run."""
    return typer.main.get_command(cli.app)


@pytest.fixture
def leave(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Any
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "app", commands)

    def run(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run([str(word) for word in words])
        out, error = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, error

    return run
