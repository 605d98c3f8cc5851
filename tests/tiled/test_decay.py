"""The decay of the inverse: its tails against those of the dense inverse of a circular problem."""

from __future__ import annotations

import itertools

import pytest
import torch

import lsconv
from lsconv.border.penalty import as_convolutions
from lsconv.tiled.decay import Decay

F64 = torch.float64


def tails(A: lsconv.Convolution, L: torch.Tensor, damp: float) -> torch.Tensor:
    """The share of the dense inverse's column for one cell that lies farther than o cells from it."""
    D, n = A.to_dense(), A.in_numel
    column = torch.linalg.inv(D.mT @ D + damp**2 * L.mT @ L)[:, 0].square()
    distance = torch.arange(n).minimum(n - torch.arange(n))
    beyond = torch.stack([column[distance >= o].sum() for o in range(n // 2 + 1)])
    return (beyond / beyond[0]).sqrt()


@pytest.mark.parametrize("damp", [0.05, 0.5])
@pytest.mark.parametrize("penalised", [False, True])
def test_the_tails_are_those_of_the_dense_inverse(damp: float, penalised: bool) -> None:
    weight = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=F64)
    A = lsconv.Conv1d(weight, (24,), padding=1, padding_mode="circular")
    L = (
        lsconv.Gradient(A.in_shape, ndim=1, boundary="periodic", dtype=F64)
        if penalised
        else lsconv.Identity(A.in_shape)
    )
    terms = as_convolutions(L, 1) if penalised else []
    assert terms is not None
    decay = Decay(A, terms, damp, 24)
    exact = tails(A, L.to_dense().to(F64), damp)
    torch.testing.assert_close(torch.tensor(decay.tails, dtype=F64), exact, rtol=1e-6, atol=1e-7)


def test_more_overlap_or_more_damping_leaves_less_and_takes_fewer_steps() -> None:
    A = lsconv.Conv2d(torch.full((1, 1, 5, 5), 0.04, dtype=F64), (64, 64))
    rates = {
        damp: [Decay(A, [], damp, 64).first_pass_error(overlap) for overlap in range(0, 40, 4)] for damp in (0.05, 0.5)
    }
    for falling in rates.values():
        assert all(0 <= after <= before <= 1 for before, after in itertools.pairwise(falling))
    assert all(strong <= weak for weak, strong in zip(rates[0.05], rates[0.5], strict=True))
    decay = Decay(A, [], 0.5, 64)
    assert decay.steps(8, 1e-10) >= decay.steps(24, 1e-10)
    assert decay.steps(8, 1.0) == 0
    assert decay.overlap([32, 32], 32, 1e-10) % 4 == 0
