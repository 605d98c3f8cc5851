"""Images on the extended grid: C and its adjoint against dense matrices, the normal matrices, and free cells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.fourier.embedding import Embedding
from lsconv.fourier.frequency_matrices import Grid
from lsconv.fourier.symbol import symbol
from lsconv.inverse.admm.proximal import sparsity_term
from lsconv.inverse.admm.split_images import (
    ConvolutionImage,
    DifferenceImage,
    GridLayout,
    IdentityImage,
    PaddedImage,
    SplitImage,
)

F64 = torch.float64
SIZES, INPUTS = (6, 5), (4, 5)
LAYOUT = GridLayout(Grid(SIZES, real=True), (), 1, 1, INPUTS, F64, torch.device("cpu"))


def image(name: str) -> SplitImage:
    if name == "convolution":
        A = lsconv.Conv2d(torch.randn(2, 1, 3, 2, dtype=F64), SIZES, padding="same", padding_mode="circular")
        return ConvolutionImage(LAYOUT, A, symbol(A, Embedding(A, SIZES)))
    if name == "differences":
        return DifferenceImage(LAYOUT, lsconv.Gradient((1, *INPUTS), ndim=2, spacing=(0.5, 2.0), dtype=F64))
    return IdentityImage(LAYOUT, zero_outside=False)


def apply(split: SplitImage, x: Tensor) -> Tensor:
    return split.apply(x, LAYOUT.grid.transform(LAYOUT.blocked(x))).clone()  # the next image may overwrite it


def dense(split: SplitImage) -> Tensor:
    basis = torch.eye(SIZES[0] * SIZES[1], dtype=F64).reshape(-1, 1, *SIZES)
    return torch.stack([apply(split, unit).flatten() for unit in basis], dim=-1)


@pytest.mark.parametrize("name", ["convolution", "differences", "itself"])
def test_the_normal_matrices_are_those_of_the_dense_product(name: str) -> None:
    split = image(name)
    C = dense(split)
    x = torch.randn(1, *SIZES, dtype=F64)
    spectrum = LAYOUT.grid.transform(LAYOUT.blocked(x))
    normal = LAYOUT.grid.inverse((split.normal()[..., 0, 0] * spectrum).to(spectrum.dtype))
    torch.testing.assert_close(normal.flatten(), C.mT @ (C @ x.flatten()))


@pytest.mark.parametrize("name", ["differences", "itself"])
def test_the_adjoint_is_the_transpose(name: str) -> None:
    split = image(name)
    r = torch.randn(split.shape, dtype=F64)
    expected = dense(split).mT @ r.flatten()
    torch.testing.assert_close(split.adjoint(r.clone()).flatten(), expected)


def test_cells_that_the_operator_does_not_have_are_left_as_they_are() -> None:
    gradient = lsconv.Gradient((1, *INPUTS), ndim=2, dtype=F64)
    term = sparsity_term(gradient, torch.tensor(1e9, dtype=F64))
    split = DifferenceImage(LAYOUT, gradient)
    s = torch.randn(split.shape, dtype=F64)
    out = torch.empty_like(s)
    split.proximal(term, s.clone(), torch.tensor(1.0, dtype=F64), out)
    inside = torch.zeros_like(s)
    inside[0, :, : INPUTS[0] - 1, : INPUTS[1]] = 1
    inside[1, :, : INPUTS[0], : INPUTS[1] - 1] = 1
    torch.testing.assert_close(out, torch.where(inside == 1, 0.0, s))  # all that counts falls below the threshold


def test_copies_share_their_mean() -> None:
    split = PaddedImage(LAYOUT, [(1, 1), (0, 0)], "replicate")
    term = sparsity_term(lsconv.Identity((1, *INPUTS), dtype=F64), torch.tensor(0.0, dtype=F64))
    s, out = torch.randn(1, *SIZES, dtype=F64), torch.empty(1, *SIZES, dtype=F64)
    split.proximal(term, s.clone(), torch.tensor(1.0, dtype=F64), out)
    # rows of the grid: four of x, the copy of the last one, and that of the first before row 0
    first, last = s[:, [0, 5]].mean(1), s[:, [3, 4]].mean(1)
    torch.testing.assert_close(out, torch.stack([first, s[:, 1], s[:, 2], last, last, first], dim=1))
