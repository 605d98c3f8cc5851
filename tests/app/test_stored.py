"""``lsconv deblur --tile`` from and to OME-Zarr: what the untiled command writes, pixels, pyramid, axes and scales."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from lsconv.app.calibration import Calibration
from lsconv.app.image_io import Metadata, Picture, read_picture, write_picture

zarr = pytest.importorskip("zarr")

Leave = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
STEPS = {"T": (2.0, "second"), "Z": (0.3, "micrometer"), "Y": (0.1, "micrometer"), "X": (0.1, "micrometer")}


def picture(*shape: int, axes: str = "", dtype: Any = np.uint16) -> Picture:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=shape), -1), -2)
    values = ((smooth - smooth.min()) / np.ptp(smooth) * 60000).astype(dtype)
    channels = tuple((f"stain {i}", "00FF00") for i in range(shape[axes.index("C")])) if "C" in axes else ()
    steps = {axis: STEPS[axis] for axis in f"{axes}YX" if axis in STEPS}
    return Picture(values[..., None], axes=axes, metadata=Metadata(calibration=Calibration(steps, channels)))


def same(one: Path, other: Path, tolerance: float) -> None:
    """Hold two OME-Zarr images against each other: what they say, and their levels up to a tolerance."""
    assert (one / "zarr.json").read_bytes() == (other / "zarr.json").read_bytes()
    groups = [zarr.open_group(path, mode="r") for path in (one, other)]
    assert sorted(groups[0].array_keys()) == sorted(groups[1].array_keys())
    for name in sorted(groups[0].array_keys()):
        first, second = (group[name] for group in groups)
        assert (first.chunks, first.dtype) == (second.chunks, second.dtype)
        assert np.abs(first[...].astype(np.float64) - second[...]).max() <= tolerance


@pytest.mark.parametrize(
    ("axes", "shape", "dtype"),
    [("", (300, 310), np.uint16), ("C", (2, 60, 62), ">u2"), ("TCZ", (2, 1, 2, 60, 62), np.uint8),
     ("T", (2, 60, 62), np.float32)],
)  # fmt: skip
def test_tiles_write_the_image_that_the_whole_does(leave: Leave, axes: str, shape: tuple[int, ...], dtype: Any) -> None:
    made = picture(*shape, axes=axes, dtype=dtype) if dtype != np.uint8 else picture(*shape, axes=axes, dtype=np.int32)
    if dtype == np.uint8:
        made = Picture((made.values // 256).astype(np.uint8), axes=axes, metadata=made.metadata)
    write_picture(Path("in.ome.zarr"), made)
    words = ["deblur", "in.ome.zarr", "--gaussian", 1, "--damp", 0.1]
    assert leave(*words, "-o", "whole.ome.zarr")[0] == 0
    code, out, error = leave(*words, "-o", "tiles.ome.zarr", "--tile", 40 if shape[-1] < 100 else 128)
    assert (code, error) == (0, "")
    assert "tiles of" in out
    same(Path("whole.ome.zarr"), Path("tiles.ome.zarr"), 1 if np.dtype(dtype).kind in "iu" else 1.5)
    assert sorted(os.listdir(".")) == ["in.ome.zarr", "tiles.ome.zarr", "whole.ome.zarr"]


@pytest.mark.parametrize("axes", ["Z", "CZ"])
def test_a_stack_is_restored_by_tiles_as_a_volume(leave: Leave, axes: str) -> None:
    write_picture(Path("in.zarr"), picture(*(2, 10, 24, 26)[-len(axes) - 2 :], axes=axes))
    line = np.array([0.25, 0.5, 0.25])
    np.save("psf.npy", line[:, None, None] * np.outer(np.ones(5), np.ones(5)) / 25)
    words = ["deblur", "in.zarr", "--psf", "psf.npy", "--damp", 0.2]
    assert leave(*words, "-o", "whole.zarr")[0] == 0
    assert leave(*words, "-o", "tiles.zarr", "--tile", 14)[0] == 0
    same(Path("whole.zarr"), Path("tiles.zarr"), 1)


def test_depth_is_found_by_its_name_in_a_hyperstack(leave: Leave) -> None:
    values = np.moveaxis(picture(2, 8, 20, 22, axes="CZ").values[..., 0], 0, 1)
    tifffile.imwrite("in.tif", values, imagej=True, metadata={"axes": "ZCYX", "spacing": 0.3, "unit": "um"})
    np.save("psf.npy", np.ones((3, 3, 3)) / 27)
    words = ["deblur", "in.tif", "--psf", "psf.npy", "--damp", 0.2]
    assert leave(*words, "-o", "whole.tif")[0] == 0
    assert leave(*words, "-o", "tiles.tif", "--tile", 12)[0] == 0
    assert leave(*words, "-o", "tiles.zarr", "--tile", 12)[0] == 0
    whole, tiles = (tifffile.imread(name).astype(int) for name in ("whole.tif", "tiles.tif"))
    assert np.abs(whole - tiles).max() <= 1
    tiles = zarr.open_group("tiles.zarr", mode="r")["0"][...].astype(int)
    assert np.abs(np.moveaxis(whole, 1, 0) - tiles).max() <= 1


@pytest.mark.parametrize("target", ["tiles.tif", "tiles.npy", "tiles.zarr"])
@pytest.mark.parametrize("source", ["in.tif", "planes.tif", "in.zarr"])
def test_every_format_becomes_every_other_with_what_it_says(leave: Leave, source: str, target: str) -> None:
    made = picture(3, 40, 42, axes="C")
    write_picture(Path("in.zarr"), made)
    write_picture(Path("in.tif"), made)
    tifffile.imwrite("planes.tif", made.values[..., 0], photometric="rgb", planarconfig="separate", metadata=None)
    words = ["deblur", source, "--box", 3, "--damp", 0.1]
    assert leave(*words, "-o", f"whole-{target}")[0] == 0
    assert leave(*words, "-o", target, "--tile", 30)[0] == 0
    whole, tiles = (read_picture(Path(name)) for name in (f"whole-{target}", target))
    assert np.abs(whole.values.astype(int) - tiles.values).max() <= 1
    assert whole.axes == tiles.axes
    assert whole.metadata.calibration == tiles.metadata.calibration
    assert bool(tiles.metadata.calibration) == (source != "planes.tif" and target != "tiles.npy")


def test_labels_go_with_the_tiles_or_are_named(leave: Leave) -> None:
    write_picture(Path("in.zarr"), picture(40, 42))
    write_picture(Path("in.zarr/labels/cells.zarr"), Picture(np.ones((40, 42, 1), np.uint8)))
    words = ["deblur", "in.zarr", "--box", 3, "--damp", 0.1, "--tile", 30]
    assert leave(*words, "-o", "out.zarr")[0] == 0
    assert read_picture(Path("out.zarr/labels/cells.zarr")).values.all()
    code, _, error = leave(*words, "-o", "out.tif")
    assert (code, "labels cells.zarr are not written: TIFF has no place for them" in error) == (0, True)


def test_missing_pixels_are_refused_and_nothing_is_left(leave: Leave) -> None:
    made = picture(40, 42, dtype=np.float32)
    made.values[7, 8] = np.nan
    write_picture(Path("in.zarr"), made)
    for target in ("out.zarr", "out.tif", "out.npy"):
        code, _, error = leave("deblur", "in.zarr", "--box", 3, "--damp", 0.1, "--tile", 30, "-o", target)
        assert (code, error.count("\n")) == (2, 1)
    assert os.listdir(".") == ["in.zarr"]


@pytest.mark.parametrize(
    "name", ["alpha.npy", "alpha.tif", "white.tif", "cut.npy", "plate.zarr", "line.npy", "bool.zarr"]
)
def test_a_file_that_tiles_do_not_read_is_reported_in_one_line(leave: Leave, name: str) -> None:
    np.save("alpha.npy", np.ones((9, 9, 4), np.uint8))
    np.save("line.npy", np.ones(50))
    write_picture(Path("alpha.tif"), Picture(np.ones((9, 9, 4), np.uint8), opacity=True))
    tifffile.imwrite("white.tif", np.ones((9, 9), np.uint8), photometric="miniswhite")
    Path("cut.npy").write_bytes(Path("alpha.npy").read_bytes()[:-9])
    Path("plate.zarr").mkdir()
    Path("plate.zarr/zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    write_picture(Path("bool.zarr"), Picture(np.ones((9, 9, 1), bool)))
    before = sorted(os.listdir("."))
    code, _, error = leave("deblur", name, "--box", 3, "--damp", 0.1, "--tile", 8, "-o", "out.zarr")
    assert (code, error.count("\n")) == (2, 1), error
    assert name in error
    assert sorted(os.listdir(".")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.slow
def test_a_killed_restoration_goes_on_where_it_was(tmp_path: Path, leave: Leave) -> None:
    write_picture(tmp_path / "in.zarr", picture(400, 410))
    words = [
        "deblur",
        "in.zarr",
        "--box",
        "9",
        "--damp",
        "0.01",
        "-o",
        "out.zarr",
        "--tile",
        "64",
        "--max-memory",
        "400M",
    ]
    start = "import sys; from lsconv.app.cli import run; run(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", start, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    state = tmp_path / ".out.zarr.tiles" / "0-state.json"
    for _ in range(600):
        if state.exists():
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert not (tmp_path / "out.zarr").exists()
    assert state.exists()
    code, _, error = leave(*words)
    assert code == 0, error
    assert sorted(os.listdir(tmp_path)) == ["in.zarr", "out.zarr"]
    assert leave(*words[:-5], "whole.zarr")[0] == 0
    same(tmp_path / "whole.zarr", tmp_path / "out.zarr", 1)
