"""The matrices per frequency, against dense algebra."""

from __future__ import annotations

import pytest
import torch

from lsconv.border.gram import gram, saddle_inverse


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_saddle_inverse_is_that_of_the_saddle_matrix(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    S = torch.randn(3, 5, 4, rows, columns, dtype=dtype)
    mu = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1, 1)
    squared = gram(S, "residual" if rows <= columns else "solution")
    inverse, smaller = saddle_inverse(S, squared, mu)
    eye = torch.eye(rows + columns, dtype=dtype)
    saddle = torch.zeros(*S.shape[:-2], rows + columns, rows + columns, dtype=dtype)
    saddle[..., :rows, rows:], saddle[..., rows:, :rows] = S, S.mH
    signs = torch.cat([-torch.ones(rows), torch.ones(columns)]).to(dtype)
    saddle = saddle + mu.sqrt() * torch.diag(signs)
    torch.testing.assert_close(saddle @ inverse, eye.expand_as(saddle), rtol=0, atol=1e-12)
    small = torch.eye(min(shape), dtype=dtype)
    torch.testing.assert_close((squared + mu * small) @ smaller, small.expand_as(squared), rtol=0, atol=1e-12)
