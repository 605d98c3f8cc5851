"""Dense matrices in batches: LU factors that are right on several threads, and inverses of Hermitian ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lsconv
from lsconv.border.border_set import Border, between_borders
from lsconv.fourier import batched_linalg
from lsconv.fourier.batched_linalg import DenseInverse
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import FrequencyMatrices
from lsconv.fourier.symbol import symbol

BATCHES = [(), (3,), (2, 4)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rows", [5, 64, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("batch", BATCHES)
def test_factors_inverses_and_determinants_are_right(batch: tuple[int, ...], rows: int, dtype: torch.dtype) -> None:
    matrices = torch.randn(*batch, rows, rows, dtype=dtype)
    eye = torch.eye(rows, dtype=dtype)
    b = torch.randn(*batch, rows, 3, dtype=dtype)
    in_place = matrices.mT.clone(memory_format=torch.contiguous_format).mT
    kept = matrices.clone()
    for factors, pivots, info in (batched_linalg.lu_factor(matrices), batched_linalg.lu_factor_in_place(in_place)):
        assert not info.any()
        x = torch.linalg.lu_solve(factors, pivots, b)
        torch.testing.assert_close(matrices @ x, b, rtol=0, atol=1e-8)
    assert factors.data_ptr() == in_place.data_ptr()
    assert torch.equal(matrices, kept)
    strided = matrices.movedim(0, -1).contiguous().movedim(-1, 0) if batch else matrices  # as a symbol may lie
    inverses, info = batched_linalg.inverse(strided)
    assert not info.any()
    torch.testing.assert_close(matrices @ inverses, eye.expand_as(matrices), rtol=0, atol=1e-8)
    expected = torch.linalg.svdvals(matrices).log().sum(-1)
    torch.testing.assert_close(batched_linalg.slogdet(matrices)[1], expected)


def test_a_singular_matrix_is_marked() -> None:
    matrices = torch.eye(70, dtype=torch.float64).repeat(3, 1, 1)
    matrices[1, 4, 4] = 0
    assert batched_linalg.lu_factor(matrices)[2].bool().tolist() == [False, True, False]
    assert batched_linalg.inverse(matrices)[1].bool().tolist() == [False, True, False]
    assert batched_linalg.slogdet(matrices)[1].tolist() == [0, -torch.inf, 0]


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


def test_an_indefinite_matrix_declared_definite_is_factorised_with_pivots() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 300, dtype=F64))[None]
    inverse = DenseInverse(matrix.clone(), definite=True)
    assert inverse.kind == "lu"
    torch.testing.assert_close(inverse(matrix.mT), torch.eye(300, dtype=F64)[None].mT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_large_indefinite_matrix_is_solved_with_though_its_storage_is_taken(dtype: torch.dtype) -> None:
    """Symmetric, real in the storage of the matrix itself; complex symmetric ones are not Hermitian."""
    torch.manual_seed(0)
    matrix = torch.randn(2, 300, 300, dtype=dtype)
    matrix = matrix + matrix.mT
    b = torch.randn(3, 2, 300, dtype=dtype)
    expected = torch.stack(
        [torch.linalg.solve(m, column).mT for m, column in zip(matrix, b.permute(1, 2, 0), strict=True)]
    )
    inverse = DenseInverse(matrix.clone(), definite=False)
    assert inverse.kind == "lu"
    torch.testing.assert_close(inverse(b), expected.transpose(0, 1), rtol=0, atol=1e-9)
