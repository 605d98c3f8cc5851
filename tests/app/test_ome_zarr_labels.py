"""Labels beside an OME-Zarr image: bad pixels by name, copied with the image, and never lost without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from lsconv.app.image_io import ImageFileError, Picture, check_target, read_picture, write_picture

pytest.importorskip("zarr")

Leave = Callable[..., tuple[int, str, str]]
BLUR = ("--gaussian", 0.7, "--damp", 0.2)


def counts(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 200, (*shape, 1)).astype(np.uint8)


def add_labels(image: Path, name: str, values: np.ndarray[Any, Any], axes: str = "") -> Path:
    """Put an image of labels beside an image, as the format wants it."""
    write_picture(image / "labels" / f"{name}.zarr", Picture(values[..., None], axes=axes))
    (image / "labels" / f"{name}.zarr").rename(image / "labels" / name)
    group = image / "labels" / "zarr.json"
    said = json.loads(group.read_text()) if group.exists() else {"attributes": {"ome": {"labels": []}}}
    said["attributes"]["ome"]["labels"].append(name)
    group.write_text(json.dumps({"zarr_format": 3, "node_type": "group", **said}))
    return image / "labels" / name


def test_labels_are_bad_pixels_whatever_their_number(leave: Leave) -> None:
    image = counts(20, 21)
    write_picture(Path("a.ome.zarr"), Picture(image))
    labels = np.zeros((20, 21), np.int32)
    labels[3:5, 4:9], labels[12, 12] = 1, 700
    name = add_labels(Path("a.ome.zarr"), "dirt", labels)
    code, out, _ = leave("deblur", "a.ome.zarr", *BLUR, "-o", "b.ome.zarr", "--bad-pixels", name)
    assert code == 0
    assert "11 pixel(s) missing" in out
    write_picture(Path("mask.png"), Picture(255 * (labels > 0).astype(np.uint8)[..., None]))
    assert leave("deblur", "a.ome.zarr", *BLUR, "-o", "c.ome.zarr", "--bad-pixels", "mask.png")[0] == 0
    assert np.array_equal(read_picture(Path("b.ome.zarr")).values, read_picture(Path("c.ome.zarr")).values)


@pytest.mark.parametrize(
    ("axes", "shape", "missing"),
    [("", (14, 15), 1 * 12), ("Z", (3, 14, 15), 1 * 4), ("TC", (2, 1, 14, 15), 1 * 6), ("TCZ", (2, 2, 3, 14, 15), 1)],
)
def test_labels_count_where_their_axes_say(leave: Leave, axes: str, shape: tuple[int, ...], missing: int) -> None:
    write_picture(Path("a.zarr"), Picture(counts(2, 2, 3, 14, 15), axes="TCZ"))
    labels = np.zeros(shape, np.uint16)
    labels[(*(0,) * len(axes), 7, 8)] = 5
    name = add_labels(Path("a.zarr"), "dirt", labels, axes)
    code, out, _ = leave("deblur", "a.zarr", *BLUR, "-o", "b.zarr", "--bad-pixels", name)
    assert code == 0
    assert f"{missing} pixel(s) missing" in out


@pytest.mark.parametrize(
    ("axes", "shape", "says"),
    [("", (14, 14), "is of (14, 14) pixels, the image of (14, 15)"),
     ("Z", (2, 14, 15), "is of (2, 14, 15) with axes ZYX, the image of (3, 14, 15) with ZYX"),
     ("T", (3, 14, 15), ""),
     ("TZ", (2, 3, 14, 15), "is of (2, 3, 14, 15) with axes TZYX, the image of (3, 14, 15) with ZYX")],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(leave: Leave, axes: str, shape: tuple[int, ...], says: str) -> None:
    write_picture(Path("a.zarr"), Picture(counts(3, 14, 15), axes="Z"))
    name = add_labels(Path("a.zarr"), "dirt", np.ones(shape, np.uint8) * 0, axes)
    code, _, error = leave("deblur", "a.zarr", *BLUR, "-o", "b.zarr", "--bad-pixels", name)
    assert (code, says in error) == (2 if says else 0, True)
    assert Path("b.zarr").exists() == (not says)


def test_labels_go_with_an_image_of_their_size(leave: Leave) -> None:
    write_picture(Path("a.zarr"), Picture(counts(20, 21)))
    labels = np.arange(420, dtype=np.uint16).reshape(20, 21)
    add_labels(Path("a.zarr"), "cells", labels)
    for _ in range(2):  # the second time they are there already
        code, _, error = leave("deblur", "a.zarr", *BLUR, "-o", "b.zarr", "--error-bars", "bars.zarr")
        assert (code, error) == (0, "")
        assert np.array_equal(read_picture(Path("b.zarr/labels/cells")).values[..., 0], labels)
        assert json.loads(Path("b.zarr/labels/zarr.json").read_text())["attributes"]["ome"]["labels"] == ["cells"]
        assert not Path("bars.zarr/labels").exists()


def test_labels_that_cannot_go_with_the_image_are_named(leave: Leave) -> None:
    write_picture(Path("a.zarr"), Picture(counts(30, 31)))
    for name in ("cells", "nuclei"):
        add_labels(Path("a.zarr"), name, np.zeros((30, 31), np.uint8))
    code, _, error = leave("deblur", "a.zarr", *BLUR, "-o", "b.tif")
    assert (code, error) == (0, "lsconv: a.zarr: labels cells, nuclei are not written: TIFF has no place for them\n")
    code, _, error = leave("blur", "a.zarr", "--gaussian", 0.7, "-o", "b.zarr")
    assert (code, error) == (0, "lsconv: a.zarr: labels cells, nuclei are not written: the image is of another size\n")
    assert not Path("b.zarr/labels").exists()


def test_an_image_with_labels_of_its_own_is_not_replaced(leave: Leave) -> None:
    write_picture(Path("a.zarr"), Picture(counts(20, 21)))
    write_picture(Path("b.zarr"), Picture(counts(20, 21)))
    add_labels(Path("b.zarr"), "by_hand", np.ones((20, 21), np.uint8))
    code, _, error = leave("deblur", "a.zarr", *BLUR, "-o", "b.zarr")
    assert code == 2
    assert error == "lsconv: a.zarr: b.zarr: has labels (by_hand), which would be lost; give another name\n"
    with pytest.raises(ImageFileError, match="has labels"):
        check_target(Path("b.zarr"), read_picture(Path("a.zarr")))
    assert read_picture(Path("b.zarr/labels/by_hand")).values.all()


def test_every_page_of_a_mask_counts_for_its_own(leave: Leave) -> None:
    tifffile.imwrite("a.tif", counts(3, 14, 15)[..., 0], metadata={"axes": "ZYX"}, ome=True)
    bad = np.zeros((3, 14, 15), np.uint8)
    bad[1, 2:4, 3] = 255
    np.save("bad.npy", bad)
    code, out, _ = leave("deblur", "a.tif", *BLUR, "-o", "b.tif", "--bad-pixels", "bad.npy")
    assert code == 0
    assert "2 pixel(s) missing" in out
