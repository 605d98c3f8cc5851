"""The rules for operators made of others: where each has a plan, where none, and that its answer is the dense one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.inverse.plans.composed import measured_rows, reduced, transposed, trimmed, varying
from lsconv.inverse.plans.request import PlanRequest, Rule
from lsconv.inverse.route import route

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
BLUR = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=F64, generator=GENERATOR), (9, 10))
KEEP = torch.ones(BLUR.out_shape, dtype=torch.bool)
KEEP[0, 2, 3] = KEEP[0, 5, 6] = False
PADDED = torch.nn.functional.pad(BLUR.weight, (1, 2, 0, 1))
MADE_OF_OTHERS: dict[str, tuple[Rule, lsconv.LinearOperator]] = {
    "margins of zeros": (reduced, lsconv.Conv2d(PADDED, (9, 10))),
    "a kernel along one axis": (reduced, lsconv.Conv2d(BLUR.weight[:, :, :1], (9, 10))),
    "margins of zeros, shapes kept": (
        trimmed,
        lsconv.Conv2d(torch.nn.functional.pad(BLUR.weight, (1, 1, 1, 1)), (9, 10), padding=2),
    ),
    "mask": (measured_rows, lsconv.Mask(KEEP) @ BLUR),
    "weights": (measured_rows, lsconv.Diagonal(0.5 + torch.rand(BLUR.out_shape, dtype=F64)) @ BLUR),
    "adjoint": (transposed, BLUR.H),
}


def request(**options: Any) -> PlanRequest:
    def choose(A: lsconv.LinearOperator, inner: PlanRequest) -> Any:
        return route(A, inner.damp, method=inner.method)

    return PlanRequest(choose, **{"damp": 0.3, "method": "auto", **options})


@pytest.mark.parametrize("name", MADE_OF_OTHERS)
def test_the_plan_of_a_rule_gives_the_dense_answer(name: str) -> None:
    rule, A = MADE_OF_OTHERS[name]
    plan = rule(A, request())
    assert plan is not None
    y = torch.randn(A.out_shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    y = torch.where(KEEP, y, 0) if name == "mask" else y
    D = A.to_dense()
    exact = torch.linalg.solve(D.mT @ D + 0.3**2 * torch.eye(A.in_numel, dtype=F64), D.mT @ y.flatten())
    torch.testing.assert_close(plan.solve(y).x.flatten(), exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rule", [reduced, trimmed, measured_rows, transposed, varying])
def test_no_rule_has_a_plan_for_an_operator_that_is_not_made_of_others(rule: Rule) -> None:
    assert rule(BLUR, request()) is None
    assert rule(lsconv.Dense(torch.eye(3, dtype=F64)), request()) is None


@pytest.mark.parametrize(
    "options",
    [{"method": "lsmr"}, {"needs_krylov": True}, {"damp": 0.0, "rcond": 1e-6}],
    ids=["method", "start", "rcond"],
)
@pytest.mark.parametrize("name", ["mask", "weights", "adjoint"])
def test_no_plan_is_made_of_another_that_could_not_do_what_is_asked(name: str, options: dict[str, Any]) -> None:
    rule, A = MADE_OF_OTHERS[name]
    assert rule(A, request(**options)) is None
