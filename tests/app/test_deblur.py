"""``lsconv deblur`` and ``lsconv blur``: every format end to end, and one line on stderr for everything amiss."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import lsconv
from lsconv import psf as formulas
from lsconv.app import cli, restore
from lsconv.app.image_io import Metadata, Picture, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]


def scene(*shape: int) -> np.ndarray[Any, Any]:
    """Smooth, between 0.1 and 0.9: ``(*pages, height, width, channels)``."""
    grids = np.meshgrid(*(np.arange(size) for size in shape), indexing="ij")
    phase = sum(grid * step for grid, step in zip(grids, (0.31, 0.23, 0.41, 0.7)[4 - len(shape) :], strict=True))
    return np.asarray(0.5 + 0.4 * np.sin(phase))


def stored(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    limit = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1
    return (scene(*shape) * limit).astype(dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("a.png", "uint8", (28, 30, 1)),
        ("a.png", "uint8", (28, 30, 3)),
        ("a.png", "uint16", (28, 30, 3)),
        ("a.png", "uint8", (28, 30, 4)),
        ("a.jpg", "uint8", (28, 30, 3)),
        ("a.tif", "uint16", (28, 30, 1)),
        ("a.tif", "float32", (28, 30, 1)),
        ("a.tif", "uint16", (5, 28, 30, 1)),
        ("a.tif", "uint8", (5, 28, 30, 3)),
        ("a.npy", "float64", (28, 30, 1)),
    ],
)
@pytest.mark.parametrize("boundary", ["unknown", "reflect"])
def test_blurring_and_restoring_gives_the_picture_back_in_its_format(
    leave: Leave, name: str, dtype: str, shape: tuple[int, ...], boundary: str
) -> None:
    picture = Picture(stored(dtype, *shape), opacity=shape[-1] == 4)
    write_picture(Path(name), picture)
    options = ["--gaussian", "0.6", "--boundary", boundary]
    damp = "0.1" if name.endswith("jpg") else "0.01"  # JPEG's errors are noise
    assert leave("blur", name, *options, "-o", "blurred-" + name)[0] == 0
    assert leave("deblur", "blurred-" + name, *options, "--damp", damp, "-o", "restored-" + name)[0] == 0
    restored = read_picture(Path("restored-" + name))
    edge = slice(3, -3) if boundary == "unknown" else slice(None)
    truth = picture.values[..., edge, edge, :]
    assert restored.values.dtype == picture.values.dtype
    assert restored.values.shape == truth.shape
    colours = slice(None, -1) if picture.opacity else slice(None)
    inner = (..., slice(4, -4), slice(4, -4), colours)
    scale = np.iinfo(dtype).max if picture.is_integer else 1.0
    difference = np.abs(restored.values[inner].astype(float) - truth[inner]) / scale
    if name.endswith("jpg"):
        assert difference.mean() < 0.02
    else:
        assert difference.max() < (0.02 if dtype == "uint8" else 0.01)
    if picture.opacity:
        assert np.array_equal(restored.values[..., -1], truth[..., -1])


@pytest.mark.slow
@pytest.mark.parametrize("corner", [(0, 0), (0, 128), (128, 0), (128, 128)])
def test_damp_chosen_by_itself_makes_every_quarter_of_a_photograph_better(
    leave: Leave, corner: tuple[int, int]
) -> None:
    with resources.as_file(resources.files("lsconv.app") / "data" / "astronaut-256.png") as path:
        photograph = read_picture(path).values[corner[0] :, corner[1] :][:128, :128]
    write_picture(Path("photo.png"), Picture(photograph))
    assert leave("blur", "photo.png", "--box", 5, "--noise-std", 1.0, "--seed", 3, "-o", "blurred.png")[0] == 0
    truth = photograph[2:-2, 2:-2].astype(float)

    def error(name: str) -> float:
        return float(np.sqrt(np.mean((read_picture(Path(name)).values - truth) ** 2)))

    for options in (
        [],
        ["--noise-std", 1.0],
        ["--damp", "discrepancy", "--noise-std", 1.0],
        ["--prior", "tv"],
    ):
        code, out, err = leave("deblur", "blurred.png", "--box", 5, *options, "-o", "restored.png")
        assert (code, err) == (0, "")
        assert ("weight " if "tv" in options else "damp ") in out
        assert error("restored.png") < 0.85 * error("blurred.png")


def test_total_variation_needs_no_weight(leave: Leave) -> None:
    squares = np.zeros((48, 48, 1))
    squares[14:34, 10:30] = 0.8
    write_picture(Path("a.png"), Picture((squares * 255).astype(np.uint8)))
    leave("blur", "a.png", "--box", 5, "--noise-std", 5, "-o", "blurred.png")
    errors = {}
    for prior in ("tikhonov", "tv"):
        code, out, _ = leave("deblur", "blurred.png", "--box", 5, "--prior", prior, "-o", f"{prior}.png")
        assert code == 0
        assert ("weight" if prior == "tv" else "damp") in out
        errors[prior] = np.abs(read_picture(Path(f"{prior}.png")).values / 255 - squares[2:-2, 2:-2]).mean()
    assert errors["tv"] < 0.5 * errors["tikhonov"]


def test_blur_is_the_librarys_blur_and_its_noise_follows_the_seed(leave: Leave) -> None:
    field = scene(20, 22, 1)
    write_picture(Path("a.npy"), Picture(field))
    for name, words in {
        "plain": [],
        "one": ["--noise-std", 0.1, "--seed", 1],
        "again": ["--noise-std", 0.1, "--seed", 1],
        "two": ["--noise-std", 0.1, "--seed", 2],
    }.items():
        assert leave("blur", "a.npy", "--disk", 2, "--boundary", "zero", *words, "-o", f"{name}.npy")[0] == 0
    plain, one, again, two = (np.load(f"{name}.npy") for name in ("plain", "one", "again", "two"))
    A = lsconv.blur_operator(formulas.disk(2), (20, 22), boundary="zero")
    assert np.allclose(plain, A(torch.from_numpy(field[None, ..., 0]))[0].numpy(), atol=1e-12)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)
    assert np.std(one - plain) == pytest.approx(0.1, rel=0.15)


def test_metadata_reach_the_restored_picture(leave: Leave) -> None:
    told = Metadata(resolution=(300.0, 300.0), description="a sample")
    write_picture(Path("a.tif"), Picture(stored("uint16", 20, 20, 1), metadata=told))
    assert leave("deblur", "a.tif", "--box", 3, "--damp", 0.1, "-o", "b.tif")[0] == 0
    assert read_picture(Path("b.tif")).metadata == told


def test_a_psf_from_a_file_is_scaled_to_sum_one_and_may_be_one_per_colour_or_three_dimensional(leave: Leave) -> None:
    write_picture(Path("a.png"), Picture(stored("uint8", 20, 21, 3)))
    write_picture(Path("stack.tif"), Picture(stored("uint8", 8, 20, 21, 1)))
    psf = np.random.default_rng(0).integers(1, 200, (3, 4, 3)).astype(np.uint8)
    write_picture(Path("grey.png"), Picture(psf[..., :1]))
    write_picture(Path("colour.png"), Picture(psf))
    np.save("planes.npy", psf.astype(float))  # (3, 4, 3): three axes, no colours
    options = ["--damp", "0.1"]
    assert leave("deblur", "a.png", "--psf", "grey.png", *options, "-o", "grey-restored.png")[0] == 0
    assert leave("deblur", "a.png", "--psf", "colour.png", *options, "-o", "colour-restored.png")[0] == 0
    assert leave("deblur", "stack.tif", "--psf", "planes.npy", *options, "-o", "solid.tif")[0] == 0
    values = read_picture(Path("a.png")).values

    def expected(kernel: np.ndarray[Any, Any]) -> Any:
        return lsconv.deconvolve(
            values, kernel / kernel.sum((-2, -1), keepdims=True), damp=0.1, channels="last", ndim=2
        ).x

    planes = np.moveaxis(psf, -1, 0).astype(float)
    assert np.array_equal(read_picture(Path("grey-restored.png")).values, expected(planes[0]))
    assert np.array_equal(read_picture(Path("colour-restored.png")).values, expected(planes))
    solid = lsconv.deconvolve(stored("uint8", 8, 20, 21, 1)[..., 0], psf / psf.sum(), damp=0.1).x
    assert np.array_equal(read_picture(Path("solid.tif")).values[..., 0], solid)


def test_several_pictures_go_to_a_folder_and_a_bad_one_stops_none(leave: Leave) -> None:
    for name in ("a.png", "b.tif"):
        write_picture(Path(name), Picture(stored("uint8", 16, 16, 1)))
    Path("bad.png").write_bytes(b"nothing")
    code, out, error = leave("deblur", "a.png", "bad.png", "b.tif", "--box", 3, "--damp", 0.1, "-o", "done")
    assert code == 2
    assert sorted(path.name for path in Path("done").iterdir()) == ["a.png", "b.tif"]
    assert error.count("\n") == 1
    assert "bad.png: not a PNG" in error
    assert out.count("\n") == 2


def test_the_examples_of_the_help_run(leave: Leave) -> None:
    write_picture(Path("photo.png"), Picture(stored("uint8", 40, 40, 3)))
    for command in ("deblur", "blur"):
        code, out, _ = leave(command, "--help")
        assert code == 0
        lines = [line.strip() for line in out.splitlines() if line.strip().startswith("lsconv ")]
        assert lines
        for line in lines:
            assert leave(*shlex.split(line)[1:])[0] == 0
    with Image.open("report.png") as image:
        assert image.format == "PNG"


@pytest.fixture
def pictures(leave: Leave) -> Leave:
    """Some good and some bad files beside the command line."""
    write_picture(Path("a.png"), Picture(stored("uint8", 12, 12, 1)))
    write_picture(Path("b.png"), Picture(stored("uint8", 12, 12, 1)))
    write_picture(Path("c.png"), Picture(stored("uint8", 12, 12, 4), opacity=True))
    write_picture(Path("stack.tif"), Picture(stored("uint8", 3, 12, 12, 1)))
    write_picture(Path("wild.npy"), Picture(3 * scene(12, 12, 1)))
    write_picture(Path("colour.png"), Picture(stored("uint8", 3, 3, 3)))
    write_picture(Path("black.png"), Picture(np.zeros((3, 3, 1), np.uint8)))
    np.save("nan.npy", np.full((12, 12), np.nan))
    np.save("solid.npy", np.ones((3, 3, 3)))
    tifffile.imwrite("line.tif", np.ones((1, 12), np.uint8))
    Path("text.txt").write_text("no picture")
    Path("folder.png").mkdir()
    Path("sub").mkdir()
    Path("empty").mkdir()
    np.save("line.npy", np.linspace(0, 1, 40))
    np.save("complex.npy", np.ones((12, 12), complex))
    np.save("inf.npy", np.full((12, 12), np.inf))
    np.save("hole.npy", np.full((3, 3), np.nan))
    tifffile.imwrite("times.tif", stored("uint8", 2, 12, 12), metadata={"axes": "TYX"}, imagej=True)
    np.save("minus.npy", np.array(scene(12, 12) - 0.5))
    write_picture(Path("sub/a.png"), Picture(stored("uint8", 12, 12, 1)))
    return leave


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("deblur", "IMAGE"),
        ("deblur a.png --box 3", "--output"),
        ("deblur a.png -o x.png", "give one of --psf, --gaussian, --disk, --motion, --box as the blur, got none"),
        ("deblur a.png --box 3 --disk 2 -o x.png", "got --disk, --box"),
        ("deblur none.png --box 3 -o x.png", "none.png: No such file"),
        ("deblur text.txt --box 3 -o x.png", "text.txt: not a PNG, JPEG, TIFF, NPY, WAV or FITS file"),
        ("deblur empty --box 3 -o x", "empty: the folder has no file that ends in .png"),
        ("deblur nan.npy --box 3 -o x.npy", "nan.npy: image: has no measured pixel"),
        ("deblur a.png --box 13 -o x.png", "a.png: psf: its size (13, 13) exceeds that of the image, (12, 12)"),
        ("deblur line.tif --box 3 -o x.tif", "exceeds"),
        ("deblur a.png --box 0 -o x.png", "--box"),
        ("deblur a.png --box 2.5 -o x.png", "--box"),
        ("deblur a.png --box 3 -o x.png --error-bars x.jpg", "--error-bars x.jpg: are real numbers"),
        ("deblur a.png --box 3 -o x.png --error-bars s.tif --min 0", "--error-bars: are of gaussian noise"),
        ("deblur a.png --gaussian=-1 -o x.png", "--gaussian: sigma: expected a number > 0, got -1"),
        ("deblur a.png --gaussian 1e9 -o x.png", "at most 2000 pixels"),
        ("deblur a.png --disk nan -o x.png", "--disk: radius"),
        ("deblur a.png --motion 15 -o x.png", "--motion 15: expected LENGTH,ANGLE"),
        ("deblur a.png --motion=-3,4 -o x.png", "--motion: length"),
        ("deblur a.png --psf none.png -o x.png", "none.png: No such file"),
        ("deblur a.png --psf text.txt -o x.png", "text.txt: not a PNG"),
        ("deblur a.png --psf black.png -o x.png", "--psf black.png: its values sum to 0"),
        ("deblur a.png --psf colour.png -o x.png", "it has 3 channels, the image has 1"),
        ("deblur a.png --psf solid.npy -o x.png", "needs a stack"),
        ("deblur a.png --box 3 --boundary mirror -o x.png", "--boundary mirror: expected one of unknown"),
        ("deblur a.png --box 3 --prior lasso -o x.png", "--prior lasso: expected one of gradient"),
        ("deblur a.png --box 3 --damp much -o x.png", "--damp much: expected auto"),
        ("deblur a.png --box 3 --damp=-1 -o x.png", "--damp -1: expected a number >= 0"),
        ("deblur a.png --box 3 --damp upre -o x.png", "--damp upre: needs --noise-std"),
        ("deblur a.png --box 3 --noise-std=-1 -o x.png", "--noise-std -1"),
        ("deblur a.png --box 3 --prior tv --weight=-1 -o x.png", "weight"),
        ("deblur a.png --box 3 --device quantum -o x.png", "--device quantum"),
        ("deblur a.png --box 3 -o x.bmp", "must end in one of .png"),
        ("deblur a.png --box 3 -o text.txt/x.png", "--output text.txt: is a file, expected a folder"),
        ("deblur a.png --box 3 -o a.png", "--output a.png: would replace an input"),
        ("deblur a.png --box 3 -o .", "would replace an input"),
        ("deblur a.png b.png --box 3 -o x.png", "several images need a folder"),
        ("deblur a.png b.png --box 3 -o text.txt", "several images need a folder"),
        ("deblur a.png sub/a.png --box 3 -o x", "two images would both become a.png"),
        ("deblur a.png b.png --box 3 -o text.txt/such", "--output text.txt: is a file"),
        ("deblur c.png --box 3 -o x.jpg", "JPEG cannot hold opacity"),
        ("deblur stack.tif --box 3 -o x.png", "PNG cannot hold a stack"),
        ("deblur wild.npy --box 3 -o x.png", "PNG cannot hold values outside [0, 1]"),
        ("deblur a.png --box 3 -o x.png --plot r.jpg", "--plot r.jpg: the report is a PNG"),
        ("deblur a.png --box 3 -o x.png --plot folder.png", "--plot folder.png: is a folder"),
        ("deblur a.png --box 3 -o x.png --plot x.png", "is also the name of the image"),
        ("deblur a.png --box 3 -o new/ --plot new/a.png", "--plot new/a.png: is also the name of the image"),
        ("deblur a.png --box 3 -o new/x.png --plot new/r.jpg", "--plot new/r.jpg: the report is a PNG"),
        ("deblur a.png --box 13 -o new/x.png --plot plots/r.png", "a.png: psf: its size (13, 13) exceeds"),
        ("deblur a.png --box 3 -o new", "--output new: the name must end in one of .png"),
        ("deblur a.png b.png --box 3 -o sub2 --plot r.png", "--plot: a report is about one image"),
        ("deblur a.png --box 3 -o x.png --noise shot", "--noise shot: expected gaussian or poisson"),
        ("deblur a.png --box 3 -o x.png --noise poisson --noise-std 3", "--read-noise, in photons"),
        ("deblur a.png --box 3 -o x.png --noise poisson --gain 0", "--gain 0: expected a number > 0"),
        ("deblur a.png --box 3 -o x.png --gain 2", "--gain: needs --noise poisson"),
        ("deblur a.png --box 3 -o x.png --read-noise 2", "--read-noise: needs --noise poisson"),
        ("deblur a.png --box 3 -o x.png --noise poisson --background=-4", "--background -4: expected a number >= 0"),
        ("deblur a.png --box 3 -o x.png --background nan", "--background nan"),
        ("deblur a.png --box 3 -o x.png --offset inf", "--offset inf"),
        ("deblur a.png --box 3 -o x.png --background much", "--background"),
        ("deblur a.png --box 3 -o x.png --min 9 --max 3", "--min 9: exceeds --max 3"),
        ("deblur a.png --box 3 -o x.png --nonnegative --min 3", "--nonnegative: is --min 0"),
        ("deblur a.png --box 3 -o x.png --max nan", "--max nan: expected a finite number"),
        ("deblur a.png --box 3 -o x.png --min nan --max 3", "--min nan: expected a finite number"),
        ("deblur a.png --box 3 -o x.png --max 1 --damp 0.1", "a.png: bounds: (None, 1.0) hold 0 % of the image"),
        ("deblur a.png --box 3 -o x.png --noise-std 900", "a.png: noise_std: 900 is no less than the range"),
        ("deblur a.png --box 3 -o x.png --origin left", "--origin left: expected center"),
        ("deblur a.png --box 3 -o x.png --weight 3", "--weight: is of --prior tv"),
        ("deblur a.png --box 3 -o x.png --prior tv --weight nan", "--weight nan"),
        (
            "deblur a.png --box 3 -o x.png --prior tv --damp 7",
            "--damp: is of the other priors; --prior tv has --weight",
        ),
        ("deblur a.png --box 3 -o x.png --prior tv --noise-std 0", "a.png: noise_std: expected positive numbers"),
        ("deblur a.png --box 3 -o x.png --jobs 0", "--jobs"),
        ("deblur a.png --box 3 -o x.png --jobs many", "--jobs"),
        ("deblur a.png --box 3 -o x.png --max-memory much", "--max-memory much: expected a size such as 500M or 4G"),
        ("deblur a.png --box 3 -o x.png --max-memory 3K", "a.png: needs about"),
        ("deblur a.png --box 3 -o x.png --quiet --verbose", "--quiet, --verbose: give one of them"),
        ("deblur a.png --box 3 -o x.png --report text.txt", "--report text.txt: is a file, expected a folder"),
        ("deblur a.png --box 3 -o x.png --report text.txt/such", "--report text.txt: is a file"),
        ("deblur minus.npy --box 3 -o x.npy --noise poisson", "minus.npy: image: counts must be >= 0"),
        ("deblur complex.npy --box 3 -o x.npy", "complex.npy: values of type complex128 are not supported"),
        ("deblur inf.npy --box 3 -o x.npy", "inf.npy: contains infinity; missing pixels are NaN"),
        ("deblur a.png --psf hole.npy -o x.npy", "--psf hole.npy: contains NaN"),
        ("deblur a.png --psf complex.npy -o x.npy", "complex.npy: values of type complex128"),
        ("deblur times.tif --psf solid.npy -o x.tif", "a PSF of three axes needs a stack, here the axes are TYX"),
        ("deblur a.png --psf line.npy -o x.png", "a PSF of one axis needs a signal"),
        ("deblur line.npy --disk 2 -o x.npy", "a signal needs a blur of one axis"),
        ("deblur line.npy --box 3 -o x.png", "PNG cannot hold a signal"),
        ("deblur line.npy --box 41 -o x.npy", "exceeds that of the image, (40,)"),
        ("deblur a.png --box 3 -o x.wav", "WAV cannot hold an image"),
        ("deblur a.png sub --box 3 -o x.png", "several images need a folder"),
        ("deblur sub --box 3 -o x.png", "several images need a folder"),
        ("deblur sub --box 3 -o sub", "would replace an input"),
        ("deblur sub --box 3 -o text.txt", "several images need a folder"),
        ("blur hole.npy --box 3 -o x.npy", "hole.npy: contains NaN; a blur needs"),
        ("blur complex.npy --box 3 -o x.npy", "complex.npy: values of type complex128"),
        ("blur line.npy --disk 2 -o x.npy", "a signal needs a blur of one axis"),
        ("blur a.png -o x.png", "give one of"),
        ("blur a.png --box 13 -o x.png", "a.png: the PSF's size (13, 13) exceeds that of the image, (12, 12)"),
        ("blur a.png --box 8 -o x.png", "nothing to restore would be left"),
        ("blur a.png --box 3 --noise-std=-1 -o x.png", "--noise-std -1"),
        ("blur a.png --box 3 --noise-std nan -o x.png", "--noise-std nan"),
        ("blur a.png --box 3 --seed x -o x.png", "--seed"),
        ("blur none.png --box 3 -o x.png", "none.png: No such file"),
        ("blur a.png --box 3 --boundary mirror -o x.png", "--boundary mirror"),
    ],
)
def test_everything_amiss_is_one_line_code_two_and_no_file(pictures: Leave, words: str, says: str) -> None:
    before = sorted(Path().rglob("*"))
    code, out, error = pictures(*shlex.split(words))
    assert code == 2
    assert out == ""
    assert error.startswith("lsconv: ")
    assert error.count("\n") == 1
    assert says in error
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("-o new/x.png", ["new/x.png"]),
        ("-o new/", ["new/a.png"]),
        ("-o new/deep/x.png", ["new/deep/x.png"]),
        ("-o x.png --plot plots/r.png", ["plots/r.png", "x.png"]),
        (
            "-o x.png --report page/all",
            [
                *(
                    f"page/all/{name}"
                    for name in ("index.html", "x.png.data.png", "x.png.png", "x.png.restoration.png")
                ),
                "x.png",
            ],
        ),
    ],
)
def test_folders_are_made_where_they_are_missing(pictures: Leave, words: str, written: list[str]) -> None:
    before = set(Path().rglob("*.*"))
    code, _, error = pictures(*shlex.split(f"deblur a.png --box 3 --damp 0.1 {words}"))
    assert (code, error) == (0, "")
    assert sorted(map(str, set(Path().rglob("*.*")) - before)) == written


def test_an_unwritable_folder_is_refused(pictures: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode, **_: mode != os.W_OK)  # the superuser may write anywhere
    code, _, error = pictures("deblur", "a.png", "--box", 3, "-o", "x.png")
    assert code == 2
    assert "its folder cannot be written to" in error


def test_a_disk_that_fills_up_is_one_line_too(pictures: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(restore, "write_picture", full)
    code, _, error = pictures("deblur", "a.png", "--box", 3, "--damp", 0.1, "-o", "x.png")
    assert (code, error) == (2, "lsconv: x.png: No space left on device\n")


def test_too_little_memory_is_one_line_too(pictures: Leave, monkeypatch: pytest.MonkeyPatch) -> None:
    def starve(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(lsconv, "deconvolve", starve)
    code, _, error = pictures("deblur", "a.png", "--box", 3, "-o", "x.png")
    assert (code, error) == (2, "lsconv: a.png: not enough memory for an image of this size\n")


def test_an_answer_that_did_not_converge_is_written_warned_about_and_code_one(
    pictures: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = lsconv.deconvolve

    def give_up(*arguments: Any, **options: Any) -> lsconv.Solution:
        import dataclasses

        solution = solve(*arguments, **options)
        warnings.warn("gave up", lsconv.ConvergenceWarning, stacklevel=1)
        return dataclasses.replace(solution, converged=torch.zeros_like(solution.converged))

    monkeypatch.setattr(lsconv, "deconvolve", give_up)
    code, _, error = pictures("deblur", "a.png", "--box", 3, "--damp", 0.1, "-o", "x.png")
    assert (code, error) == (1, "lsconv: a.png: gave up\n")
    assert Path("x.png").exists()


def test_typers_own_runner_sees_the_commands() -> None:
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert re.search(r"\bdeblur\b", result.output)
    assert re.search(r"\bblur\b", result.output)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("uint8", (28, 30, 4)), pytest.param("float32", (3, 28, 30, 1), marks=pytest.mark.slow)]
)
def test_error_bars_are_real_numbers_in_grey_levels_and_a_panel_of_the_report(
    leave: Leave, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    write_picture(Path("a.tif"), Picture(stored(dtype, *shape), opacity=shape[-1] == 4))
    words = ["a.tif", "--gaussian", 0.6, "--damp", 0.1, "-o", "b.tif", "--error-bars", "std.tif", "--plot", "r.png"]
    code, _, err = leave("deblur", *words)
    assert (code, err) == (0, "")
    assert "standard deviation" in [axes.get_title() for axes in drawn[0].axes]
    found = read_picture(Path("std.tif")).values
    fields = read_picture(Path("a.tif")).colours
    solution = lsconv.deconvolve(fields.reshape(-1, *fields.shape[-3:]), formulas.gaussian(0.6).float(), damp=0.1,
                                 channels="first", error_bars=True)  # fmt: skip
    expected = solution.std.reshape(fields.shape).movedim(-3, -1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)
