"""LU factors of batches, right on several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lsconv.fourier import batched_linalg

BATCHES = [(), (3,), (2, 4)]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("rows", [5, 64, 200])
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
    torch.testing.assert_close(batched_linalg.log_abs_det(matrices), expected)


def test_a_singular_matrix_is_marked() -> None:
    matrices = torch.eye(70, dtype=torch.float64).repeat(3, 1, 1)
    matrices[1, 4, 4] = 0
    assert batched_linalg.lu_factor(matrices)[2].bool().tolist() == [False, True, False]
    assert batched_linalg.inverse(matrices)[1].bool().tolist() == [False, True, False]
    assert batched_linalg.log_abs_det(matrices).tolist() == [0, -torch.inf, 0]
