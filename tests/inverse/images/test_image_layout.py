"""Kinds, types and layouts of images: what comes back is what was given."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.errors import ShapeError
from tests.inverse.images.pictures import asymmetric, blurred_camera, gaussian_psf

IN_GREY_LEVELS: list[dict[str, Any]] = [
    {"prior": "tv", "weight": 1.0, "bounds": (0, 60)},
    {"damp": "upre", "noise_std": 2.0},
    {"damp": 0.1, "background": 20.0},
    {"noise": "poisson", "damp": 0.05, "gain": 2.0, "offset": 5.0, "read_noise": 1.0},
]


@pytest.mark.parametrize("damp", ["gcv", 0.1])
def test_numpy_is_answered_with_numpy_and_torch_with_torch(damp: Any) -> None:
    image, psf = np.random.default_rng(0).random((12, 12)), asymmetric(3, 3)
    in_numpy = lsconv.deconvolve(image, psf, damp=damp).x
    in_torch = lsconv.deconvolve(torch.from_numpy(image), torch.from_numpy(psf), damp=damp).x
    assert isinstance(in_numpy, np.ndarray)
    assert isinstance(in_torch, Tensor)
    assert in_numpy.dtype == np.float64
    assert np.array_equal(in_numpy, in_torch.numpy())


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "float16", "float32", "float64", ">u2"]
)
def test_numbers_keep_their_type_and_integers_are_rounded_and_cut_off(dtype: str) -> None:
    kind = np.dtype(dtype)
    image = np.random.default_rng(0).random((12, 12)) ** 0.1  # many pixels next to white: the answer overshoots
    stored = (image * np.iinfo(kind).max).astype(kind) if kind.kind in "iu" else image.astype(kind)
    x = lsconv.deconvolve(stored, asymmetric(3, 3), damp=1e-2).x
    assert x.dtype == kind.newbyteorder("=")
    scale = np.iinfo(kind).max if kind.kind in "iu" else 1
    exact = lsconv.deconvolve(stored.astype(np.float64) / scale, asymmetric(3, 3), damp=1e-2).x
    assert exact.max() > 1
    if kind.kind in "iu":
        expected = np.clip(np.rint(exact * scale), np.iinfo(kind).min, scale)
        assert np.abs(x.astype(np.float64) - expected).max() <= max(1, 1e-6 * scale)
        assert x.max() == scale
    else:
        assert np.abs(x - exact).max() < {2: 2e-3, 4: 1e-5, 8: 1e-12}[kind.itemsize]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.bfloat16])
def test_tensors_keep_their_type_too(dtype: torch.dtype) -> None:
    image = (torch.rand(12, 12) * 100).to(dtype)
    x = lsconv.deconvolve(image, torch.from_numpy(asymmetric(3, 3)), damp=1e-5, boundary="zero").x
    assert x.dtype == dtype
    back = lsconv.blur_operator(torch.from_numpy(asymmetric(3, 3)).float(), (12, 12), boundary="zero")(x.float()[None])
    assert (back[0] - image.float()).abs().max() < (8 if dtype is torch.bfloat16 else 50)


def test_layouts_are_the_same_problem() -> None:
    image, psf = torch.rand(2, 3, 12, 13, dtype=torch.float64), torch.from_numpy(asymmetric(3, 4))
    first = lsconv.deconvolve(image, psf, channels="first", damp=0.1)
    last = lsconv.deconvolve(image.movedim(1, -1), psf, channels="last", damp=0.1)
    alone = lsconv.deconvolve(image[1, 2], psf, damp=0.1)
    plain = lsconv.deconvolve(image, psf, damp=0.1)
    assert first.damp.shape == (2,)
    assert last.x.shape == (2, 12, 13, 3)
    assert torch.allclose(last.x.movedim(-1, 1), first.x, atol=1e-12)
    assert torch.allclose(first.x[1, 2], alone.x, atol=1e-9)
    assert torch.allclose(plain.x, first.x, atol=1e-9)
    assert plain.damp.shape == (2, 3)


def test_a_psf_per_channel_and_per_picture_are_so_many_problems() -> None:
    image = torch.rand(2, 3, 12, 13, dtype=torch.float64)
    psf = (
        torch.rand(2, 3, 3, 3, dtype=torch.float64)
        + 9 * torch.eye(3, dtype=torch.float64)[1, :, None] * torch.eye(3)[1]
    )
    psf = psf / psf.sum((-2, -1), keepdim=True)
    together = lsconv.deconvolve(image, psf, channels="first", ndim=2, damp=0.1).x
    by_picture = lsconv.deconvolve(image[:, 0], psf[:, 0], ndim=2, damp=0.1).x
    shared = lsconv.deconvolve(image, psf[:, :1], channels="first", ndim=2, damp=0.1).x
    for item, channel in itertools.product(range(2), range(3)):
        alone = lsconv.deconvolve(image[item, channel], psf[item, channel], damp=0.1).x
        assert torch.allclose(together[item, channel], alone, atol=1e-9)
    assert torch.allclose(by_picture, together[:, 0], atol=1e-9)
    assert torch.allclose(shared[:, 0], together[:, 0], atol=1e-9)


def test_stacks_and_lines_follow_the_psfs_axes() -> None:
    stack = torch.rand(7, 8, 9)
    psf = torch.from_numpy(asymmetric(2, 3, 3)).float()
    plane, line = psf[0] / psf[0].sum(), psf[0, 0] / psf[0, 0].sum()
    assert lsconv.deconvolve(stack, psf, damp=0.1).damp.shape == ()
    assert lsconv.deconvolve(stack, psf, damp=0.1, crop=False).x.shape == (8, 10, 11)
    assert lsconv.deconvolve(stack, plane, damp=0.1).damp.shape == (7,)
    assert lsconv.deconvolve(stack[0, 0], line, damp=0.1, crop=False).x.shape == (11,)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *((IN_GREY_LEVELS[2], dtype) for dtype in ("uint8", "int16", ">u2", "uint32", "int64", "uint64")),
        *((IN_GREY_LEVELS[k], dtype) for k in (0, 1, 3) for dtype in (">u2", "int64")),  # in float32 and in float64
        pytest.param({"prior": "tv", "noise": "poisson", "background": 20.0}, "uint8", marks=pytest.mark.slow),
    ],
)
def test_an_integer_image_means_what_the_same_numbers_as_floats_mean(options: dict[str, Any], dtype: str) -> None:
    image = (20 + blurred_camera() + 2 * np.random.default_rng(1).standard_normal((36, 36))).round()
    found = lsconv.deconvolve(image.astype(dtype), gaussian_psf(), **options).x
    same = image.astype("float64" if np.dtype(dtype).itemsize > 2 else "float32")
    expected = lsconv.deconvolve(same, gaussian_psf(), **options).x
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    # the certificates of float32 allow two thousandths
    assert np.abs(found.astype(float) - expected.clip(np.iinfo(dtype).min, np.iinfo(dtype).max)).max() < 1.5


def test_bool_and_float16_images_are_numbers() -> None:
    square = np.zeros((20, 20), bool)
    square[5:15, 6:12] = True
    x = lsconv.deconvolve(square, gaussian_psf(3), damp=0.1).x
    assert x.dtype == np.float32
    assert np.array_equal(x, lsconv.deconvolve(square.astype(np.float32), gaussian_psf(3), damp=0.1).x)
    assert len(np.unique(x)) > 2
    assert lsconv.deconvolve(torch.from_numpy(square), gaussian_psf(3), damp=0.1).x.dtype == torch.float32
    half = np.random.default_rng(0).random((12, 12)).astype(np.float16)
    x = lsconv.deconvolve(half, gaussian_psf(3), damp=0.1).x
    assert x.dtype == np.float16
    assert np.abs(x - lsconv.deconvolve(half.astype(np.float32), gaussian_psf(3), damp=0.1).x).max() < 2e-3


@pytest.mark.parametrize("shape", [(48, 40, 3), (2, 48, 40, 3)])
def test_three_values_a_pixel_are_colours(shape: tuple[int, ...]) -> None:
    image, psf = np.random.default_rng(0).random(shape), gaussian_psf(3)
    x = lsconv.deconvolve(image, psf, damp=0.1).x
    assert np.array_equal(x, lsconv.deconvolve(image, psf, damp=0.1, channels="last").x)


@pytest.mark.parametrize(("image", "psf"), [((40, 40, 4), (5, 5)), ((6, 40, 40), (6, 5, 5)), ((40, 40, 3), (3, 5, 5))])
def test_shapes_that_can_be_read_in_two_ways_are_refused(image: tuple[int, ...], psf: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"channels=.*ndim|ndim.*channels="):
        lsconv.deconvolve(np.ones(image), np.ones(psf) / np.prod(psf))
