"""Separable kernels solved axis by axis first: when the border's factors take over, and that the answers stay."""

from __future__ import annotations

import math

import pytest
import torch

import lsconv
from lsconv.border.plan import BorderPlan
from lsconv.inverse.plans.small_matrices import SeparableThenBorderPlan
from tests.oracles import dense_tikhonov


def blur(size: int, channels: int = 1, dtype: torch.dtype = torch.float32, padding: int = 0) -> lsconv.Convolution:
    u = torch.tensor([1.0, 3.0, 4.0, 3.0, 1.0], dtype=torch.float64) / 12
    weight = torch.outer(u, u).expand(channels, 1, 5, 5).contiguous().to(dtype)
    return lsconv.Conv2d(weight, (size, size), groups=channels, padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solves_answers_and_adjoints_go_over_to_the_border_and_stay_what_they_were(dtype: torch.dtype) -> None:
    A = blur(20, 2, dtype)
    generator = torch.Generator().manual_seed(1)
    y, v = (torch.randn(2, *shape, dtype=dtype, generator=generator) for shape in (A.out_shape, A.in_shape))
    exact = dense_tikhonov(A, y, 0.1).flatten(1)
    bound = 1e-5 if dtype == torch.float32 else 1e-9
    inverse = lsconv.pinv(A, damp=0.1)
    plan = inverse.plan
    assert isinstance(plan, SeparableThenBorderPlan)
    before = inverse.adjoint(v)
    assert not plan.exhausted
    plan._paying_solves = plan.solved
    assert plan.exhausted
    solved = plan.solved
    solution = inverse.solve(y)
    assert solution.converged.all()
    for x in (solution.x, inverse(y)):
        assert (x.double().flatten(1) - exact).norm() < bound * exact.norm()
    assert (inverse.adjoint(v) - before).norm() < bound * before.norm()
    assert plan.solved == solved  # it was not asked
    assert inverse.fallback is not None
    border = inverse.fallback.plan
    assert isinstance(border, BorderPlan)
    assert border.inverse.direct is not None
    other = inverse.with_damp(0.3)
    assert not other.plan.exhausted
    assert (other(y).double().flatten(1) - dense_tikhonov(A, y, 0.3).flatten(1)).norm() < bound * exact.norm()


def test_the_border_is_priced_where_it_has_factors_and_never_without_damping() -> None:
    large = lsconv.pinv(blur(400, 3), damp=0.1).plan
    assert isinstance(large, SeparableThenBorderPlan)
    assert 0 < large._paying_solves < math.inf
    for A, damp in (
        (blur(24), 0.1),
        (blur(24, dtype=torch.float64, padding=2), 0.1),
        (blur(40, dtype=torch.float64), 0.0),
    ):
        plan = lsconv.pinv(A, damp=damp).plan
        assert isinstance(plan, SeparableThenBorderPlan)
        assert plan._paying_solves == math.inf


def test_without_factors_of_the_border_the_plan_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    A = blur(24)
    inverse = lsconv.pinv(A, damp=0.1)
    y = torch.randn(A.out_shape, generator=torch.Generator().manual_seed(1))
    first = inverse(y)
    assert isinstance(inverse.plan, SeparableThenBorderPlan)
    inverse.plan._paying_solves = 1
    monkeypatch.setattr("lsconv.border.normal_inverse.BorderInverse.factorise_if_cheaper", lambda *_: None)
    assert inverse.plan.exhausted
    solution = inverse.solve(y)
    assert solution.converged
    assert torch.equal(solution.x, first)
