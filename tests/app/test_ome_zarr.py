"""OME-Zarr: axes, units, scales, channels and number types survive; folders are replaced in one step, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import lsconv
from lsconv.app.arguments import UsageError, find_images, plan_outputs
from lsconv.app.image_io import ImageFileError, Metadata, Picture, check_target, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
WINDOW = {"min": 0, "max": 255, "start": 0, "end": 255}
OMERO = {
    "channels": [
        {"label": "DAPI", "color": "0000FF", "active": True, "window": WINDOW},
        {"label": "GFP", "color": "00FF00", "window": WINDOW},
    ]
}
KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
UNITS = {"t": "second", "z": "micrometer", "y": "micrometer", "x": "micrometer"}


def axes_of(names: str) -> list[dict[str, str]]:
    return [{"name": n, "type": KINDS[n], **({"unit": UNITS[n]} if n in UNITS else {})} for n in names]


def make(folder: Path, values: np.ndarray[Any, Any], names: str, version: str = "0.5") -> Path:
    """An image written by hand, one chunk uncompressed, and a false lower level that nobody is to read."""
    scale = [1.5, 1.0, 2.0, 0.25, 0.5][-len(names) :]
    datasets = [
        {
            "path": path,
            "coordinateTransformations": [
                {"type": "scale", "scale": [*scale[:-2], factor * scale[-2], factor * scale[-1]]},
                {"type": "translation", "translation": [7.0 if n == "x" else 0.0 for n in names]},
            ],
        }
        for path, factor in (("full", 1), ("half", 2))
    ]
    entry = {"name": "specimen", "axes": axes_of(names), "datasets": datasets, "type": "gaussian", "metadata": {"a": 1}}
    beside = {"omero": OMERO} if "c" in names else {}
    for path in ("full", "half"):
        array = folder / path
        array.mkdir(parents=True)
        shape = list(values.shape)
        data = values if path == "full" else np.zeros_like(values)
        if version == "0.4":
            head = {"zarr_format": 2, "shape": shape, "chunks": shape, "dtype": values.dtype.str, "fill_value": 0,
                    "order": "C", "compressor": None, "filters": None, "dimension_separator": "/"}  # fmt: skip
            (array / ".zarray").write_text(json.dumps(head))
            chunk = array.joinpath(*("0" for _ in shape))
        else:
            head = {"zarr_format": 3, "node_type": "array", "shape": shape, "data_type": values.dtype.name,
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}}, "fill_value": 0,
                    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    "dimension_names": list(names), "attributes": {}}  # fmt: skip
            (array / "zarr.json").write_text(json.dumps(head))
            chunk = array.joinpath("c", *("0" for _ in shape))
        chunk.parent.mkdir(parents=True)
        chunk.write_bytes(data.tobytes())
    if version == "0.4":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(
            json.dumps({"multiscales": [{**entry, "version": "0.4"}], **beside, "laboratory": "B12"})
        )
    else:
        attributes = {"ome": {"version": "0.5", "multiscales": [entry], **beside}, "laboratory": "B12"}
        (folder / "zarr.json").write_text(
            json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})
        )
    return folder


def attributes_of(folder: Path) -> dict[str, Any]:
    """What a group says, and its image and what is beside it at one place whatever the version."""
    if (folder / "zarr.json").exists():
        found = json.loads((folder / "zarr.json").read_text())["attributes"]
        return {**found, **found["ome"]}
    return json.loads((folder / ".zattrs").read_text())


def counts(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 200, shape)


def test_without_zarr_the_line_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Leave
) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    make(tmp_path / "a.ome.zarr", counts(4, 5).astype(np.uint8), "yx")
    with pytest.raises(ImageFileError, match=r"a.ome.zarr: OME-Zarr needs zarr; .*pip install 'lsconv\[zarr\]'"):
        read_picture(tmp_path / "a.ome.zarr")
    with pytest.raises(ImageFileError, match=r"pip install 'lsconv\[zarr\]'"):
        check_target(tmp_path / "b.zarr", Picture(np.zeros((4, 4, 1), np.uint8)))
    code, _, error = leave("deblur", "a.ome.zarr", "--gaussian", 1, "-o", "b.zarr")
    assert (code, error.count("\n")) == (2, 1)
    assert "pip install 'lsconv[zarr]'" in error


@pytest.mark.parametrize(
    ("version", "dtype"),
    [*((version, dtype) for version in ("0.4", "0.5") for dtype in ("uint8", "uint16", "float32", "int16", "float64")),
     ("0.4", ">u2"), ("0.4", ">f4")],
)  # fmt: skip
@pytest.mark.parametrize("names", ["yx", "zyx", "cyx", "tcyx", "czyx", "tczyx"])
def test_values_axes_scales_and_channels_survive(tmp_path: Path, version: str, names: str, dtype: str) -> None:
    zarr = pytest.importorskip("zarr")
    values = counts(*(2, 2, 3, 6, 7)[5 - len(names) :]).astype(dtype)
    make(tmp_path / "a.ome.zarr", values, names, version)
    picture = read_picture(tmp_path / "a.ome.zarr")
    assert picture.axes == names[:-2].upper()
    assert picture.values.dtype == values.dtype.newbyteorder("=")
    assert np.array_equal(picture.values[..., 0], values)
    write_picture(tmp_path / "b.ome.zarr", picture)
    group = zarr.open_group(tmp_path / "b.ome.zarr", mode="r")
    assert group.metadata.zarr_format == {"0.4": 2, "0.5": 3}[version]
    assert list(group.array_keys()) == ["0"]
    assert np.array_equal(group["0"][...], values)
    said, before = attributes_of(tmp_path / "b.ome.zarr"), attributes_of(tmp_path / "a.ome.zarr")
    entry, first = said["multiscales"][0], before["multiscales"][0]
    assert entry["axes"] == first["axes"]
    assert entry["name"] == "specimen"
    assert "metadata" not in entry
    assert [d["coordinateTransformations"] for d in entry["datasets"]] == [
        first["datasets"][0]["coordinateTransformations"]
    ]
    assert said.get("omero") == before.get("omero")
    assert said["laboratory"] == "B12"
    assert (entry if version == "0.4" else said)["version"] == version
    if version == "0.5":
        assert group["0"].metadata.dimension_names == tuple(names)


def test_versions_before_0_4_name_no_types_or_no_axes(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    for version, axes in (("0.3", {"axes": ["c", "y", "x"]}), ("0.1", {})):
        shape = (2, 6, 7) if axes else (1, 2, 3, 6, 7)
        folder = make(tmp_path / f"{version}.zarr", counts(*shape).astype(np.uint8), "tczyx"[-3:], "0.4")
        entry = {"version": version, "datasets": [{"path": "full"}], **axes}
        (folder / ".zattrs").write_text(json.dumps({"multiscales": [entry]}))
        picture = read_picture(folder)
        assert picture.axes == ("C" if axes else "TCZ")
        write_picture(tmp_path / "b.zarr", picture)
        found = attributes_of(tmp_path / "b.zarr")["multiscales"][0]
        assert found["version"] == "0.4"
        assert [axis["type"] for axis in found["axes"]] == [KINDS[n] for n in ("cyx" if axes else "tczyx")]


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bool"])
def test_the_levels_are_means_in_their_places(tmp_path: Path, dtype: str) -> None:
    zarr = pytest.importorskip("zarr")
    rows, columns = np.mgrid[:515, :700]
    plane = 0.2 * rows + 0.1 * columns  # linear: a mean is the value in the middle
    values = np.stack([plane, plane + 5]).astype(dtype) if dtype != "bool" else np.stack([rows >= 256, columns >= 300])
    make(tmp_path / "a.zarr", values, "cyx")
    write_picture(tmp_path / "b.zarr", read_picture(tmp_path / "a.zarr"))
    group = zarr.open_group(tmp_path / "b.zarr", mode="r")
    datasets = attributes_of(tmp_path / "b.zarr")["multiscales"][0]["datasets"]
    assert [group[d["path"]].shape for d in datasets] == [(2, 515, 700), (2, 258, 350), (2, 129, 175)]
    for level, dataset in enumerate(datasets):
        scale, translation = (step[step["type"]] for step in dataset["coordinateTransformations"])
        assert scale == [2.0, 0.25 * 2**level, 0.5 * 2**level]
        array = group[dataset["path"]][...]
        assert array.dtype == values.dtype
        inner = array[:, : 515 // 2**level, : 700 // 2**level]
        if dtype == "bool":
            assert np.array_equal(array, values[:, :: 2**level, :: 2**level])  # the edges lie between the means
            continue
        y = (translation[1] + scale[1] * np.arange(inner.shape[1]))[:, None] / 0.25
        x = (translation[2] + scale[2] * np.arange(inner.shape[2]) - 7) / 0.5
        expected = 0.2 * y + 0.1 * x + np.array([0, 5])[:, None, None]
        assert np.abs(inner - expected).max() <= (1e-3 if dtype == "float32" else 1.3)


def test_other_formats_become_version_0_5_in_the_order_of_its_axes(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    values = counts(3, 4, 2, 6, 7).astype(np.uint16)  # T Z C
    metadata = Metadata(resolution=(4000.0, 5000.0), unit="cm")
    write_picture(tmp_path / "a.zarr", Picture(values[..., None], axes="TZC", metadata=metadata))
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert np.array_equal(group["0"][...], np.moveaxis(values, 1, 2))
    entry = attributes_of(tmp_path / "a.zarr")["multiscales"][0]
    assert [axis["name"] for axis in entry["axes"]] == list("tczyx")
    assert [axis.get("unit") for axis in entry["axes"]] == [None, None, None, "centimeter", "centimeter"]
    assert entry["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 1, 1, 1 / 5000, 1 / 4000]
    colours = counts(6, 7, 3).astype(np.uint8)
    write_picture(tmp_path / "b.zarr", Picture(colours))
    assert np.array_equal(zarr.open_group(tmp_path / "b.zarr", mode="r")["0"][...], np.moveaxis(colours, -1, 0))
    for picture in (Picture(np.zeros((2, 3, 4, 5, 3), np.uint8), axes="CZ"), Picture(np.zeros((2, 4, 5, 1)), axes="Q")):
        with pytest.raises(ImageFileError, match=r"OME-Zarr has time, channel, depth, y and x"):
            check_target(tmp_path / "c.zarr", picture)
    with pytest.raises(ImageFileError, match="cannot hold opacity"):
        check_target(tmp_path / "c.zarr", Picture(np.zeros((4, 5, 4), np.uint8), opacity=True))
    with pytest.raises(ImageFileError, match="cannot hold a signal"):
        check_target(tmp_path / "c.zarr", Picture(np.zeros((1, 5, 1), np.uint8), line=True))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_times_and_channels_are_restored_apart_and_depth_as_a_volume(leave: Leave, version: str) -> None:
    zarr = pytest.importorskip("zarr")
    values = counts(2, 2, 5, 10, 11).astype(np.uint16)
    make(Path("a.ome.zarr"), values, "tczyx", version)
    line = np.array([0.25, 0.5, 0.25])
    kernel = (line[:, None, None] * line[:, None] * line).astype(np.float32)
    make(Path("psf.zarr"), kernel, "zyx", version)
    words = ("--psf", "psf.zarr", "--damp", 0.3, "-o", "b.ome.zarr/")
    assert leave("deblur", "a.ome.zarr", *words)[0] == 0
    restored = zarr.open_group("b.ome.zarr", mode="r")["0"][...]
    for t in range(2):
        for c in range(2):
            expected = lsconv.deconvolve(values[t, c], kernel, damp=0.3).x
            assert np.abs(restored[t, c].astype(int) - expected).max() <= 1
    assert leave("deblur", "a.ome.zarr/", *words)[0] == 0  # the image that is there is replaced
    assert sorted(os.listdir(".")) == ["a.ome.zarr", "b.ome.zarr", "psf.zarr"]


@pytest.mark.parametrize(
    ("names", "shape", "dtype"),
    [
        *(("yx", (14, 15), dtype) for dtype in ("uint8", ">u2", "float32")),
        ("zyx", (6, 14, 15), ">u2"),
        ("tczyx", (2, 2, 4, 10, 11), "float32"),
    ],
)
def test_an_image_is_restored_as_it_is_in_a_tiff(leave: Leave, names: str, shape: tuple[int, ...], dtype: str) -> None:
    zarr = pytest.importorskip("zarr")
    values = counts(*shape).astype(dtype)
    make(Path("a.zarr"), values, names, "0.4")
    written = np.moveaxis(values, 1, 2) if names == "tczyx" else values  # ImageJ's order is TZCYX
    axes = "TZCYX" if names == "tczyx" else names.upper()
    tifffile.imwrite("a.tif", written, imagej=True, metadata={"axes": axes}, byteorder=">" if dtype[0] == ">" else None)
    for name in ("a.zarr", "a.tif"):
        assert leave("deblur", name, "--gaussian", 0.7, "--damp", 0.2, "-o", f"new/{name}")[0] == 0
    restored = tifffile.imread("new/a.tif")
    restored = np.moveaxis(restored, 2, 1) if names == "tczyx" else restored
    assert np.array_equal(zarr.open_group("new/a.zarr", mode="r")["0"][...], restored)


def test_a_folder_that_ends_in_zarr_is_an_image_and_not_a_folder_of_images(tmp_path: Path) -> None:
    image = make(tmp_path / "in" / "a.ome.zarr", counts(6, 7).astype(np.uint8), "yx")
    assert find_images([image]) == [image]
    assert find_images([tmp_path / "in"]) == [image]
    assert plan_outputs([tmp_path / "in"], [image], str(tmp_path / "out")) == [tmp_path / "out" / "a.ome.zarr"]
    assert plan_outputs([image], [image], f"{tmp_path}/b.zarr/") == [tmp_path / "b.zarr"]
    with pytest.raises(UsageError, match="this is the name of an image"):
        plan_outputs([image, image], [image, image], str(tmp_path / "b.zarr"))
    for inside in (image, image / "b.npy"):
        with pytest.raises(UsageError, match="would replace an input"):
            plan_outputs([image], [image], str(inside))


@pytest.mark.parametrize("kind", ["empty", "plate", "things"])
def test_folders_of_other_things_are_not_replaced(tmp_path: Path, kind: str, leave: Leave) -> None:
    pytest.importorskip("zarr")
    other = tmp_path / f"{kind}.zarr"
    other.mkdir()
    if kind == "plate":
        (other / ".zgroup").write_text('{"zarr_format": 2}')
        (other / ".zattrs").write_text('{"plate": {}}')
    if kind == "things":
        (other / "notes.txt").write_text("kept")
    before = sorted(os.listdir(other))
    with pytest.raises(ImageFileError, match="is a folder"):
        write_picture(other, Picture(np.zeros((4, 4, 1), np.uint8)))
    make(tmp_path / "a.zarr", counts(6, 7).astype(np.uint8), "yx")
    assert leave("deblur", "a.zarr", "--gaussian", 1, "-o", other)[0] == 2
    assert sorted(os.listdir(other)) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ome: ome.pop("multiscales"), "a Zarr group without multiscales; of a plate or a collection"),
        (lambda ome: ome.update(version="0.6.dev1"), "OME-Zarr version 0.6.dev1 is not supported"),
        (lambda ome: ome["multiscales"][0]["axes"].reverse(), "axes x, y, z; expected t, c, z, y, x or fewer"),
        (lambda ome: ome["multiscales"][0]["axes"].pop(0), "2 axes are named, the array has 3"),
        (lambda ome: ome["multiscales"][0].pop("datasets"), "damaged or unsupported"),
        (lambda ome: ome["multiscales"][0]["datasets"][0].update(path="none"), "damaged or unsupported"),
    ],
)
def test_a_folder_that_is_no_image_is_refused_by_a_sentence(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    pytest.importorskip("zarr")
    folder = make(tmp_path / "a.zarr", counts(3, 6, 7).astype(np.uint8), "zyx")
    group = json.loads((folder / "zarr.json").read_text())
    change(group["attributes"]["ome"])
    (folder / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ImageFileError, match=said):
        read_picture(folder)


def test_a_failure_while_writing_leaves_the_old_image_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zarr = pytest.importorskip("zarr")
    old = Picture(counts(6, 7, 1).astype(np.uint8))
    write_picture(tmp_path / "a.zarr", old)
    monkeypatch.setattr(zarr.Array, "__setitem__", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_picture(tmp_path / "a.zarr", Picture(np.zeros((6, 7, 1), np.uint8)))
    assert os.listdir(tmp_path) == ["a.zarr"]
    assert np.array_equal(read_picture(tmp_path / "a.zarr").values, old.values)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.02, marks=pytest.mark.slow)])
def test_a_process_killed_while_writing_leaves_a_whole_image(tmp_path: Path, seconds: float) -> None:
    pytest.importorskip("zarr")
    script = (
        "import pathlib, numpy as np; from lsconv.app.image_io import Picture, write_picture\n"
        "for value in range(1, 250):\n"
        "    write_picture(pathlib.Path('a.zarr'), Picture(np.full((300, 300, 1), value, np.uint8)))\n"
        "    print(value, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    values = read_picture(tmp_path / "a.zarr").values
    assert values.shape == (300, 300, 1)
    assert values.min() == values.max() >= 3


def test_levels_of_several_blocks_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zarr = pytest.importorskip("zarr")
    values = counts(2, 601, 530).astype(np.uint8)
    read = read_picture(make(tmp_path / "a.zarr", values, "cyx"))
    ome = replace(read.metadata.ome, chunks=((1, 96, 80), None))
    picture = replace(read, metadata=replace(read.metadata, ome=ome))
    for name, pixels in (("many", 1), ("some", 2**15), ("one", 2**30)):
        monkeypatch.setattr("lsconv.app.ome_zarr._PIXELS_AT_ONCE", pixels)
        write_picture(tmp_path / f"{name}.zarr", picture)
    many, some, one = (zarr.open_group(tmp_path / f"{name}.zarr", mode="r") for name in ("many", "some", "one"))
    assert sorted(one.array_keys()) == ["0", "1", "2"]
    assert one["2"].chunks == (1, 96, 80)
    for level in ("0", "1", "2"):
        assert np.array_equal(many[level][...], one[level][...])
        assert np.array_equal(some[level][...], one[level][...])
    padded = np.pad(values, ((0, 0), (0, 1), (0, 0)), mode="edge").astype(float)
    means = padded.reshape(2, 301, 2, 265, 2).mean((2, 4))
    assert np.abs(one["1"][...] - means).max() <= 0.5
