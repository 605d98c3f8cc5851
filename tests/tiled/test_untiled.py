"""The untiled solve: the dense answer, whatever the border, and an estimate of its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.penalty import as_convolutions
from lsconv.tiled.field import Field
from lsconv.tiled.ranks import Ranks
from lsconv.tiled.untiled import UntiledPlan, untiled_bytes

F64 = torch.float64
DAMP = 0.1


@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"padding": 1, "padding_mode": "circular"}])
@pytest.mark.parametrize("penalised", [False, True])
def test_rows_of_the_answer_are_those_of_the_dense_one(options: dict[str, Any], penalised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    A = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=F64, generator=generator), (9, 8), **options)
    edge = "periodic" if options.get("padding_mode") else "neumann"
    L = lsconv.Gradient(A.in_shape, boundary=edge, dtype=F64) if penalised else None
    terms = [] if L is None else as_convolutions(L, A.ndim) or []
    y = torch.randn(A.out_shape, dtype=F64, generator=generator)
    plan = UntiledPlan(A, terms, L, DAMP, 2**30)
    ranks, x = Ranks(None, A.device), torch.zeros(A.in_shape, dtype=F64)
    answer, data = (
        Field(values, size, channels=True, wraps=(False, False), first=0, device=A.device)
        for values, size in ((x, A.spatial_in), (y, A.spatial_out))
    )
    plan.write(ranks, data, answer, 1e-8)
    D = A.to_dense()
    B = torch.eye(A.in_numel, dtype=F64) if L is None else L.to_dense()
    exact = torch.linalg.solve(D.mT @ D + DAMP**2 * B.mT @ B, D.mT @ y.flatten()).reshape(A.in_shape)
    torch.testing.assert_close(answer.read((0, 0), A.spatial_in, F64), exact, rtol=1e-8, atol=1e-9)


def test_the_estimate_grows_with_the_field_and_the_kernel() -> None:
    small, large, wide = (
        untiled_bytes(lsconv.Conv2d(torch.ones(1, 1, k, k), (n, n)), [], DAMP) for n, k in ((32, 3), (64, 3), (64, 9))
    )
    assert 0 < small < large < wide
