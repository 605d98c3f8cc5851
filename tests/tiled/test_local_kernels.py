"""Tiles with the kernel of their place: their damping, and where they do not pay."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.errors import MethodError
from lsconv.tiled.schwarz import SchwarzInverse
from tests.tiled.varying import F64, field


def test_the_damping_is_raised_where_zeros_of_the_transfer_function_move() -> None:
    kernels = torch.zeros(2, 9, 9, dtype=F64)
    kernels[0, 4], kernels[1, :, 4] = 1 / 9, 1 / 9
    A = lsconv.VaryingConvolution.from_grid(kernels, [(0.0, 10.0), (0.0, 54.0)], (64, 64))
    for damp, raised in ((1e-3, True), (1.0, False)):
        M = SchwarzInverse(A, torch.tensor(damp, dtype=F64), core=(32, 32))
        assert (M.local.damp_ratio > 10) == raised


def test_tiles_that_do_not_pay_are_refused() -> None:
    A = field(40)
    with pytest.raises(MethodError, match="LSMR should take less time"):
        SchwarzInverse(A, torch.tensor(10.0, dtype=F64), refuse_if_slower=True)
    with pytest.raises(MethodError, match="made of convolutions"):
        SchwarzInverse(A, torch.tensor(0.1, dtype=F64), lsconv.Diagonal(torch.ones(A.in_shape, dtype=F64)))
