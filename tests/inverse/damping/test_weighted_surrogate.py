"""The damp of weighted data against the curve of the dense matrices, and their surrogate where it is a known one."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse.damping.choose_damp import choose_damp
from lsconv.inverse.damping.decomposed_path import DensePath
from lsconv.inverse.damping.rules import Criterion
from lsconv.inverse.damping.surrogate import TaperedPath
from lsconv.inverse.damping.weighted_surrogate import (
    WeightedTaperedPath,
    constant_weight_in_kernel,
    weighted_convolution,
)
from lsconv.operators.convolution import Convolution

DOUBLE = torch.float64


def blur(size: tuple[int, int]) -> Convolution:
    g = torch.exp(-torch.arange(-2.0, 3.0, dtype=DOUBLE).square() / 2)
    return lsconv.blur_operator(torch.outer(g, g) / g.sum() ** 2, size)


def deviation(kind: str, shape: tuple[int, ...]) -> Tensor:
    column = torch.arange(shape[-1], dtype=DOUBLE).expand(shape)
    if kind == "two levels":
        return torch.where(column < shape[-1] // 2, 0.01, 0.1).to(DOUBLE)
    if kind == "ramp":
        return 0.01 * 10 ** (column / shape[-1])
    return 0.005 + 0.1 * torch.rand(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rule", "penalised"),
    [  # every pair of two of them
        ("ramp", "gcv", False), ("ramp", "upre", True), ("two levels", "gcv", True),
        ("two levels", "upre", False), ("random", "gcv", False), ("random", "upre", True),
    ],
)  # fmt: skip
def test_the_damp_of_weighted_data_is_within_a_hundredth_of_the_least_criterion(
    kind: str, rule: str, penalised: bool
) -> None:
    A = blur((26, 24))
    x = torch.zeros(A.in_shape, dtype=DOUBLE)
    x[..., 6:16, 5:18] = 1
    x[..., 18:, 10:] += 0.5
    std = deviation(kind, A.out_shape)
    y = A(x) + std * torch.randn(A.out_shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=DOUBLE) if penalised else None
    noise = {"noise_std": 1.0} if rule == "upre" else {}
    chosen = choose_damp(A, y, rule, L=L, weights=std**-2, trace="stochastic", **noise)
    assert "searched on a surrogate first" in chosen.message

    B = lsconv.Diagonal(1 / std) @ A
    scale = torch.tensor(100.0, dtype=DOUBLE)
    dense = DensePath(B, (y / std)[None], L, scale, torch.tensor(float(A.out_numel), dtype=DOUBLE))
    criterion = Criterion(rule, torch.ones((), dtype=DOUBLE), 0)

    def value(damp: Tensor) -> float:
        return float(criterion(dense.evaluate(damp), damp.log(), dense.data_count)[0])

    least = min(value(damp) for damp in scale * torch.logspace(-5, 1, 241, dtype=DOUBLE))
    assert value(chosen.damp) < 1.01 * least


@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_the_likeness_of_equal_weights_is_that_of_the_convolution(penalised: bool, mode: str) -> None:
    size = (18, 18) if mode == "zeros" else (16, 16)  # what reads no padding is a good length for transforms
    A = lsconv.Conv2d(
        torch.rand(2, 1, 3, 3, dtype=DOUBLE), in_size=size, padding=1, padding_mode=mode, groups=2
    )  # fmt: skip
    y = 3 * A(torch.rand(2, 4, *A.in_shape, dtype=DOUBLE))
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=DOUBLE) if penalised else None
    path = WeightedTaperedPath(A, torch.full(A.out_shape, 3.0, dtype=DOUBLE), y, L)
    known = TaperedPath(A.with_parameters([3 * A.weight.detach()]), y, L, determinant=False)
    assert torch.equal(torch.as_tensor(path.data_count, dtype=DOUBLE), torch.as_tensor(known.data_count, dtype=DOUBLE))
    damp = torch.tensor([0.3], dtype=DOUBLE)
    found, wanted = (p.evaluate(damp, slope=True) for p in (path, known))
    for field in fields(found):
        torch.testing.assert_close(getattr(found, field.name), getattr(wanted, field.name), equal_nan=True)


def test_the_slopes_of_the_surrogate_are_those_of_its_values() -> None:
    A = blur((26, 24))
    y = A(torch.rand(A.in_shape, dtype=DOUBLE))[None]
    path = WeightedTaperedPath(A, 1 / deviation("random", A.out_shape), y, None)
    t = torch.tensor(1.0, dtype=DOUBLE)
    before, at, after = (path.evaluate((t + step).exp(), slope=True) for step in (-1e-4, 0.0, 1e-4))
    mu = (2 * t).exp()
    torch.testing.assert_close((after.trace - before.trace) / 4e-4, at.trace_slope, rtol=1e-5, atol=0)
    residual = (after.residual_norm_sq - before.residual_norm_sq) / 4e-4
    torch.testing.assert_close(residual, -mu.square() * at.penalty_slope, rtol=1e-5, atol=0)


def test_one_weight_for_all_data_is_moved_into_the_kernel() -> None:
    A = blur((20, 20))
    one = torch.full((3, *A.out_shape), 2.0, dtype=DOUBLE) * torch.arange(1, 4)[:, None, None, None]
    B = lsconv.Diagonal(one, 1) @ A
    scaled = constant_weight_in_kernel(B)
    x = torch.rand(3, *A.in_shape, dtype=DOUBLE)
    assert isinstance(scaled, Convolution)
    torch.testing.assert_close(scaled(x), B(x))
    one[..., 3, 4] = 0
    B = lsconv.Diagonal(one, 1) @ A
    scaled = constant_weight_in_kernel(B)
    split = weighted_convolution(scaled)
    assert split is not None
    assert split[0].unique().tolist() == [0, 1]
    torch.testing.assert_close(scaled(x), B(x))
    one[..., 3, 4] = 1
    B = lsconv.Diagonal(one, 1) @ A
    assert constant_weight_in_kernel(B) is B
