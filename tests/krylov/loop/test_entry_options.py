"""Options that are single numbers are looked at first, by name; missing data stand under a mask."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _reseeded() -> None:
    GENERATOR.manual_seed(0)  # whatever has run before


A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=F64, generator=GENERATOR), in_size=(8, 9), padding=1)
Y = torch.rand(2, 1, 8, 9, dtype=F64, generator=GENERATOR)
FAR = {"rtol": 1e-8}
PSF = torch.full((3, 3), 1 / 9, dtype=F64)
SQUARE = A.H @ A + lsconv.Identity(A.in_shape)

CALLS: dict[str, Callable[..., Any]] = {
    "lstsq": lambda **o: lsconv.lstsq(A, Y, damp=0.3, **o),
    "tikhonov": lambda **o: lsconv.tikhonov(A, Y, 0.3, **o),
    "pinv.solve": lambda **o: lsconv.pinv(A, damp=0.3).solve(Y, **o),
    "total_variation": lambda **o: lsconv.total_variation(A, Y, 0.1, **o),
    "plug_and_play": lambda **o: lsconv.plug_and_play(A, Y, lambda v: v, 0.1, **o),
    "deconvolve": lambda **o: lsconv.deconvolve(Y, PSF, damp=0.3, **o),
    "refine": lambda **o: lsconv.refine(A, Y, damp=0.3, **o),
    **{
        name: lambda name=name, **o: getattr(lsconv, name)(A, Y, **o)
        for name in ("lsmr", "lsqr", "cgls", "craig", "hybrid")
    },
    **{name: lambda name=name, **o: getattr(lsconv, name)(SQUARE, Y, **o) for name in ("cg", "minres", "gmres")},
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    for option in ("rtol", "max_iter"):
        for value in ("1e-3", np.ones(2), torch.ones(2), [1], True, 1j, -1):
            with pytest.raises(lsconv.LsconvError, match=f"^{option}: expected"):
                CALLS[name](**{option: value})
    with pytest.raises(lsconv.LsconvError, match=r"^max_iter: expected an integer >= 0, got 10\.0"):
        CALLS[name](max_iter=10.0)


@pytest.mark.parametrize("value", [np.float64(1e-3), np.float32(1e-3), torch.tensor(1e-3), 1e-3])
def test_numbers_of_every_kind_are_taken(value: Any) -> None:
    expected = lsconv.lsqr(A, Y, damp=0.3, rtol=float(value)).x
    assert torch.equal(lsconv.lsqr(A, Y, damp=0.3, rtol=value, max_iter=np.int64(500)).x, expected)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"background": torch.ones(3, 9), "noise": "poisson"}, "background: .*(does not broadcast|or a map)"),
        ({"background": "dark", "noise": "poisson"}, "background: expected a number"),
        ({"background": -1, "noise": "poisson"}, "background: expected (finite )?numbers >= 0"),
        ({"huber": np.ones(3)}, "huber: expected a single number"),
        ({"huber": torch.inf}, "huber: expected a finite number"),
        ({"bounds": (np.zeros((8, 9)), None)}, "bounds: expected one number or None"),
        ({"bounds": 3}, "bounds: expected"),
        ({"bounds": "ab"}, "bounds: expected"),
        ({"bounds": (1, 0)}, "bounds: the lowest"),
        ({"noise": "other"}, "noise: expected"),
    ],
)
def test_total_variation_refuses_at_once(options: dict[str, Any], text: str) -> None:
    image = torch.rand(300, 300, dtype=F64)
    start = time.perf_counter()
    with pytest.raises(lsconv.LsconvError, match=f"^{text}"):
        lsconv.deconvolve(image, PSF, prior="tv", **options)
    refused = time.perf_counter() - start
    with pytest.raises(lsconv.LsconvError, match=f"^{text}"):
        lsconv.total_variation(A, Y, 0.1, **options)
    assert refused < 1  # the weight takes longer to find


def test_counts_below_zero_are_refused_before_the_weight_is_sought() -> None:
    image = torch.rand(300, 300, dtype=F64) - 0.5
    start = time.perf_counter()
    with pytest.raises(lsconv.LsconvError, match=r"^image: counts must be >= 0 .*background="):
        lsconv.deconvolve(image, PSF, prior="tv", noise="poisson")
    assert time.perf_counter() - start < 1
    with pytest.raises(lsconv.LsconvError, match=r"^y: counts must be >= 0"):
        lsconv.total_variation(A, -Y, 0.1, noise="poisson")
    with pytest.raises(lsconv.LsconvError, match=r"^colour: total variation takes no such option"):
        lsconv.deconvolve(image, PSF, prior="tv", colour=True)


# ---------------------------------------------------------------------------------------------- missing data

KEEP = torch.rand(A.out_shape, generator=GENERATOR) > 0.2
MASKED: dict[str, tuple[lsconv.LinearOperator, Callable[[Tensor], Tensor]]] = {
    "mask": (lsconv.Mask(KEEP) @ A, lambda y: y),
    "diagonal": (lsconv.Diagonal(KEEP.to(F64)) @ A, lambda y: y),
    "scaled": (2 * (lsconv.Mask(KEEP) @ A), lambda y: y),
    "stacked": (lsconv.vstack([lsconv.Mask(KEEP) @ A, lsconv.Gradient(A.in_shape)]), lambda y: _joined(y)),
}


def _joined(y: Tensor) -> Tensor:
    return torch.cat([y.flatten(1), torch.zeros(2, 2 * 72, dtype=F64)], 1)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("under", [torch.nan, torch.inf, 1e30])
def test_what_stands_under_a_mask_does_not_count(name: str, under: float) -> None:
    B, data = MASKED[name]
    zeros, garbage = data(torch.where(KEEP, Y, 0)), data(torch.where(KEEP, Y, under))
    for solve in (
        lambda y: lsconv.lstsq(B, y, damp=0.3, **FAR),
        lambda y: lsconv.tikhonov(B, y, 0.3, L=lsconv.Gradient(A.in_shape), **FAR),
        lambda y: lsconv.tikhonov(B, y, 0.3, check_finite=False, **FAR),
        lambda y: lsconv.lsqr(B, y, damp=0.3, **FAR),
        lambda y: lsconv.pinv(B, damp=0.3).solve(y, **FAR),
    ):
        found, expected = solve(garbage), solve(zeros)
        assert torch.equal(found.x, expected.x)
        assert bool(found.converged.all())
        assert torch.equal(found.residual_norm, expected.residual_norm)
    with warnings.catch_warnings():  # LSMR may miss its default tolerance by a hair, of both
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        assert torch.equal(lsconv.pinv(B, damp=0.3)(garbage), lsconv.pinv(B, damp=0.3)(zeros))


def test_damps_are_chosen_without_what_stands_under_a_mask() -> None:
    B, y = lsconv.Mask(KEEP) @ A, Y[0]
    found = [lsconv.choose_damp(B, torch.where(KEEP, y, under), "lcurve").damp for under in (torch.nan, 0)]
    assert torch.equal(*found)


def test_gradients_do_not_see_what_is_missing() -> None:
    kernel = A.weight.clone().requires_grad_()
    grads = []
    for under in (0.0, torch.nan):
        y = torch.where(KEEP, Y, under).requires_grad_()
        B = lsconv.Mask(KEEP) @ lsconv.Conv2d(kernel, in_size=(8, 9), padding=1)
        x = lsconv.lstsq(B, y, damp=0.3).x
        grads.append(torch.autograd.grad((x**2).sum(), (kernel, y)))
    for zeros, nans in zip(*grads, strict=True):
        assert torch.equal(zeros, nans)
    assert not bool(grads[1][1][:, ~KEEP].any())


def test_data_that_are_seen_must_be_finite_all_the_same() -> None:
    y = Y.clone()
    y[0][KEEP] = torch.nan
    with pytest.raises(lsconv.LsconvError, match="y: contains NaN or infinity in batch item"):
        lsconv.lstsq(lsconv.Mask(KEEP) @ A, y, damp=0.3)


def test_missing_pixels_are_counted_and_the_way_through_a_mask_works() -> None:
    size = (16, 17)
    truth = torch.rand(1, 18, 19, dtype=F64, generator=GENERATOR)
    blur = lsconv.blur_operator(PSF, size)
    image = blur(truth)[0]
    holes = image.clone()
    holes[3, 4] = torch.nan
    masked = np.ma.masked_invalid(holes.numpy())
    for given in (holes, masked):
        with pytest.warns(lsconv.InputWarning, match="^image: 1 of 272 pixels are NaN or masked and count as missing"):
            lsconv.deconvolve(given, PSF, damp=0.1)
    with pytest.raises(lsconv.LsconvError, match=r"^y: .*Mask\(~mask\) @ A"):
        lsconv.lstsq(blur, masked[None], damp=0.1)
    whole = np.ma.masked_array(image.numpy())
    assert np.array_equal(lsconv.deconvolve(whole, PSF, damp=0.1).x, lsconv.deconvolve(image.numpy(), PSF, damp=0.1).x)
    solution = lsconv.tikhonov(
        lsconv.Mask(holes.isfinite()[None]) @ blur, holes[None], 1e-2, L=lsconv.Gradient(blur.in_shape), **FAR
    )
    assert bool(solution.converged)
    assert bool((blur(solution.x)[0] - image).abs().max() < 0.1)
