"""The additive Schwarz preconditioner: a partition of unity, Hermitian, exact for one tile, and near the inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import MethodError
from lsconv.tiled.schwarz import SchwarzInverse

F64 = torch.float64


def blur(sigma: float, size: int = 7) -> torch.Tensor:
    profile = torch.exp(-0.5 * ((torch.arange(size, dtype=F64) - size // 2) / sigma) ** 2)
    return profile[:, None] * profile / profile.sum() ** 2


def field(n: int, padding: Any = 0, mode: str = "zeros", **options: Any) -> lsconv.VaryingConvolution:
    """A blur that grows across the field."""
    kernels = torch.stack([blur(0.7), blur(0.9), blur(0.9), blur(1.2)])
    positions = [(n / 4, n / 4), (n / 4, 3 * n / 4), (3 * n / 4, n / 4), (3 * n / 4, 3 * n / 4)]
    return lsconv.VaryingConvolution.from_grid(
        kernels, positions, (n, n), padding=padding, padding_mode=mode, **options
    )


def matrix(M: SchwarzInverse) -> torch.Tensor:
    """The matrix of the preconditioner."""
    n = M.A.in_numel
    rows = M(torch.eye(n, dtype=F64).reshape(n, *M.A.in_shape), 1e-8)[0]
    return rows.reshape(n, n).mT


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


def test_squares_of_the_windows_sum_to_one() -> None:
    for mode, padding in (("zeros", 0), ("circular", "same")):
        M = SchwarzInverse(field(41, padding, mode), torch.tensor(0.1, dtype=F64), core=(13, 13))
        ones = torch.ones(1, 41, 41, dtype=F64)
        total = torch.zeros_like(ones)
        for group in M.groups:
            for start, window in zip(group.starts.tolist(), group.windows, strict=True):
                for i, j in ((i, j) for i in range(window.shape[1]) for j in range(window.shape[2])):
                    margin = M.layout.axes[0].margin
                    total[0, (start[0] + i - margin) % 41, (start[1] + j - margin) % 41] += window[0, i, j] ** 2
        torch.testing.assert_close(total, ones)


def test_the_damping_is_raised_where_zeros_of_the_transfer_function_move() -> None:
    kernels = torch.zeros(2, 9, 9, dtype=F64)
    kernels[0, 4], kernels[1, :, 4] = 1 / 9, 1 / 9
    A = lsconv.VaryingConvolution.from_grid(kernels, [(0.0, 10.0), (0.0, 54.0)], (64, 64))
    for damp, raised in ((1e-3, True), (1.0, False)):
        M = SchwarzInverse(A, torch.tensor(damp, dtype=F64), core=(32, 32))
        assert (M.local.factor > 10) == raised


def test_tiles_that_do_not_pay_are_refused() -> None:
    A = field(40)
    with pytest.raises(MethodError, match="LSMR should take less time"):
        SchwarzInverse(A, torch.tensor(10.0, dtype=F64), refuse_if_slower=True)
    with pytest.raises(MethodError, match="made of convolutions"):
        SchwarzInverse(A, torch.tensor(0.1, dtype=F64), lsconv.Diagonal(torch.ones(A.in_shape, dtype=F64)))
