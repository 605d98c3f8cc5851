"""Restoration of the classical scenarios: what deconvolve chooses by itself against what the truth would choose."""

from __future__ import annotations

import importlib.resources
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv import psf

_SQUARE = (torch.arange(15, dtype=torch.float64) - 7) ** 2
_FADING = 1 / (1 + _SQUARE[:, None] + _SQUARE)
# blur, and the noise: a standard deviation, or a BSNR in decibels
SCENARIOS = {
    "box 9x9, BSNR 40 dB": (psf.box(9), 40.0),
    "Gaussian of sigma 1.6, noise 2/255": (psf.gaussian(1.6), 2 / 255),
    "1/(1+i^2+j^2), noise sqrt(2)/255": (_FADING / _FADING.sum(), math.sqrt(2) / 255),
    "motion, BSNR 30 dB": (psf.motion(15, 30), 30.0),
}


def photograph() -> Tensor:
    image = pytest.importorskip("PIL.Image")
    source = importlib.resources.files("lsconv.app") / "data" / "astronaut-256.png"
    with importlib.resources.as_file(source) as path:
        return torch.from_numpy(np.asarray(image.open(path).convert("L"), dtype=np.float32) / 255)


def blurred(truth: Tensor, kernel: Tensor, noise: float) -> Tensor:
    size = tuple(n - k + 1 for n, k in zip(truth.shape, kernel.shape, strict=True))
    y = lsconv.blur_operator(kernel, size)(truth.double()[None])[0]
    std = float(y.std()) * 10 ** (-noise / 20) if noise > 1 else noise
    return (y + std * torch.randn(y.shape, dtype=torch.float64)).float()


def decibels(x: Tensor, truth: Tensor, kernel: Tensor) -> float:
    inner = truth[tuple(slice((k - 1) // 2, (k - 1) // 2 + n) for n, k in zip(x.shape, kernel.shape, strict=True))]
    return float(-10 * torch.log10((x - inner).square().mean()))


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "place",
    [
        pytest.param((slice(64, 192), slice(64, 192)), id="middle"),
        *(
            pytest.param((slice(i, i + 128), slice(j, j + 128)), id=f"corner {i},{j}", marks=pytest.mark.slow)
            for i, j in ((0, 0), (128, 128))
        ),
    ],
)
def test_the_automatic_damp_is_within_0_3_db_of_the_best(scenario: str, place: tuple[slice, slice]) -> None:
    kernel, noise = SCENARIOS[scenario]
    truth = photograph()[place]
    y = blurred(truth, kernel, noise)
    automatic = decibels(lsconv.deconvolve(y, kernel.float()).x, truth, kernel)
    best = max(
        decibels(lsconv.deconvolve(y, kernel.float(), damp=float(damp), rtol=1e-4).x, truth, kernel)
        for damp in np.geomspace(0.01, 0.3, 8)
    )
    assert automatic > best - 0.3
    assert automatic > decibels(y, truth, kernel) + 1


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_chosen_beats_the_wiener_filter_and_richardson_lucy_at_their_best(scenario: str) -> None:
    restoration = pytest.importorskip("skimage.restoration")
    kernel, noise = SCENARIOS[scenario]
    truth = photograph()
    y = blurred(truth, kernel, noise)
    ours = decibels(lsconv.deconvolve(y, kernel.float(), prior="tv").x, truth, kernel)
    picture, k = y.double().numpy(), kernel.numpy()
    doubled = np.pad(picture, [(0, n) for n in picture.shape], mode="symmetric")
    margin = 3 * max(k.shape)
    mirrored = np.pad(picture, margin, mode="symmetric").clip(1e-6)
    height, width = picture.shape
    theirs = [
        restoration.wiener(doubled, k, float(balance), clip=False)[:height, :width]
        for balance in np.geomspace(1e-4, 1, 9)
    ] + [
        restoration.richardson_lucy(mirrored, k, num_iter=count, clip=False)[margin:-margin, margin:-margin]
        for count in (10, 30, 60, 120)
    ]
    assert ours > max(decibels(torch.from_numpy(x).float(), truth, kernel) for x in theirs)


@pytest.mark.parametrize(
    ("kernel", "size"), [("symmetric", (40, 48)), ("symmetric", (37, 41)), ("even", (37, 41)), ("asymmetric", (40, 48))]
)
@pytest.mark.parametrize("penalty", ["laplacian", "identity", "convolution"])
def test_circular_tikhonov_is_the_wiener_filter_of_scikit_image(
    size: tuple[int, int], kernel: str, penalty: str
) -> None:
    """Its ``balance`` is damp squared, its ``reg`` the penalty; by default the Laplacian."""
    restoration = pytest.importorskip("skimage.restoration")
    k = {
        "symmetric": psf.box(5),
        "even": torch.rand(4, 6, dtype=torch.float64),
        "asymmetric": torch.rand(5, 3, dtype=torch.float64),
    }[kernel]
    k = k / k.sum()
    A = lsconv.blur_operator(k, size, boundary="periodic")
    y = A(torch.rand(1, *size, dtype=torch.float64)) + 0.01 * torch.randn(1, *size, dtype=torch.float64)
    reg = torch.randn(3, 3, dtype=torch.float64)
    reg = reg + reg.flip(0, 1)  # of other transfer functions scikit-image takes the real part
    reg[1, 1] += 20  # no zeros, which those of the box blur would come near
    L, given = {
        "laplacian": (lsconv.Laplacian(A.in_shape, boundary="periodic", dtype=torch.float64), None),
        "identity": (None, np.ones((1, 1))),
        "convolution": (lsconv.blur_operator(reg, size, boundary="periodic"), reg.numpy()),
    }[penalty]
    for balance in (1e-3, 0.1):
        theirs = restoration.wiener(y[0].numpy(), k.numpy(), balance, reg=given, clip=False)
        ours = lsconv.tikhonov(A, y, math.sqrt(balance), L=L, method="fourier").x[0]
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)
        if penalty != "identity":  # for which deconvolve pulls to the mean instead of zero
            continue
        mean = y.mean()
        theirs = restoration.wiener((y[0] - mean).numpy(), k.numpy(), balance, reg=given, clip=False)
        ours = lsconv.deconvolve(y[0], k, boundary="periodic", prior="tikhonov", damp=math.sqrt(balance)).x
        torch.testing.assert_close(ours - mean, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)
