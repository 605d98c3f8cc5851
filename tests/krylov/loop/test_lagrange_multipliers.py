"""Multipliers of least-norm answers: what is found along with x is what a solve would find, and saves that solve."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lsconv
from lsconv.krylov.loop.lagrange_multipliers import collect_multipliers

D = torch.float64
METHODS = ["lsqr", "lsmr", "cgls", "craig"]
every_method = pytest.mark.parametrize("name", METHODS)


def _matrix(batch: tuple[int, ...], condition: float, dtype: torch.dtype, rank: int = 12) -> Tensor:
    """12 x 20, with given singular values."""
    wide = torch.complex128 if dtype.is_complex else D
    U = torch.linalg.qr(torch.randn(*batch, 12, 12, dtype=wide))[0]
    V = torch.linalg.qr(torch.randn(*batch, 20, 12, dtype=wide))[0]
    s = condition ** -torch.linspace(0, 1, 12, dtype=D)
    s[rank:] = 0
    return (U * s) @ V.mH


def _exact(matrix: Tensor, y: Tensor) -> Tensor:
    pinv = torch.linalg.pinv(matrix, rtol=1e-10)
    return (pinv.mH @ (pinv @ y[..., None]))[..., 0]


@every_method
@pytest.mark.parametrize(
    ("dtype", "batch", "rank", "condition"),
    [  # every pair of two of them, but for single precision and the larger condition with a batch
        (torch.float32, (), 12, 1e3),
        (torch.float32, (3,), 7, 10.0),
        (D, (), 7, 1e3),
        (D, (3,), 12, 10.0),
        (torch.complex128, (), 12, 10.0),
        (torch.complex128, (3,), 7, 1e3),
    ],
)
def test_multipliers_equal_those_of_the_dense_pseudo_inverse(
    name: str, dtype: torch.dtype, batch: tuple[int, ...], rank: int, condition: float
) -> None:
    eps, found, allowed = torch.finfo(dtype).eps, 0.0, 0.0
    for _ in range(8):
        matrix = _matrix(batch, condition, dtype, rank)
        y = (matrix @ torch.randn(20, 1, dtype=matrix.dtype))[..., 0]
        with collect_multipliers(True) as kept:
            x = getattr(lsconv, name)(matrix.to(dtype), y.to(dtype)).x
        z, exact = kept.of(x), _exact(matrix, y)
        assert z is not None
        # x has rtol times the condition; z, of x, that condition once more in the worst case
        assert (z - exact).norm() <= 10 * eps**0.75 * condition**2 * exact.norm()
        assert ((matrix.to(dtype).mH @ z[..., None])[..., 0] - x).norm() <= 10 * eps**0.75 * x.norm()
        solved = getattr(lsconv, name)(matrix.to(dtype).mH, x).x
        found += float((z - exact).norm())
        allowed += float(2 * (solved - exact).norm() + 100 * eps * condition * exact.norm())
    assert found <= allowed  # a solve for one of them may be more accurate by chance


@every_method
def test_scaled_problems_and_mixed_batches_keep_their_digits(name: str) -> None:
    matrix = _matrix((), 10.0, D)
    y = torch.randn(3, 12, dtype=D)
    for of_a, of_y in ((1e-14, 1.0), (1e14, 1e-14), (1.0, 1e14)):
        with collect_multipliers(True) as kept:
            x = getattr(lsconv, name)(of_a * matrix, of_y * y).x
        z = kept.of(x)
        assert z is not None
        torch.testing.assert_close(z * (of_a**2 / of_y), _exact(matrix, y), rtol=1e-9, atol=1e-9)
    y[0], y[1, 3] = 0, torch.nan
    with collect_multipliers(True) as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = getattr(lsconv, name)(matrix, y, check_finite=False).x
    z = kept.of(x)
    assert z is not None
    assert not z[0].any()
    torch.testing.assert_close(z[2], _exact(matrix, y[2]), rtol=1e-9, atol=1e-9)


@every_method
def test_nothing_is_kept_where_it_would_be_wrong_or_is_not_wanted(name: str) -> None:
    matrix, y = _matrix((), 10.0, D, rank=7), torch.randn(12, dtype=D)
    consistent = matrix @ torch.randn(20, dtype=D)
    solve = getattr(lsconv, name)
    with collect_multipliers(True) as kept:
        if name != "craig":  # which is for consistent systems
            assert kept.of(solve(matrix, y).x) is None  # outside the range
        assert kept.of(solve(matrix.mT, matrix.mT @ torch.randn(12, dtype=D)).x) is None  # tall
        assert kept.of(solve(matrix, consistent, damp=0.1).x) is None
        assert kept.of(solve(matrix, consistent, x0=torch.randn(20, dtype=D)).x) is None
        assert kept.of(torch.zeros(20, dtype=D)) is None
        assert kept.of(solve(matrix, consistent).x) is not None
    with collect_multipliers(False) as kept:
        assert kept.of(solve(matrix, consistent).x) is None


class Counted:
    """A wide matrix as an operator of user functions, with a parameter, whose applications are counted."""

    def __init__(self, matrix: Tensor) -> None:
        self.calls = 0
        self.parameter = matrix.clone().requires_grad_()
        self.A = lsconv.FromFunctions(
            (matrix.shape[1],), (matrix.shape[0],), self._apply, self._adjoint, dtype=matrix.dtype,
            parameters=(self.parameter,),
        )  # fmt: skip

    def _apply(self, x: Tensor, matrix: Tensor) -> Tensor:
        self.calls += 1
        return x @ matrix.mT

    def _adjoint(self, y: Tensor, matrix: Tensor) -> Tensor:
        self.calls += 1
        return y @ matrix.conj()

    def count(self) -> int:
        """Calls since the last count."""
        calls, self.calls = self.calls, 0
        return calls


SOLVES: dict[str, Any] = {
    "lsqr": lambda A, y: lsconv.lsqr(A, y).x,
    "lsmr": lambda A, y: lsconv.lsmr(A, y).x,
    "cgls": lambda A, y: lsconv.cgls(A, y).x,
    "craig": lambda A, y: lsconv.craig(A, y).x,
    "lstsq": lambda A, y: lsconv.lstsq(A, y).x,
    "pinv": lambda A, y: lsconv.pinv(A)(y),
    "pinv.solve": lambda A, y: lsconv.pinv(A).solve(y).x,
}


@pytest.mark.parametrize("name", SOLVES)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_backward_of_a_wide_operator_costs_one_solve(name: str, batch: tuple[int, ...]) -> None:
    counted = Counted(_matrix((), 30.0, D))
    y = torch.randn(*batch, 12, dtype=D, requires_grad=True)
    x = SOLVES[name](counted.A, y)
    forward = counted.count()
    found = torch.autograd.grad(x, (y, counted.parameter), g := torch.randn_like(x))
    assert counted.count() <= 1.5 * forward
    dense = (torch.linalg.pinv(counted.parameter) @ y[..., None])[..., 0]
    for got, expected in zip(found, torch.autograd.grad(dense, (y, counted.parameter), g), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@every_method
def test_forward_mode_costs_the_answer_and_one_solve(name: str) -> None:
    counted, y = Counted(_matrix((), 30.0, D)), torch.randn(12, dtype=D)
    alone = SOLVES[name](counted.A, y)
    once = counted.count()
    assert not alone.isnan().any()
    tangent = torch.randn(12, 20, dtype=D)
    with torch.autograd.forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        dual = torch.autograd.forward_ad.make_dual(counted.parameter.detach(), tangent)
        moving = counted.A.with_parameters([dual])
        found = torch.autograd.forward_ad.unpack_dual(SOLVES[name](moving, y)).tangent
    assert counted.count() <= 2.5 * once
    expected = torch.func.jvp(lambda m: torch.linalg.pinv(m) @ y, (counted.parameter.detach(),), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@every_method
def test_rank_deficient_wide_gradients_equal_the_dense_ones(name: str) -> None:
    # perturbations that keep the rank: both factors vary
    left, right = torch.randn(12, 5, dtype=D, requires_grad=True), torch.randn(5, 20, dtype=D, requires_grad=True)
    y = torch.randn(2, 12, dtype=D, requires_grad=True)
    consistent = y @ (left @ torch.linalg.pinv(left)).detach().mT
    for data in (consistent,) if name == "craig" else (consistent, y):
        x = SOLVES[name](lsconv.Dense(left @ right), data)
        dense = (torch.linalg.pinv(right) @ torch.linalg.pinv(left) @ data[..., None])[..., 0]
        g = torch.randn_like(x)
        pairs = zip(*(torch.autograd.grad(t, (left, right, y), g, retain_graph=True) for t in (x, dense)), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@every_method
def test_second_derivatives_know_that_they_depend_on_everything(name: str) -> None:
    matrix, y = torch.randn(2, 4, dtype=D, requires_grad=True), torch.randn(2, dtype=D, requires_grad=True)

    def answer(matrix: Tensor, y: Tensor) -> Tensor:
        x: Tensor = getattr(lsconv, name)(matrix, y, rtol=1e-14).x
        return x

    assert torch.autograd.gradgradcheck(answer, (matrix, y), fast_mode=True)


@every_method
@pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
def test_multipliers_are_freed_with_the_graph_and_do_not_grow_with_the_iterations(name: str) -> None:
    matrix = _matrix((), 1e4, D).requires_grad_()
    y, sizes = torch.randn(12, dtype=D, requires_grad=True), []
    for limit in (3, 300):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            x = getattr(lsconv, name)(matrix, y, rtol=1e-9, max_iter=limit).x
        sizes.append(sum(kept))
        del x
        gc.collect()
    assert sizes[1] <= sizes[0] + 12 * 8


@pytest.mark.parametrize("name", ["lsqr", "lsmr", "cgls", "lstsq"])
@pytest.mark.parametrize(("rows", "solves"), [(40, 3), (60, 5)])
def test_backward_of_a_singular_operator_does_not_search_for_an_inverse_without_end(
    name: str, rows: int, solves: int
) -> None:
    left, right = torch.randn(rows, 12, dtype=D), torch.randn(12, 40, dtype=D)
    counted, y = Counted(left @ right), torch.randn(rows, dtype=D, requires_grad=True)
    x = SOLVES[name](counted.A, y)
    forward = counted.count()
    (found,) = torch.autograd.grad(x, counted.parameter, g := torch.randn_like(x))
    assert counted.count() <= 1.5 * solves * forward
    matrix = left @ right
    pinv = torch.linalg.pinv(matrix, rtol=1e-9)
    x, u = pinv @ y.detach(), pinv.mT @ g
    q, z = pinv @ u, pinv.mT @ x
    r, w = y.detach() - matrix @ x, g - matrix.mT @ u
    expected = -torch.outer(u, x) + torch.outer(r, q) + torch.outer(z, w)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@every_method
def test_a_large_batch_has_them_all(name: str) -> None:
    """``x = A^H z``, and no part of z is left out."""
    diagonal = torch.linspace(1, 2, 120_000, dtype=D)
    A = lsconv.Crop((120_000,), 10_000, 90_000) @ lsconv.Diagonal(diagonal)
    y = A(torch.randn(2, 3, *A.in_shape, dtype=D))
    with collect_multipliers(True) as kept:
        z = kept.of(getattr(lsconv, name)(A, y, rtol=1e-12).x)
    assert z is not None
    torch.testing.assert_close(z, y / diagonal[10_000:100_000] ** 2, rtol=1e-8, atol=1e-9)
