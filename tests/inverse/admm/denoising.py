"""A small problem of total variation, its optimum by another method, and its certificate."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import lsconv
from lsconv.inverse.admm.optimality import optimality
from lsconv.inverse.admm.proximal import Term, gaussian_term, sparsity_term

DOUBLE = torch.float64


WEIGHT = 0.05


def problem() -> tuple[lsconv.Convolution, Tensor]:
    generator = torch.Generator().manual_seed(5)
    A = lsconv.Conv2d(torch.rand(1, 1, 3, 3, dtype=DOUBLE, generator=generator) / 5, (8, 9))
    x = torch.zeros(1, 8, 9, dtype=DOUBLE)
    x[:, 2:6, 3:7] = 1
    return A, A(x) + 0.03 * torch.randn(A.out_shape, dtype=DOUBLE, generator=generator)


def total_variation_terms(A: lsconv.Convolution, y: Tensor, huber: float = 0.0) -> list[Term]:
    weight = torch.tensor(WEIGHT, dtype=DOUBLE)
    return [gaussian_term(A, y), sparsity_term(lsconv.Gradient(A.in_shape, dtype=DOUBLE), weight, (0, 1), huber)]


@functools.cache
def optimum(steps: int = 6000) -> tuple[Tensor, Tensor]:
    """The minimiser and the dual variable of the differences, by the method of Chambolle and Pock on matrices."""
    A, y = problem()
    matrix, G = A.to_dense(), lsconv.Gradient(A.in_shape, dtype=DOUBLE).to_dense()
    step = 0.99 / torch.linalg.matrix_norm(torch.cat([matrix, G]), 2)
    x = bar = torch.zeros(A.in_numel, dtype=DOUBLE)
    p, q = torch.zeros(A.out_numel, dtype=DOUBLE), torch.zeros(2 * A.in_numel, dtype=DOUBLE)
    for _ in range(steps):
        p = (p + step * (matrix @ bar - y.flatten())) / (1 + step)
        q = (q + step * (G @ bar)).reshape(2, -1)
        q = (q / (q.norm(dim=0) / WEIGHT).clamp_min(1)).flatten()
        new = x - step * (matrix.mT @ p + G.mT @ q)
        bar, x = 2 * new - x, new
    return x.reshape(A.in_shape), q.reshape(2, *A.in_shape)


def objective(A: lsconv.Convolution, y: Tensor, x: Tensor) -> float:
    gradient = lsconv.Gradient(A.in_shape, dtype=DOUBLE)(x)
    return float(0.5 * (A(x) - y).square().sum() + WEIGHT * torch.linalg.vector_norm(gradient, dim=0).sum())


def certificate(A: lsconv.Convolution, y: Tensor, x: Tensor, q: Tensor, bounds=None):
    return optimality(
        total_variation_terms(A, y), [torch.zeros_like(y), q], x, bounds=bounds, norms=[1.0, 3.0], rounding=1e-16
    )
