"""The command line answers, and says in one line what is wrong."""

from __future__ import annotations

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import lsconv.app
from lsconv.app import demo
from lsconv.app.cli import run


def leave(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--device", "nonsense"], "--device nonsense"),
        (["demo", "--device", "meta"], "--device meta"),
        (["demo", "--device", "cuda:99"], "CUDA devices"),
        (["demo", "--output", "picture.jpg"], ".png"),
        (["demo", "--output", f"{__file__}/picture.png"], "is a file, expected a folder"),
        (["demo", "--colour"], "--colour"),
        (["invert-the-world"], "invert-the-world"),
    ],
)
def test_a_wrong_request_is_one_line_on_stderr_and_code_two(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert leave(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert error.startswith("lsconv: ")
    assert says in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="here there is a CUDA device")
def test_cuda_where_there_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["demo", "--device", "cuda"]) == 2
    assert "0 CUDA devices" in capsys.readouterr().err


def test_a_folder_as_output_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    assert leave(["demo", "--output", str(tmp_path / "folder.png")]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_an_answer_that_did_not_converge_is_code_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate = demo.evaluate

    def give_up(*arguments: Any) -> demo.Answer:
        return dataclasses.replace(evaluate(*arguments), converged=False)

    monkeypatch.setattr(demo, "evaluate", give_up)
    assert leave(["demo", "--quick", "--output", str(tmp_path / "picture.png")]) == 1
    assert "not converged: lsconv of 'The question" in capsys.readouterr().err


def test_info_prints_the_versions_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["info"]) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert {name: lines[name] for name in ("lsconv", "torch", "numpy", "scipy")} == {
        name: version(name) for name in ("lsconv", "torch", "numpy", "scipy")
    }


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert leave(arguments) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "info"))


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lsconv.app.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        lsconv.app.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "typer" in error
    assert "lsconv[app]" in error
