"""A layer's fields are restored as the library restores each of them, whatever the axes, number type and colours."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
import torch

import lsconv
from lsconv.napari.problem import CancelledError, Problem, Settings, psf_of

PSF = psf_of("gaussian", 1.0).numpy()
VOLUME = psf_of("gaussian", 0.7, depth=0.7).numpy()


def counts(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(20, 200, shape)


def same(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    assert found.dtype == expected.dtype.newbyteorder("=")
    assert np.abs(found.astype(float) - expected.astype(float)).max() <= (1 if found.dtype.kind in "iu" else 1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("shape", [(18, 20), (2, 18, 20), (2, 1, 2, 18, 20)])
def test_every_plane_is_restored_by_itself(shape: tuple[int, ...], dtype: str) -> None:
    data = counts(*shape).astype(dtype)
    problem = Problem.of(data, PSF, Settings(strength=0.2))
    fields = problem.fields()
    assert len(fields) == int(np.prod(shape[:-2]))
    for index in fields:
        native = data[index].astype(data.dtype.newbyteorder("="))
        same(problem.restore(index).values, lsconv.deconvolve(native, PSF, damp=0.2).x)


@pytest.mark.parametrize(("labels", "z"), [(("t", "Z", "c", "y", "x"), 1), ((), 2), (("a", "b", "z", "y", "x"), 2)])
def test_depth_is_the_axis_named_z_or_the_third_from_the_end(labels: tuple[str, ...], z: int) -> None:
    data = counts(2, 8, 8, 9, 10).astype(np.uint16)[:, : 7 if z == 2 else 8, : 7 if z == 1 else 8]
    problem = Problem.of(data, VOLUME, Settings(strength=0.3), labels=labels)
    fields = problem.fields()
    assert len(fields) == 14
    index = fields[9]
    assert index[z] == slice(None)
    same(problem.restore(index).values, lsconv.deconvolve(data[index], VOLUME, damp=0.3).x)


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_are_restored_together_and_opacity_is_kept(channels: int) -> None:
    data = counts(2, 18, 20, channels).astype(np.uint8)
    problem = Problem.of(data, PSF, Settings(), colour=True)
    index = problem.fields()[1]
    found = problem.restore(index).values
    expected = lsconv.deconvolve(data[1, ..., :3].astype(np.float32), PSF, channels="last").x
    assert np.abs(found[..., :3] - expected.clip(0, 255)).max() <= 1
    assert np.array_equal(found[..., 3:], data[1, ..., 3:])


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (Settings(), {}),
        (Settings("zero", prior="tikhonov", strength=0.3), {"boundary": "zero", "prior": "tikhonov", "damp": 0.3}),
        (Settings(prior="tv", strength=2.0, nonnegative=True), {"prior": "tv", "weight": 2.0, "bounds": (0.0, None)}),
        (Settings(noise="poisson", background=10.0, gain=2.0), {"noise": "poisson", "background": 10.0, "gain": 2.0}),
    ],
)  # fmt: skip
def test_the_choices_are_those_of_the_library(settings: Settings, options: dict[str, Any]) -> None:
    data = counts(18, 20).astype(np.float32)
    restored = Problem.of(data, PSF, settings).restore((slice(None), slice(None)))
    expected = lsconv.deconvolve(data, PSF, **options)
    same(restored.values, expected.x)
    assert restored.strength == pytest.approx(float(expected.damp), rel=1e-3)
    assert restored.converged


def test_labels_are_missing_pixels_wherever_they_have_fewer_axes() -> None:
    data, mask = counts(2, 18, 20).astype(np.uint16), np.zeros((18, 20), dtype=np.int32)
    mask[4:6, 7] = 3
    data[:, 4:6, 7] = 60000
    problem = Problem.of(data, PSF, Settings(strength=0.2), mask=mask)
    restored = problem.restore(problem.fields()[1])
    same(restored.values, lsconv.deconvolve(data[1], PSF, damp=0.2, observed=mask == 0).x)
    assert restored.values.max() < 1000
    assert restored.evidence is not None
    assert int(torch.isnan(restored.evidence.residual).sum()) == 2


def test_error_bars_are_those_of_the_library_and_one_for_all_colours() -> None:
    data = counts(12, 14).astype(np.float32)
    restored = Problem.of(data, PSF, Settings(strength=0.2, error_bars=True)).restore((slice(None),) * 2)
    expected = lsconv.deconvolve(data, PSF, damp=0.2, error_bars=True).std
    assert restored.std is not None
    assert np.abs(restored.std - expected).max() <= 1e-3 * expected.max()
    colours = Problem.of(counts(12, 14, 3).astype(np.uint8), PSF, Settings(strength=0.2, error_bars=True), colour=True)
    found = colours.restore((slice(None),) * 2).std
    assert found is not None
    assert found.shape == (12, 14)


@pytest.mark.parametrize("factor", [1, 1000])
def test_a_psf_in_grey_levels_is_divided_by_its_sum_without_a_word(factor: int) -> None:
    data = counts(18, 20).astype(np.float32)
    psf = np.round(1e5 * PSF)[None].astype(np.uint32) * factor
    restored = Problem.of(data, psf, Settings(strength=0.2)).restore((slice(None),) * 2)
    assert np.abs(restored.values - lsconv.deconvolve(data, PSF, damp=0.2).x).max() < 0.1
    assert restored.remarks == ()


def test_a_crop_is_a_part_that_is_restored_as_the_whole_is() -> None:
    data = counts(3, 220, 230).astype(np.float32)
    problem = Problem.of(data, PSF, Settings(strength=0.2, boundary="reflect"), mask=np.zeros((220, 230), np.uint8))
    crop, where = problem.cropped((2, 219, 100))
    assert where == (slice(2, 3), slice(60, 220), slice(20, 180))
    assert np.array_equal(crop.data, data[where])
    whole = problem.restore(problem.fields()[2]).values[60:220, 20:180]
    part = crop.restore(crop.fields()[0]).values
    assert np.abs(part - whole)[30:-30, 30:-30].max() < 1e-2 * np.ptp(whole)
    assert crop.settings.boundary == "unknown"


def test_fields_are_read_one_by_one_as_they_are_needed() -> None:
    class Lazy:
        shape, dtype, ndim = (4, 18, 20), np.dtype(np.uint16), 3
        read: list[Any] = []

        def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
            self.read.append(index)
            return counts(18, 20).astype(np.uint16)

    problem = Problem.of(Lazy(), PSF, Settings(strength=0.2))
    problem.restore(problem.fields()[3])
    assert Lazy.read == [(3, slice(None), slice(None))]


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(strength=0.2), Settings(prior="tv", strength=5.0), Settings(noise="poisson"),
     Settings(strength=0.2, nonnegative=True)],
)  # fmt: skip
def test_every_restoration_ends_before_its_next_operation_when_cancelled(settings: Settings) -> None:
    problem = Problem.of(counts(40, 40).astype(np.float32), PSF, settings)
    asked = itertools.count(1)
    for patience in (1, 100):
        asked = itertools.count(1)
        with pytest.raises(CancelledError):
            problem.restore((slice(None),) * 2, lambda: next(asked) >= patience)  # noqa: B023 - called at once
        assert next(asked) == patience + 1


def test_one_field_of_least_squares_asks_every_second_whether_to_go_on() -> None:
    problem = Problem.of(counts(600, 600).astype(np.float32), PSF, Settings())
    asked = [time.thread_time()]
    problem.restore((slice(None),) * 2, lambda: bool(asked.append(time.thread_time())))  # type: ignore[func-returns-value]
    assert asked[-1] - asked[0] > 0.3
    assert np.diff(asked).max() < 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": np.zeros((8, 8)), "psf": VOLUME}, "PSF: has 3 axes, the image 2"),
        ({"data": np.zeros((8, 8)), "psf": np.ones(5)}, r"PSF: an array of shape \(5,\)"),
        ({"data": np.zeros((8, 8)), "psf": np.ones((9, 3)) / 27}, r"its size \(9, 3\) exceeds the image's, \(8, 8\)"),
        ({"data": np.zeros((8, 8)), "psf": PSF[:3, :3], "mask": np.zeros((8, 9))}, r"bad pixels: of shape \(8, 9\)"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(lsconv.ArgumentError, match=said):
        Problem.of(settings=Settings(), **arguments)


@pytest.mark.parametrize("psf", [np.zeros((3, 3)), -np.ones((3, 3)), np.full((3, 3), np.nan)])
def test_a_psf_without_a_sum_is_refused_by_the_solver(psf: np.ndarray[Any, Any]) -> None:
    problem = Problem.of(counts(8, 8).astype(np.float32), psf, Settings(strength=0.2))
    with pytest.raises(lsconv.LsconvError, match="psf"):
        problem.restore((slice(None),) * 2)
