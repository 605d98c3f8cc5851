"""Dense matrices in batches: LU factors that are right on several threads, and inverses of Hermitian ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lsconv.fourier import batched_linalg
from lsconv.fourier.batched_linalg import DenseInverse, hermitian_inverse_, inverse_of_hermitian

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


@pytest.mark.parametrize("size", [0, 1, 2, 5, 300])  # the largest are inverted two at a time
def test_hermitian_inverse_is_the_inverse(size: int) -> None:
    root = torch.randn(3, 4, size, size, dtype=torch.complex128)
    matrices = root @ root.mH + 0.1 * torch.eye(size)
    eye = torch.eye(size, dtype=matrices.dtype).expand_as(matrices)
    torch.testing.assert_close(matrices @ hermitian_inverse_(matrices.clone()), eye, rtol=0, atol=1e-9)


def test_hermitian_inverse_marks_matrices_that_are_not_definite_and_only_those() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    matrices = torch.stack([torch.eye(3), indefinite, 2 * torch.eye(3), torch.zeros(3, 3)])
    inverse = hermitian_inverse_(matrices.clone())
    assert inverse[[1, 3]].isnan().all()
    torch.testing.assert_close(inverse[0], torch.eye(3))
    torch.testing.assert_close(inverse[2], torch.eye(3) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("definite", "size", "kind"), [(True, 9, "inverse"), (False, 9, "inverse"),
                                                        (True, 300, "cholesky"), (False, 300, "lu")])  # fmt: skip
def test_hermitian_matrices_are_inverted(definite: bool, size: int, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    root = torch.randn(2, size, size, dtype=dtype)
    matrices = root @ root.mH + torch.eye(size) if definite else root + root.mH
    inverse = DenseInverse(matrices.clone(), definite=definite)
    assert inverse.kind == kind
    u = torch.randn(3, 2, size, dtype=dtype)
    torch.testing.assert_close(inverse((matrices @ u.unsqueeze(-1)).squeeze(-1)), u, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse.logdet, batched_linalg.slogdet(matrices)[1])


def test_a_singular_matrix_that_may_be_indefinite_gets_its_pseudo_inverse() -> None:
    matrices = torch.stack([torch.diag(torch.tensor([1.0, -2.0, 0.0])), torch.eye(3)])
    inverse = inverse_of_hermitian(matrices, definite=False)
    torch.testing.assert_close(inverse, torch.stack([torch.diag(torch.tensor([1.0, -0.5, 0.0])), torch.eye(3)]))


def test_an_indefinite_matrix_declared_definite_is_factorised_with_pivots() -> None:
    matrix = torch.diag(torch.linspace(-1, 1, 300, dtype=torch.float64))[None]
    inverse = DenseInverse(matrix.clone(), definite=True)
    assert inverse.kind == "lu"
    torch.testing.assert_close(inverse(matrix.mT), torch.eye(300, dtype=torch.float64)[None].mT)


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
