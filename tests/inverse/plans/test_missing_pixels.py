"""Images with missing, saturated and weighted pixels, through deconvolve."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    DtypeError,
    InputWarning,
    MethodError,
    NonFiniteError,
    ShapeError,
)

RNG = np.random.default_rng(0)
PSF = np.outer([1.0, 2, 1], [1.0, 3, 1]) / 20
SCENE = RNG.random((26, 28)).cumsum(1) / 10
IMAGE = lsconv.blur_operator(torch.tensor(PSF), (24, 26))(torch.tensor(SCENE)[None])[0].numpy()
SEEN = RNG.random(IMAGE.shape) > 0.1


def quietly(image: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        return lsconv.deconvolve(image, PSF, **{"damp": 0.05, **options}).x


def test_nan_masked_and_not_observed_are_one_problem() -> None:
    expected = quietly(np.where(SEEN, IMAGE, np.nan))
    assert np.array_equal(quietly(np.ma.masked_array(IMAGE, ~SEEN)), expected)
    for under in (0.0, -1e9, np.inf, np.nan):
        assert np.array_equal(quietly(np.where(SEEN, IMAGE, under), observed=SEEN), expected)
    half = SEEN | (np.arange(IMAGE.shape[0]) > 10)[:, None]
    assert np.array_equal(quietly(np.where(SEEN, IMAGE, np.nan), observed=half), expected)
    assert torch.equal(quietly(torch.tensor(IMAGE), observed=torch.tensor(SEEN)), torch.tensor(expected))


def test_a_restoration_with_missing_pixels_is_the_dense_one_without_them() -> None:
    A = lsconv.blur_operator(torch.tensor(PSF), IMAGE.shape)
    D = lsconv.Gradient(A.in_shape, ndim=2, dtype=torch.float64).to_dense()
    M, weights = A.to_dense(), torch.tensor(RNG.random(IMAGE.shape) + 0.1)
    for given, options in ((torch.tensor(SEEN).double(), {}), (torch.tensor(SEEN) * weights, {"weights": weights})):
        w, y = given.flatten(), torch.tensor(IMAGE).flatten()
        expected = torch.linalg.solve(M.T @ (w[:, None] * M) + 0.05**2 * D.T @ D, M.T @ (w * y)).reshape(SCENE.shape)
        x = quietly(np.where(SEEN, IMAGE, np.nan), crop=False, **options)
        assert np.abs(x - expected.numpy()).max() < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"prior": "tikhonov"},
        {"damp": "gcv"},
        {"boundary": "zero"},
        {"boundary": "reflect"},
        {"prior": "tv", "weight": 1e-3, "damp": "auto"},
        {"bounds": (0, None)},
        pytest.param({"noise": "poisson"}, marks=pytest.mark.slow),
        pytest.param({"prior": lambda v: v / 1.01}, marks=pytest.mark.slow),
    ],
)
def test_every_prior_and_boundary_takes_observed(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = lsconv.deconvolve(np.where(SEEN, IMAGE, 77.0), PSF, observed=SEEN, **{"damp": 0.05, **options}).x
        again = lsconv.deconvolve(np.where(SEEN, IMAGE, np.nan), PSF, **{"damp": 0.05, **options}).x
    assert np.array_equal(x, again)
    assert np.isfinite(x).all()


def test_observed_may_be_of_the_size_of_a_colour_image() -> None:
    colours = np.stack([IMAGE, 2 * IMAGE, IMAGE[::-1]], -1)
    seen = np.broadcast_to(SEEN[..., None], colours.shape)
    x = quietly(colours, observed=SEEN, channels="last")
    assert np.allclose(x, quietly(colours, observed=seen, channels="last"))
    assert np.allclose(x[..., 0], quietly(IMAGE, observed=SEEN), atol=1e-6)


def test_only_what_the_user_did_not_say_is_announced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsconv.deconvolve(IMAGE, PSF, damp=0.05, observed=SEEN)
    missing = int((~SEEN).sum())
    with pytest.warns(InputWarning, match=f"{missing} of {SEEN.size} pixels are NaN or masked"):
        lsconv.deconvolve(np.where(SEEN, IMAGE, np.nan), PSF, damp=0.05)


def lamp() -> np.ndarray[Any, Any]:
    """An 8-bit photograph with a saturated lamp."""
    scene = 100 * SCENE / SCENE.max()
    scene[8:14, 8:14] = 900
    blurred = lsconv.blur_operator(torch.tensor(PSF), (24, 26))(torch.tensor(scene)[None])[0].numpy()
    return np.clip(np.rint(blurred), 0, 255).astype(np.uint8)


def test_saturated_pixels_are_missing() -> None:
    image = lamp()
    expected = quietly(image, observed=image < 255)
    assert np.array_equal(quietly(image, saturated=255), expected)
    assert np.array_equal(quietly(image, saturated="auto"), expected)
    assert not np.array_equal(quietly(image), expected)
    count = int((image == 255).sum())
    with pytest.warns(InputWarning) as heard:
        lsconv.deconvolve(image, PSF, damp=0.05, saturated="auto")
    said = " ".join(str(each.message) for each in heard)
    assert f"{count} pixels at the top level 255" in said
    assert f"{count} of {image.size} pixels" in said


@pytest.mark.parametrize(
    "options", [{"damp": 0.05}, {"damp": 0.05, "bounds": (0, None)}, {"prior": "tv", "weight": 2.0}]
)
def test_a_saturated_pixel_may_be_a_lower_bound(options: dict[str, Any]) -> None:
    image = lamp().astype(np.float64)
    saturated = image >= 255
    A = lsconv.blur_operator(torch.tensor(PSF / PSF.sum()), (24, 26))
    y, rows = torch.tensor(image)[None], torch.tensor(saturated)[None]
    if "prior" in options:
        expected = lsconv.total_variation(A, y, 2.0, at_least=rows)
    else:
        level = float(y[~rows].mean())
        L = lsconv.Gradient(A.in_shape, boundary="neumann", dtype=torch.float64)
        prior = torch.full(A.in_shape, level, dtype=torch.float64)
        expected = lsconv.tikhonov(A, y, 0.05, L=L, x_prior=prior, bounds=options.get("bounds"), at_least=rows)
    found = lsconv.deconvolve(image, PSF, saturated=255, one_sided=True, crop=False, **options)
    assert bool(found.converged)
    np.testing.assert_allclose(found.x, expected.x[0].numpy(), rtol=0, atol=2e-3)
    blurred = A(torch.tensor(found.x)[None])[0].numpy()
    assert np.median(blurred[saturated]) > 300
    # above the level nothing pulls: the recorded value has no say
    above = np.where(saturated, 400.0, image)
    assert np.array_equal(
        lsconv.deconvolve(above, PSF, saturated=255, one_sided=True, crop=False, **options).x, found.x
    )


def test_a_lower_bound_and_a_rule_for_damp_agree_with_tikhonov() -> None:
    image = lamp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        chosen = lsconv.deconvolve(image, PSF, saturated="auto", one_sided=True)
        missing = lsconv.deconvolve(image, PSF, saturated="auto")
    assert float(chosen.damp) == pytest.approx(float(missing.damp), rel=1e-6)  # the rule looks at what is certain
    assert bool(chosen.converged)
    colours = lsconv.deconvolve(
        np.stack([image, image]), PSF, channels="first", damp=0.05, saturated=255, one_sided=True
    )
    alone = lsconv.deconvolve(image, PSF, damp=0.05, saturated=255, one_sided=True)
    assert int(np.abs(colours.x[0].astype(int) - alone.x.astype(int)).max()) <= 1


def test_without_a_saturated_pixel_one_sided_changes_nothing() -> None:
    plain = lsconv.deconvolve(IMAGE, PSF, damp=0.05)
    level = float(IMAGE.max()) + 1
    assert np.array_equal(lsconv.deconvolve(IMAGE, PSF, damp=0.05, saturated=level, one_sided=True).x, plain.x)


def test_the_level_is_found_where_there_is_a_plateau() -> None:
    rising = np.arange(1000, dtype=np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        assert lsconv.saturation_level(rising, "auto") is None
        assert lsconv.saturation_level(np.minimum(rising, 900), "auto") == 900
        assert lsconv.saturation_level(torch.tensor(np.minimum(rising, 900).astype(np.int32)), "auto") == 900
        assert lsconv.saturation_level(np.ma.masked_array(rising, rising == 999), "auto") is None
    with pytest.warns(InputWarning, match="no plateau"):
        lsconv.saturation_level(rising, "auto")
    assert lsconv.saturation_level(rising, 12) == 12
    assert lsconv.saturation_level(rising, None) is None


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"observed": SEEN.astype(float)}, DtypeError, "observed != 0"),
        ({"observed": SEEN[1:]}, ShapeError, "observed: expected the image's shape"),
        ({"observed": [True]}, ArgumentTypeError, "observed: expected a bool"),
        ({"observed": np.zeros_like(SEEN)}, NonFiniteError, "no measured pixel"),
        ({"weights": np.zeros_like(IMAGE)}, NonFiniteError, "no measured pixel"),
        ({"weights": (~SEEN).astype(float), "observed": SEEN}, NonFiniteError, "no measured pixel"),
        ({"noise_std": np.full_like(IMAGE, np.inf)}, NonFiniteError, "no measured pixel"),
        ({"weights": -IMAGE - 1}, ArgumentError, "weights: expected finite numbers"),
        ({"weights": IMAGE + 1, "noise_std": IMAGE + 1}, ArgumentError, "one of the two"),
        ({"weights": IMAGE + 1, "noise": "poisson"}, ArgumentError, "weights: are of noise"),
        ({"saturated": "auto"}, ArgumentError, "plateau of an image of integers"),
        ({"saturated": "never"}, ArgumentError, "saturated: expected"),
        ({"saturated": True}, ArgumentTypeError, "saturated: expected"),
        ({"saturated": float("nan")}, ArgumentError, "finite grey level"),
        ({"one_sided": True}, ArgumentError, "one_sided: is about the pixels that saturated="),
        ({"one_sided": True, "saturated": 1.0, "noise": "poisson"}, ArgumentError, "one_sided"),
        ({"one_sided": True, "saturated": float(IMAGE.min())}, NonFiniteError, "not saturated"),
        ({"one_sided": True, "saturated": float(IMAGE.max()), "prior": lambda x: x}, MethodError, "denoiser"),
        ({"one_sided": True, "saturated": float(IMAGE.max()), "error_bars": True}, MethodError, "error_bars"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        lsconv.deconvolve(IMAGE, PSF, **{"damp": 0.05, **options})
