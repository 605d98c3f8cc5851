"""Pictures survive the way to a file and back, with all they say, and a file is never left half written."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from lsconv.app.image_io import (
    ImageFileError,
    Metadata,
    Picture,
    atomically,
    check_target,
    read_picture,
    write_picture,
)


def noise(dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return (4 * rng.standard_normal(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)


@pytest.mark.parametrize(
    ("ending", "dtype", "shape"),
    [
        *[(".png", dtype, (7, 9, c)) for dtype in ("uint8", "uint16") for c in (1, 2, 3, 4)],
        *[(".tif", dtype, (7, 9, c)) for dtype in ("uint8", "uint16", "float32") for c in (1, 2, 3, 4)],
        *[(".tiff", dtype, (7, 9, 1)) for dtype in ("int16", "uint32", "int32", "float16", "float64")],
        *[(".tif", dtype, (5, 7, 9, c)) for dtype in ("uint8", "uint16", "float32") for c in (1, 3, 4)],
        *[(".npy", dtype, (7, 9, c)) for dtype in ("uint8", "uint16", "float32", "float64", "int16") for c in (1, 3)],
        (".npy", "float32", (5, 7, 9, 1)),
        (".npy", "float32", (5, 7, 9, 3)),
        (".npy", "uint8", (7, 9, 4)),
    ],
)
def test_values_type_and_layout_survive_exactly(
    tmp_path: Path, ending: str, dtype: str, shape: tuple[int, ...]
) -> None:
    picture = Picture(noise(dtype, *shape), opacity=shape[-1] in (2, 4))
    write_picture(tmp_path / f"a{ending}", picture)
    back = read_picture(tmp_path / f"a{ending}")
    assert back.values.dtype == picture.values.dtype
    assert np.array_equal(back.values, picture.values)
    assert back.opacity == picture.opacity


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_smooth_pictures_to_a_few_grey_levels(tmp_path: Path, channels: int) -> None:
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    values = np.repeat((ramp[:, None] // 2 + ramp // 2)[..., None], channels, -1)
    write_picture(tmp_path / "a.jpg", Picture(values))
    back = read_picture(tmp_path / "a.jpg")
    assert back.values.shape == values.shape
    assert np.abs(back.values.astype(int) - values).max() <= 4


def test_16_bit_colour_png_is_what_other_programs_write_and_read(tmp_path: Path) -> None:
    values = noise("uint16", 6, 5, 3)
    write_picture(tmp_path / "a.png", Picture(values))
    header = (tmp_path / "a.png").read_bytes()[:33]
    assert (header[24], header[25]) == (16, 2)  # depth and colour type, from PNG's specification
    with Image.open(tmp_path / "a.png") as image:  # Pillow reads the upper 8 bits
        assert np.abs(np.array(image).astype(int) - (values >> 8)).max() <= 1


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif"])
def test_profile_resolution_and_description_survive(tmp_path: Path, ending: str) -> None:
    profile = _profile()
    told = Metadata(icc=profile, resolution=(300.0, 150.0), unit="inch", description="Grüße, 3 µm")
    write_picture(tmp_path / f"a{ending}", Picture(noise("uint8", 7, 9, 3), metadata=told))
    back = read_picture(tmp_path / f"a{ending}").metadata
    assert back.icc == profile
    assert back.description == "Grüße, 3 µm"
    assert back.dpi == pytest.approx((300, 150), abs=0.02)  # PNG counts pixels per metre


@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("source", [".png", ".jpg"])
def test_exif_survives_with_its_orientation(tmp_path: Path, source: str, ending: str) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "A camera", 6
    Image.fromarray(noise("uint8", 7, 9, 3)).save(tmp_path / f"a{source}", exif=exif)
    write_picture(tmp_path / f"b{ending}", read_picture(tmp_path / f"a{source}"))
    with Image.open(tmp_path / f"b{ending}") as image:
        kept = image.getexif()
        assert (kept[0x010F], kept[0x0112]) == ("A camera", 6)
        assert image.size == (9, 7)


def test_pngs_text_and_colour_chunks_survive_word_for_word(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Author", "someone")
    info.add(b"gAMA", (45455).to_bytes(4, "big"))
    Image.fromarray(noise("uint8", 7, 9)).save(tmp_path / "a.png", pnginfo=info)
    write_picture(tmp_path / "b.png", read_picture(tmp_path / "a.png"))
    with Image.open(tmp_path / "b.png") as image:
        assert image.text["Author"] == "someone"  # type: ignore[attr-defined]
        assert image.info["gamma"] == pytest.approx(0.45455)


def test_tiffs_unit_of_resolution_survives_and_becomes_dots_per_inch_elsewhere(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise("uint8", 7, 9), resolution=(100, 50), resolutionunit="CENTIMETER")
    picture = read_picture(tmp_path / "a.tif")
    write_picture(tmp_path / "b.tif", picture)
    write_picture(tmp_path / "b.png", picture)
    again = read_picture(tmp_path / "b.tif").metadata
    assert (again.resolution, again.unit) == ((100.0, 50.0), "cm")
    assert read_picture(tmp_path / "b.png").metadata.dpi == pytest.approx((254, 127), abs=0.01)


def test_imagejs_description_is_kept_for_its_shape_and_number_type_and_elsewhere_the_sizes_in_omes_words(
    tmp_path: Path,
) -> None:
    stack = noise("uint16", 5, 7, 9)
    about = {"axes": "ZYX", "spacing": 0.5, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata=about, resolution=(10, 8))
    picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(picture.values[..., 0], stack)
    write_picture(tmp_path / "same.tif", picture)
    write_picture(tmp_path / "other.tif", Picture(picture.values[:, 1:-1], metadata=picture.metadata))
    write_picture(tmp_path / "real.tif", Picture(picture.values.astype(np.float32), metadata=picture.metadata))
    with tifffile.TiffFile(tmp_path / "same.tif") as tiff:
        assert tiff.imagej_metadata is not None
        assert tiff.imagej_metadata["spacing"] == 0.5
        assert np.array_equal(tiff.asarray(), stack)
    for name, expected in (("other", stack[:, 1:-1]), ("real", stack.astype(np.float32))):
        with tifffile.TiffFile(tmp_path / f"{name}.tif") as tiff:
            assert not tiff.is_imagej
            assert np.array_equal(tiff.asarray(), expected)
            pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [pixels[f"PhysicalSize{axis}"] for axis in "XYZ"] == [0.1, 0.125, 0.5]
        assert {pixels[f"PhysicalSize{axis}Unit"] for axis in "XYZ"} == {"µm"}


@pytest.mark.parametrize("kind", ["imagej", "ome"])
@pytest.mark.parametrize(("axes", "shape"), [("CYX", (3, 7, 9)), ("TCYX", (2, 4, 7, 9)), ("TZCYX", (2, 3, 2, 7, 9))])
def test_axes_and_descriptions_of_microscopes_survive(
    tmp_path: Path, kind: str, axes: str, shape: tuple[int, ...]
) -> None:
    values = noise("uint16", *shape)
    about: dict[str, Any] = {"axes": axes, "unit": "um"} if kind == "imagej" else {"axes": axes, "PhysicalSizeX": 0.1}
    tifffile.imwrite(tmp_path / "a.tif", values, metadata=about, resolution=(10, 10), **{kind: True})
    picture = read_picture(tmp_path / "a.tif")
    assert picture.axes == axes[:-2]
    write_picture(tmp_path / "b.tif", picture)
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(tmp_path / "b.tif") as after:
        assert after.series[0].axes == before.series[0].axes == axes
        assert np.array_equal(after.asarray(), values)
        assert after.pages.first.description == before.pages.first.description


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_signals_survive_with_their_rate(tmp_path: Path, dtype: str, channels: int) -> None:
    from scipy.io import wavfile

    samples = noise(dtype, 50, channels)
    wavfile.write(tmp_path / "a.wav", 44100, samples[:, 0] if channels == 1 else samples)
    write_picture(tmp_path / "b.wav", read_picture(tmp_path / "a.wav"))
    rate, back = wavfile.read(tmp_path / "b.wav")
    assert rate == 44100
    assert np.array_equal(back.reshape(50, channels), samples)
    np.save(tmp_path / "c.npy", samples[:, 0])
    write_picture(tmp_path / "d.npy", read_picture(tmp_path / "c.npy"))
    assert np.array_equal(np.load(tmp_path / "d.npy"), samples[:, 0])


def test_compressed_big_endian_planar_and_inverted_tiffs_are_read(tmp_path: Path) -> None:
    colour = noise("uint16", 7, 9, 3)
    tifffile.imwrite(tmp_path / "lzw.tif", colour, compression="lzw", photometric="rgb")
    tifffile.imwrite(tmp_path / "big.tif", colour, byteorder=">", photometric="rgb")
    planes = np.ascontiguousarray(np.moveaxis(colour, -1, 0))
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    for name in ("lzw", "big", "planes"):
        values = read_picture(tmp_path / f"{name}.tif").values
        assert np.array_equal(values, colour)
        assert values.dtype.isnative
    tifffile.imwrite(tmp_path / "white.tif", 255 - colour[..., 0].astype(np.uint8), photometric="miniswhite")
    assert np.array_equal(read_picture(tmp_path / "white.tif").values[..., 0], colour[..., 0].astype(np.uint8))


def test_palette_transparency_and_black_and_white_become_colour_opacity_and_grey(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (255, 0, 51)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.new("1", (4, 3), 1).save(tmp_path / "white.png")
    Image.new("L", (4, 3), 7).save(tmp_path / "clear.png", transparency=7)
    assert read_picture(tmp_path / "palette.png").values[0, 0].tolist() == [255, 0, 51]
    assert read_picture(tmp_path / "white.png").values.tolist() == [[[255]] * 4] * 3
    clear = read_picture(tmp_path / "clear.png")
    assert clear.opacity
    assert clear.values[..., -1].max() == 0


def test_colours_are_in_the_units_of_the_file() -> None:
    values = np.array([[[0], [65535]]], dtype=np.uint16)
    assert Picture(values).pixels.tolist() == [[[0.0, 1.0]]]
    assert Picture(values).colours.tolist() == [[[0.0, 65535.0]]]
    assert Picture(values).colours.dtype == torch.float32
    assert Picture(values.astype(np.uint32)).colours.dtype == torch.float64
    floating = np.array([[[-3.5], [2.0]]])
    assert Picture(floating).colours.tolist() == [[[-3.5, 2.0]]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_every_integer_survives_the_way_through_floating_point(dtype: str) -> None:
    limit = np.iinfo(dtype).max
    values = np.unique(np.linspace(0, limit, 4096).astype(dtype)).reshape(1, -1, 1)
    picture = Picture(values)
    assert np.array_equal(picture.with_colours(picture.colours).values, values)
    assert picture.with_colours(picture.colours * 0 + 1.5 * limit).values.max() == limit
    assert picture.with_colours(picture.colours * 0 - 1.5).values.max() == 0


def test_opacity_is_left_alone_and_cut_with_the_picture() -> None:
    picture = Picture(noise("uint8", 7, 9, 4), opacity=True)
    assert picture.colours.shape == (3, 7, 9)
    cut = picture.with_colours(picture.colours[:, 1:5, 2:8], (slice(1, 5), slice(2, 8)))
    assert np.array_equal(cut.values, picture.values[1:5, 2:8])


def test_other_depths_are_rounded_to_what_the_format_holds(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", Picture(np.array([[[0.0], [0.25], [1.0]]], dtype=np.float32)))
    assert read_picture(tmp_path / "a.png").values.reshape(-1).tolist() == [0, 16384, 65535]
    write_picture(tmp_path / "a.jpg", Picture(np.full((16, 16, 1), 257 * 80, dtype=np.uint16)))
    assert np.unique(read_picture(tmp_path / "a.jpg").values).tolist() == [80]


@pytest.mark.parametrize(
    ("name", "picture", "says"),
    [
        ("a.bmp", Picture(np.zeros((4, 4, 1), np.uint8)), "must end in one of .png"),
        ("a", Picture(np.zeros((4, 4, 1), np.uint8)), "must end in"),
        ("a.png", Picture(np.zeros((2, 4, 4, 1), np.uint8)), "PNG cannot hold a stack"),
        ("a.jpg", Picture(np.zeros((4, 4, 4), np.uint8), opacity=True), "JPEG cannot hold opacity"),
        ("a.wav", Picture(np.zeros((4, 4, 1), np.uint8)), "WAV cannot hold an image"),
        ("a.tif", Picture(np.zeros((1, 9, 1), np.uint8), line=True), "TIFF cannot hold a signal"),
        ("a.wav", Picture(np.zeros((1, 9, 1), np.float16), line=True), "WAV cannot hold float16"),
        ("a.png", Picture(np.full((4, 4, 1), 1.5)), "outside .0, 1."),
        ("a.png", Picture(np.zeros((4, 4, 1), np.int16)), "negative integers"),
    ],
)
def test_values_that_a_format_cannot_hold_are_refused_and_no_file_appears(
    tmp_path: Path, name: str, picture: Picture, says: str
) -> None:
    with pytest.raises(ImageFileError, match=says):
        check_target(tmp_path / name, picture)
    with pytest.raises(ImageFileError, match=says):
        write_picture(tmp_path / name, picture)
    assert list(tmp_path.iterdir()) == []


def _saved(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.png", b"no picture at all", "not a PNG, JPEG, TIFF, NPY, WAV or FITS"),
        ("empty.png", b"", "not a PNG, JPEG, TIFF, NPY, WAV or FITS"),
        ("a.gif", b"GIF89a\x01\x00\x01\x00", "not a PNG"),
        ("cut.npy", _saved(lambda f: np.save(f, np.ones((9, 9))))[:-9], "damaged"),
        ("cut.tif", b"II*\0\x08\0\0\0", "damaged"),
        ("cut.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF", "damaged"),
        ("object.npy", _saved(lambda f: np.save(f, np.array([{}], dtype=object))), "damaged or unsupported"),
        ("complex.npy", _saved(lambda f: np.save(f, np.ones((4, 4), complex))), "type complex128"),
        ("five.npy", _saved(lambda f: np.save(f, np.ones((2, 2, 4, 4, 1)))), "not a signal, an image or a stack"),
        ("cut.wav", b"RIFF\x24\0\0\0WAVEfmt ", "damaged"),
        ("wide.npy", _saved(lambda f: np.save(f, np.ones((2, 4, 4, 9)))), "more than 4 channels"),
        ("none.npy", _saved(lambda f: np.save(f, np.ones((0, 4)))), "not an image"),
        ("inf.tif", _saved(lambda f: tifffile.imwrite(f, np.full((4, 4), np.inf))), "infinity"),
        ("cmyk.jpg", _saved(lambda f: Image.new("CMYK", (4, 4)).save(f, "JPEG")), "CMYK"),
        (
            "palette.tif",
            _saved(lambda f: tifffile.imwrite(f, np.zeros((4, 4), np.uint8), photometric="palette",
                                              colormap=np.zeros((3, 256), np.uint16))),
            "PALETTE",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageFileError, match=says) as caught:
        read_picture(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".png", ".tif", ".jpg"])
def test_a_damaged_file_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    write_picture(path, Picture(noise("uint8", 40, 40, 3)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageFileError, match="damaged"):
        read_picture(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="halfway"), atomically(path) as file:
        file.write(b"new")
        raise RuntimeError("halfway")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_written_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    with atomically(tmp_path / "a.bin") as file:
        file.write(b"new")
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
