"""rcond: the rank is the user's, by every method that decides one, against torch.linalg.pinv of the dense matrix."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.errors import ArgumentError, MethodError
from lsconv.factored.dense_svd import SingularValuePlan
from lsconv.factored.kronecker import SeparablePlan
from lsconv.fourier.circulant import FourierPlan

KERNEL = torch.tensor([[[1.0, 0.0, 1.0]]])
DTYPES = (torch.float32, torch.float64)


def circular(dtype: torch.dtype) -> lsconv.Conv1d:
    """Its symbol, 1 + 0.999 exp(i w), falls to a thousandth."""
    return lsconv.Conv1d(torch.tensor([[[1.0, 0.999]]], dtype=dtype), 8, padding=((1, 0),), padding_mode="circular")


def same(dtype: torch.dtype) -> lsconv.Conv1d:
    """Square, with one exact null vector."""
    return lsconv.Conv1d(KERNEL.to(dtype), 5, padding=1)


def wide(dtype: torch.dtype) -> lsconv.Conv1d:
    """Its two channels are the same, but for a millionth."""
    return lsconv.Conv1d(torch.tensor([[[1.0, 0.5], [1.0, 0.5 + 1e-4]]], dtype=dtype), 8)


OPERATORS = {
    "circular": (circular, 1e-2, FourierPlan),
    "same": (same, 1e-6, SeparablePlan),
    "wide": (wide, 1e-3, SingularValuePlan),
}


def test_border_names_what_decides_the_rank_where_it_does_not() -> None:
    circulant, wide_one = circular(torch.float64), wide(torch.float64)
    for A, other in ((circulant, "fourier"), (wide_one, "svd")):
        with pytest.raises(MethodError, match=f'use method="{other}"'):
            lsconv.lstsq(A, torch.ones(A.out_shape, dtype=torch.float64), method="border", rcond=1e-2)


def assert_shortest(A: lsconv.LinearOperator, rcond: float, method: str) -> None:
    """The answer is that of the dense pseudo-inverse at rcond, and says its rank."""
    matrix = A.to(dtype=torch.float64).to_dense()
    y = torch.randn(4, *A.out_shape, dtype=A.dtype, generator=torch.Generator().manual_seed(0))
    exact = (y.double().flatten(1) @ torch.linalg.pinv(matrix, rtol=rcond).mT).reshape(4, *A.in_shape)
    solution = lsconv.lstsq(A, y, rcond=rcond, method=method)
    rank = int(torch.linalg.matrix_rank(matrix, rtol=rcond))
    assert solution.converged.all()
    assert solution.rank.tolist() == [rank] * 4
    assert solution.nullity.tolist() == [A.in_numel - rank] * 4
    bound = 1e4 * torch.finfo(A.dtype).eps * float(exact.norm())
    torch.testing.assert_close(solution.x.double(), exact, rtol=0, atol=bound)
    torch.testing.assert_close(lsconv.pinv(A, rcond=rcond, method=method)(y).double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OPERATORS)
def test_auto_and_svd_cut_where_the_user_says(kind: str, dtype: torch.dtype) -> None:
    make, rcond, plan = OPERATORS[kind]
    A = make(dtype)
    assert_shortest(A, rcond, "auto")
    assert_shortest(A, rcond, "svd")
    assert isinstance(lsconv.pinv(A, rcond=rcond).plan, plan)


@pytest.mark.parametrize(("kind", "method"), [("circular", "fourier"), ("same", "border")])
def test_methods_asked_for_cut_there_too(kind: str, method: str) -> None:
    make, rcond, _ = OPERATORS[kind]
    assert_shortest(make(torch.float64), rcond, method)


def test_another_rcond_is_another_answer() -> None:
    A = circular(torch.float64)
    y = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept, cut = (lsconv.lstsq(A, y, rcond=rcond) for rcond in (1e-6, 1e-2))
    assert int(kept.nullity) == 0
    assert int(cut.nullity) == 1
    assert float(kept.x.norm()) > 10 * float(cut.x.norm())


def test_where_the_direct_border_has_no_clear_cut_the_dense_matrix_answers() -> None:
    """A "same" convolution whose threshold cuts singular values that are not zero."""
    A = lsconv.Conv1d(torch.tensor([[[1.0, 2.5, 1.0]]], dtype=torch.float64), 12, padding=1)
    values = torch.linalg.svdvals(A.to_dense())
    rcond = float((values[-3] + values[-4]) / 2 / values[0])
    assert_shortest(A, rcond, "auto")
    with pytest.raises(MethodError, match='method="svd"'):
        lsconv.lstsq(A, torch.ones(1, 12, dtype=torch.float64), rcond=rcond, method="border")


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls", "craig", "cg", "minres", "gmres"])
def test_iterations_decide_no_rank_and_say_who_does(method: str) -> None:
    with pytest.raises(MethodError, match=f'rcond: method "{method}" decides no rank; use .*"svd"'):
        lsconv.lstsq(same(torch.float64), torch.ones(1, 5, dtype=torch.float64), rcond=1e-6, method=method)


@pytest.mark.parametrize("rcond", [-0.1, 1.0, 2, float("nan"), True, "1e-3"])
def test_values_outside_of_their_range_are_refused(rcond: object) -> None:
    A = same(torch.float64)
    with pytest.raises(ArgumentError, match=r"rcond: expected a number in \[0, 1\)"):
        lsconv.lstsq(A, torch.ones(1, 5, dtype=torch.float64), rcond=rcond)
    with pytest.raises(ArgumentError, match="rcond"):
        lsconv.pinv(A, rcond=rcond)


@pytest.mark.parametrize("method", ["auto", "lsmr", "svd"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_damping_needs_no_rank(kind: str, method: str) -> None:
    make, rcond, _ = OPERATORS[kind]
    A = make(torch.float64)
    y = torch.randn(2, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cut, plain = (lsconv.lstsq(A, y, damp=0.1, method=method, rcond=r) for r in (rcond, None))
    assert cut.converged.all()
    torch.testing.assert_close(cut.x, plain.x, rtol=1e-9, atol=1e-9)


def test_the_null_space_is_printed() -> None:
    solution = lsconv.lstsq(same(torch.float64), torch.ones(1, 5, dtype=torch.float64), rcond=1e-6)
    assert "null space of 1 dimension(s)" in str(solution)
    full = lsconv.lstsq(circular(torch.float64), torch.ones(1, 8, dtype=torch.float64), rcond=1e-6)
    assert "null space" not in str(full)
