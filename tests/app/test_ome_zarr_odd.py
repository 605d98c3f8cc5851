"""Odd OME-Zarr images, whole and by tiles: one line and no file where they are refused, a whole image elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from lsconv.app.image_io import ImageFileError, Picture, check_target, read_picture

zarr = pytest.importorskip("zarr")

Leave = Callable[..., tuple[int, str, str]]
BLUR = ("--gaussian", 0.5, "--damp", 0.2)
GREY = np.random.default_rng(0).integers(0, 255, (20, 21)).astype(np.uint16)


def make(name: str, values: Any = GREY, axes: Any = "yx", zarr_format: int = 3, **change: Any) -> Path:
    """Write an image by zarr alone, with something of its description changed, or left out by None."""
    group = zarr.open_group(name, mode="w", zarr_format=zarr_format)
    array = group.create_array(
        "0", shape=values.shape, dtype=values.dtype, chunks=tuple(min(n, 8) for n in values.shape)
    )
    array[...] = values
    scale = change.pop("scale", [1.0] * values.ndim)
    steps = {} if scale is None else {"coordinateTransformations": [{"type": "scale", "scale": scale}]}
    named = axes and [n if isinstance(n, dict) else {"name": n} for n in axes]
    entry = {"axes": named, "datasets": [{"path": "0", **steps}]}
    ome = {"omero": change.pop("omero")} if "omero" in change else {}
    entry = {key: value for key, value in {**entry, **change}.items() if value is not None}
    if zarr_format == 3:
        group.attrs.put({"ome": {"version": "0.5", "multiscales": [entry], **ome}})
    else:
        group.attrs.put({"multiscales": [{**entry, "version": "0.4"}], **ome})
    return Path(name)


def damage(name: str) -> None:
    """Cut every chunk short."""
    for chunk in make(name).joinpath("0", "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(chunk.read_bytes()[:5])


REFUSED: dict[str, tuple[Callable[[str], Any], str]] = {
    "without_axes.zarr": (lambda n: make(n, axes=None, zarr_format=2), "5 axes are named"),
    "empty.zarr": (lambda n: make(n, np.zeros((0, 21), np.uint16)), "is not an image"),
    "pixel.zarr": (lambda n: make(n, GREY[:1, :1]), "exceeds that of the image, (1, 1)"),
    "complex.zarr": (lambda n: make(n, GREY.astype("c8")), "complex64"),
    "inf.zarr": (lambda n: make(n, np.full((20, 21), np.inf, np.float32)), "infinity"),
    "nan.zarr": (lambda n: make(n, np.full((20, 21), np.nan, np.float32)), "NaN"),
    "scale.zarr": (lambda n: make(n, scale=[1, 2, 3]), "a scale of [3] numbers for 2 axes"),
    "damaged.zarr": (damage, "damaged"),
    "array.zarr": (lambda n: make("of.zarr").joinpath("0").rename(n), "a Zarr array without metadata"),
    "twice.zarr": (lambda n: make(n, np.stack([GREY] * 2), axes=["y", "y", "x"]), "axes y, y, x"),
    "folder.zarr": (lambda n: Path(n).mkdir(), "a folder that is no Zarr group"),
}


@pytest.mark.parametrize("tile", [(), ("--tile", 16)], ids=["whole", "tiles"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_no_image_gives_one_line_and_no_file(leave: Leave, name: str, tile: tuple[Any, ...]) -> None:
    make_it, said = REFUSED[name]
    make_it(name)
    before = sorted(os.listdir("."))
    for output in ("out.zarr", "out.tif"):
        code, out, error = leave("deblur", name, *BLUR, "-o", output, *tile)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert said in error
        assert name in error
        assert sorted(os.listdir(".")) == before


SERVED: dict[str, Callable[[str], Any]] = {
    "big_endian.zarr": lambda n: make(n, GREY.astype(">u2"), zarr_format=2),
    "half.zarr": lambda n: make(n, (GREY / 255).astype(np.float16)),
    "long.zarr": lambda n: make(n, GREY.astype(np.int64)),
    "no_scale.zarr": lambda n: make(n, scale=None),
    "depth_first.zarr": lambda n: make(n, np.stack([GREY] * 6).reshape(3, 2, 20, 21), axes="zcyx"),
    "angle.zarr": lambda n: make(n, np.stack([GREY] * 2), axes=["angle", "y", "x"]),
    "omero.zarr": lambda n: make(n, np.stack([GREY] * 2), axes="cyx", omero={"channels": [None, 5]}),
    "unit.zarr": lambda n: make(n, axes=[{"name": "y", "unit": 7}, {"name": "x", "unit": None}]),
    "chunkless.zarr": lambda n: make(n, np.zeros((20, 21), np.uint8)),
    "no_suffix": make,
}


@pytest.mark.parametrize("name", SERVED)
def test_an_odd_image_is_restored_in_its_type_and_shape(leave: Leave, name: str) -> None:
    SERVED[name](name)
    given = read_picture(Path(name))
    found = []
    for output, tile in (("a.zarr", ()), ("b.zarr", ("--tile", 16)), ("a.tif", ())):
        code, _, error = leave("deblur", name, *BLUR, "-o", output, *tile)
        assert (code, error) == (0, "")
        found.append(read_picture(Path(output)))
        assert found[-1].values.shape == given.values.shape
        assert found[-1].values.dtype == given.values.dtype
        assert np.allclose(found[-1].values.astype(float), found[0].values, atol=1 if given.is_integer else 2e-3)
    assert sorted(os.listdir(".")) == sorted([name, "a.zarr", "b.zarr", "a.tif"])


def test_depth_before_channels_is_restored_as_a_volume_by_tiles_too(leave: Leave) -> None:
    SERVED["depth_first.zarr"]("in.zarr")
    np.save("psf.npy", np.ones((3, 3, 3)))
    for output, tile in (("a.zarr", ()), ("b.zarr", ("--tile", 12))):
        assert leave("deblur", "in.zarr", "--psf", "psf.npy", "--damp", 0.3, "-o", output, *tile)[0] == 0
    one, other = (read_picture(Path(name)).values.astype(int) for name in ("a.zarr", "b.zarr"))
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize("tile", [(), ("--tile", 16)], ids=["whole", "tiles"])
def test_a_file_is_no_place_for_a_folder(leave: Leave, tile: tuple[Any, ...]) -> None:
    make("in.zarr")
    Path("notes.zarr").write_text("kept")
    code, _, error = leave("deblur", "in.zarr", *BLUR, "-o", "notes.zarr", *tile)
    assert (code, error) == (2, "lsconv: --output notes.zarr: is a file; OME-Zarr images are folders\n")
    with pytest.raises(ImageFileError, match="is a file; OME-Zarr images are folders"):
        check_target(Path("notes.zarr"), Picture(GREY[..., None]))
    assert Path("notes.zarr").read_text() == "kept"


@pytest.mark.parametrize("tile", [(), ("--tile", 16)], ids=["whole", "tiles"])
@pytest.mark.parametrize("output", ["in.zarr", "./in.zarr/", "in.zarr/inside.zarr", "link.zarr"])
def test_the_input_is_never_replaced(leave: Leave, output: str, tile: tuple[Any, ...]) -> None:
    make("in.zarr")
    Path("link.zarr").symlink_to("in.zarr")
    code, _, error = leave("deblur", "in.zarr", *BLUR, "-o", output, *tile)
    assert (code, "would replace an input" in error) == (2, True)
    assert np.array_equal(read_picture(Path("in.zarr")).values[..., 0], GREY)


@pytest.mark.parametrize("dtype", ["int64", "longlong", "float16"])
def test_number_types_of_two_names_and_axes_that_no_word_is_for_become_tiff_and_back(leave: Leave, dtype: str) -> None:
    values = np.stack([GREY % 100] * 12).reshape(2, 3, 2, 20, 21).astype(dtype)
    tifffile.imwrite("in.tif", values)
    assert leave("deblur", "in.tif", *BLUR, "-o", "out.tif")[0] == 0
    back = read_picture(Path("out.tif"))
    assert (back.values.shape, back.values.dtype) == ((*values.shape, 1), values.dtype)
    tifffile.imwrite("plane.tif", values[0, 0, 0])
    for output, tile in (("a.zarr", ()), ("b.zarr", ("--tile", 16))):
        assert leave("deblur", "plane.tif", *BLUR, "-o", output, *tile)[0] == 0
        assert read_picture(Path(output)).values.dtype == values.dtype


def test_a_failure_of_the_disk_while_tiles_are_written_is_one_line(
    leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("in.zarr")
    make("out.zarr", GREY + 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "out.zarr")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    code, _, error = leave("deblur", "in.zarr", *BLUR, "-o", "out.zarr", "--tile", 16)
    assert (code, error) == (2, "lsconv: out.zarr: No space left on device\n")
    assert np.array_equal(read_picture(Path("out.zarr")).values[..., 0], GREY + 1)
    left = [str(path) for path in Path(".out.zarr.tiles").rglob("answer*")]
    assert left == []  # what a restart goes on from is kept, a draft is not


def test_json_that_is_none_is_one_line(leave: Leave) -> None:
    for name, text in (("a.zarr", "{"), ("b.zarr", "[]"), ("c.zarr", json.dumps({"zarr_format": 9}))):
        Path(name).mkdir()
        Path(name, "zarr.json").write_text(text)
        for tile in ((), ("--tile", 16)):
            code, _, error = leave("deblur", name, *BLUR, "-o", "out.zarr", *tile)
            assert (code, error.count("\n")) == (2, 1), error
            assert name in error
    assert sorted(os.listdir(".")) == ["a.zarr", "b.zarr", "c.zarr"]
