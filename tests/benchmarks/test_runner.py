"""The benchmarks' own claims: who is raced fairly, what a target means, and that every benchmark runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import ONLY_WHEN_NAMED

ROOT = Path(__file__).parents[2]
QUICK = [file.stem for file in sorted((ROOT / "benchmarks").glob("*.py"))
         if "\ndef tables(" in file.read_text() and file.stem not in ONLY_WHEN_NAMED]  # fmt: skip


def test_a_race_takes_its_contestants_in_turn_and_forgets_the_warm_up() -> None:
    from benchmarks.runner import race

    order: list[str] = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 4
    assert len(times["a"].samples) == len(times["b"].samples) == 3


def test_a_slow_contestant_runs_once_and_the_others_go_on() -> None:
    from benchmarks.runner import race

    times = race({"slow": lambda: time.sleep(0.05), "fast": lambda: None}, repeats=4, patience=0.02)
    assert len(times["slow"].samples) == 1
    assert times["slow"].median >= 0.05
    assert len(times["fast"].samples) == 4


def test_reach_finds_the_loosest_decade_that_meets_the_measured_target() -> None:
    from benchmarks.runner import Answer, reach

    # this method claims ten times the accuracy that it has
    arrival = reach(lambda tolerance, _: Answer(torch.tensor(10 * tolerance)), float, 1e-6)
    assert arrival.arrived
    assert arrival.tolerance == pytest.approx(1e-7)
    assert float(arrival.run().x) == pytest.approx(1e-6)


def test_a_method_that_stops_short_is_shown_with_what_it_reached() -> None:
    from benchmarks.runner import Answer, reach

    def stuck(tolerance: float, max_iter: int | None) -> Answer:
        time.sleep(0.01)
        return Answer(torch.tensor(0.3), max_iter)

    arrival = reach(stuck, float, 1e-6, seconds=0.05)
    assert not arrival.arrived
    assert arrival.error == pytest.approx(0.3)
    assert arrival.seconds >= 0.01


def test_only_what_arrived_is_raced_again_and_the_lead_over_the_others_is_a_bound() -> None:
    from benchmarks.runner import Answer, Arrival, run_times, times_faster

    runs: list[str] = []

    def arrival(name: str, arrived: bool, seconds: float) -> Arrival:
        answer = Answer(torch.tensor(0.0), 7)
        return Arrival(1e-3, arrived, answer, 1e-6, seconds, lambda: (runs.append(name), answer)[1])

    arrivals = {"there": arrival("there", True, 9.0), "not": arrival("not", False, 5.0)}
    times = run_times(arrivals, {"other": lambda: runs.append("other")}, repeats=2)
    assert runs == ["other", "there"] * 3
    assert times["not"] == 5.0
    assert times["there"] < 1
    assert times_faster({"not": arrivals["not"]}, times, 0.5) == "> 10"
    assert times_faster(arrivals, {"there": 2.0, "not": 5.0}, 0.5) == "4.0"


def test_a_limit_in_seconds_is_used_up_where_the_first_iterations_cost_more_than_their_share() -> None:
    from benchmarks.runner import Answer, reach

    def slow_start(tolerance: float, max_iter: int | None) -> Answer:
        assert max_iter is not None
        time.sleep(0.1 + 0.001 * max_iter)
        return Answer(torch.tensor(1.0 / max_iter), max_iter)

    arrival = reach(slow_start, float, 1e-9, seconds=0.4)
    assert not arrival.arrived
    assert arrival.seconds > 0.2


def test_the_fitted_slope_is_the_exponent_of_a_power_law() -> None:
    from benchmarks.runner import slope

    assert slope([1.0, 2.0, 8.0], [3.0, 12.0, 192.0]) == pytest.approx(2.0)


def test_tables_that_a_script_prints_are_taken_over() -> None:
    from benchmarks.__main__ import printed

    def script() -> None:
        print(
            "speed\n| method | s |\n|---|--:|\n| a | 1 |\n| b | 2 |\n\nmemory\n| method | MiB |\n|---|---|\n| a | 3 |"
        )

    speed, memory = printed(script)
    assert (speed.title, speed.rows) == ("speed", [{"method": "a", "s": "1"}, {"method": "b", "s": "2"}])
    assert (memory.title, memory.rows) == ("memory", [{"method": "a", "MiB": "3"}])


def test_all_peers_solve_the_damped_problem() -> None:
    pytest.importorskip("pylops")
    pytest.importorskip("threadpoolctl")
    import lsconv
    from benchmarks import peers

    generator = torch.Generator().manual_seed(0)
    A = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=generator), in_size=(9, 10))
    y = torch.randn(A.out_shape, dtype=torch.float64, generator=generator)
    dense = A.to_dense()
    expected = torch.linalg.solve(dense.T @ dense + 0.25 * torch.eye(90, dtype=torch.float64), dense.T @ y.flatten())
    for peer in (*peers.foreign().values(), peers.pylops_lsqr, peers.normal_cg):
        answer = peer(A, y, 0.5, 1e-12, 500)
        torch.testing.assert_close(answer.x.flatten(), expected, rtol=1e-8, atol=1e-8)
        assert peers.relative_gradient(A, y, 0.5, answer.x) < 1e-9
        assert peers.relative_gradient(A, y, 0.5, answer.x + 1e-3) > 1e-4


def test_lineax_pads_as_the_operator_does_in_both_precisions() -> None:
    pytest.importorskip("lineax")
    import lsconv
    from benchmarks import peers

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(1, 1, 4, 3, dtype=torch.float64, generator=generator).to(dtype)
        A = lsconv.Conv2d(kernel, in_size=(11, 8), padding=(2, 1))
        y = torch.randn(A.out_shape, dtype=torch.float64, generator=generator).to(dtype)
        answer = peers.lineax_lsmr(A, y, 0.5, tolerance / 100, 500)
        assert answer.x.dtype == dtype
        assert peers.relative_gradient(A, y, 0.5, answer.x) < tolerance


def test_the_circular_pseudo_inverse_inverts_a_circular_convolution_by_all_or_half_of_the_frequencies() -> None:
    import lsconv
    from benchmarks.question import circular_pinv

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(2, 12, 12, dtype=torch.float64, generator=generator)
    A = lsconv.Conv2d(weight, in_size=(12, 12), padding=1, padding_mode="circular")
    for half in (False, True):
        assert torch.dist(circular_pinv(weight, A(x), 12, padding=1, half=half), x) < 1e-9 * x.norm()


def test_scenes_are_not_shifted_and_the_oracle_finds_the_best_parameter() -> None:
    pytest.importorskip("skimage")
    from benchmarks.restoration import oracle, scenes

    scene = next(scenes(quick=True))
    blurred = scene.psnr(scene.y)
    assert blurred > scene.psnr(scene.y.roll(1, 0))
    assert blurred > scene.psnr(scene.y.roll(1, 1))
    truth = scene.framed(scene.truth)
    _, best, _ = oracle(scene, lambda value: truth + abs(value - 0.02), 1e-4, 1.0, 5)
    assert best == pytest.approx(0.02, rel=0.3)


def test_the_command_line_prints_and_writes_json_and_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import memory
    from benchmarks.__main__ import main
    from benchmarks.runner import Table

    rows = [{"case": "a blur", "seconds": 1.5}, {"case": "a layer", "seconds": 2.5}]
    monkeypatch.setattr(memory, "tables", lambda quick: [Table("sizes", rows)])
    assert main(["memory", "--quick", "--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "memory.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["tables"][0]["rows"] == rows
    assert (tmp_path / "memory.md").read_text().count("|") >= 12
    assert "a layer" in capsys.readouterr().out


def test_what_was_measured_outlives_a_failure_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import memory, scaling
    from benchmarks.__main__ import main
    from benchmarks.runner import Table

    def failing(quick: bool) -> Any:
        yield Table("first", [{"a": 1}])
        raise RuntimeError("the second table")

    monkeypatch.setattr(scaling, "tables", failing)
    monkeypatch.setattr(memory, "tables", lambda quick: [Table("other", [{"b": 2}])])
    assert main(["scaling", "memory", "--quick", "--output", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert content["tables"][0]["rows"] == [{"a": 1}]
    assert not content["complete"]
    assert "tables are missing" in (tmp_path / "scaling.md").read_text()
    assert json.loads((tmp_path / "memory.json").read_text())["complete"]
    assert "the second table" in capsys.readouterr().err


def test_an_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])
    assert "no benchmark nonsense; known:" in capsys.readouterr().err


def test_an_iteration_is_compared_with_the_traffic_of_its_device() -> None:
    from benchmarks.border_iteration import traffic

    row = traffic((1, 48, torch.float32, 1e-2), 1, batch=3, device="cpu")
    assert row["case"] == "3 × 1 × 48², float32"
    grid = 3 * 48**2 * 8  # factors in float64
    assert row["moved MiB"] * 2**20 == pytest.approx(6 * grid, rel=0.5)
    assert row["iteration / traffic"] == pytest.approx(row["iteration ms"] / row["traffic ms"])
    assert row["iteration / traffic"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_every_benchmark_runs_in_quick_mode(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--threads", "1", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert {f"{name}.json", f"{name}.md"} <= written
    assert name != "scaling" or "scaling-1.png" in written
    if name == "memory":
        row = json.loads((tmp_path / "memory.json").read_text())["tables"][0]["rows"][0]
        assert row["setup + solve peak MiB"] > row["picture MiB"]
