"""Physical sizes, axes and channels survive the way between TIFF (ImageJ's, OME's), and OME-Zarr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from lsconv.app.calibration import Calibration
from lsconv.app.image_io import Metadata, Picture, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]


def counts(dtype: str, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def said_by(folder: Path) -> tuple[list[dict[str, str]], list[float], dict[str, Any]]:
    """Axes, scale of the highest level, and the rest, of an OME-Zarr image of version 0.5."""
    ome = json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]
    entry = ome["multiscales"][0]
    return entry["axes"], entry["datasets"][0]["coordinateTransformations"][0]["scale"], ome


def pixels_of(path: Path) -> dict[str, Any]:
    with tifffile.TiffFile(path) as tiff:
        return tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]


def test_imagejs_voxel_size_interval_and_unit_become_omes_scale(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    about = {"axes": "TZCYX", "unit": "um", "spacing": 0.4, "finterval": 2.5}
    values = counts("uint16", 2, 3, 2, 6, 7)
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, metadata=about, resolution=(10, 8))
    write_picture(tmp_path / "a.zarr", read_picture(tmp_path / "a.tif"))
    axes, scale, _ = said_by(tmp_path / "a.zarr")
    assert [axis["name"] for axis in axes] == list("tczyx")
    assert [axis.get("unit") for axis in axes] == ["second", None, *["micrometer"] * 3]
    assert scale == pytest.approx([2.5, 1, 0.4, 0.125, 0.1])
    assert np.array_equal(read_picture(tmp_path / "a.zarr").values[..., 0], np.moveaxis(values, 1, 2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("axes", ["YX", "ZYX", "CYX", "TCYX", "CZYX", "TCZYX"])
def test_ome_tiff_survives_the_way_to_ome_zarr_and_back(tmp_path: Path, axes: str, dtype: str) -> None:
    pytest.importorskip("zarr")
    sizes = {"T": 2, "C": 3, "Z": 4, "Y": 6, "X": 7}
    values = counts(dtype, *(sizes[axis] for axis in axes))
    about: dict[str, Any] = {"axes": axes, "PhysicalSizeX": 65.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.065,
             "PhysicalSizeZ": 0.2, "TimeIncrement": 40.0, "TimeIncrementUnit": "ms"}  # fmt: skip
    if "C" in axes:
        about["Channel"] = {"Name": ["DAPI", "GFP", "Cy5 & <far>"], "Color": [65535, 16711935, -16776961]}
    tifffile.imwrite(tmp_path / "a.ome.tif", values, ome=True, metadata=about)
    first = read_picture(tmp_path / "a.ome.tif")
    write_picture(tmp_path / "b.ome.zarr", first)
    described, scale, ome = said_by(tmp_path / "b.ome.zarr")
    expected = {"t": (40.0, "millisecond"), "c": (1.0, None), "z": (0.2, "micrometer"), "y": (0.065, "micrometer"),
                "x": (65.0, "nanometer")}  # fmt: skip
    assert [(step, axis.get("unit")) for step, axis in zip(scale, described, strict=True)] == [
        expected[name] for name in axes.lower()
    ]
    if "C" in axes:
        channels = ome["omero"]["channels"]
        assert [each["label"] for each in channels] == ["DAPI", "GFP", "Cy5 & <far>"]
        assert [each["color"] for each in channels] == ["0000FF", "00FF00", "FF0000"]
        limits = np.iinfo(dtype) if values.dtype.kind in "iu" else None
        window = channels[0]["window"]
        assert (window["start"], window["end"]) == ((limits.min, limits.max) if limits else (0, values.max()))
    write_picture(tmp_path / "c.tif", read_picture(tmp_path / "b.ome.zarr"))
    back = read_picture(tmp_path / "c.tif")
    assert back.axes == axes[:-2]
    assert back.values.dtype == values.dtype
    assert np.array_equal(back.values[..., 0], values)
    assert back.metadata.calibration.channels == first.metadata.calibration.channels
    kept = {axis: step for axis, step in first.metadata.calibration.steps.items() if axis in axes}
    assert back.metadata.calibration.steps == kept
    pixels = pixels_of(tmp_path / "c.tif")
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (65.0, "nm")
    with tifffile.TiffFile(tmp_path / "c.tif") as tiff:  # for programs that know TIFF's own words alone
        x, y = (tiff.pages.first.tags[name].value for name in ("XResolution", "YResolution"))
        assert tiff.pages.first.tags["ResolutionUnit"].value == 3
        assert x[0] / x[1] == pytest.approx(1 / 65e-7)
        assert y[0] / y[1] == pytest.approx(1 / 0.065e-4)


def test_steps_without_a_unit_are_arbitrary_ones_in_ome_xml_and_come_back_without(tmp_path: Path) -> None:
    calibration = Calibration({"X": (0.5, ""), "Y": (0.5, ""), "Z": (3.0, "")})
    picture = Picture(counts("uint8", 3, 6, 7, 1), axes="Z", metadata=Metadata(calibration=calibration))
    write_picture(tmp_path / "a.tif", picture)
    assert pixels_of(tmp_path / "a.tif")["PhysicalSizeZUnit"] == "reference frame"
    assert read_picture(tmp_path / "a.tif").metadata.calibration == calibration
    assert read_picture(tmp_path / "a.tif").metadata.unit == "none"


def test_the_scale_of_an_image_multiplies_that_of_its_level(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    calibration = Calibration({"T": (3.0, "second"), "Y": (2.0, "micrometer"), "X": (0.5, "micrometer")})
    picture = Picture(counts("uint8", 2, 6, 7, 1), axes="T", metadata=Metadata(calibration=calibration))
    write_picture(tmp_path / "a.zarr", picture)
    assert read_picture(tmp_path / "a.zarr").metadata.calibration == calibration
    said = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    said["attributes"]["ome"]["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [4, 1, 0.5]}]
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(said))
    steps = read_picture(tmp_path / "a.zarr").metadata.calibration.steps
    assert steps == {"T": (12.0, "second"), "Y": (2.0, "micrometer"), "X": (0.25, "micrometer")}


@pytest.mark.parametrize(
    ("unit", "name"),
    [("micron", "micrometer"), ("µm", "micrometer"), ("μm", "micrometer"), ("\\u00B5m", "micrometer"),
     ("nm", "nanometer"), ("inch", "inch"), ("cm", "centimeter"), ("Å", "angstrom"), ("furlong", ""), ("", "")],
)  # fmt: skip
def test_units_are_known_by_all_their_names(unit: str, name: str) -> None:
    found = Calibration.of_imagej({"unit": unit, "spacing": 2.0}, None).steps["Z"]
    assert found == (2.0, name)


@pytest.mark.parametrize(
    "text", ["", "<OME", "<OME/>", '<OME><Image><Pixels PhysicalSizeX="wide" PhysicalSizeY="-1"/></Image></OME>']
)
def test_a_calibration_that_ome_xml_lacks_is_not_known(text: str) -> None:
    assert not Calibration.of_ome_xml(text)


def test_colours_and_words_go_with_the_sizes(tmp_path: Path) -> None:
    calibration = Calibration({"X": (2.0, "millimeter"), "Y": (2.0, "millimeter")})
    metadata = Metadata(calibration=calibration, description="a leaf & <more>")
    write_picture(tmp_path / "a.tif", Picture(counts("uint8", 6, 7, 3), metadata=metadata))
    back = read_picture(tmp_path / "a.tif")
    assert back.metadata.calibration == calibration
    assert np.array_equal(back.values, counts("uint8", 6, 7, 3))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.series[0].axes == "YXS"
        assert tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Description"] == "a leaf & <more>"


def test_a_stack_restored_from_one_format_into_the_other_has_its_voxels(leave: Leave) -> None:
    pytest.importorskip("zarr")
    about = {"axes": "ZYX", "PhysicalSizeX": 0.1, "PhysicalSizeY": 0.1, "PhysicalSizeZ": 0.3}
    tifffile.imwrite("a.ome.tif", counts("uint16", 4, 16, 17), ome=True, metadata=about)
    blur = ("--gaussian", 0.7, "--damp", 0.2)
    assert leave("deblur", "a.ome.tif", *blur, "-o", "b.ome.zarr")[0] == 0
    assert said_by(Path("b.ome.zarr"))[1] == [0.3, 0.1, 0.1]
    assert leave("deblur", "b.ome.zarr", *blur, "-o", "c.tif", "--error-bars", "d.tif")[0] == 0
    for name in ("c.tif", "d.tif"):
        assert [pixels_of(Path(name))[f"PhysicalSize{axis}"] for axis in "ZYX"] == [0.3, 0.1, 0.1]
    assert leave("blur", "a.ome.tif", "--gaussian", 0.7, "-o", "small.tif")[0] == 0
    pixels = pixels_of(Path("small.tif"))
    assert (pixels["SizeX"], pixels["PhysicalSizeZ"]) == (11, 0.3)
