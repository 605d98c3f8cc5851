"""The additive Schwarz preconditioner: Hermitian, exact for one tile, and near the inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import MethodError
from lsconv.tiled.schwarz import SchwarzInverse
from tests.tiled.varying import F64, blur, field, matrix


@pytest.mark.parametrize("padding, mode", [(0, "zeros"), ("same", "zeros"), ("same", "circular"), ("same", "reflect")])
def test_one_kernel_in_one_tile_is_the_inverse(padding: Any, mode: str) -> None:
    A = lsconv.VaryingConvolution(
        blur(1.0)[None], torch.ones(1, *((14, 14) if padding == 0 else (20, 20)), dtype=F64), (20, 20),
        padding=padding, padding_mode=mode,
    )  # fmt: skip
    damp = torch.tensor(0.2, dtype=F64)
    D = A.to_dense()
    exact = torch.linalg.inv(D.mT @ D + damp**2 * torch.eye(400, dtype=F64))
    found = matrix(SchwarzInverse(A, damp, core=(20, 20)))
    assert float(torch.dist(found, exact) / exact.norm()) < 1e-5  # factors are in float32


@pytest.mark.parametrize(
    "padding, mode, most",
    [
        (0, "zeros", 4.0),
        ("same", "circular", 12.0),
        *(pytest.param("same", mode, 4.0, marks=pytest.mark.slow) for mode in ("zeros", "reflect")),
    ],
)
@pytest.mark.parametrize("with_penalty", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tiles_are_near_the_inverse(padding: Any, mode: str, most: float, with_penalty: bool) -> None:
    """The condition number of the preconditioned operator, that of the operator itself being in the hundreds."""
    A, damp = field(32, padding, mode), torch.tensor(0.05, dtype=F64)
    if with_penalty and mode == "reflect":
        with pytest.raises(MethodError, match="one grid"):
            SchwarzInverse(A, damp, lsconv.Gradient(A.in_shape).to(dtype=F64), core=(11, 11))
        return
    boundary = "periodic" if mode == "circular" else "neumann"
    L = lsconv.Gradient(A.in_shape, boundary=boundary).to(dtype=F64) if with_penalty else None
    M = SchwarzInverse(A, damp, L, core=(11, 11))
    assert len(M.layout.tiles) == 9
    D, B = A.to_dense(), torch.eye(1024, dtype=F64) if L is None else L.to_dense()
    normal, P = D.mT @ D + damp**2 * B.mT @ B, matrix(M)
    torch.testing.assert_close(P, P.mT, rtol=1e-3, atol=1e-3 * float(P.abs().max()))
    root = torch.linalg.cholesky(normal)
    values = torch.linalg.eigvalsh(root.mT @ ((P + P.mT) / 2) @ root)
    assert float(values[-1] / values[0]) < most
    own = torch.linalg.eigvalsh(normal)
    assert float(own[-1] / own[0]) > 30 * most / 4
