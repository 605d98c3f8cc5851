"""The tiled plan on several processes: the answer of one device, and failures that everyone hears of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lsconv
from lsconv.tiled.field import Field
from lsconv.tiled.ranks import rows_of

PROGRAM = Path(__file__).parent / "rank_program.py"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(lsconv.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def launch(ranks: int, case: str, folder: Path, seconds: float = 80) -> list[str]:
    """The output of every rank."""
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROGRAM), case, str(folder)],
            env={**environment(), "RANK": str(rank), "WORLD_SIZE": str(ranks)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        # the first one is waited for first: the others may hang, as a test wants them to
        return [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_the_answer_of_one_device(ranks: int, tmp_path: Path) -> None:
    assert launch(ranks, "compare", tmp_path) == [""] * ranks


@pytest.mark.distributed
def test_total_variation_of_rows_that_ranks_share_is_that_of_the_whole(tmp_path: Path) -> None:
    assert launch(2, "variation", tmp_path) == ["", ""]


@pytest.mark.distributed
def test_torchrun_starts_it_and_batches_in_parts_are_solved_where_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*command, str(PROGRAM), "files", str(tmp_path)], check=True, env=environment(), timeout=80)


@pytest.mark.distributed
def test_what_goes_wrong_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    said = launch(2, "raise", tmp_path, 40)
    assert all("NonFiniteError" in text for text in said)
    assert "rank 1 failed: NonFiniteError: y: contains NaN or infinity in what tile (1, 0) reads" in said[0]
    assert "RankError: rank 1 failed: RuntimeError: the disk is full" in said[0]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["end", "hang"])
def test_a_rank_that_is_gone_ends_all_within_the_time_out(case: str, tmp_path: Path) -> None:
    said = launch(2, case, tmp_path, 40)[0]
    assert "RankError: rank 0: another rank has ended, or has not answered within the time-out" in said


def test_rows_are_shared_whatever_their_number() -> None:
    for rows, ranks in ((7, 3), (3, 4), (64, 5)):
        parts = [rows_of(rows, rank, ranks) for rank in range(ranks)]
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert (parts[0].start, parts[-1].stop) == (0, rows)


def test_what_is_added_beyond_an_edge_that_wraps_comes_back_on_the_other_side() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 7, 6, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    field = Field(u.clone(), (7, 6), channels=True, wraps=(True, False))
    read = field.read((-4, 4), (9, 4))
    target = Field(torch.zeros_like(u), (7, 6), channels=True, wraps=(True, False))
    target.add((-4, 4), v)
    torch.testing.assert_close((read * v).sum(), (u * target.array).sum())  # each is the other's adjoint
