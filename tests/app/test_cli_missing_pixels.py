"""``lsconv deblur --bad-pixels`` and ``--saturated``: such pixels have no say, and stand in the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lsconv.app.image_io import Picture, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def pictures(leave: Leave) -> None:
    """A picture and its bad pixels, in the folder that ``leave`` runs in."""
    image = (60 + 50 * np.sin(np.arange(32)[:, None] / 3) + np.arange(34)[None, :]).astype(np.uint8)[..., None]
    bad = np.zeros_like(image)
    bad[10:12, :] = 255
    write_picture(Path("image.png"), Picture(np.repeat(image, 3, -1)))
    write_picture(Path("bad.png"), Picture(bad))
    ruined = np.where(bad > 0, RNG.integers(0, 200, image.shape, dtype=np.uint8), image)
    write_picture(Path("ruined.png"), Picture(np.repeat(ruined, 3, -1)))
    lamp = image.copy()
    lamp[20:24, 20:24] = 255
    write_picture(Path("lamp.png"), Picture(lamp))
    write_picture(Path("small.png"), Picture(bad[1:]))
    np.save("ones.npy", bad[..., 0] // 255)
    write_picture(Path("real.tif"), Picture(image.astype(np.float32)))


def test_values_of_bad_pixels_do_not_show(leave: Leave) -> None:
    common = ["--gaussian", "0.8", "--damp", "0.05", "--bad-pixels", "bad.png"]
    assert leave("deblur", "image.png", *common, "-o", "one.png")[0] == 0
    code, out, _ = leave("deblur", "ruined.png", *common, "-o", "other.png", "--plot", "report.png")
    assert code == 0
    assert "204 pixel(s) missing" in out
    assert np.array_equal(read_picture(Path("one.png")).values, read_picture(Path("other.png")).values)
    report = read_picture(Path("report.png")).values[..., :3].astype(int)
    assert int(((report[..., 0] > 200) & (report[..., 1:].max(-1) < 60)).sum()) > 100  # a red line


def test_the_opacity_of_a_mask_marks_no_pixel(leave: Leave) -> None:
    bad = read_picture(Path("bad.png")).values
    write_picture(Path("opaque.png"), Picture(np.concatenate([bad, np.full_like(bad, 255)], -1), opacity=True))
    code, out, _ = leave("deblur", "image.png", "--box", 3, "--damp", 0.1, "--bad-pixels", "opaque.png", "-o", "x.png")
    assert code == 0
    assert "204 pixel(s) missing" in out


@pytest.mark.parametrize("level", ["255", "auto"])
def test_a_saturated_lamp_is_missing(leave: Leave, level: str) -> None:
    options = ["--gaussian", "0.8", "--damp", "0.05"]
    code, out, error = leave("deblur", "lamp.png", *options, "--saturated", level, "-o", "x.png")
    assert code == 0
    assert "16 pixel(s) missing" in out
    assert ("top level 255" in error + out) == (level == "auto")
    leave("deblur", "image.png", *options, "-o", "whole.png")
    near, whole = (read_picture(Path(name)).values.astype(int)[..., 0] for name in ("x.png", "whole.png"))
    assert np.abs(near - whole)[:16].max() <= 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("image.png", "--bad-pixels", "small.png"), "is of (31, 34) pixels, the image of (32, 34)"),
        (("image.png", "--bad-pixels", "none.png"), "none.png"),
        (
            ("image.png", "--bad-pixels", "ones.npy"),
            "--bad-pixels ones.npy: has no white pixel, its largest",
        ),
        (("image.png", "--saturated", "bright"), "--saturated bright: expected a grey level or auto"),
        (("real.tif", "--saturated", "auto"), "--saturated auto: looks for the plateau"),
    ],
)
def test_a_mask_that_does_not_fit_is_reported_in_one_line(leave: Leave, words: tuple[str, ...], says: str) -> None:
    output = "x" + Path(words[0]).suffix
    code, _, error = leave("deblur", *words, "--gaussian", "0.8", "-o", output)
    assert code == 2
    assert says in error
    assert not Path(output).exists()
