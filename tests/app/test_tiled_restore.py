"""``lsconv deblur --tile``: the pixels of the whole image, read and written by slices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

import lsconv

Leave = Callable[..., tuple[int, str, str]]


def picture(shape: tuple[int, ...], dtype: Any = np.uint16) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    smooth = np.cumsum(np.cumsum(rng.normal(size=shape), -1), -2)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 60000).astype(dtype)


@pytest.mark.parametrize("boundary", ["unknown", pytest.param("zero", marks=pytest.mark.slow), "periodic"])
def test_tiles_write_the_pixels_of_the_whole(leave: Leave, tmp_path: Path, boundary: str) -> None:
    tifffile.imwrite(tmp_path / "in.tif", picture((90, 101)))
    words = ["deblur", "in.tif", "--gaussian", 1, "--damp", 0.1, "--boundary", boundary]
    assert leave(*words, "-o", "whole.tif")[0] == 0
    code, out, error = leave(*words, "-o", "tiles.tif", "--tile", 40)
    assert (code, error) == (0, "")
    assert "tiles of" in out
    whole, tiles = (tifffile.imread(tmp_path / name).astype(int) for name in ("whole.tif", "tiles.tif"))
    assert tifffile.imread(tmp_path / "tiles.tif").dtype == np.uint16
    assert int(np.abs(whole - tiles).max()) <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "tiles.tif", "whole.tif"]


def test_colours_and_pages_are_planes_of_their_own(leave: Leave, tmp_path: Path) -> None:
    colours = picture((2, 3, 60, 62), np.float32)
    np.save(tmp_path / "in.npy", np.moveaxis(colours, 1, -1))
    words = ["deblur", "in.npy", "--box", 3, "--damp", 0.1]
    assert leave(*words, "-o", "whole.npy")[0] == 0
    assert leave(*words, "-o", "tiles.npy", "--tile", 30)[0] == 0
    whole, tiles = (np.load(tmp_path / name) for name in ("whole.npy", "tiles.npy"))
    assert np.abs(whole - tiles).max() <= 2e-5 * np.abs(whole).max()


def test_a_rule_chooses_damp_on_a_sample_and_says_so(leave: Leave, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tifffile.imwrite(tmp_path / "in.tif", (picture((90, 101), np.float32) + rng.normal(0, 300, (90, 101))).astype("f4"))
    code, out, _ = leave("deblur", "in.tif", "--gaussian", 1, "-o", "out.tif", "--tile", 50)
    assert code == 0
    assert "(by gcv on 1 window(s) of 90×101, where it is " in out


@pytest.mark.slow
def test_a_sample_of_windows_chooses_the_damp_of_the_whole(leave: Leave, tmp_path: Path) -> None:
    """The middle of the image is empty, and would be damped as much as can be."""
    rng = np.random.default_rng(1)
    scene = np.repeat(np.repeat(rng.uniform(0, 1000, (90, 96)), 8, 0), 8, 1)
    scene[100:620, 120:650] = 500
    image = torch.from_numpy(scene)[None]
    kernel = lsconv.psf.gaussian(1.0).to(torch.float64)
    A = lsconv.Conv2d(kernel[None, None], scene.shape)
    y = A(image) + 10 * torch.from_numpy(rng.normal(size=A.out_shape))
    tifffile.imwrite(tmp_path / "in.tif", y[0].numpy().astype("f4"))
    code, out, _ = leave("deblur", "in.tif", "--gaussian", 1, "-o", "out.tif", "--tile", 300)
    assert code == 0
    assert "on 9 window(s) of 192×192" in out
    damp = float(out.split("damp ")[1].split(" ")[0])
    L = lsconv.Gradient(A.in_shape, dtype=torch.float64)
    whole = float(lsconv.choose_damp(A, y, "gcv", L=L).damp)
    assert damp == pytest.approx(whole, rel=0.3)
    middle = y[:, 100:612, 120:632]
    B = lsconv.Conv2d(kernel[None, None], (512 + kernel.shape[0] - 1, 512 + kernel.shape[1] - 1))
    flat = float(lsconv.choose_damp(B, middle, "gcv", L=lsconv.Gradient(B.in_shape, dtype=torch.float64)).damp)
    assert flat > 2 * whole


@pytest.mark.parametrize(
    "words, says",
    [
        (["--prior", "tv"], "--tile: is not served with --prior tv"),
        (["--min", 0], "--tile: is not served with --min"),
        (["--damp", 0], "--damp 0"),
        (["--boundary", "reflect"], "--tile: is not served with --boundary reflect"),
    ],
)
def test_arguments_that_tiles_do_not_serve_are_refused(
    leave: Leave, tmp_path: Path, words: list[Any], says: str
) -> None:
    tifffile.imwrite(tmp_path / "in.tif", picture((40, 40)))
    code, _, error = leave("deblur", "in.tif", "--box", 3, "-o", "out.tif", "--tile", 20, *words)
    assert code == 2
    assert says in error


def test_a_compressed_file_is_refused_with_the_reason(leave: Leave, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "in.tif", picture((40, 40)), compression="zlib")
    code, _, error = leave("deblur", "in.tif", "--box", 3, "-o", "out.tif", "--tile", 20)
    assert code == 2
    assert "without compression" in error
    assert not (tmp_path / "out.tif").exists()
