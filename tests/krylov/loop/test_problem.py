"""check_finite=False with NaN ends in a status: NON_FINITE and x = NaN for the item, its neighbours as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lsconv

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.ConvergenceWarning")
F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _reseeded() -> None:
    GENERATOR.manual_seed(0)  # whatever has run before


KERNEL = torch.randn(1, 1, 3, 3, dtype=F64, generator=GENERATOR)
A = lsconv.Conv2d(KERNEL, in_size=(8, 9), padding=1)
VALID = lsconv.Conv2d(KERNEL, in_size=(10, 11))
KEEP = torch.rand(A.out_shape, generator=GENERATOR) > 0.2
KEEP[0, 3, 3] = True
OPERATORS = {
    "same": A,
    "valid": VALID,
    "circular": lsconv.Conv2d(KERNEL, in_size=(8, 9), padding=1, padding_mode="circular"),
    "mask": lsconv.Mask(KEEP) @ A,
    "functions": lsconv.FromFunctions(A.in_shape, A.out_shape, A.apply, A.adjoint, dtype=F64),
    "a kernel each": lsconv.Conv2d(torch.stack([KERNEL, 2 * KERNEL, 3 * KERNEL]), (8, 9)),
}
KEY = {"check_finite": False}
SOLVES: dict[str, Callable[[lsconv.LinearOperator, Tensor], lsconv.Solution]] = {
    "lstsq": lambda A, y: lsconv.lstsq(A, y, **KEY),
    "lstsq, damp": lambda A, y: lsconv.lstsq(A, y, damp=0.3, **KEY),
    "lstsq, lsmr": lambda A, y: lsconv.lstsq(A, y, damp=0.3, method="lsmr", **KEY),
    "pinv.solve": lambda A, y: lsconv.pinv(A, damp=0.3).solve(y, **KEY),
    "tikhonov": lambda A, y: lsconv.tikhonov(A, y, 0.3, **KEY),
    "tikhonov, L": lambda A, y: lsconv.tikhonov(A, y, 0.3, L=lsconv.Gradient(A.in_shape), **KEY),
    "tikhonov, lsmr": lambda A, y: lsconv.tikhonov(A, y, 0.3, L=lsconv.Gradient(A.in_shape), method="lsmr", **KEY),
    "tikhonov, prior": lambda A, y: lsconv.tikhonov(A, y, 0.3, x_prior=torch.ones(A.in_shape, dtype=F64), **KEY),
    "total_variation": lambda A, y: lsconv.total_variation(A, y, 0.1, max_iter=20, **KEY),
    "refine": lambda A, y: lsconv.refine(A, y, damp=0.3, **KEY),
    **{
        name: lambda A, y, name=name: getattr(lsconv, name)(A, y, **KEY, max_iter=50)
        for name in ("lsmr", "lsqr", "cgls", "craig", "hybrid")
    },
    **{
        f"{name}, damp": lambda A, y, name=name: getattr(lsconv, name)(A, y, damp=0.3, **KEY)
        for name in ("lsmr", "lsqr", "cgls", "craig")
    },
    **{
        name: lambda A, y, name=name: getattr(lsconv, name)(
            A.H @ A + lsconv.Identity(A.in_shape), A.H.apply(y), **KEY, max_iter=50
        )
        for name in ("cg", "minres", "gmres")
    },
}


def data(A: lsconv.LinearOperator, items: int, bad: float) -> tuple[Tensor, Tensor]:
    y = torch.randn(items, *A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(items))
    nonfinite = y.clone()
    nonfinite[0, 0, 3, 3] = bad
    return y, nonfinite


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", SOLVES)
def test_the_item_is_non_finite_and_its_neighbours_are_solved(name: str, operator: str) -> None:
    A = OPERATORS[operator]
    if name == "refine" and operator == "functions":
        pytest.skip("these functions take float64 alone")
    for items, bad in ((1, torch.inf), (3, torch.nan)):
        if A.batch_shape and items == 1:
            continue
        y, nonfinite = data(A, items, bad)
        solution = SOLVES[name](A, nonfinite)
        assert solution.status[0] is lsconv.Status.NON_FINITE
        assert bool(solution.x[0].isnan().all())
        assert not bool(solution.converged[0])
        healthy = SOLVES[name](A, torch.cat([0 * y[:1], y[1:]]))  # what stands in for the item
        assert torch.equal(solution.x[1:], healthy.x[1:])
        assert torch.equal(solution.codes[1:], healthy.codes[1:])


def test_nothing_but_nan_is_non_finite_too() -> None:
    for name, solve in SOLVES.items():
        solution = solve(A, torch.full((2, *A.out_shape), torch.nan, dtype=F64))
        assert solution.status == [lsconv.Status.NON_FINITE] * 2, name


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_rule_for_damp_meets_nan(operator: str) -> None:
    B = OPERATORS[operator]
    _, nonfinite = data(B, 3, torch.nan)
    for rule in ("gcv", "lcurve"):
        solution = lsconv.tikhonov(B, nonfinite, rule, check_finite=False)
        assert solution.status[0] is lsconv.Status.NON_FINITE
        assert bool(solution.x[1:].isfinite().all())


def test_pseudo_inverses_give_nan_for_the_item_alone() -> None:
    _, nonfinite = data(A, 3, torch.nan)
    for inverse in (lsconv.pinv(A), lsconv.pinv(A, damp=0.3), lsconv.pinv(A, damp=0.3).H):
        x = inverse(nonfinite)
        assert bool(x[0].isnan().all())
        assert bool(x[1:].isfinite().all())


def test_gradients_of_the_neighbours_are_finite() -> None:
    _, nonfinite = data(A, 3, torch.nan)
    for solve in (
        lambda B, y: lsconv.lstsq(B, y, damp=0.3, check_finite=False).x,
        lambda B, y: lsconv.lsqr(B, y, damp=0.3, check_finite=False).x,
    ):
        y = nonfinite.clone().requires_grad_()
        (g,) = torch.autograd.grad(solve(A, y)[1:].sum(), y)
        assert bool(g[1:].isfinite().all())
