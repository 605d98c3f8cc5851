"""The demonstration's problems, its yardsticks, and the program itself with the picture that it writes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import skimage.metrics
import torch
from PIL import Image

import lsconv
from lsconv.app import demo
from lsconv.app.cli import run

CPU = torch.device("cpu")


class Run(NamedTuple):
    code: int
    out: str
    error: str
    picture: Path


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("demo") / "picture.png"
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
        run(["demo", "--quick", "--output", str(path)])
    return Run(int(str(ended.value.code)), out.getvalue(), error.getvalue(), path)


def test_the_demo_succeeds_silently_on_stderr(quick_run: Run) -> None:
    assert (quick_run.code, quick_run.error) == (0, "")


def test_the_table_has_a_row_of_figures_for_every_method(quick_run: Run) -> None:
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in quick_run.out.splitlines() if "|" in line]
    figures = {row[0]: [float(value) for value in row[1:4]] for row in cells if len(row) == 6 and "e" in row[1][-4:]}
    for problem in (demo.question_problem(CPU, quick=True), demo.photograph_problem(CPU, quick=True)):
        for method in demo.solvers(problem):
            assert all(np.isfinite(figures[method]))


def test_no_line_of_the_output_is_cut_off(quick_run: Run) -> None:
    assert "…" not in quick_run.out


def test_the_picture_has_the_printed_size_and_six_different_places(quick_run: Run) -> None:
    with Image.open(quick_run.picture) as image:
        assert image.format == "PNG"
        assert f"({image.width}×{image.height})" in quick_run.out
        assert (image.width, image.height) == (900, 690)
        pixels = np.asarray(image.convert("RGB"), dtype=float)
    places = [pixels[row : row + 240, column : column + 240] for row in (70, 400) for column in (30, 330, 630)]
    for index, place in enumerate(places):
        assert place.std() > 20
        assert all(np.abs(place - other).mean() > 2 for other in places[:index])


def test_the_recipe_of_the_question_inverts_what_it_assumes() -> None:
    weight, x = torch.randn(3, 2, 3, 3).double(), torch.randn(4, 2, 10, 12).double()
    periodic = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 2, 0, 2), mode="circular"), weight)
    torch.testing.assert_close(demo.circular_pseudo_inverse(weight, periodic, (10, 12)), x)
    torch.testing.assert_close(demo.circular_pseudo_inverse(weight, periodic, (10, 12), damp=1e-7), x)


def test_the_recipe_of_the_question_misses_the_minimum_norm_solution_and_lsconv_finds_it() -> None:
    problem = demo.question_problem(CPU, quick=True)
    reference = demo.solve_reference(problem)
    solvers = demo.solvers(problem)
    circular = demo.evaluate(problem, reference, "circular", solvers["circular pinv"])
    ours = demo.evaluate(problem, reference, "lsconv", solvers["lsconv"])
    assert circular.distance > 0.1
    assert ours.converged
    assert ours.distance < 0.01


def test_lsconv_restores_the_photograph_better_than_the_same_damping_on_a_circle() -> None:
    problem = demo.photograph_problem(CPU, quick=True)
    reference = demo.solve_reference(problem)
    rows = {name: demo.evaluate(problem, reference, name, solve) for name, solve in demo.solvers(problem).items()}
    assert rows["lsconv, damped"].error < 0.9 * rows["circular pinv, damped"].error
    assert rows["circular pinv, damped"].error < rows["circular pinv"].error


def test_the_reference_is_the_dense_pseudo_inverse() -> None:
    weight, truth = torch.randn(2, 2, 3, 3), torch.randn(1, 2, 9, 10)
    A = lsconv.Conv2d(weight, in_size=(9, 10))
    problem = demo.Problem("small", A, weight, truth, A(truth), damp=0.0, budget=10)
    matrix = A.to(dtype=torch.float64).to_dense()
    expected = (torch.linalg.pinv(matrix) @ (matrix @ truth.double().flatten())).reshape(truth.shape)
    reference = demo.solve_reference(problem)
    assert reference.verified
    torch.testing.assert_close(reference.x, expected, rtol=1e-7, atol=1e-7)


def test_a_wrong_reference_does_not_pass_as_verified() -> None:
    assert not demo.Reference(torch.zeros(1), residual=1e-3, inner_product=0.0).verified
    assert not demo.Reference(torch.zeros(1), residual=0.0, inner_product=1e-3).verified


def test_the_motion_kernel_is_a_centred_asymmetric_average() -> None:
    kernel = demo.motion_kernel()
    places = torch.arange(15.0, dtype=torch.float64)
    assert kernel.min() >= 0
    assert abs(kernel.sum().item() - 1) < 1e-12
    for dim in (0, 1):
        assert abs((kernel.sum(1 - dim) @ places).item() - 7) < 0.5
    for mirror in (kernel.flip(0), kernel.flip(1), kernel.flip(0, 1), kernel.T):
        assert (kernel - mirror).norm() > 0.5 * kernel.norm()


def test_the_noise_of_the_photograph_is_one_percent() -> None:
    problem = demo.photograph_problem(CPU)
    noise = problem.y - problem.A(problem.truth)
    assert problem.y.shape == (3, 1, 242, 242)
    assert abs(noise.std().item() - 0.01) < 1e-4


def test_psnr_is_the_usual_one() -> None:
    one, two = torch.rand(3, 20, 21), torch.rand(3, 20, 21)
    expected = skimage.metrics.peak_signal_noise_ratio(one.numpy(), two.numpy(), data_range=1.0)
    assert demo.peak_signal_to_noise(two, one) == pytest.approx(expected, abs=1e-4)


@pytest.mark.gpu
def test_the_demo_runs_on_cuda(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["demo", "--quick", "--device", "cuda", "--output", str(tmp_path / "picture.png")])
    assert ended.value.code == 0
