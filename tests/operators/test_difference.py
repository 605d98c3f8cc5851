"""Finite differences against torch's convolution with the kernels that they name."""

from __future__ import annotations

import pytest
import torch

from lsconv.errors import ArgumentError, ShapeError
from lsconv.operators.convolution import Convolution
from lsconv.operators.difference import Gradient, Laplacian

SHAPES = [((3, 5, 6), 2), ((3, 1, 6), 2), ((4,), 1), ((2, 3, 4, 5), 3), ((5, 6), 2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("boundary", ["neumann", "periodic", "dirichlet"])
@pytest.mark.parametrize("shape, ndim", SHAPES)
@pytest.mark.parametrize("kind", [Gradient, Laplacian])
def test_differences_are_the_convolution_that_they_name(
    kind: type[Gradient | Laplacian], shape: tuple[int, ...], ndim: int, boundary: str, dtype: torch.dtype
) -> None:
    D = kind(shape, ndim, boundary, spacing=[0.5, 2.0, 3.0][:ndim], dtype=dtype)
    lead = shape[: len(shape) - ndim]
    A = Convolution(D.kernels[:, None], shape[-ndim:], padding=D.padding, padding_mode=D.padding_mode)
    x = torch.randn(2, *shape, dtype=dtype)
    expected = A(x.unsqueeze(-ndim - 1)).movedim(-ndim - 1, 1)
    torch.testing.assert_close(D(x), expected if kind is Gradient else expected.squeeze(1))
    assert D.out_shape == ((ndim, *shape) if kind is Gradient else shape)
    assert lead == D.in_shape[: len(lead)]
    assert D.dot_test() <= 1e-12


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
def test_laplacian_is_minus_the_squared_gradient(boundary: str) -> None:
    G, L = (kind((2, 4, 5), 2, boundary, (0.5, 2.0), dtype=torch.float64) for kind in (Gradient, Laplacian))
    torch.testing.assert_close(L.to_dense(), (-(G.H @ G)).to_dense())


def test_gradient_of_a_constant_is_zero_inside() -> None:
    ones = torch.ones(2, 4, 5)
    assert not Gradient((2, 4, 5))(ones).any()
    assert not Gradient((2, 4, 5), boundary="periodic")(ones).any()
    assert Gradient((2, 4, 5), boundary="dirichlet")(ones).sum() == -2 * (4 + 5)


def test_refusals() -> None:
    with pytest.raises(ShapeError, match=r"ndim: 2 spatial axes do not fit shape \(5,\)"):
        Gradient((5,))
    with pytest.raises(ArgumentError, match=r"boundary: expected one of 'neumann', .* got 'mirror'"):
        Laplacian((5, 5), boundary="mirror")
    with pytest.raises(ArgumentError, match=r"spacing: expected a positive number or 2 of them, got \(1.0,\)"):
        Gradient((5, 5), spacing=(1.0,))
    with pytest.raises(ArgumentError, match=r"spacing: expected a positive number or 2 of them, got 0"):
        Gradient((5, 5), spacing=0)
