"""svd: factors that are orthonormal, whose product is the matrix, for circulants and separable kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lsconv import Conv1d, Conv2d, Conv3d, MethodError, singular_values
from lsconv.inverse.functions.decomposition import svd

DOUBLE = torch.float64


def randn(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


LINE, PLANE = randn(3), torch.outer(randn(3), randn(3))
CIRCULAR: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
CASES = {
    "circulant, one channel, even": lambda: Conv2d(randn(1, 1, 3, 3), (6, 8), **CIRCULAR),
    "circulant, one channel, odd": lambda: Conv2d(randn(1, 1, 3, 3), (5, 7), **CIRCULAR),
    "circulant, equal channels": lambda: Conv2d(torch.eye(2, dtype=DOUBLE)[..., None, None] * randn(3, 3), (6, 6),
                                               **CIRCULAR),
    "circulant, 3 to 2 channels": lambda: Conv2d(randn(2, 3, 3, 3), (6, 5), **CIRCULAR),
    "circulant, groups": lambda: Conv1d(randn(4, 1, 3), 8, groups=2, **CIRCULAR),
    "circulant, strided": lambda: Conv2d(randn(3, 1, 3, 3), (6, 8), stride=2, **CIRCULAR),
    "circulant, complex": lambda: Conv2d(randn(2, 2, 3, 3, dtype=torch.complex128), (6, 5), **CIRCULAR),
    "circulant, three axes": lambda: Conv3d(randn(1, 1, 3, 3, 3), (4, 3, 6), **CIRCULAR),
    "separable, valid": lambda: Conv2d(PLANE[None, None], (7, 8)),
    "separable, same, strided": lambda: Conv2d(PLANE[None, None], (7, 8), padding=1, stride=2),
    "separable, channels": lambda: Conv2d(randn(2, 3, 1, 1) * PLANE, (6, 7), padding=2),
    "separable, groups": lambda: Conv2d(PLANE.expand(2, 1, 3, 3).clone(), (6, 7), groups=2),
    "pointwise, the last input not read": lambda: Conv1d(randn(3, 1, 1), 7, stride=3),
    "one axis": lambda: Conv1d(LINE[None, None], 9),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_factors_are_orthonormal_and_their_product_is_the_operator(name: str) -> None:
    A = CASES[name]()
    d = svd(A)
    U, V, values = d.U.to_dense(), d.V.to_dense(), d.S.flatten()
    assert U.dtype == A.dtype
    one = torch.eye(len(values), dtype=A.dtype)
    torch.testing.assert_close(U.mH @ U, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(V.mH @ V, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(U * values @ V.mH, A.to_dense(), rtol=0, atol=1e-11)
    count = min(A.in_numel, A.out_numel)
    ordered = torch.nn.functional.pad(values.sort(descending=True).values, (0, count - len(values)))
    torch.testing.assert_close(ordered, singular_values(A), rtol=0, atol=1e-11)
    d.U.dot_test()
    d.V.dot_test()


def test_batches_pass_through_the_factors() -> None:
    A = Conv2d(randn(2, 2, 3, 3, dtype=torch.float32), (6, 8), **CIRCULAR)
    d, x = svd(A), randn(3, 4, *A.in_shape, dtype=torch.float32)
    torch.testing.assert_close(d.U(d.S * d.V.H(x)), A(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "A",
    [
        Conv2d(randn(1, 1, 3, 3), (6, 8)),
        Conv1d(randn(2, 1, 1, 3), 8, padding=1, padding_mode="circular"),
    ],
)
def test_an_operator_without_such_factors_is_refused(A: Any) -> None:
    with pytest.raises(MethodError, match="svd"):
        svd(A)
