"""The quadratic step in the operators themselves, against the dense normal equations."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.inverse.admm.operator_step import NormalStep
from lsconv.inverse.admm.proximal import gaussian_term, sparsity_term

F64 = torch.float64


def convolution(mode: str) -> lsconv.Convolution:
    weight = torch.rand(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    return lsconv.Conv2d(weight, (6, 7), padding=1, padding_mode=mode)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])  # through the border, and by conjugate gradients
def test_repeated_steps_lead_to_the_minimiser(mode: str) -> None:
    A = convolution(mode)
    L = lsconv.Gradient(A.in_shape, ndim=2, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    y, r = (torch.randn(shape, dtype=F64, generator=generator) for shape in (A.out_shape, L.out_shape))
    rho = torch.tensor(0.7, dtype=F64)
    step = NormalStep(A, y, [sparsity_term(L, torch.tensor(1.0, dtype=F64))], torch.zeros(A.in_shape, dtype=F64))
    step.set_penalties([rho])
    for _ in range(8):
        images = step.step([r], 1.0)
    D, G = A.to_dense(), L.to_dense()
    exact = torch.linalg.solve(D.mT @ D + rho * G.mT @ G, D.mT @ y.flatten() + 2 * rho * G.mT @ r.flatten())
    torch.testing.assert_close(step.x.flatten(), exact, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(images[0].flatten(), G @ exact, rtol=1e-6, atol=1e-6)


def test_without_a_data_term_every_image_has_a_penalty_of_its_own() -> None:
    A = convolution("zeros")
    identity = lsconv.Identity(A.in_shape, dtype=F64)
    generator = torch.Generator().manual_seed(2)
    y = torch.randn(A.out_shape, dtype=F64, generator=generator)
    terms = [gaussian_term(A, y), sparsity_term(identity, torch.tensor(1.0, dtype=F64))]
    step = NormalStep(None, None, terms, torch.zeros(A.in_shape, dtype=F64))
    assert not step.one_penalty
    rho = [torch.tensor(value, dtype=F64) for value in (0.5, 2.0)]
    step.set_penalties(rho)
    reflected = [torch.randn(shape, dtype=F64, generator=generator) for shape in (A.out_shape, A.in_shape)]
    for _ in range(12):
        step.step(reflected, 1.0)
    D, eye = A.to_dense(), torch.eye(A.in_numel, dtype=F64)
    right = 2 * rho[0] * D.mT @ reflected[0].flatten() + 2 * rho[1] * reflected[1].flatten()
    exact = torch.linalg.solve(rho[0] * D.mT @ D + rho[1] * eye, right)
    torch.testing.assert_close(step.x.flatten(), exact, rtol=1e-8, atol=1e-9)
