"""Exact traces of separable convolutions, from the singular values of their axes."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.inverse.damping.choose_damp import RULES
from lsconv.inverse.damping.decomposed_path import DensePath, SeparablePath
from lsconv.operators.convolution import Convolution

DOUBLE = torch.float64


def operator(groups: int = 1, channels: tuple[int, int] = (1, 1), **options: object) -> Convolution:
    u, v, M = (torch.randn(n, dtype=DOUBLE) for n in (3, 4, 1))
    M = torch.randn(channels[1], channels[0] // groups, dtype=DOUBLE)
    weight = M[:, :, None, None] * torch.outer(u, v)
    return lsconv.Conv2d(weight, (11, 9), groups=groups, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "A",
    [
        operator(),
        operator(padding=2, stride=2),
        operator(padding=1, padding_mode="reflect"),
        operator(channels=(2, 3), padding=(0, 2)),
        operator(groups=2, channels=(4, 2), dilation=2),
        operator(padding=5, stride=3),  # some outputs read nothing
    ],
    ids=["valid", "strided", "reflect", "channels", "grouped", "zero rows"],
)
def test_every_sum_is_that_of_the_dense_decomposition(A: Convolution) -> None:
    y = torch.randn(2, 3, *A.out_shape, dtype=DOUBLE)
    y[0, 1] = A(torch.randn(A.in_shape, dtype=DOUBLE))
    one = torch.ones((), dtype=DOUBLE)
    path, dense = SeparablePath(A, y, one), DensePath(A, y, None, one, one)
    for damp in (1e-3, 0.1, 10.0):
        e, expected = (p.evaluate(torch.tensor([damp, 2 * damp, damp], dtype=DOUBLE)) for p in (path, dense))
        for name in ("residual_norm_sq", "penalty_norm_sq", "trace", "penalty_slope", "trace_slope"):
            torch.testing.assert_close(getattr(e, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        if min(A.in_numel, A.out_numel) == path.w.numel():  # else zeros are counted by the dense one alone
            torch.testing.assert_close(e.logdet, expected.logdet, rtol=1e-9, atol=1e-9)


DEAR = pytest.mark.slow


@pytest.mark.parametrize("rule", ["gcv", *(pytest.param(r, marks=DEAR) for r in RULES if r != "gcv")])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(DOUBLE, marks=DEAR)])
def test_every_rule_is_served_with_exact_traces(rule: str, dtype: torch.dtype) -> None:
    blur = lsconv.psf.gaussian(1.5, size=9).to(dtype)
    A = lsconv.Conv2d(blur[None, None], (150, 140), padding=4)
    truth = torch.rand(1, 15, 14, dtype=dtype).repeat_interleave(10, 1).repeat_interleave(10, 2)
    y = A(truth) + 0.01 * torch.randn(A.out_shape, dtype=dtype)
    noise = 0.01 if rule in ("upre", "discrepancy") else None
    found = lsconv.choose_damp(A, y, rule, noise_std=noise)
    assert "surrogate" not in found.message
    assert rule in ("discrepancy", "lcurve") or "exact traces" in found.message
    assert float(found.trace_error.abs().max()) == 0
    estimated = lsconv.choose_damp(A, y, rule, noise_std=noise, trace="stochastic", surrogate=False)
    torch.testing.assert_close(found.damp, estimated.damp, rtol=0.1, atol=0.0)


def test_the_chosen_damp_is_the_minimum_of_the_exact_criterion() -> None:
    A = lsconv.Conv2d(lsconv.psf.gaussian(2.0, size=13).to(DOUBLE)[None, None], (120, 110))
    y = A(torch.rand(A.in_shape, dtype=DOUBLE)) + 0.003 * torch.randn(A.out_shape, dtype=DOUBLE)
    found = lsconv.choose_damp(A, y)
    path = SeparablePath(A, y[None], torch.tensor(float(A.out_numel), dtype=DOUBLE))

    def gcv(damp: float) -> float:
        e = path.evaluate(torch.tensor(damp, dtype=DOUBLE))
        return float(e.residual_norm_sq / (A.out_numel - e.trace) ** 2)

    best = float(found.damp)
    assert gcv(best) <= min(gcv(0.9 * best), gcv(1.1 * best))
