"""FITS: header, WCS and number types survive, NaN are missing, and without astropy the extra is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lsconv.app.image_io import ImageFileError, Picture, check_target, read_picture, write_picture
from lsconv.app.restore import Restoration


def test_without_astropy_the_line_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("astropy", "astropy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.fits").write_bytes(b"SIMPLE  =                    T".ljust(2880))
    with pytest.raises(ImageFileError, match=r"a.fits: FITS needs astropy; .*pip install 'lsconv\[fits\]'"):
        read_picture(tmp_path / "a.fits")
    with pytest.raises(ImageFileError, match=r"pip install 'lsconv\[fits\]'"):
        check_target(tmp_path / "b.fits", Picture(np.zeros((4, 4, 1), np.uint8)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("shape", [(30,), (7, 9), (3, 7, 9)])
def test_values_and_header_survive(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    fits = pytest.importorskip("astropy.io.fits")
    values = (100 * np.random.default_rng(0).random(shape)).astype(dtype)
    hdu = fits.PrimaryHDU(values)
    hdu.header.update(OBJECT="M 31", CTYPE1="RA---TAN", CRVAL1=10.5, EXPTIME=30.0)
    hdu.writeto(tmp_path / "a.fits")
    write_picture(tmp_path / "b.fits", read_picture(tmp_path / "a.fits"))
    with fits.open(tmp_path / "b.fits") as file:
        assert np.array_equal(file[0].data, values)
        assert file[0].data.dtype.newbyteorder("=") == values.dtype
        for name in ("OBJECT", "CTYPE1", "CRVAL1", "EXPTIME"):
            assert file[0].header[name] == hdu.header[name]
        assert "lsconv" in str(file[0].header["HISTORY"])


def test_an_image_in_an_extension_with_missing_pixels_is_restored(tmp_path: Path) -> None:
    import torch

    fits = pytest.importorskip("astropy.io.fits")
    import lsconv
    from lsconv.app.arguments import choose_psf

    image = np.random.default_rng(0).random((20, 22)).astype(np.float32)
    image[3, 4] = np.nan
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(image, name="SCI")]).writeto(tmp_path / "a.fits")
    work = Restoration(choose_psf(None, 1.0, None, None, None), "unknown", "gradient", "0.3", None, None,
                     torch.device("cpu"))  # fmt: skip
    with pytest.warns(lsconv.InputWarning, match="1 of 440 pixels"):
        _, converged = work(tmp_path / "a.fits", tmp_path / "b.fits")
    assert converged
    with fits.open(tmp_path / "b.fits") as file:
        assert np.isfinite(file[0].data).all()
        assert file[0].header["EXTNAME"] == "SCI"
