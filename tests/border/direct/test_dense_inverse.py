"""The factors of a whole border, and the change to them where iterating has cost as much."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.border.border_set import Border, between_borders
from lsconv.border.direct.dense_inverse import DenseInverse
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.symbol import FrequencyMatrices, symbol

pytestmark = pytest.mark.usefixtures("iterated")

F64 = torch.float64


def symbol_of(A: lsconv.Convolution) -> tuple[FrequencyMatrices, Embedding]:
    embedding = Embedding(A)
    return symbol(A, embedding), embedding


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_restricted_is_the_block_of_the_circulant_matrix(stride: int, dtype: torch.dtype) -> None:
    A = lsconv.Conv2d(torch.randn(3, 2, 3, 3, dtype=dtype), (7, 6), padding=1, stride=stride)
    C, embedding = symbol_of(A)
    outer = Border(embedding.grid, embedding.output_border(), A.device)
    inner = Border(embedding.grid, embedding.input_border(), A.device)
    unit = torch.eye(inner.size, dtype=dtype).unsqueeze(1)
    expected = outer.gather(C.on_grid(inner.scatter(unit))).squeeze(1).mT
    torch.testing.assert_close(between_borders(C.kernel(), outer, inner)[0], expected)


@pytest.mark.parametrize(("definite", "size", "kind"), [(True, 9, "inverse"), (False, 9, "inverse"),
                                                        (True, 70, "cholesky"), (False, 70, "lu")])  # fmt: skip
def test_a_hermitian_operator_on_the_border_is_inverted(definite: bool, size: int, kind: str) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=F64), (size, size), padding=1)
    C, embedding = symbol_of(A)
    Q = C.map(lambda m: m @ m.mH if definite else m + m.mH)
    border = Border(embedding.grid, embedding.output_border(), A.device)
    kernel = Q.kernel()
    inverse = DenseInverse(between_borders(kernel, border, border), definite=definite)
    assert inverse.kind == kind
    u = torch.randn(3, 1, border.size, dtype=F64)
    torch.testing.assert_close(inverse(border.gather(Q.on_grid(border.scatter(u)))), u, rtol=1e-7, atol=1e-7)


def test_what_is_said_to_be_definite_and_is_not_gets_pivots() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 300, dtype=F64))[None]
    inverse = DenseInverse(matrix.clone(), definite=True)
    assert inverse.kind == "lu"
    torch.testing.assert_close(inverse(matrix.mT), torch.eye(300, dtype=F64)[None].mT)
