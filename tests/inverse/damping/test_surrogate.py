"""The tapered surrogate against dense algebra where it is exact, and against the exact rules where it approximates."""

from __future__ import annotations

import importlib.resources
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv
from lsconv import psf
from lsconv.inverse.damping.choose_damp import RULES, choose_damp
from lsconv.inverse.damping.surrogate import TaperedPath
from lsconv.operators.base import LinearOperator

DOUBLE = torch.float64


@pytest.mark.parametrize("penalty", [None, "gradient", "laplacian", "stack"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_on_a_circular_convolution_it_is_dense_algebra(penalty: str | None, dilation: int) -> None:
    """Nothing tapers there, and what is left are sums over the frequencies."""
    A = lsconv.Conv2d(
        torch.rand(2, 1, 1, 3, dtype=DOUBLE), (12, 14), padding=(0, dilation), dilation=dilation, groups=2,
        padding_mode="circular",
    )  # fmt: skip
    L: LinearOperator | None = {
        None: lambda: None,
        "gradient": lambda: lsconv.Gradient(A.in_shape, boundary="periodic", dtype=DOUBLE),
        "laplacian": lambda: lsconv.Laplacian(A.in_shape, boundary="periodic", dtype=DOUBLE),
        "stack": lambda: lsconv.vstack(
            [
                lsconv.Gradient(A.in_shape, boundary="periodic", dtype=DOUBLE),
                0.3 * lsconv.Identity(A.in_shape, dtype=DOUBLE),
            ]
        ),
    }[penalty]()
    assert TaperedPath.serves(A, L)
    y = torch.randn(1, *A.out_shape, dtype=DOUBLE)
    y = y - y.mean((-2, -1), keepdim=True)  # which the surrogate leaves out
    path = TaperedPath(A, y, L)
    M, P = A.to_dense(), torch.eye(A.in_numel, dtype=DOUBLE) if L is None else L.to_dense()
    damp = 0.4
    e = path.evaluate(torch.tensor(damp, dtype=DOUBLE), slope=True)

    def dense(mu: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        normal = M.T @ M + mu * P.T @ P
        x = torch.linalg.solve(normal, M.T @ y.flatten())
        trace = torch.trace(torch.linalg.solve(normal, M.T @ M))
        return (M @ x - y.flatten()).square().sum(), (P @ x).square().sum(), trace, torch.linalg.slogdet(normal)[1]

    rss, norm, trace, logdet = dense(damp**2)
    assert path.data_count == A.out_numel
    torch.testing.assert_close(e.residual_norm_sq, rss)
    torch.testing.assert_close(e.penalty_norm_sq, norm)
    torch.testing.assert_close(e.trace, trace)
    step = 1e-5
    slope = (dense(damp**2 + step)[1] - dense(damp**2 - step)[1]) / (2 * step)
    torch.testing.assert_close(e.penalty_slope, slope, rtol=1e-5, atol=0)
    rise = damp**2 * (dense(damp**2 + step)[2] - dense(damp**2 - step)[2]) / (2 * step)
    torch.testing.assert_close(e.trace_slope, rise, rtol=1e-5, atol=0)
    rank = int(torch.linalg.matrix_rank(P))
    torch.testing.assert_close(e.logdet, logdet - rank * math.log(damp**2))


def test_white_noise_keeps_its_energy_under_the_taper() -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 5, 5) / 25, (260, 300))
    path = TaperedPath(A, 0.1 * torch.randn(1, *A.out_shape), None)
    e = path.evaluate(torch.tensor(1e3, dtype=DOUBLE))  # the residual is all of the data
    assert float(e.residual_norm_sq / path.data_count) == pytest.approx(0.01, rel=0.03)


SCENES = {
    "box": (psf.box(7), 0.004),
    "Gaussian": (psf.gaussian(1.5), 0.01),
    "motion": (psf.motion(9, 40), 0.02),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("penalty", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_minimum_of_the_surrogate_is_near_that_of_the_whole_data(scene: str, penalty: bool) -> None:
    image = pytest.importorskip("PIL.Image")
    source = importlib.resources.files("lsconv.app") / "data" / "astronaut-256.png"
    with importlib.resources.as_file(source) as path:
        truth = torch.from_numpy(np.asarray(image.open(path).convert("L"), dtype=np.float64) / 255)[None]
    kernel, noise = SCENES[scene]
    A = lsconv.blur_operator(kernel, tuple(n - k + 1 for n, k in zip(truth.shape[1:], kernel.shape, strict=True)))
    y = (A(truth) + noise * torch.randn(A.out_shape, dtype=DOUBLE)).float()
    A = A.to(dtype=torch.float32)
    L = lsconv.Gradient(A.in_shape) if penalty else None
    prior = torch.full(A.in_shape, float(y.mean()))
    quick = choose_damp(A, y, "gcv", L=L, x_prior=prior, trace="stochastic")
    assert "on a surrogate first" in quick.message
    assert quick.surrogate is not None
    damps, values = quick.surrogate
    near = float(damps[values.argmin()])
    assert near == pytest.approx(float(quick.damp), rel=0.35)
    assert quick.damps.shape[0] <= 4  # looks at the whole are dear
    whole = choose_damp(A, y, "gcv", L=L, x_prior=prior, surrogate=False)
    torch.testing.assert_close(quick.damp, whole.damp, rtol=0.05, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_channels_under_one_kernel_are_chosen_for_together(rule: str) -> None:
    """Equal groups are one group with more data: the exact choice is that of kernels equal to rounding only."""
    weight = torch.rand(1, 1, 3, 3, dtype=DOUBLE).expand(3, 1, 3, 3).contiguous()
    A = lsconv.Conv2d(weight, (12, 13), groups=3)
    B = lsconv.Conv2d(weight * torch.tensor([1, 1, 1 + 1e-13], dtype=DOUBLE).reshape(3, 1, 1, 1), (12, 13), groups=3)
    y = A(torch.randn(2, *A.in_shape, dtype=DOUBLE)) + 0.3 * torch.randn(2, *A.out_shape, dtype=DOUBLE)
    noise = 0.3 if rule in ("upre", "discrepancy") else None
    together, beside = (choose_damp(op, y, rule, noise_std=noise) for op in (A, B))
    torch.testing.assert_close(together.damp, beside.damp, rtol=1e-6, atol=0)
    finite = torch.isfinite(beside.values)
    torch.testing.assert_close(together.values[finite], beside.values[finite], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("penalty", "padding"), [(False, (2, 3, 3)), (True, 0)])
def test_the_minimum_of_the_surrogate_of_a_small_volume_is_within_a_factor_of_four(
    penalty: bool, padding: int | tuple[int, ...]
) -> None:
    """Nearly all of the data of such a volume lie near a face, and few of them read no padding."""
    axes = [torch.exp(-((torch.arange(float(n)) - n // 2) ** 2) / n) for n in (5, 7, 7)]
    kernel = torch.einsum("i,j,k->ijk", *(axis / axis.sum() for axis in axes))[None, None]
    A = lsconv.Conv3d(kernel, (10, 36, 36), padding=padding)
    scene = (torch.nn.functional.avg_pool3d(torch.randn(1, 10, 36, 36), 7, 1, 3) > 0).float()
    y = A(scene) + 0.03 * torch.randn(A.out_shape)
    L = lsconv.Gradient(A.in_shape, ndim=3) if penalty else None
    assert TaperedPath.serves(A, L)
    selection = choose_damp(A, y, "gcv", L=L, trace="stochastic")
    assert selection.surrogate is not None
    damps, values = selection.surrogate
    ratio = float(damps[values.argmin()] / selection.damp)
    assert 1 / 4 < ratio < 4
