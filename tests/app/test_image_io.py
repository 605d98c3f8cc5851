"""Pictures survive the way to a file and back, and a file is never left half written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lsconv.app.image_io import ImageFileError, Picture, atomically, read_picture, write_picture


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_eight_bit_values_survive_exactly(tmp_path: Path, channels: int) -> None:
    values = torch.randint(0, 256, (channels, 7, 9)).double() / 255
    write_picture(tmp_path / "a.png", Picture(values))
    back = read_picture(tmp_path / "a.png")
    assert back.bit_depth == 8
    assert torch.equal(back.pixels, values)


def test_sixteen_bit_grey_survives_exactly(tmp_path: Path) -> None:
    values = torch.randint(0, 65536, (1, 7, 9)).double() / 65535
    write_picture(tmp_path / "a.png", Picture(values, bit_depth=16))
    back = read_picture(tmp_path / "a.png")
    assert back.bit_depth == 16
    assert torch.equal(back.pixels, values)


def test_channels_rows_and_columns_are_where_pillow_has_them(tmp_path: Path) -> None:
    values = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png").pixels
    assert pixels.shape == (3, 5, 6)
    assert pixels[2, 4, 1].item() == values[4, 1, 2] / 255


def test_palette_and_black_and_white_become_colour_and_grey(tmp_path: Path) -> None:
    colours = Image.new("RGB", (4, 3), (255, 0, 51))
    colours.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    Image.new("1", (4, 3), 1).save(tmp_path / "white.png")
    assert read_picture(tmp_path / "palette.png").pixels[:, 0, 0].tolist() == [1.0, 0.0, 0.2]
    assert torch.equal(read_picture(tmp_path / "white.png").pixels, torch.ones(1, 3, 4, dtype=torch.float64))


def test_values_are_rounded_and_cut_off(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", Picture(torch.tensor([[[-0.5, 0.501 / 255, 0.499 / 255, 2.0]]])))
    assert (read_picture(tmp_path / "a.png").pixels * 255).tolist() == [[[0.0, 1.0, 0.0, 255.0]]]


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture at all")
    with pytest.raises(ImageFileError, match=r"a\.png: not a PNG"):
        read_picture(tmp_path / "a.png")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", Picture(torch.rand(3, 40, 40)))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ImageFileError, OSError)):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    "picture",
    [
        Picture(torch.zeros(5, 4, 4)),
        Picture(torch.zeros(4, 4)),
        Picture(torch.zeros(3, 4, 4), bit_depth=16),
        Picture(torch.zeros(1, 4, 4), bit_depth=12),
    ],
)
def test_what_a_file_cannot_hold_is_refused_and_no_file_appears(tmp_path: Path, picture: Picture) -> None:
    with pytest.raises(ImageFileError):
        write_picture(tmp_path / "a.png", picture)
    assert list(tmp_path.iterdir()) == []


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
