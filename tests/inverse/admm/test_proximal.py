"""Proximal steps and Fenchel-Young gaps of the convex terms, by minimisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.inverse.admm.proximal import Term, gaussian_term, poisson_term, sparsity_term
from tests.inverse.admm.denoising import DOUBLE


def term_of(kind: str, L: lsconv.Identity, data: Tensor) -> Term:
    weight = torch.tensor(0.7, dtype=DOUBLE)
    return {
        "gaussian": gaussian_term(L, data),
        "sparsity": sparsity_term(L, weight, (0,)),
        "huber": sparsity_term(L, weight, (0,), 0.5),
        "poisson": poisson_term(L, data, 0.3),
    }[kind]


@pytest.mark.parametrize("kind", ["sparsity", "huber", "poisson"])
def test_fenchel_young_gaps_are_never_negative_and_vanish_at_the_subgradient(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    L = lsconv.Identity((2, 1, 4, 4), dtype=DOUBLE)
    counts = torch.poisson(3 * torch.rand(L.out_shape, dtype=DOUBLE, generator=generator))
    term = term_of(kind, L, counts)
    v = torch.rand(L.out_shape, dtype=DOUBLE, generator=generator).requires_grad_()
    (subgradient,) = torch.autograd.grad(term.value(v), v)
    assert float(term.gap(v.detach(), term.dual(subgradient, v.detach()))) == pytest.approx(0, abs=1e-12)
    for _ in range(20):
        p = term.dual(torch.randn(L.out_shape, dtype=DOUBLE, generator=generator), v.detach())
        assert float(term.gap(v.detach(), p)) > 1e-3


@pytest.mark.parametrize("kind", ["gaussian", "sparsity", "huber", "poisson"])
def test_proximal_steps_minimise(kind: str) -> None:
    generator = torch.Generator().manual_seed(2)
    L = lsconv.Identity((2, 1, 3, 3), dtype=DOUBLE)
    data = torch.poisson(3 * torch.rand(L.out_shape, dtype=DOUBLE, generator=generator))
    term = term_of(kind, L, data)
    v = torch.randn(L.out_shape, dtype=DOUBLE, generator=generator)
    rho = torch.tensor(1.3, dtype=DOUBLE)
    z = torch.empty_like(v)
    term.prox(v, rho.reshape(1, 1, 1, 1), z)

    def value(z: Tensor) -> float:
        return float(term.value(z) + rho / 2 * (z - v).square().sum())

    for _ in range(50):
        other = z + 10 ** float(-4 * torch.rand((), generator=generator)) * torch.randn(
            v.shape, dtype=DOUBLE, generator=generator
        )
        assert (kind == "poisson" and bool((other < -0.3).any())) or value(other) > value(z)
