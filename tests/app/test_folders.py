"""Folders, channels, time series, signals and counts through ``lsconv deblur``, with reports and processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import lsconv

Leave = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


def counts(*shape: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[: shape[-2], : shape[-1]]
    level = 200 + 100 * np.sin(rows / 4) * np.cos(columns / 3)
    return rng.poisson(np.broadcast_to(level, shape)).astype(np.uint16)


def psf(sigma: float = 1.0) -> np.ndarray[Any, Any]:
    line = np.exp(-0.5 * (np.arange(7) - 3) ** 2 / sigma**2)
    return np.outer(line, line) / line.sum() ** 2


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_folder_becomes_a_folder_with_a_page_about_all(leave: Leave, jobs: int) -> None:
    Path("in").mkdir()
    for name in ("a.tif", "b.ome.tif"):
        tifffile.imwrite(f"in/{name}", counts(2, 20, 22), ome="ome" in name, metadata={"axes": "CYX"})
    Path("in/bad.png").write_bytes(b"nothing")
    Path("in/notes.txt").write_text("no image")
    code, out, error = leave(
        "deblur", "in", "--gaussian", 1, "--damp", 0.2, "-o", "out", "--report", "page", "--jobs", jobs
    )
    assert code == 2
    assert sorted(os.listdir("out")) == ["a.tif", "b.ome.tif"]
    assert error.count("\n") == 1
    assert "bad.png: not a PNG" in error
    drawn = [f"{name}{kind}.png" for name in ("a.tif", "b.ome.tif") for kind in ("", ".data", ".restoration")]
    assert sorted(os.listdir("page")) == sorted([*drawn, "index.html"])
    page = Path("page/index.html").read_text()
    assert "2 of 3 files restored" in page
    assert "<code>lsconv deblur in --gaussian 1 --damp 0.2 -o out --report page" in page
    assert page.count("<figure class=pair>") == 2
    for name in drawn:
        assert f"src='{name}'" in page
    assert "bad.png: not a PNG" in page
    assert out.count("\n") == 3


def test_every_time_and_channel_is_restored_by_itself_under_the_psf_of_its_channel(leave: Leave) -> None:
    values = counts(2, 3, 20, 22)
    values[:, 1] //= 2
    tifffile.imwrite("a.tif", values, imagej=True, metadata={"axes": "TCYX"})
    kernels = np.stack([psf(0.7), psf(1.0), psf(1.3)]).astype(np.float32)
    tifffile.imwrite("psf.tif", kernels, imagej=True, metadata={"axes": "CYX"})
    assert leave("deblur", "a.tif", "--psf", "psf.tif", "--damp", 0.2, "-o", "b.tif")[0] == 0
    restored = tifffile.imread("b.tif")
    for t in range(2):
        for c in range(3):
            kernel = kernels[c].astype(float) / kernels[c].astype(float).sum()
            expected = lsconv.deconvolve(values[t, c], kernel, damp=0.2).x
            assert np.abs(restored[t, c].astype(int) - expected).max() <= 1


def test_the_report_says_which_of_the_images_it_shows(leave: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    from lsconv.app import restore

    titles: list[str] = []
    monkeypatch.setattr(restore, "draw_report", lambda path, evidence, title: titles.append(title))
    tifffile.imwrite("a.tif", counts(3, 2, 12, 13), imagej=True, metadata={"axes": "TCYX"})
    tifffile.imwrite("b.tif", counts(5, 12, 13), imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite("c.tif", counts(12, 13))
    for name in "abc":
        leave("deblur", f"{name}.tif", "--gaussian", 1, "--damp", 0.2, "-o", f"new/{name}.tif", "--plot", "r.png")
    said = [title.split(": ")[0] for title in titles]
    assert said == ["a.tif, time 2 of 3, channel 2 of 2", "b.tif, slice 3 of 5", "c.tif"]
    assert all(title.endswith("damp 0.2") for title in titles)


def test_depth_is_restored_as_a_volume_wherever_its_axis_stands(leave: Leave) -> None:
    values = counts(2, 6, 2, 14, 15)
    tifffile.imwrite("a.tif", values, imagej=True, metadata={"axes": "TZCYX"})
    kernel = np.array([0.25, 0.5, 0.25])[:, None, None] * psf()[2:5, 2:5] / psf()[2:5, 2:5].sum()
    tifffile.imwrite("psf.tif", kernel.astype(np.float32), imagej=True, metadata={"axes": "ZYX"})
    assert leave("deblur", "a.tif", "--psf", "psf.tif", "--damp", 0.3, "-o", "b.tif")[0] == 0
    restored = tifffile.imread("b.tif")
    expected = lsconv.deconvolve(values[1, :, 1], kernel.astype(np.float32), damp=0.3).x
    assert restored.shape == values.shape
    assert np.abs(restored[1, :, 1].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("prior", ["gradient", pytest.param("tv", marks=pytest.mark.slow)])
def test_counts_are_restored_as_the_library_restores_them(leave: Leave, prior: str) -> None:
    grey = (2 * counts(16, 16) + 100).astype(np.uint16)
    tifffile.imwrite("a.tif", grey)
    words = [
        "--noise",
        "poisson",
        "--gain",
        2,
        "--offset",
        100,
        "--background",
        30,
        "--read-noise",
        1.5,
        "--prior",
        prior,
    ]
    assert leave("deblur", "a.tif", "--gaussian", 1, *words, "-o", "b.tif")[0] == 0
    from lsconv.psf import gaussian

    expected = lsconv.deconvolve(grey, gaussian(1.0).numpy(), prior=prior, noise="poisson", gain=2.0, offset=100.0,
                                 background=30.0, read_noise=1.5).x  # fmt: skip
    assert np.abs(tifffile.imread("b.tif").astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "words",
    [
        ["--damp", 0.05, "--nonnegative"],
        ["--damp", 0.05, "--min", 0],
        ["--min", 0, "--max", 250, "--prior", "tv"],
    ],
)
def test_bounds_hold(leave: Leave, words: list[Any]) -> None:
    np.save("a.npy", counts(14, 14).astype(np.float32) - 150)
    assert leave("deblur", "a.npy", "--gaussian", 1, *words, "-o", "b.npy")[0] == 0
    restored = np.load("b.npy")
    assert restored.min() == 0
    assert restored.max() <= 250 or "--max" not in words


def test_missing_pixels_are_filled_and_counted(leave: Leave) -> None:
    image = counts(20, 20).astype(np.float32)
    image[4:6, 5] = np.nan
    np.save("a.npy", image)
    code, _, error = leave("deblur", "a.npy", "--gaussian", 1, "--damp", 0.2, "-o", "b.npy", "--plot", "r.png")
    assert code == 0
    assert "2 of 400 pixels are NaN or masked and count as missing" in error
    assert np.isfinite(np.load("b.npy")).all()


@pytest.mark.parametrize("name", ["a.npy", "a.wav"])
def test_signals_are_restored_along_their_axis(leave: Leave, name: str) -> None:
    from scipy.io import wavfile

    samples = (1000 * np.sin(np.arange(200) / 9)).astype(np.int16)
    np.save("a.npy", samples)
    wavfile.write("a.wav", 8000, samples)
    np.save("psf.npy", np.array([0.25, 0.5, 0.25]))
    plot = ["--plot", "r.png"] if name == "a.npy" else []
    assert leave("deblur", name, "--psf", "psf.npy", "--damp", 0.01, "-o", f"b{name[1:]}", *plot)[0] == 0
    restored = np.load("b.npy") if name == "a.npy" else wavfile.read("b.wav")[1]
    expected = lsconv.deconvolve(samples, np.array([0.25, 0.5, 0.25]), damp=0.01).x
    assert np.abs(restored.astype(int) - expected).max() <= 1


def test_quiet_says_nothing_verbose_says_why_and_version_the_version(leave: Leave) -> None:
    tifffile.imwrite("a.tif", counts(20, 20))
    assert leave("deblur", "a.tif", "--gaussian", 1, "-o", "b.tif", "--quiet") == (0, "", "")
    code, out, _ = leave("deblur", "a.tif", "--gaussian", 1, "-o", "b.tif", "-v")
    assert code == 0
    assert "by the rule gcv" in out
    assert "PSF centre at 4, 4" in out
    assert leave("--version") == (0, f"lsconv {lsconv.__version__}\n", "")


def test_verbose_names_the_plan_that_the_solver_takes_at_a_periodic_border(leave: Leave) -> None:
    """The penalty is periodic there too, so that one product of FFTs inverts."""
    np.save("a.npy", np.random.default_rng(0).random((20, 22)).astype(np.float32))
    code, out, _ = leave("deblur", "a.npy", "--box", 3, "--damp", 0.1, "--boundary", "periodic", "-o", "x.npy", "-v")
    A = lsconv.blur_operator(lsconv.psf.box(3).float(), (20, 22), boundary="periodic")
    expected = lsconv.explain(A, 0.1, lsconv.Gradient(A.in_shape, boundary="periodic")).plan
    assert code == 0
    assert f"plan {expected}\n" in out
    assert expected != lsconv.explain(A, 0.1, lsconv.Gradient(A.in_shape)).plan


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "out.bin").write_bytes(b"old")
    script = (
        "import pathlib, time; from lsconv.app.image_io import atomically\n"
        "with atomically(pathlib.Path('out.bin')) as file:\n"
        "    file.write(b'new' * 1000); file.flush(); print('half', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    assert (tmp_path / "out.bin").read_bytes() == b"old"
