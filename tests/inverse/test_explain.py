"""What answers a problem, said in words: the plan that "auto" takes, why, and what the others take."""

from __future__ import annotations

import pytest
import torch

import lsconv

F64 = torch.float64


def _disk(size: int = 7) -> torch.Tensor:
    axis = torch.arange(float(size)) - size // 2
    disk = (axis[:, None] ** 2 + axis**2 <= (size / 2) ** 2).double()
    return (disk / disk.sum())[None, None]


@pytest.mark.parametrize(
    ("A", "damp", "plan", "reason"),
    [
        (lsconv.Conv2d(torch.ones(2, 3, 1, 1, dtype=F64), (9, 9)), 0.0, "PatchPlan", "disjoint patches"),
        (lsconv.Conv2d(torch.ones(1, 1, 5, 5, dtype=F64), (40, 40)), 0.1, "SeparableThenBorderPlan", "product"),
        (lsconv.Conv2d(_disk(), (64, 64), padding=3, padding_mode="circular"), 0.1, "FourierPlan", "circular"),
        (lsconv.Conv2d(_disk(), (64, 64)), 0.1, "BorderPlan", "factors of the border cost"),
        (lsconv.Conv2d(_disk(), (64, 64)).H, 0.1, "AdjointPlan", "adjoint of a convolution"),
        (lsconv.Mask(torch.arange(58 * 58).reshape(1, 58, 58) % 900 > 0) @ lsconv.Conv2d(_disk(), (64, 64)), 0.1,
         "Missing", "outputs are missing"),
        (lsconv.Conv2d(_disk(), (64, 64), padding=3, padding_mode="replicate"), 0.0, "KrylovPlan", "only applies A"),
    ],
)  # fmt: skip
def test_the_reason_is_that_of_the_plan_taken(A: lsconv.LinearOperator, damp: float, plan: str, reason: str) -> None:
    explanation = lsconv.explain(A, damp)
    assert explanation.plan.startswith(plan)
    assert reason in " ".join(explanation.reasons)
    assert explanation.measured == {}
    assert str(explanation).splitlines()[0] == explanation.plan


def test_measured_methods_tell_their_seconds_or_why_they_do_not_serve() -> None:
    explanation = lsconv.explain(lsconv.Conv2d(_disk(), (32, 32)), 0.1, measure=True)
    assert explanation.measured["auto"].startswith("setup ")
    assert explanation.measured["border"].startswith("setup ")
    assert explanation.measured["fourier"].startswith("does not serve: ")
    assert "separable kernel" in explanation.measured["separable"]


def test_a_penalty_has_its_own_methods() -> None:
    A = lsconv.Conv2d(_disk(), (32, 32))
    explanation = lsconv.explain(A, 0.1, lsconv.Gradient(A.in_shape, dtype=F64), measure=True)
    assert explanation.plan.startswith("StackedPlan")
    assert set(explanation.measured) == {"auto", "fourier", "border", "lsmr"}


def test_explain_refuses_what_lstsq_refuses() -> None:
    with pytest.raises(lsconv.DtypeError):
        lsconv.explain(lsconv.Conv2d(torch.ones(1, 1, 3, 3, dtype=torch.float16), (8, 8)))
