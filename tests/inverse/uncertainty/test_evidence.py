"""The evidence against the densities of dense Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import lsconv
from lsconv import Conv2d, Gradient, log_evidence

DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("penalty", [False, True])
def test_the_evidence_is_the_density_of_the_data(padding: int, penalty: bool) -> None:
    A, sigma, damp = Conv2d(randn(2, 1, 3, 3), (6, 5), padding=padding), 0.3, 0.7
    L = Gradient(A.in_shape, boundary="dirichlet", dtype=DOUBLE) if penalty else None
    P = L.to_dense() if L is not None else torch.eye(30, dtype=DOUBLE)
    M, prior, y = A.to_dense(), randn(*A.in_shape, seed=1), randn(4, *A.out_shape, seed=2)
    C = sigma**2 * torch.eye(A.out_numel, dtype=DOUBLE) + (sigma / damp) ** 2 * M @ torch.linalg.solve(P.T @ P, M.T)
    expected = MultivariateNormal(M @ prior.flatten(), C).log_prob(y.flatten(1)) - torch.logdet(P.T @ P) / 2
    found = log_evidence(A, y, damp, noise_std=sigma, L=L, x_prior=prior, exact=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def test_data_that_are_not_measured_do_not_count() -> None:
    A0 = Conv2d(randn(1, 1, 3, 3), (6, 5), padding=1)
    mask = torch.rand(A0.out_shape, generator=torch.Generator().manual_seed(0)) < 0.7
    y = torch.where(mask, randn(*A0.out_shape, seed=1), torch.nan)
    rows = A0.to_dense()[mask.flatten()]
    C = 0.09 * torch.eye(len(rows), dtype=DOUBLE) + 0.09 / 0.49 * rows @ rows.T
    expected = MultivariateNormal(torch.zeros(len(rows), dtype=DOUBLE), C).log_prob(y[mask])
    torch.testing.assert_close(
        log_evidence(lsconv.Mask(mask) @ A0, y, 0.7, noise_std=0.3), expected, rtol=1e-10, atol=0
    )


def test_the_evidence_of_a_singular_penalty_is_the_limit_of_wide_priors() -> None:
    A, sigma, damp, wide = Conv2d(randn(1, 1, 3, 3), (6, 5)), 0.3, 0.7, 1e-5
    L = Gradient(A.in_shape, dtype=DOUBLE)
    constant = torch.full((1, 30), 30**-0.5, dtype=DOUBLE)
    P = torch.cat([L.to_dense(), wide * constant])
    M, y = A.to_dense(), randn(*A.out_shape, seed=1)
    C = sigma**2 * torch.eye(A.out_numel, dtype=DOUBLE) + (sigma / damp) ** 2 * M @ torch.linalg.solve(P.T @ P, M.T)
    flat = math.log(2 * math.pi * sigma**2 / (damp * wide) ** 2) / 2  # the density of the constant, which has none
    positive = torch.linalg.eigvalsh(L.to_dense().T @ L.to_dense())[1:].log().sum()
    expected = MultivariateNormal(torch.zeros(A.out_numel, dtype=DOUBLE), C).log_prob(y.flatten()) + flat - positive / 2
    torch.testing.assert_close(log_evidence(A, y, damp, noise_std=sigma, L=L), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("penalty", [False, True])
def test_the_evidence_has_its_maximum_at_the_damp_of_the_rule(penalty: bool) -> None:
    A = Conv2d(torch.rand(1, 1, 3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)), (16, 16))
    x = randn(1, 16, 16).cumsum(-1).cumsum(-2) / 10 if penalty else randn(1, 16, 16)
    y = A(x) + 0.1 * randn(*A.out_shape, seed=1)
    L = Gradient(A.in_shape, dtype=DOUBLE) if penalty else None
    chosen = lsconv.choose_damp(A, y, "evidence", L=L).damp
    around = chosen * torch.tensor([0.9, 1.0, 1.1], dtype=DOUBLE)
    below, best, above = log_evidence(A, y.expand(3, *A.out_shape), around, L=L)
    assert best > max(below, above)
    damp = chosen.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_evidence(A, y, damp, L=L), damp)
    assert abs(float(slope * damp.detach())) < 0.1  # nats per unit of log damp


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_derivatives_of_the_evidence_are_those_of_finite_differences(penalty: bool) -> None:
    weight, damp = randn(1, 1, 3, 2).requires_grad_(), torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    sigma, y = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True), randn(1, 4, 5, seed=1).requires_grad_()

    def value(weight: Tensor, damp: Tensor, y: Tensor, sigma: Tensor | None = None) -> Tensor:
        A = Conv2d(weight, (6, 6))
        L = Gradient(A.in_shape, dtype=DOUBLE) if penalty else None
        return log_evidence(A, y, damp, noise_std=sigma, L=L)

    assert torch.autograd.gradcheck(value, (weight, damp, y, sigma), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradcheck(value, (weight, damp, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (weight, damp, y), atol=1e-4, fast_mode=True)


def test_complex_data_and_nothing_left_are_refused() -> None:
    A = Conv2d(randn(1, 1, 3, 3), (3, 3))
    with pytest.raises(lsconv.errors.DtypeError, match="real"):
        log_evidence(A, torch.zeros(1, 1, 1, dtype=torch.complex128), 1.0)
    with pytest.raises(lsconv.errors.ArgumentError, match="none"):
        log_evidence(A, torch.zeros(1, 1, 1, dtype=DOUBLE), 1.0, L=Gradient((1, 3, 3), boundary="periodic"))
    with pytest.raises(lsconv.errors.ArgumentError, match="noise_std"):
        log_evidence(A, torch.zeros(1, 1, 1, dtype=DOUBLE), 1.0, noise_std=0.0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"noise_std": -1.0}, "noise_std"),
        ({"noise_std": torch.ones(1, 6, 6)}, r"Diagonal\(1 / noise_std\)"),
        ({"damp": "gcv"}, "damp: .*choose_damp"),
        ({"damp": 0.0}, "damp"),
        ({"y": torch.zeros(1, 6, 6, dtype=torch.float64)}, "fitted exactly"),
        ({"y": torch.full((1, 6, 6), torch.nan, dtype=torch.float64)}, "y"),
        ({"y": np.ones((1, 6, 6))}, "from_numpy"),
        ({"L": "gradient"}, "L: expected"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], names: str) -> None:
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=torch.float64), (8, 8))
    given = {"y": torch.randn(A.out_shape, dtype=torch.float64), "damp": 0.1, **change}
    with pytest.raises(lsconv.LsconvError, match=names):
        lsconv.log_evidence(A, given.pop("y"), given.pop("damp"), **given)


def test_a_kernel_in_place_of_an_operator_is_told_where_it_goes() -> None:
    with pytest.raises(lsconv.ShapeError, match=r"lsconv.Conv2d\(A, in_size"):
        lsconv.lstsq(torch.rand(1, 1, 3, 3), torch.randn(1, 6, 6))
