"""Large right-hand sides solved in groups have the answers that they have together, and one report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.krylov.loop import batch_groups
from lsconv.krylov.loop.options import Options
from lsconv.krylov.loop.problem import prepare
from lsconv.krylov.loop.solution import Solution, Status
from lsconv.operators.base import LinearOperator

Solver = Callable[..., Solution]


def data(A: LinearOperator, *batch: int) -> Tensor:
    return torch.randn(*batch, *A.out_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[60_000, 40_000], ids=["one by one", "threes"])
def large(request: pytest.FixtureRequest) -> Iterator[lsconv.Diagonal]:
    """An operator, definite, whose items are solved in groups that are smaller than a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lsconv.Diagonal(torch.linspace(1, 3, request.param, dtype=torch.float64))
    torch.set_num_threads(threads)


def watched(state: Any) -> None:
    """A callback, for which a batch stays together."""


def assert_close(one: Solution, other: Solution) -> None:
    assert one.status == other.status
    assert one.converged.equal(other.converged)
    assert one.iterations.equal(other.iterations)
    assert one.damp.equal(other.damp)
    torch.testing.assert_close(one.x, other.x, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert one.history is not None
    assert other.history is not None
    for name in ("residual_norm", "gradient_norm", "operator_norm"):
        first, second = getattr(one.history, name), getattr(other.history, name)
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("solver", [lsconv.cg, lsconv.minres, lsconv.cgls, lsconv.lsqr, lsconv.lsmr, lsconv.craig])
def test_groups_have_the_answers_of_the_whole_batch(solver: Solver, large: lsconv.Diagonal) -> None:
    """With a zero item, which needs no iteration, and one that is not finite."""
    y = data(large, 2, 4)
    y[0, 1], y[1, 2, 0] = 0, torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = solver(large, y, check_finite=False)
        assert_close(solution, solver(large, y, check_finite=False, callback=watched))
    assert solution.x.shape == y.shape
    assert solution.status[0][1] is Status.ZERO
    assert solution.status[1][2] is Status.NON_FINITE


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("solver", [lsconv.cgls, lsconv.lsqr, lsconv.lsmr])
def test_groups_have_their_own_damping_and_start(solver: Solver, start: bool, large: lsconv.Diagonal) -> None:
    damp = torch.tensor([[0.0, 0.1, 0.0, 0.5], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    x0 = 3 * data(large, 4) if start else None
    solution, whole = (
        solver(large, data(large, 2, 4), damp=damp, x0=x0, rtol=1e-12, callback=callback)
        for callback in (None, watched)
    )
    assert solution.damp.equal(whole.damp)
    assert solution.converged.all()
    torch.testing.assert_close(solution.x, whole.x, rtol=1e-9, atol=1e-10)


def test_groups_of_craig_have_their_own_damping(large: lsconv.Diagonal) -> None:
    damp = torch.tensor([0.0, 0.1, 0.0, 0.5])
    solve = lambda callback: lsconv.craig(large, data(large, 4), damp=damp, rtol=1e-12, callback=callback)
    torch.testing.assert_close(solve(None).x, solve(watched).x, rtol=1e-9, atol=1e-10)


def test_there_is_one_report_of_all_groups(large: lsconv.Diagonal) -> None:
    """And it counts the items of the whole batch."""
    y = data(large, 5)
    y[1] = 0
    with pytest.warns(
        lsconv.ConvergenceWarning, match=r"lsqr: 4 of 5 item\(s\).*\(batch item\(s\) 0, 2, 3, 4\)"
    ) as seen:
        lsconv.lsqr(large, y, max_iter=2)
    assert len(seen) == 1
    with pytest.raises(lsconv.ConvergenceError, match="4 of 5"):
        lsconv.lsqr(large, y, max_iter=2, raise_on_failure=True)


def test_derivatives_of_groups_are_those_of_the_whole_batch(large: lsconv.Diagonal) -> None:
    def gradients(callback: Any) -> tuple[Tensor, Tensor]:
        y, weight = data(large, 5).requires_grad_(), large.diagonal.clone().requires_grad_()
        lsconv.lsqr(lsconv.Diagonal(weight), y, damp=0.1, rtol=1e-13, callback=callback).x.square().sum().backward()
        assert y.grad is not None
        assert weight.grad is not None
        return y.grad, weight.grad

    for one, other in zip(gradients(None), gradients(watched), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------------- what is solved at once


def count(A: Any, y: Tensor, callback: Any = None, threads: int = 1, **arguments: Any) -> int:
    problem = prepare(A, y, **arguments)
    options = Options.of(problem, rtol=None, atol=0.0, max_iter=None, check_every=None, callback=callback,
                         progress=False, raise_on_failure=False)  # fmt: skip
    return batch_groups.group_size(problem, options, threads)


def test_a_group_is_what_the_caches_hold() -> None:
    """Those of all threads; two large items are not worth a group."""
    for threads, counts in ((1, (32, 8, 3, 1, 1)), (2, (32, 16, 7, 4, 1)), (64, (32, 32, 14, 8, 3))):
        for side, expected in zip((32, 64, 96, 128, 192), counts, strict=True):
            A = lsconv.Conv2d(torch.ones(8, 8, 3, 3), in_size=(side, side), padding=1)
            assert count(A, torch.zeros(1, *A.out_shape).expand(32, *A.out_shape), threads=threads) == expected


def test_what_is_read_once_for_a_batch_keeps_it_together() -> None:
    """A matrix, a preconditioner, what a function may hide, kernels of their own; and whoever watches."""
    A = lsconv.Conv2d(torch.ones(2, 2, 3, 3, dtype=torch.float64), in_size=(256, 257), padding=1)
    y = data(A, 5)
    assert count(A, y) == 1
    hidden = lsconv.FromFunctions(A.in_shape, A.out_shape, A.apply, A.adjoint, dtype=A.dtype)
    matrix = lsconv.Dense(torch.zeros(1, 1).expand(500, 1000))
    kernels = lsconv.Conv2d(A.weight.expand(5, *A.weight.shape), in_size=A.spatial_in, padding=1)
    P = lsconv.Diagonal(torch.ones(A.out_shape, dtype=A.dtype))
    for together in (count(hidden, y), count(kernels, y), count(A, y, M=P), count(A, y, N=P)):
        assert together == 5
    assert count(A, y, callback=watched) == 5
    assert count(matrix, torch.zeros(1, 500).expand(600, 500)) == 600


def test_items_of_little_damping_do_not_hold_up_the_others() -> None:
    """Most of a batch ends early, and only the group of its slowest item goes on."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    A = lsconv.Conv2d(weight, (256, 260), padding=1)
    damp = torch.cat([torch.full((7,), 20.0), torch.tensor([3.0])])
    products = 0

    def apply(x: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += x.shape[0] if x.ndim == 4 else 1
        return A(x)

    counted = lsconv.Conv2d(weight, (256, 260), padding=1)
    counted.apply = apply  # type: ignore[method-assign]
    solution = lsconv.lsmr(counted, torch.randn(8, *A.out_shape), damp=damp)
    assert products < 0.5 * 8 * int(solution.iterations.max())
