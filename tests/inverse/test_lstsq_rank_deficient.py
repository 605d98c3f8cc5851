"""lstsq where A has a null space, or may have one: the answer of minimum norm, or a status that says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lsconv
from lsconv.errors import MethodError
from lsconv.fourier.embedding import Embedding

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_operator_that_is_zero_has_the_answer_zero(dtype: torch.dtype) -> None:
    # dilation 2 and padding 1 on a single cell: every tap reads padding. The circulant operator around it is not zero,
    # and what its elimination leaves is rounding in double precision, which differs between processors.
    A = lsconv.Conv1d(torch.ones(1, 1, 2, dtype=dtype), in_size=1, padding=1, dilation=2)
    for y in (torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype)):
        assert float(lsconv.lstsq(A, y).x.abs()) < 10 * torch.finfo(torch.float64).eps


@given(data=st.data())
def test_x_has_no_part_in_the_null_space(cases: Any, reference: Any, by_border: Any, data: Any) -> None:
    A, y, damp = data.draw(cases()).arguments
    assume(Embedding.serves(A))
    dense = reference(A, y, damp)
    assume(bool(dense.clear.all()))
    solution = by_border(A, y, damp)
    assert (dense.null_part(solution.x)[solution.converged] <= 1e-8).all()


@pytest.mark.parametrize(("c_in", "k"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_nullity_of_tall_valid_convolution_is_independent_of_the_size(c_in: int, k: int) -> None:
    for n in (3 * k + c_in, 3 * k + c_in + 3):
        A = lsconv.Conv2d(torch.randn(c_in + 1, c_in, k, k, dtype=torch.float64), (n, n))
        s = torch.linalg.svdvals(A.to_dense())
        assert int((s < 1e-11 * s[0]).sum()) == c_in * (c_in + 1) * (k - 1) ** 2


DEFICIENT = {
    "valid 1->2": (lambda: (torch.randn(2, 1, 3, 3, dtype=torch.float64), (16, 16))),
    "full 2->1": (lambda: (torch.randn(1, 2, 3, 3, dtype=torch.float64), (16, 16), 1, 2)),
}


@pytest.mark.parametrize("name", DEFICIENT)
def test_border_refuses_a_null_space_that_the_shapes_imply(name: str) -> None:
    A = lsconv.Convolution(*DEFICIENT[name]())
    y = torch.randn(A.out_shape, dtype=A.dtype)
    with pytest.raises(MethodError, match=r"null space.*lsmr.*damp > 0"):
        lsconv.lstsq(A, y, method="border")
    assert lsconv.lstsq(A, y, damp=1e-3, method="border").converged


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("name", DEFICIENT)
def test_auto_finds_the_minimum_norm_solution_of_a_deficient_shape(reference: Any, name: str, consistent: bool) -> None:
    A = lsconv.Convolution(*DEFICIENT[name]())
    y = A(torch.randn(A.in_shape, dtype=A.dtype)) if consistent else torch.randn(A.out_shape, dtype=A.dtype)
    dense = reference(A, y)
    solution = lsconv.lstsq(A, y)
    assert solution.converged
    assert dense.error(solution.x) <= max(1e-8, 1e-9 * float(dense.condition))


@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("damp", [0.0, 1e-4])
def test_square_same_convolution_is_certified_or_says_why_not(
    reference: Any, assert_certified: Any, channels: int, n: int, damp: float
) -> None:
    A = lsconv.Conv2d(torch.randn(channels, channels, 3, 3, dtype=torch.float64), (n, n), padding=1)
    y = A(torch.randn(A.in_shape, dtype=A.dtype))
    solution = lsconv.lstsq(A, y, damp=damp, method="border")
    assert_certified(solution, reference(A, y, damp), 1e-10)


@pytest.mark.parametrize("padding", [((2, 0),), ((0, 2),), ((1, 1),)])
@pytest.mark.parametrize("taps", [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 2.0, 0.0]])
def test_shifts_out_of_the_image_are_inverted_where_they_can_be(
    reference: Any, assert_certified: Any, taps: list[float], padding: Any
) -> None:
    A = lsconv.Conv1d(torch.tensor([[taps]], dtype=torch.float64), 24, padding=padding)
    y = torch.randn(A.out_shape, dtype=A.dtype)
    dense = reference(A, y)
    solution = lsconv.lstsq(A, y, method="auto")
    assert_certified(solution, dense, 1e-10)
    if dense.clear and solution.converged:
        assert dense.error(solution.x) <= max(1e-8, 1e-9 * float(dense.condition))
