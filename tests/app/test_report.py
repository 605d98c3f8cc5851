"""The report says how white a residual is, and shows everything it was given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import lsconv
from lsconv.app.arguments import Kernel
from lsconv.app.report import Evidence, draw_pair, draw_report, report_figure, whiteness


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
    assert whiteness(torch.from_numpy(residual), max_shift=5).correlation == pytest.approx(
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
    white = sum(whiteness(torch.randn(48, 48), max_shift=8).white for _ in range(300))
    assert white >= 290


def test_a_flat_residual_and_a_tiny_one_are_judged_without_dividing_by_zero() -> None:
    assert whiteness(torch.ones(8, 8)).white
    assert whiteness(torch.randn(1, 1)).correlation == 0


@pytest.mark.parametrize(
    ("damp", "shape"),
    [(0.1, (1, 20, 24)), *(pytest.param("gcv", s, marks=pytest.mark.slow) for s in ((3, 20, 24), (3, 24, 20)))],
)
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


@pytest.mark.parametrize(("noise", "seed"), [(0.5, 0), (2.0, 1), (8.0, 2)])
def test_an_answer_by_the_rule_raises_no_alarm_and_one_damped_too_much_does(noise: float, seed: int) -> None:
    psf = lsconv.psf.gaussian(1.5)
    scene = 50 * torch.randn(100, 110, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    scene = torch.nn.functional.avg_pool2d(scene[None], 5, stride=1)
    A = lsconv.blur_operator(psf, tuple(n - k + 1 for n, k in zip(scene.shape[1:], psf.shape, strict=True)))
    data = A(scene) + noise * torch.randn(A.out_shape, dtype=torch.float64)
    verdicts = []
    for damp in ("gcv", 3.0):
        solution = lsconv.deconvolve(data, psf, channels="first", damp=damp, crop=False)
        verdicts.append(str(whiteness(data - A(solution.x))).splitlines()[0])
    assert "noise alone" in verdicts[0]
    assert verdicts[1].startswith("part of the image is left")


def evidence_of(data: torch.Tensor, psf: torch.Tensor, **options: object) -> Evidence:
    """The evidence of a restoration without a margin."""
    solution = lsconv.deconvolve(data, psf, channels="first", ndim=psf.ndim, boundary="periodic", **options)
    A = lsconv.blur_operator(psf, tuple(data.shape[1:]), boundary="periodic", channels=len(data), ndim=psf.ndim)
    camera = {"background": 0.0, "offset": 0.0, "gain": 1.0, "read_noise": 0.0}
    return Evidence.of(data, A, solution, solution.x, Kernel(psf, psf.ndim), camera,
                       poisson=options.get("noise") == "poisson", std=solution.std)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "psf", "options", "titles"),
    [
        ((1, 24, 28), torch.ones(3, 3) / 9, {}, ["data, 0 to 1", "residual", "spectra", "choice of damp by gcv"]),
        ((2, 6, 24, 28), torch.ones(3, 3, 3) / 27, {"damp": 0.2}, ["slice 4 of 6", "mean of the channels", "spectra"]),
        ((1, 90), torch.ones(3) / 3, {"damp": 0.2}, ["PSF, 3, its centre at 1", "residual", "spectra"]),
        ((1, 20, 22), torch.ones(3, 3) / 9, {"error_bars": 8}, ["standard deviation", "spectra", "choice of damp"]),
        ((1, 20, 22), torch.ones(3, 3) / 9, {"noise": "poisson", "damp": 0.1}, ["residual / standard deviation"]),
    ],
)
def test_every_panel_has_its_title(
    shape: tuple[int, ...], psf: torch.Tensor, options: dict[str, object], titles: list[str]
) -> None:
    figure, _ = report_figure(evidence_of(torch.rand(shape), psf, **options), "a $title$ of \udce9")
    figure.draw_without_rendering()
    found = [axes.get_title() for axes in figure.axes]
    for title in titles:
        assert any(title in each for each in found), (title, found)


@pytest.mark.parametrize(
    ("rule", "line"), [("gcv", "pixels left out"), ("lcurve", "corner"), ("evidence", "likeliest")]
)
def test_the_curve_of_a_rule_is_explained_in_a_line(rule: str, line: str) -> None:
    figure, _ = report_figure(evidence_of(torch.rand(1, 24, 28), torch.ones(3, 3) / 9, damp=rule), "a title")
    (panel,) = [axes for axes in figure.axes if axes.get_title() == f"choice of damp by {rule}"]
    assert line in panel.get_xlabel().replace("\n", " ")


@pytest.mark.parametrize("channels", [1, 3, 2])
def test_the_pair_has_the_pixels_of_data_and_restoration_on_one_scale(tmp_path: Path, channels: int) -> None:
    data = 100 + 50 * torch.rand(channels, 24, 28)
    evidence = evidence_of(data, torch.ones(3, 3) / 9, damp=0.1)
    draw_pair(tmp_path, "a.tif", evidence)
    shown = [np.array(Image.open(tmp_path / f"a.tif.{kind}.png")) for kind in ("data", "restoration")]
    low, high = float(data.min()), float(data.max())
    for picture, image in zip(shown, (data, evidence.restored), strict=True):
        expected = (255 * ((image - low) / (high - low)).clamp(0, 1)).numpy()
        expected = np.moveaxis(expected, 0, -1) if channels == 3 else expected[0]
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).max() <= 0.51


def test_a_signal_gets_no_pair_of_pictures(tmp_path: Path) -> None:
    draw_pair(tmp_path, "a.npy", evidence_of(torch.rand(1, 90), torch.ones(3) / 3, damp=0.1))
    assert list(tmp_path.iterdir()) == []
