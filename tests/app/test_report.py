"""The report says how white a residual is, and shows everything it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import lsconv
from lsconv.app.report import Evidence, draw_report, whiteness
from lsconv.app.requests import Kernel


def correlation_by_definition(residual: np.ndarray, reach: int) -> float:
    """The largest autocorrelation at shifts other than zero, shift by shift."""
    r = residual - residual.mean()
    height, width = r.shape
    largest = 0.0
    for down in range(reach + 1):
        for right in range(-reach, reach + 1):
            if (down, right) != (0, 0):
                here = r[: height - down, max(0, -right) : width - max(0, right)]
                there = r[down:, max(0, right) : width - max(0, -right)]
                largest = max(largest, abs(float((here * there).sum())) / float((r**2).sum()))
    return largest


def test_the_correlation_is_the_largest_of_the_definitions() -> None:
    residual = np.random.default_rng(0).standard_normal((24, 30))
    assert whiteness(torch.from_numpy(residual), reach=5).correlation == pytest.approx(
        correlation_by_definition(residual, 5), abs=1e-12
    )


@pytest.mark.parametrize("shift", [(0, 3), (2, 0), (4, -1), (1, 5)])
def test_a_copy_shifted_by_a_vector_is_found_at_that_vector(shift: tuple[int, int]) -> None:
    noise = torch.randn(300, 310)
    judged = whiteness(noise + 0.5 * noise.roll(shift, (0, 1)))
    assert judged.shift == shift
    assert judged.correlation == pytest.approx(0.4, abs=0.05)  # 0.5 / (1 + 0.25)
    assert not judged.white


def test_white_noise_is_called_white_in_about_99_of_100_cases() -> None:
    white = sum(whiteness(torch.randn(48, 48), reach=8).white for _ in range(300))
    assert white >= 290


def test_a_flat_residual_and_a_tiny_one_are_judged_without_dividing_by_zero() -> None:
    assert whiteness(torch.ones(8, 8)).white
    assert whiteness(torch.randn(1, 1)).correlation == 0


@pytest.mark.parametrize("damp", ["gcv", 0.1])
@pytest.mark.parametrize("shape", [(1, 20, 24), (3, 20, 24), (3, 24, 20)])
def test_a_report_is_a_picture_with_the_residuals_verdict(
    tmp_path: Path, damp: str | float, shape: tuple[int, ...]
) -> None:
    psf = torch.ones(3, 3) / 9
    data = torch.rand(shape)
    solution = lsconv.deconvolve(data, psf, channels="first", damp=damp, boundary="periodic")
    A = lsconv.blur_operator(psf, shape[1:], boundary="periodic", channels=shape[0])
    residual = data - A(solution.x)
    judged = draw_report(tmp_path / "r.png", Evidence(data, solution.x, Kernel(psf, 2), residual, solution), "a title")
    assert judged == whiteness(residual)
    with Image.open(tmp_path / "r.png") as image:
        assert min(image.size) > 500
        assert np.array(image.convert("L")).std() > 10


@pytest.mark.parametrize(("options", "title"), [({}, "choice of damp by gcv"), ({"prior": "tv"}, "convergence")])
def test_the_last_panel_shows_how_damp_was_chosen_or_how_the_iteration_went(
    tmp_path: Path, options: dict[str, str], title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    psf, data = torch.ones(3, 3) / 9, torch.rand(20, 24)
    solution = lsconv.deconvolve(data, psf, **options)
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    evidence = Evidence(data[None], solution.x[None], Kernel(psf, 2), 0.1 * data[None], solution)
    draw_report(tmp_path / "r.png", evidence, "a title")
    panel = drawn[0].axes[-1] if drawn[0].axes[-1].get_title() else drawn[0].axes[-2]
    assert panel.get_title() == title
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert f"chosen: {float(solution.damp):.3g}" in labels if not options else "stationarity" in labels
