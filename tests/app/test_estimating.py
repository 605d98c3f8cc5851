"""``lsconv psf`` and ``--psf auto:MODEL``: blurs that the image itself tells."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import lsconv
from lsconv.app.image_io import read_picture, write_picture
from lsconv.app.picture import Picture

Leave = Callable[..., tuple[int, str, str]]


@pytest.fixture
def blurred(leave: Leave) -> Path:
    """A part of a photograph, out of focus by three pixels."""
    with resources.as_file(resources.files("lsconv.app") / "data" / "astronaut-256.png") as path:
        write_picture(Path("sharp.png"), Picture(read_picture(path).values[:160, 40:200]))
    assert leave("blur", "sharp.png", "--disk", 3, "--noise-std", 1, "-o", "blurred.png")[0] == 0
    return Path("blurred.png")


@pytest.mark.slow
def test_the_radius_is_printed_with_its_error_and_the_psf_written(leave: Leave, blurred: Path) -> None:
    code, out, err = leave("psf", blurred, "--model", "disk", "-o", "psf.npy")
    assert (code, err) == (0, "")
    found = re.fullmatch(r"radius = ([\d.]+) ± ([\d.]+) px\n", out)
    assert found is not None
    assert abs(float(found[1]) - 3) < 0.1
    assert np.load("psf.npy").sum() == pytest.approx(1)
    assert leave("deblur", blurred, "--psf", "psf.npy", "-o", "restored.png")[0] == 0


@pytest.mark.slow
def test_deblur_finds_the_blur_and_restores_as_with_the_true_one(
    leave: Leave, blurred: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    code, out, err = leave("deblur", blurred, "--psf", "auto:disk", "-o", "auto.png", "--plot", "report.png")
    assert (code, err) == (0, "")
    assert re.search(r"radius = [\d.]+ ± [\d.]+ px, PSF 7×7", out)
    assert "estimate of the PSF" in [axes.get_title() for axes in drawn[0].axes]
    assert leave("deblur", blurred, "--disk", 3, "-o", "known.png")[0] == 0
    found, known, given = (read_picture(Path(n)).values.astype(float) for n in ("auto.png", "known.png", "blurred.png"))
    assert np.sqrt(np.mean((found - known) ** 2)) < 0.1 * np.sqrt(np.mean((given - known) ** 2))


@pytest.mark.slow
def test_an_image_that_does_not_tell_its_blur_is_code_one_with_a_reason(leave: Leave) -> None:
    noise = np.random.default_rng(0).normal(100, 10, (128, 128, 1)).astype("float32")
    write_picture(Path("noise.tif"), Picture(noise))
    code, out, err = leave("psf", "noise.tif", "--model", "gaussian")
    assert code == 1
    assert out.startswith("sigma = ")
    assert any(status.sentence in err for status in lsconv.PsfStatus if status is not lsconv.PsfStatus.FOUND)
    assert leave("deblur", "noise.tif", "--psf", "auto:gaussian", "-o", "out.tif")[0] == 1


@pytest.mark.parametrize(
    "words, said",
    [
        ("psf a.png --model lens", "--model lens: expected one of gaussian, disk, motion"),
        ("psf a.png --model disk -o psf.png", "--output psf.png: the PSF is an array"),
        ("psf a.npy --model disk -o a.npy", "--output a.npy: would replace the image"),
        ("deblur a.png --psf auto:lens -o b.png", "--psf auto:lens: expected auto:gaussian"),
        ("deblur a.png --psf auto:disk --origin peak -o b.png", "--psf auto:disk: is of images and centred blurs"),
        ("blur a.png --psf auto:disk -o b.png", "--psf auto:disk: estimates a blur for lsconv deblur"),
    ],
)
def test_arguments_without_sense_are_reported_in_one_line_with_code_two(leave: Leave, words: str, said: str) -> None:
    write_picture(Path("a.png"), Picture(np.zeros((40, 40, 1), dtype="uint8")))
    code, out, err = leave(*words.split())
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
