"""The PSF's centre, sum and margins, as deconvolve takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from tests.inverse.images.pictures import BOUNDARIES, gaussian_psf


@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_a_psf_of_sum_zero_is_served_with_the_mean_that_nothing_says_at_zero(prior: str) -> None:
    psf = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    solution = lsconv.deconvolve(
        torch.rand(8, 8, dtype=torch.float64), psf, prior=prior, damp=0.1, crop=False, normalize_psf=False
    )
    assert bool(solution.converged)
    assert abs(solution.x.mean()) < 1e-3 if prior == "gradient" else True


@pytest.mark.parametrize("margins", [((4, 4), (3, 3)), ((5, 3), (0, 6))])
@pytest.mark.parametrize("boundary", ["unknown", "zero", "reflect", "periodic"])
@pytest.mark.parametrize("prior", ["gradient", "tikhonov"])
def test_zeros_around_the_psf_change_nothing_but_its_centre(
    margins: tuple[tuple[int, int], ...], boundary: str, prior: str
) -> None:
    if (boundary, prior) == ("reflect", "gradient"):
        pytest.skip("LSMR stagnates there above its tolerance, with margins and without")
    generator = torch.Generator().manual_seed(0)
    psf = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    psf = psf / psf.sum()
    image = torch.rand(20, 21, generator=generator, dtype=torch.float64)
    wide = torch.nn.functional.pad(psf, [*margins[1], *margins[0]])
    options: dict[str, Any] = {"boundary": boundary, "prior": prior, "rtol": 1e-8}
    found = lsconv.deconvolve(image, wide, damp=0.1, **options)
    shifts = [(k - 1) // 2 - ((w - 1) // 2 - m[0]) for k, w, m in zip(psf.shape, wide.shape, margins, strict=True)]
    if shifts == [0, 0]:
        torch.testing.assert_close(found.x, lsconv.deconvolve(image, psf, damp=0.1, **options).x)
    with_weight = lsconv.deconvolve(image, wide.requires_grad_(), damp=0.1, **options)  # it is not trimmed
    assert with_weight.x.shape == found.x.shape
    if boundary != "unknown" or prior == "tikhonov":
        torch.testing.assert_close(found.x, with_weight.x.detach(), rtol=1e-5, atol=1e-5)
    # the sum alone is that of the image, whatever the PSF
    (with_weight.x * torch.rand(with_weight.x.shape, generator=generator, dtype=torch.float64)).sum().backward()
    assert wide.grad is not None
    assert wide.grad.shape == wide.shape
    assert float(wide.grad[0, 0].abs()) > 0


def test_without_crop_the_field_is_that_of_the_psf_as_given() -> None:
    psf = torch.zeros(9, 11)
    psf[4, 4:7] = 1 / 3
    assert lsconv.deconvolve(torch.rand(20, 21), psf, damp=0.1, crop=False).x.shape == (28, 31)


def test_a_psf_off_sum_one_is_divided_by_its_sum_with_a_word() -> None:
    image, psf = np.random.default_rng(0).random((16, 16)), gaussian_psf(5)
    with pytest.warns(lsconv.InputWarning, match="sum to 250"):
        x = lsconv.deconvolve(image, 250 * psf, damp=0.1).x
    assert np.allclose(x, lsconv.deconvolve(image, psf, damp=0.1).x, atol=1e-10)
    assert np.allclose(lsconv.deconvolve(image, 1.009 * psf, damp=0.1).x, x, atol=1e-10)  # within 1 %: no word


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("origin", [(0, 0), (2, 4), "peak", "centroid"])
def test_the_origin_moves_the_answer_and_nothing_else(boundary: str, origin: Any) -> None:
    """A delta at the origin is the identity; so the answer under a PSF stays where its origin is."""
    psf = np.zeros((3, 5))
    place = origin if isinstance(origin, tuple) else (1, 3)
    psf[place] = 1
    image = torch.rand(9, 10, dtype=torch.float64)
    A = lsconv.blur_operator(torch.from_numpy(psf), (9, 10), boundary=boundary, origin=origin)
    assert torch.allclose(lsconv.deconvolve(image, torch.from_numpy(psf), boundary=boundary, origin=origin,
                                            damp=1e-6, prior="tikhonov").x, image, atol=1e-8)  # fmt: skip
    assert A.out_shape == (1, 9, 10)


def test_a_causal_response_as_long_as_the_record_is_inverted() -> None:
    s = np.arange(60.0)
    response = s**3 * np.exp(-s / 1.5)
    response /= response.sum()
    truth = np.exp(-s / 6)
    record = np.convolve(response, truth)[:60]
    x = lsconv.deconvolve(record, response, boundary="zero", origin=(0,), damp=1e-4).x
    assert np.linalg.norm(x - truth)[()] < 0.2 * np.linalg.norm(truth)
    centred = np.concatenate([np.zeros(59), response])
    assert np.allclose(x, lsconv.deconvolve(record, centred, boundary="zero", damp=1e-4).x, atol=1e-6)
