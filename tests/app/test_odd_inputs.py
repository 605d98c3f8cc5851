"""Odd files through the command line: one line and no file where they are refused, a whole file elsewhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import tifffile
from PIL import Image

from lsconv.app.image_io import Picture, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 255, (12, 14)).astype(np.uint8)


def png(name: str, values: np.ndarray[Any, Any] = GREY) -> None:
    Image.fromarray(values).save(name)


def cut(name: str, share: float) -> None:
    """The first part of a file."""
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: int(share * len(data))])


def flipped(name: str, place: float) -> None:
    """A file with 8 bytes in its middle changed."""
    data = bytearray(Path(name).read_bytes())
    start = int(place * len(data))
    data[start : start + 8] = bytes(255 - byte for byte in data[start : start + 8])
    Path(name).write_bytes(data)


def noisy_tiff(name: str) -> None:
    tifffile.imwrite(name, RNG.integers(0, 65535, (40, 40)).astype(np.uint16), compression="zlib")


def pickled(name: str) -> None:
    np.save(name, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def linked(name: str) -> None:
    Path(name).symlink_to(name)


def dangling(name: str) -> None:
    Path(name).symlink_to("gone.png")


def pages_of_two_kinds(name: str) -> None:
    with tifffile.TiffWriter(name) as file:
        file.write(GREY)
        file.write(np.zeros((5, 6, 3), np.uint8), photometric="rgb")


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "empty.png": (lambda n: Path(n).touch(), "not a PNG"),
    "empty.tif": (lambda n: Path(n).touch(), "not a PNG"),
    "empty.npy": (lambda n: Path(n).touch(), "not a PNG"),
    "cut.png": (lambda n: (png(n), cut(n, 0.6)), "damaged"),
    "head.png": (lambda n: (png(n), cut(n, 0.1)), "damaged"),
    "cut.jpg": (lambda n: (png(n), cut(n, 0.5)), "damaged"),
    "cut.tif": (lambda n: (noisy_tiff(n), cut(n, 0.5)), "damaged"),
    "head.tif": (lambda n: Path(n).write_bytes(b"II*\0\x08\0\0\0"), "damaged"),
    "cut.npy": (lambda n: (np.save(n, GREY), cut(n, 0.9)), "damaged"),
    "cut.wav": (lambda n: Path(n).write_bytes(b"RIFF\x24\0\0\0WAVEfmt "), "damaged"),
    "flipped.png": (lambda n: (png(n, RNG.integers(0, 255, (60, 60)).astype(np.uint8)), flipped(n, 0.5)), "damaged"),
    "flipped.tif": (lambda n: (noisy_tiff(n), flipped(n, 0.5)), "damaged"),
    "text.png": (lambda n: Path(n).write_text("a picture"), "not a PNG"),
    "other.png": (lambda n: Image.fromarray(GREY).save(n, format="GIF"), "not a PNG"),
    "nan.npy": (lambda n: np.save(n, np.full((9, 9), np.nan, np.float32)), "no measured pixel"),
    "nan.tif": (lambda n: tifffile.imwrite(n, np.full((9, 9), np.nan, np.float32)), "no measured pixel"),
    "inf.tif": (lambda n: tifffile.imwrite(n, np.array([[1, np.inf] * 4] * 8, np.float32)), "contains infinity"),
    "complex.npy": (lambda n: np.save(n, GREY.astype(complex)), "complex128"),
    "object.npy": (pickled, "object.npy"),
    "strings.npy": (lambda n: np.save(n, np.array([["a", "b"]] * 9)), "type <U1"),
    "dates.npy": (lambda n: np.save(n, np.zeros((9, 9), "M8[s]")), "type datetime64"),
    "records.npy": (lambda n: np.save(n, np.zeros((9, 9), [("a", "f4")])), "records.npy"),
    "five.npy": (lambda n: np.save(n, np.zeros((2, 2, 2, 9, 9), np.float32)), "is not a signal, an image or a stack"),
    "scalar.npy": (lambda n: np.save(n, np.float64(3)), "is not a signal"),
    "nothing.npy": (lambda n: np.save(n, np.zeros((0, 9))), "is not an image"),
    "one.png": (lambda n: png(n, GREY[:1, :1]), "exceeds that of the image, (1, 1)"),
    "row.tif": (lambda n: tifffile.imwrite(n, GREY[:1]), "exceeds that of the image, (1, 14)"),
    "loop.png": (linked, "loop.png"),
    "dangling.png": (dangling, "No such file"),
    "kinds.tif": (pages_of_two_kinds, "pictures of different kinds"),
    "bits.tif": (lambda n: tifffile.imwrite(n, GREY > 9, bitspersample=1), "of 1 bit(s) are not supported"),
    "cmyk.jpg": (lambda n: Image.new("CMYK", (9, 9)).save(n), "in CMYK are not supported"),
    "folder.tif": (lambda n: Path(n).mkdir(), "folder.tif"),
    "file.zarr": (lambda n: Path(n).write_text("no folder"), "not a PNG"),
    "empty.zarr": (lambda n: Path(n).mkdir(), "folder that is no Zarr group"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_image_gives_one_line_and_no_file(leave: Leave, name: str) -> None:
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    make, said = REFUSED[name]
    make(name)
    code, out, error = leave("deblur", name, "--box", 3, "-o", f"new/out{Path(name).suffix}")
    assert code == 2
    assert out == ""
    assert error.startswith("lsconv: ")
    assert error.count("\n") == 1, error
    assert said in error
    assert name in error
    assert not Path("new").exists()


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in ("one.png", "row.tif")])
def test_a_file_that_is_no_image_is_no_psf_and_no_mask_either(leave: Leave, name: str) -> None:
    if name.endswith(".zarr"):
        pytest.importorskip("zarr")
    REFUSED[name][0](name)
    png("image.png")
    for words in (
        ("deblur", "image.png", "--psf", name),
        ("deblur", "image.png", "--box", 3, "--bad-pixels", name),
        ("deblur", "image.png", "--psf-grid", name),
        ("blur", name, "--box", 3),
        ("psf", name, "--model", "disk"),
    ):
        code, out, error = leave(*words, "-o", f"new/out{'.npy' if words[0] == 'psf' else Path(name).suffix}")
        assert (code, out, error.count("\n")) == (2, "", 1), (words, error)
        assert error.startswith("lsconv: ")
        assert not Path("new").exists()


SERVED: dict[str, Callable[[str], Any]] = {
    "palette.png": lambda n: Image.fromarray(GREY).convert("P").save(n),
    "bilevel.png": lambda n: Image.fromarray(GREY > 99).save(n),
    "opaque.png": lambda n: Image.fromarray(np.stack([GREY] * 4, -1)).save(n),
    "deep.png": lambda n: Image.fromarray(256 * GREY.astype(np.uint16)).save(n),
    "flags.npy": lambda n: np.save(n, GREY > 99),
    "half.npy": lambda n: np.save(n, (GREY / 255).astype(np.float16)),
    "big.tif": lambda n: tifffile.imwrite(n, GREY.astype(">u2"), byteorder=">"),
    "float.tif": lambda n: tifffile.imwrite(n, GREY.astype(">f4"), byteorder=">"),
    "signed.tif": lambda n: tifffile.imwrite(n, GREY.astype(np.int16) - 99),
    "huge.npy": lambda n: np.save(n, GREY.astype(np.float64) * 1e30),
    "tiny.npy": lambda n: np.save(n, GREY.astype(np.float64) * 1e-30),
    "constant.png": lambda n: png(n, np.full((12, 14), 7, np.uint8)),
    "black.png": lambda n: png(n, np.zeros((12, 14), np.uint8)),
    "smallest.png": lambda n: png(n, GREY[:3, :3]),
    "fortran.npy": lambda n: np.save(n, np.asfortranarray(GREY)),
    "wide.npy": lambda n: np.save(n, GREY.astype(np.uint64) << 40),
    "hole.npy": lambda n: np.save(n, np.where(GREY > 200, np.nan, GREY).astype(np.float32)),
    "stack.tif": lambda n: tifffile.imwrite(n, np.stack([GREY] * 5)),
    "wrong-name.png": lambda n: tifffile.imwrite(n, GREY),
    "spaces and 'quotes'.png": png,
    "höhe-日本.png": png,
    "-dash.png": png,
    "$sum$ & <b> 100% #1.png": png,
    os.fsdecode(b"latin-\xe9.png"): png,
    "link.png": lambda n: (png("behind.png"), Path(n).symlink_to("behind.png")),
    "UPPER.PNG": lambda n: Image.fromarray(GREY).save(n, format="PNG"),
}


@pytest.mark.parametrize("name", SERVED, ids=ascii)
def test_an_odd_image_is_restored_in_its_type_and_shape(leave: Leave, name: str) -> None:
    SERVED[name](name)
    before = Path(name).read_bytes()
    code, _, error = leave("deblur", f"./{name}", "--box", 3, "--damp", 0.3, "-o", "new/")
    assert code == 0, error
    assert "Traceback" not in error
    assert os.listdir("new") == [name]
    given, found = read_picture(Path(name)), read_picture(Path("new") / name)
    kept = given.values.dtype if name != "wrong-name.png" else np.uint8
    assert found.values.dtype == kept
    assert found.values.shape == given.values.shape
    assert np.isfinite(found.values.astype(float)).all()
    assert Path(name).read_bytes() == before


@pytest.mark.slow
def test_a_folder_of_everything_restores_what_is_an_image_and_says_the_rest_in_one_line_each(leave: Leave) -> None:
    Path("in").mkdir()
    os.chdir("in")
    for name, (make, _) in REFUSED.items():
        if not name.endswith(".zarr"):
            make(name)
    for name, serve in SERVED.items():
        serve(name)
    Path("notes.txt").write_text("none")
    Path(".hidden.png").touch()
    os.chdir("..")
    code, out, error = leave("deblur", "in", "--box", 3, "--damp", 0.3, "-o", "out")
    assert code == 2
    assert "Traceback" not in error
    refused = [name for name in REFUSED if not name.endswith(".zarr")]
    assert sorted(os.listdir("out")) == sorted([*SERVED, "behind.png"])
    lines = error.splitlines()
    for name in refused:
        assert sum(f"in/{name}" in line for line in lines) >= 1, name
    assert all(line.startswith("lsconv: ") for line in lines)
    assert out.count("\n") == len(SERVED) + 1  # and behind.png


@pytest.mark.slow
def test_reports_on_odd_names_and_odd_values_are_drawn_and_linked_to(leave: Leave) -> None:
    values = ("huge.npy", "tiny.npy", "constant.png", "black.png", "smallest.png", "hole.npy", "stack.tif")
    names = [name for name in SERVED if not re.fullmatch(r"[a-z][a-z-]*\.(png|npy|tif)", name) or name in values]
    assert len(names) == len(values) + 6
    Path("in").mkdir()
    os.chdir("in")
    for name in names:
        SERVED[name](name)
    os.chdir("..")
    code, out, error = leave("deblur", "in", "--box", 3, "--damp", 0.3, "-o", "out", "--report", "page")
    assert code == 0, error
    assert out.count("\n") == len(names) + 1  # and the page
    drawn = set(os.listdir("page")) - {"index.html"}
    kinds = ("png", "data.png", "restoration.png")
    assert drawn == {f"{name}.{kind}" for name in names for kind in kinds}
    page = Path("page/index.html").read_text(encoding="utf-8")
    linked_to = {os.fsdecode(unquote_to_bytes(name)) for name in re.findall("src='([^']*)'", page)}
    assert linked_to == drawn


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_process_killed_while_writing_leaves_a_whole_file(tmp_path: Path, name: str) -> None:
    script = (
        "import pathlib, numpy as np; from lsconv.app.image_io import Picture, write_picture\n"
        "noise = np.random.default_rng(0).integers(0, 2**15, (800, 800, 1)).astype(np.uint16)\n"
        "for value in range(1, 250):\n"
        f"    write_picture(pathlib.Path({name!r}), Picture(noise + np.uint16(value)))\n"
        "    print(value, flush=True)"
    )
    write_picture(tmp_path / name, Picture(np.zeros((800, 800, 1), np.uint16)))
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    deadline = time.monotonic() + 30  # until it is in the middle of a file
    while not any(path.suffix == ".part" for path in tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.0005)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    noise = np.random.default_rng(0).integers(0, 2**15, (800, 800, 1)).astype(np.uint16)
    difference = read_picture(tmp_path / name).values - noise
    assert difference.min() == difference.max() >= 1
