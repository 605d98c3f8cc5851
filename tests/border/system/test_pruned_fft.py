"""The product on the border by transforms of its rows and columns, against transforms of the grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.border.border_set import Border
from lsconv.border.system import pruned_fft
from lsconv.border.system.pruned_fft import PrunedProduct
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, symbol

pytestmark = pytest.mark.usefixtures("iterated")

F64 = torch.float64


def convolution(dtype: torch.dtype, size: tuple[int, int], kernel: int = 3, **options: Any) -> lsconv.Conv2d:
    groups, channels, batch = options.get("groups", 1), options.pop("channels", 5), options.pop("batch", ())
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*batch, groups * channels, channels, kernel, kernel, generator=generator, dtype=dtype)
    return lsconv.Conv2d(weight, size, **options)


def saddle(A: lsconv.Conv2d) -> tuple[FrequencyMatrices, Border]:
    """A Hermitian operator between all channels of A, and the border of its outputs and its inputs."""
    embedding = Embedding(A)
    S = symbol(A, embedding).matrices
    rows, columns = S.shape[-2:]
    whole = S.new_zeros(*S.shape[:-2], rows + columns, rows + columns)
    whole[..., :rows, rows:] = S
    whole[..., rows:, :rows] = S.mH
    whole.diagonal(dim1=-2, dim2=-1).copy_(torch.linspace(1, 2, rows + columns).to(S))
    positions = embedding.output_border() + embedding.input_border()
    return FrequencyMatrices(symbol(A, embedding).grid, whole), Border(embedding.grid, positions, A.device)


def by_grid(matrices: FrequencyMatrices, border: Border, u: torch.Tensor) -> torch.Tensor:
    return border.gather(matrices.on_grid(border.scatter(u)))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.complex128, torch.complex64])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((9, 8), {}),
        ((8, 11), {"padding": 1}),  # rows and columns of outputs and of inputs lie apart
        ((7, 7), {"padding": (1, 0)}),
        ((8, 8), {"groups": 2, "padding": 1}),
        ((6, 9), {"batch": (2,)}),
        ((9, 9), {"stride": 2, "padding": 1, "channels": 2}),  # phases have borders of their own
        ((12, 12), {"kernel": 4, "padding": 2}),
    ],
)
def test_equals_the_transforms_of_the_grid(size: tuple[int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    matrices, border = saddle(convolution(dtype, size, **options))
    product = PrunedProduct(matrices, border)
    u = torch.randn(3, len(matrices.matrices), border.size, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = by_grid(matrices, border, u)
    got = product(u)
    assert got.dtype == dtype
    assert torch.dist(got, expected) < 10 * torch.finfo(dtype).eps * expected.norm()


def test_one_block_serves_all() -> None:
    matrices, border = saddle(convolution(F64, (9, 8)))
    product = PrunedProduct(matrices, border)
    u = torch.randn(2, 3, border.size, dtype=F64)
    torch.testing.assert_close(product(u), by_grid(matrices, border, u))


def test_is_self_adjoint_where_the_operator_is() -> None:
    matrices, border = saddle(convolution(F64, (10, 9), padding=1))
    product = PrunedProduct(matrices, border)
    dense = product(torch.eye(border.size, dtype=F64).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(dense, dense.mT, rtol=0, atol=1e-14 * float(dense.abs().max()) * border.size)


@pytest.mark.parametrize("part", [2**8, 2**12])
def test_a_part_of_the_frequencies_at_a_time(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, border = saddle(convolution(F64, (9, 8), groups=3))
    monkeypatch.setattr(pruned_fft, "_PART_BYTES", part)
    u = torch.randn(2, 3, border.size, dtype=F64)
    torch.testing.assert_close(PrunedProduct(matrices, border)(u), by_grid(matrices, border, u))


def test_where_transforms_of_the_grid_are_cheaper_there_is_none() -> None:
    assert PrunedProduct.of(*saddle(convolution(F64, (64, 64)))) is not None
    for A in (
        convolution(F64, (64, 64), 11),
        lsconv.Conv2d(torch.randn(5, 5, 3, 1, dtype=F64), (64, 64)),
        convolution(F64, (120, 120), channels=1),
        convolution(F64, (8, 8)),
        lsconv.Conv1d(torch.randn(5, 5, 3, dtype=F64), 9),
    ):
        assert PrunedProduct.of(*saddle(A)) is None
    wide = PrunedProduct.of(*saddle(convolution(F64, (64, 64), 9)))
    assert wide is not None
    assert wide.pays(2)
    assert not wide.pays(1)
