"""The blocks of near missing outputs: inverses of what F, the influence matrix, leaves of them away from the border."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.border.missing_blocks import MissingBlocks
from lsconv.border.penalty import Penalty, as_convolutions

F64 = torch.float64


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def complement(A: lsconv.Convolution, damp: float, missing: Tensor, L: lsconv.Gradient | None = None) -> Tensor:
    """``E^H (I - F) E`` from dense matrices."""
    M = A.to_dense()
    D = torch.eye(A.in_numel, dtype=F64) if L is None else L.to_dense()
    F = M @ torch.linalg.solve(M.T @ M + damp**2 * D.T @ D, M.T)
    index = missing.flatten().nonzero().flatten()
    return (torch.eye(len(M), dtype=F64) - F)[index][:, index]


@pytest.mark.parametrize(
    ("channels", "penalised"),
    [
        ((1, 1, 1), False),
        ((2, 1, 1), False),
        ((1, 2, 1), False),
        ((2, 2, 2), False),
        ((1, 1, 1), True),
        ((2, 2, 2), True),
    ],
)
def test_a_periodic_convolution_has_exactly_these(channels: tuple[int, int, int], penalised: bool) -> None:
    c_out, c_in, groups = channels
    A = lsconv.Conv2d(numbers(c_out, c_in // groups, 3, 3), in_size=(9, 10), padding=1, groups=groups,
                      padding_mode="circular")  # fmt: skip
    missing = numbers(*A.out_shape, seed=1) > 1
    damp, L, penalty = torch.tensor(0.7, dtype=F64), None, None
    if penalised:
        L = lsconv.Gradient(A.in_shape, ndim=2, boundary="periodic", dtype=F64)
        terms = as_convolutions(L, 2)
        assert terms is not None
        penalty = Penalty(A, terms, damp)
    blocks = MissingBlocks(A, damp, missing, penalty)
    r = torch.where(missing, numbers(3, *A.out_shape, seed=2), 0)
    z = blocks(r)
    assert bool((z[..., ~missing] == 0).all())
    expected = torch.linalg.solve(complement(A, 0.7, missing, L), r[:, missing].T).T
    assert torch.allclose(z[:, missing], expected, atol=1e-9)


def test_away_from_the_border_they_are_those_of_a_cropped_convolution() -> None:
    A = lsconv.blur_operator(numbers(3, 3).abs() / 8, (30, 32))
    missing = torch.zeros(A.out_shape, dtype=torch.bool)
    missing[:, 14:17, 15:18] = True
    blocks = MissingBlocks(A, torch.tensor(0.5, dtype=F64), missing)
    r = torch.where(missing, numbers(*A.out_shape), 0)
    expected = torch.linalg.solve(complement(A, 0.5, missing), r[missing])
    assert torch.allclose(blocks(r)[missing], expected, rtol=1e-4)


def test_items_have_their_own_masks_and_dampings() -> None:
    A = lsconv.Conv2d(numbers(1, 1, 3, 3), in_size=(8, 8), padding=1, padding_mode="circular")
    missing = numbers(2, *A.out_shape, seed=3) > 1
    for damp in (torch.tensor(0.5, dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)):
        blocks = MissingBlocks(A, damp, missing)
        r = torch.where(missing, numbers(4, 2, *A.out_shape, seed=4), 0)
        z = blocks(r)
        for item, own in enumerate(damp.expand(2).tolist()):
            here = missing[item]
            expected = torch.linalg.solve(complement(A, own, here), r[:, item][:, here].T).T
            assert torch.allclose(z[:, item][:, here], expected, atol=1e-9)


def test_nothing_missing_is_nothing_to_do() -> None:
    A = lsconv.Conv2d(numbers(1, 1, 3, 3), in_size=(8, 8))
    blocks = MissingBlocks(A, torch.tensor(0.5, dtype=F64), torch.zeros(A.out_shape, dtype=torch.bool))
    assert bool((blocks(torch.zeros(A.out_shape, dtype=F64)) == 0).all())
    assert blocks.inverses.numel() == 0


def test_a_common_null_space_of_operator_and_penalty_leaves_the_blocks_finite() -> None:
    A = lsconv.Conv2d(numbers(1, 2, 3, 3), in_size=(9, 10), padding=1, padding_mode="circular")
    terms = as_convolutions(lsconv.Gradient(A.in_shape, ndim=2, boundary="periodic", dtype=F64), 2)
    assert terms is not None
    damp, missing = torch.tensor(0.7, dtype=F64), numbers(*A.out_shape, seed=1) > 1
    blocks = MissingBlocks(A, damp, missing, Penalty(A, terms, damp))
    assert bool(blocks.inverses.isfinite().all())
