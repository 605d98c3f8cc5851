"""The inverse of the whole that ranks share: exact for every form of border, here on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.penalty import as_convolutions
from lsconv.tiled.pencil import PencilInverse, pencil_bytes
from lsconv.tiled.ranks import Ranks

F64 = torch.float64
CIRCULAR = {"padding": "same", "padding_mode": "circular"}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64)


def box(*size: int) -> torch.Tensor:
    kernel = torch.ones(1, 1, *size, dtype=F64)
    return kernel / kernel.sum()


@pytest.mark.parametrize(
    "weight, size, options, edge, form",
    [
        (box(5, 5), (24, 21), {}, None, "valid"),
        (box(5, 5), (24, 21), {"padding": "same"}, None, "saddle"),
        (box(5, 4), (21, 24), {"padding": (4, 3)}, None, "full"),
        (box(5, 5), (24, 21), CIRCULAR, None, "circular"),
        (random(3, 2, 3, 3), (20, 19), {}, None, "valid"),
        pytest.param(random(2, 3, 3, 3), (20, 19), {"padding": 1}, None, "saddle", marks=pytest.mark.slow),
        pytest.param(random(4, 2, 3, 3), (20, 19), {"groups": 2}, None, "valid", marks=pytest.mark.slow),
        (box(5, 5), (24, 21), {}, "neumann", "valid"),
        (box(5, 5), (24, 21), {"padding": "same"}, "neumann", "saddle"),
        pytest.param(box(5, 5), (24, 21), CIRCULAR, "periodic", "circular", marks=pytest.mark.slow),
        (box(3, 3, 3), (7, 6, 5), {}, None, "valid"),
        pytest.param(box(3, 3, 3), (7, 9, 8), {"padding": 1}, None, "saddle", marks=pytest.mark.slow),
    ],
)
def test_the_pencil_inverts_the_normal_operator(
    weight: torch.Tensor, size: tuple[int, ...], options: dict[str, Any], edge: str | None, form: str
) -> None:
    A = lsconv.operators.convolution.Convolution(weight, size, **options)
    L = None if edge is None else lsconv.Gradient(A.in_shape, boundary=edge, dtype=F64)
    terms = [] if L is None else as_convolutions(L, A.ndim)
    inverse = PencilInverse(A, terms, 0.05, Ranks(None, A.device))
    assert inverse.form == {"circular": "circulant"}.get(form, form)
    g = random(*A.in_shape)
    D = A.to_dense()
    B = torch.eye(A.in_numel, dtype=F64) if L is None else L.to_dense()
    exact = torch.linalg.solve(D.mT @ D + 0.05**2 * B.mT @ B, g.flatten()).reshape(g.shape)
    assert float(torch.dist(inverse(g, 1e-12), exact) / exact.norm()) < 1e-8
    assert inverse.residual <= 1e-10
    assert pencil_bytes(A, terms, 0.05, 2) < pencil_bytes(A, terms, 0.05, 1)


def test_a_few_iterations_serve_a_kernel_with_zeros_at_a_small_damp() -> None:
    A = lsconv.Conv2d(box(9, 9), (120, 110))
    inverse = PencilInverse(A, [], 1e-3, Ranks(None, A.device))
    inverse(random(*A.in_shape), 1e-4)
    assert 0 < inverse.iterations <= 15


def test_fields_it_does_not_serve_are_known_beforehand() -> None:
    assert pencil_bytes(lsconv.Conv1d(box(5), (40,)), [], 0.1, 2) is None
    reflect = lsconv.Conv2d(box(3, 3), (20, 20), padding=1, padding_mode="reflect")
    assert pencil_bytes(reflect, [], 0.1, 2) is None
    assert pencil_bytes(lsconv.Conv2d(box(3, 3), (20, 20)), [], 0.1, 16) is None  # more ranks than frequencies
