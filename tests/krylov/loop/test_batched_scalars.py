"""The scalars of a single item on the CPU are Python numbers; they do what tensors of one entry do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lsconv
from lsconv.krylov.loop import batched_scalars
from lsconv.krylov.loop.solution import Solution
from lsconv.operators.elementary import Dense

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

Solver = Callable[..., Solution]
VALUES = [0.0, 1.5, -2.0, 1e-320, 1e300, math.inf, -math.inf, math.nan]
LEAST_SQUARES = [lsconv.cgls, lsconv.lsqr, lsconv.lsmr]
SQUARE = [lsconv.cg, lsconv.minres]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_numbers(result: Any) -> list[float]:
    return [float(r) for r in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", ["divide", "quotient", "hypot", "rotation", "maximum", "minimum"])
def test_functions_of_two_numbers_agree_with_those_of_tensors(name: str) -> None:
    function = getattr(batched_scalars, name)
    for a in VALUES:
        for b in VALUES:
            tensors = function(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
            assert as_numbers(function(a, b)) == pytest.approx(as_numbers(tensors), rel=1e-15, nan_ok=True), (a, b)


@pytest.mark.parametrize("name", ["root", "binary_unit", "unbounded"])
def test_functions_of_one_number_agree_with_those_of_tensors(name: str) -> None:
    function = getattr(batched_scalars, name)
    for a in VALUES:
        if name == "binary_unit" and a == 1e-320:
            continue  # torch takes the exponent of a denormal number for that of 0
        tensor = function(torch.tensor(a, dtype=torch.float64))
        assert as_numbers(function(a)) == pytest.approx(as_numbers(tensor), rel=1e-15, nan_ok=True), a


def test_a_number_beyond_float32_becomes_infinite_as_in_a_tensor() -> None:
    space = batched_scalars.OneItem((2,), torch.float32, torch.device("cpu"))
    assert space.add(torch.zeros(2), 1e300, torch.ones(2)).tolist() == [math.inf, math.inf]
    assert space.scale(torch.ones(2), -1e300).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_two_scaled_vectors_are_added_in_the_first_of_them(dtype: torch.dtype) -> None:
    """Whatever lies between their entries; an infinite factor does what it does to a tensor."""
    space = batched_scalars.OneItem((3, 4), dtype, torch.device("cpu"))
    for a, b in ((normal(3, 4, seed=0, dtype=dtype), normal(3, 4, seed=1, dtype=dtype)),
                 (normal(4, 3, seed=0, dtype=dtype).mT, normal(3, 4, seed=1, dtype=dtype)),
                 (normal(3, 4, seed=0, dtype=dtype), normal(6, 4, seed=1, dtype=dtype)[::2])):  # fmt: skip
        expected, v = 0.75 * a - 1.5 * b, a.clone(memory_format=torch.preserve_format)
        assert space.combine(v, 0.75, -1.5, b) is v
        torch.testing.assert_close(v, expected)

    if not dtype.is_complex:
        big = space.combine(torch.ones(3, 4, dtype=dtype), 1.0, 1e300, torch.ones(3, 4, dtype=dtype))
        assert torch.equal(big, torch.full_like(big, 1e300 if dtype == torch.float64 else math.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_norm_of_a_result_cut_out_of_a_longer_one_copies_nothing(dtype: torch.dtype) -> None:
    """As convolutions by FFT return it."""
    from torch.profiler import ProfilerActivity, profile

    whole = normal(3, 80, 100, seed=0, dtype=dtype)
    cut = whole[:, :64, :96]
    space = batched_scalars.OneItem(cut.shape, dtype, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        norm = space.norm(cut)
    assert norm == pytest.approx(float(torch.linalg.vector_norm(cut.to(torch.complex128))), rel=1e-7)
    assert max(event.cpu_memory_usage for event in record.events()) < cut.numel() * cut.element_size() // 10


def same_iterates(solver: Solver, A: torch.Tensor, b: torch.Tensor, **options: Any) -> None:
    """One item alone, and the first of two: after five iterations answer and history agree to rounding."""
    alone = solver(Dense(A), b, rtol=0, max_iter=5, **options)
    pair = solver(Dense(A), torch.stack([b, b.flip(0)]), rtol=0, max_iter=5, **options)
    assert alone.status is pair.status[0]
    assert alone.converged.shape == alone.iterations.shape == alone.residual_norm.shape == alone.damp.shape == ()
    assert int(alone.iterations) == int(pair.iterations[0]) == 5
    torch.testing.assert_close(alone.x, pair.x[0], rtol=1e-9, atol=1e-11)
    for name in ("residual_norm", "gradient_norm", "operator_norm"):
        first, second = getattr(alone.history, name), getattr(pair.history, name)[:, 0]
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13)
        assert first.shape == (6,)


OPTIONS = [{}, {"damp": 0.3}, {"M": 1}, {"N": 1}, {"damp": 0.3, "M": 1}, {"x0": 1, "damp": 0.3}]


@pytest.mark.parametrize("solver", LEAST_SQUARES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(
    "options", [{}, {"damp": 0.3}, {"M": 1}, {"N": 1}, {"damp": 0.3, "M": 1}, {"x0": 1, "damp": 0.3}]
)
def test_one_item_is_iterated_as_the_first_of_two(solver: Solver, dtype: torch.dtype, options: dict[str, Any]) -> None:
    A, b = normal(9, 7, seed=0, dtype=dtype), normal(9, seed=1, dtype=dtype)
    filled = dict(options)
    for side, size in (("M", 9), ("N", 7)):
        if side in options:
            root = normal(size, size, seed=3, dtype=dtype)
            filled[side] = Dense(root @ root.mH / size + 0.5 * torch.eye(size, dtype=dtype))
    if "x0" in options:
        filled["x0"] = normal(7, seed=4, dtype=dtype)
    same_iterates(solver, A, b, **filled)


@pytest.mark.parametrize("solver", SQUARE)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_one_item_of_a_square_system_is_iterated_as_the_first_of_two(solver: Solver, preconditioned: bool) -> None:
    root = normal(8, 8, seed=0)
    A = root @ root.mT / 8 + torch.eye(8, dtype=torch.float64)
    options = {"M": Dense(torch.diag(1 / A.diagonal()))} if preconditioned else {}
    same_iterates(solver, A, normal(8, seed=1), **options)


def test_one_item_of_craig_is_iterated_as_the_first_of_two() -> None:
    same_iterates(lsconv.craig, normal(6, 9, seed=0), normal(6, seed=1))


def test_a_batch_of_one_keeps_its_dimensions() -> None:
    solution = lsconv.lsmr(normal(6, 4, seed=0), normal(1, 1, 6, seed=1), damp=torch.tensor([[0.5]]))
    assert solution.x.shape == (1, 1, 4)
    assert solution.codes.shape == solution.damp.shape == solution.gradient_norm.shape == (1, 1)
    assert solution.history.residual_norm.shape[1:] == (1, 1)
