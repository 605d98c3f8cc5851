"""estimate_psf: parameters of images drawn from its prior, error bars, verdicts, and arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv import psf

DOUBLE = torch.float64


def scene(size: int, exponent: float = 2.5, softness: float = 0.25) -> Tensor:
    """A sample of the prior, cut from a period of twice the size."""
    omega = 2 * math.pi * torch.fft.fftfreq(2 * size, dtype=DOUBLE)
    square = omega[:, None] ** 2 + omega[: size + 1] ** 2
    square[0, 0] = square[0, 1]
    power = square ** (-exponent / 2) * torch.exp(-softness * square)
    white = torch.fft.rfft2(torch.randn(2 * size, 2 * size, dtype=DOUBLE))
    return torch.fft.irfft2(white * power.sqrt(), (2 * size, 2 * size))[:size, :size]


def blurred(kernel: Tensor, noise: float, size: int = 112, **how: float) -> Tensor:
    rows, columns = (size + k - 1 for k in kernel.shape)
    A = lsconv.blur_operator(kernel, (size, size))
    image: Tensor = A(scene(max(rows, columns), **how)[:rows, :columns][None])[0]
    return image + noise * torch.randn(image.shape, dtype=DOUBLE)


CASES: dict[str, tuple[Callable[[], Tensor], dict[str, float]]] = {
    "gaussian": (lambda: psf.gaussian(1.5), {"sigma": 1.5}),
    "disk": (lambda: psf.disk(3.0), {"radius": 3.0}),
    "motion": (lambda: psf.motion(7.0, 150.0), {"length": 7.0, "angle": 150.0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", CASES)
def test_parameters_of_samples_of_the_prior_are_unbiased_within_their_error_bars(model: str) -> None:
    make, truth = CASES[model]
    count = 24 if model != "motion" else 8
    scores = []
    for _ in range(count):
        exponent, softness = 2.5 + 0.2 * float(torch.randn(())), max(0.0, 0.25 + 0.1 * float(torch.randn(())))
        found = lsconv.estimate_psf(blurred(make(), 0.02, exponent=exponent, softness=softness), model)
        assert found.converged
        scores.append([(found.parameters[name] - value) / found.std[name] for name, value in truth.items()])
    errors = torch.tensor(scores)
    print(model, "mean", errors.mean(0).tolist(), "rms", errors.square().mean(0).sqrt().tolist())
    assert (errors.mean(0).abs() < 3 * 1.3 / math.sqrt(count)).all()
    assert (errors.square().mean(0).sqrt() < 1.6).all()
    assert (errors.abs() < 1.645).double().mean() >= 0.75


@pytest.mark.slow
def test_noise_exponent_and_psf_are_found_too() -> None:
    found = lsconv.estimate_psf(blurred(psf.disk(4.0), 0.05, 200), "disk")
    assert found.noise_std == pytest.approx(0.05, rel=0.03)
    assert found.exponent == pytest.approx(2.5, abs=0.3)
    assert torch.allclose(found.psf, psf.disk(found.parameters["radius"]))
    assert found.psf.sum() == pytest.approx(1)
    assert found.status is lsconv.PsfStatus.FOUND
    assert "likelihood" in found.status.sentence


@pytest.mark.slow
def test_the_estimated_damp_restores_nearly_as_well_as_the_best() -> None:
    kernel = psf.disk(3.0)
    truth = scene(134)
    A = lsconv.blur_operator(kernel, (128, 128))
    image = A(truth[None])[0] + 0.05 * torch.randn(128, 128, dtype=DOUBLE)
    found = lsconv.estimate_psf(image, "disk")

    def error(damp: float) -> float:
        x = lsconv.deconvolve(image, found.psf, damp=damp).x
        return float((x - truth[3:-3, 3:-3]).square().mean())

    best = min(error(float(damp)) for damp in torch.logspace(-3, 1, 17))
    assert error(found.damp) < 1.05 * best


def test_an_image_that_tells_nothing_has_a_status_and_no_verdict() -> None:
    with pytest.warns(lsconv.ConvergenceWarning, match="estimate_psf"):
        found = lsconv.estimate_psf(torch.randn(160, 160, dtype=DOUBLE), "gaussian")
    assert not found.converged


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gaussian", "disk"])
def test_an_image_without_a_blur_has_one_within_a_pixel_and_the_width_is_untold(model: str) -> None:
    image = scene(64, softness=0.0) + 0.003 * torch.randn(
        64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    with pytest.warns(lsconv.ConvergenceWarning):
        found = lsconv.estimate_psf(image, model)
    name = {"gaussian": "sigma", "disk": "radius"}[model]
    assert found.status is not lsconv.PsfStatus.FOUND
    assert found.parameters[name] < 1
    assert found.std[name] > found.parameters[name] / 3


def test_a_blur_beyond_the_windows_stands_on_the_bound() -> None:
    image = blurred(psf.gaussian(7.0), 1e-3, 128)
    with pytest.warns(lsconv.ConvergenceWarning, match="another window="):
        found = lsconv.estimate_psf(image, "gaussian", window=32)
    assert found.status is lsconv.PsfStatus.AT_BOUND
    assert lsconv.estimate_psf(image, "gaussian", window=64).parameters["sigma"] == pytest.approx(7.0, rel=0.1)


@pytest.mark.slow
def test_planes_have_one_psf_and_tell_more_of_it() -> None:
    planes = torch.stack([blurred(psf.disk(2.5), 0.02) for _ in range(3)])
    one, all_three = (lsconv.estimate_psf(each, "disk") for each in (planes[0], planes))
    assert all_three.std["radius"] < one.std["radius"]
    last = lsconv.estimate_psf(planes.movedim(0, -1).numpy(), "disk", channels="last")
    assert last.parameters == pytest.approx(all_three.parameters, rel=1e-9)


@pytest.mark.slow
def test_values_of_missing_pixels_are_not_read() -> None:
    image = blurred(psf.disk(2.5), 0.02)
    mask = torch.ones(image.shape, dtype=torch.bool)
    mask[:5, 60:] = False
    garbage = torch.where(mask, image, 1e6)
    found = lsconv.estimate_psf(garbage, "disk", observed=mask)
    holes = lsconv.estimate_psf(torch.where(mask, image, torch.nan), "disk")
    masked = lsconv.estimate_psf(np.ma.array(garbage.numpy(), mask=~mask.numpy()), "disk")
    assert found.parameters == holes.parameters == masked.parameters
    assert found.parameters["radius"] == pytest.approx(2.5, rel=0.05)


def test_a_function_is_a_model_with_its_own_parameters() -> None:
    def two(wide: Tensor, narrow: Tensor) -> Tensor:
        return psf.gaussian(torch.stack([wide, narrow]), size=17)

    image = blurred(psf.gaussian([2.0, 1.2], size=17), 0.01)
    found = lsconv.estimate_psf(image, two, start={"wide": 1.0, "narrow": 1.0})
    assert found.parameters == pytest.approx({"wide": 2.0, "narrow": 1.2}, rel=0.15)
    assert found.psf.shape == (17, 17)


@pytest.mark.slow
def test_a_start_takes_the_place_of_the_grid() -> None:
    image = blurred(psf.motion(7.0, 30.0), 0.01)
    whole = lsconv.estimate_psf(image, "motion")
    near = lsconv.estimate_psf(image, "motion", start=[6.5, 25.0])
    assert near.parameters == pytest.approx(whole.parameters, rel=1e-2)
    assert near.alternatives == []


@pytest.mark.slow
def test_the_curve_has_its_top_at_the_estimate() -> None:
    found = lsconv.estimate_psf(blurred(psf.disk(3.0), 0.02), "disk")
    values, heights = found.curve(9)
    assert values[4] == pytest.approx(found.parameters["radius"])
    assert heights.argmax() == 4
    assert heights[4] == pytest.approx(0, abs=0.1)
    assert max(heights[3], heights[5]) < -10


@pytest.mark.slow
def test_an_estimate_prints_value_and_error_with_unit() -> None:
    found = lsconv.estimate_psf(blurred(psf.motion(7.0, 30.0), 0.02), "motion")
    assert str(found).startswith("length = ")
    assert " ± " in str(found)
    assert str(found).endswith("°")


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"model": "lens"}, "model: expected one of gaussian"),
        ({"model": lambda s: psf.gaussian(s, size=9)}, "start: a function"),
        ({"model": "disk", "start": [1.0, 2.0]}, "start: expected a positive value of each of radius"),
        ({"model": "disk", "start": {"sigma": 1.0}}, "start: expected values of radius"),
        ({"model": "disk", "start": -1.0}, "start: expected a positive value"),
        ({"model": "disk", "window": 33}, "window: expected an even number"),
        ({"model": "disk", "window": 400}, "window: expected an even number"),
        ({"model": "disk", "channels": "middle"}, "channels: expected"),
        ({"model": "disk", "exponent": (2.5, 0.0)}, "exponent: expected a mean"),
        ({"model": "disk", "observed": torch.ones(7, 7, dtype=torch.bool)}, "observed: .* does not broadcast"),
        ({"model": "disk", "observed": torch.ones(64, 64)}, "observed: expected bool"),
        ({"model": "disk", "image": torch.ones(64)}, "image: expected"),
        ({"model": "disk", "image": torch.ones(64, 64, dtype=torch.complex64)}, "image: expected real"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], said: str) -> None:
    given = {"image": torch.randn(64, 64), **arguments}
    with pytest.raises(lsconv.LsconvError, match=said):
        lsconv.estimate_psf(**given)


@pytest.mark.slow
def test_a_disk_in_an_image_with_a_gaussian_blur_is_no_answer() -> None:
    image = blurred(psf.gaussian(2.0), 0.01, 160)
    with pytest.warns(lsconv.ConvergenceWarning, match="estimate_psf"):
        found = lsconv.estimate_psf(image, "disk")
    assert found.status in (lsconv.PsfStatus.NOT_THIS_BLUR, lsconv.PsfStatus.MULTIMODAL)
    assert lsconv.estimate_psf(image, "gaussian").converged


@pytest.mark.slow
def test_a_scene_unlike_sharp_ones_is_said() -> None:
    image = blurred(psf.gaussian(1.0), 1e-3, 192, exponent=4.2)
    with pytest.warns(lsconv.ConvergenceWarning, match="spectrum is far"):
        found = lsconv.estimate_psf(image, "gaussian")
    assert found.status is lsconv.PsfStatus.UNUSUAL_SCENE
    assert lsconv.estimate_psf(image, "gaussian", exponent=(4.2, 0.2)).parameters["sigma"] == pytest.approx(1, rel=0.1)
