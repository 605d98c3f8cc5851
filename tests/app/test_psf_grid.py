"""``lsconv deblur --psf-grid``: PSFs at points of the field, from an NPZ file or a folder, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import lsconv
from lsconv.app.image_io import Picture, read_picture, write_picture

Leave = Callable[..., tuple[int, str, str]]
POSITIONS = np.array([[8.0, 8], [8, 32], [32, 8], [32, 32]])


def psfs() -> np.ndarray:
    """Gaussians of growing width."""
    places = np.arange(5) - 2
    found = []
    for sigma in (0.5, 0.7, 0.7, 1.0):
        profile = np.exp(-0.5 * (places / sigma) ** 2)
        found.append(profile[:, None] * profile / profile.sum() ** 2)
    return np.stack(found)


@pytest.fixture(autouse=True)
def blurred(leave: Leave) -> np.ndarray:
    """A scene, and its blur in the folder that ``leave`` runs in; the PSFs as a file and as a folder."""
    scene = 100 + 50 * np.sin(np.arange(44)[:, None] / 2) + 40 * np.cos(np.arange(44)[None, :] / 3)
    positions = torch.from_numpy(POSITIONS)
    A = lsconv.blur_operator(torch.from_numpy(psfs()), (40, 40), positions=positions)
    image = A(torch.from_numpy(scene)[None])[0].numpy()
    write_picture(Path("image.tif"), Picture(image.astype(np.float32)[..., None]))
    np.savez("psfs.npz", kernels=3 * psfs(), positions=POSITIONS)
    folder = Path("psfs")
    folder.mkdir()
    lines = ["file,row,column"]
    for k, (psf, (row, column)) in enumerate(zip(psfs(), POSITIONS, strict=True)):
        write_picture(folder / f"{k}.tif", Picture(psf.astype(np.float32)[..., None]))
        lines.append(f"{k}.tif,{row},{column}")
    (folder / "positions.csv").write_text("\n".join(lines) + "\n")
    return scene[2:-2, 2:-2]


@pytest.mark.slow
def test_the_scene_is_restored_by_psfs_that_vary(leave: Leave, blurred: np.ndarray) -> None:
    errors = {}
    for grid in ("psfs.npz", "psfs"):
        words = ("--psf-grid", grid, "--damp", "0.01", "-o", "x.tif", "--plot", "report.png", "--verbose")
        code, out, _ = leave("deblur", "image.tif", *words)
        assert code == 0
        assert "PSF 5×5 at 4 points" in out
        assert "plan" in out
        restored = read_picture(Path("x.tif")).values[..., 0]
        errors[grid] = float(np.abs(restored - blurred)[6:-6, 6:-6].max())
    assert max(errors.values()) < 0.5
    np.save("mean.npy", psfs().mean(0))
    leave("deblur", "image.tif", "--psf", "mean.npy", "--damp", "0.01", "-o", "x.tif")
    alone = np.abs(read_picture(Path("x.tif")).values[..., 0] - blurred)[6:-6, 6:-6].max()
    assert float(alone) > 5 * max(errors.values())


def save(kernels: np.ndarray, positions: np.ndarray) -> None:
    np.savez("psfs.npz", kernels=kernels, positions=positions)


def bad_table(text: str) -> None:
    Path("psfs/positions.csv").write_text(text)


@pytest.mark.parametrize(
    ("spoil", "words", "says"),
    [
        (lambda: None, ("--psf-grid", "psfs.npz", "--gaussian", "1"), "a blur of its own"),
        (lambda: None, ("--psf-grid", "psfs.npz", "--noise", "poisson"), "not served with --psf-grid"),
        (lambda: np.savez("psfs.npz", kernels=psfs()), ("--psf-grid", "psfs.npz"), "kernels and positions"),
        (lambda: save(psfs(), POSITIONS[:3]), ("--psf-grid", "psfs.npz"), "(K, *size)"),
        (lambda: np.savez("psfs.npz", kernels=-psfs(), positions=POSITIONS), ("--psf-grid", "psfs.npz"), "sum > 0"),
        (lambda: save(psfs(), POSITIONS * np.nan), ("--psf-grid", "psfs.npz"), "NaN"),
        (lambda: save(psfs()[:3], POSITIONS[:3]), ("--psf-grid", "psfs.npz"), "no grid"),
        (lambda: Path("psfs.npz").write_bytes(b"PK\x03\x04damaged"), ("--psf-grid", "psfs.npz"), "an NPZ file"),
        (lambda: Path("psfs.npz").write_bytes(b""), ("--psf-grid", "psfs.npz"), "an NPZ file"),
        (lambda: Path("psfs/positions.csv").write_bytes(b"\xff,8,8"), ("--psf-grid", "psfs"), "not a table of text"),
        (lambda: bad_table("psfs,8,8\n"), ("--psf-grid", "psfs"), "psfs/psfs"),
        (lambda: Path("psfs/positions.csv").unlink(), ("--psf-grid", "psfs"), "no positions.csv"),
        (lambda: bad_table("0.tif,8,8\n1.tif,8,x\n"), ("--psf-grid", "psfs"), "line 2"),
        (lambda: bad_table("0.tif,8,8\n1.tif,8\n"), ("--psf-grid", "psfs"), "a row and a column each"),
        (lambda: bad_table(""), ("--psf-grid", "psfs"), "a row and a column each"),
    ],
)  # fmt: skip
def test_a_grid_of_psfs_that_does_not_fit_is_reported(
    leave: Leave, spoil: Callable[[], None], words: tuple[str, ...], says: str
) -> None:
    spoil()
    code, _, error = leave("deblur", "image.tif", *words, "-o", "x.tif", "--damp", "0.1")
    assert (code, error.count("\n")) == (2, 1)
    assert says in error
    assert not Path("x.tif").exists()
