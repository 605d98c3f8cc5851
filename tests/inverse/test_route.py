"""route: which method answers which operator, and what it says when one cannot."""

from __future__ import annotations

import pytest
import torch

import lsconv
from lsconv.border.capacitance_plan import CapacitancePlan
from lsconv.border.plan import BorderPlan
from lsconv.errors import ArgumentError, ArgumentTypeError, ConvergenceWarning, DtypeError, MethodError, PlanMemoryError
from lsconv.fourier.circulant import FourierPlan
from lsconv.inverse.plans.krylov_plan import KrylovPlan
from lsconv.inverse.route import RULES, route


def conv(padding: object = 0, mode: str = "zeros", stride: int = 1, size: int = 20) -> lsconv.Convolution:
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    return lsconv.Conv2d(weight, (size, size), padding=padding, padding_mode=mode, stride=stride)


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid", ((0, 2), (1, 0))])
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_padding_goes_to_the_border(padding: object, stride: int) -> None:
    if padding == "same" and stride == 2:
        pytest.skip("torch has no strided 'same'")
    square = padding in (1, "same") and stride == 1
    for damp in (0.0, 0.1):
        assert isinstance(
            route(conv(padding, stride=stride), damp), CapacitancePlan if square and damp == 0 else BorderPlan
        )


def test_a_square_operator_is_iterated_on_where_factorising_costs_more() -> None:
    weight = torch.zeros(1, 1, 31, 31)
    weight[..., 15, 15], weight[..., 0, 0] = 4.0, 1.0
    A = lsconv.Conv2d(weight, (900, 900), padding=15)
    with pytest.raises(MethodError, match="cost more to factorise"):
        CapacitancePlan(A, refuse_if_slower=True)


def test_uncropped_circular_goes_to_fourier_and_cropped_to_the_border() -> None:
    assert isinstance(route(conv(1, "circular")), FourierPlan)
    assert isinstance(route(conv(1, "circular", stride=2)), FourierPlan)
    assert isinstance(route(conv(0, "circular")), BorderPlan)


@pytest.mark.parametrize(
    "A", [conv(1, "reflect"), conv(1, "replicate"), conv(1, "circular", stride=3), lsconv.Dense(torch.randn(5, 4))]
)
def test_the_rest_goes_to_lsmr(A: lsconv.LinearOperator) -> None:
    plan = route(A)
    assert isinstance(plan, KrylovPlan)
    assert plan.method == "lsmr"


def test_no_preconditioner_without_damping_because_it_would_change_the_answer() -> None:
    plan = route(conv(1, "reflect"))
    assert isinstance(plan, KrylovPlan)
    assert plan.M is None
    assert plan.N is None
    blur = lsconv.Conv2d(
        torch.randn(1, 1, 3, 3, dtype=torch.float64), (20, 20), padding=1, padding_mode="reflect", stride=2
    )
    damped = route(blur, 0.1)
    assert isinstance(damped, KrylovPlan)
    assert (damped.M is None) != (damped.N is None)


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls"])
def test_every_krylov_method_finds_what_the_border_finds(method: str) -> None:
    A = lsconv.Conv2d(torch.randn(2, 3, 3, 3, dtype=torch.float64), (9, 9))
    y = torch.randn(2, *A.out_shape, dtype=A.dtype)
    expected = lsconv.lstsq(A, y, method="border").x
    torch.testing.assert_close(lsconv.lstsq(A, y, method=method).x, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("A", [conv(1, "reflect"), conv(1, "circular", stride=3), lsconv.Dense(torch.randn(5, 4))])
def test_border_refuses_what_it_cannot_serve_and_names_a_method_that_can(A: lsconv.LinearOperator) -> None:
    with pytest.raises(MethodError, match="lsmr"):
        route(A, method="border")


def test_fourier_refuses_zero_padding_and_names_the_border() -> None:
    with pytest.raises(MethodError, match="border"):
        route(conv(), method="fourier")
    with pytest.raises(MethodError, match="lsmr"):
        route(lsconv.Dense(torch.randn(5, 4)), method="fourier")


def test_unknown_method_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"border.*lsmr.*'newton'"):
        route(conv(), method="newton")


def test_unknown_preconditioner_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="circulant"):
        route(conv(1, "reflect"), preconditioner="ilu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_every_method(dtype: torch.dtype) -> None:
    A = lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=dtype), (8, 8), padding=1)
    for method in ("auto", "border", "lsmr"):
        with pytest.raises(DtypeError, match="float32"):
            route(A, method=method)


# ------------------------------------------------------------------ memory


def test_a_plan_that_does_not_fit_names_the_bytes_and_the_alternatives() -> None:
    with pytest.raises(PlanMemoryError, match=r"needs about \S+ bytes.*1e\+03 are allowed.*lsmr.*float32") as caught:
        route(conv(), method="border", memory_limit=1000)
    assert isinstance(caught.value, MemoryError)


def test_fourier_keeps_to_the_memory_limit() -> None:
    A = lsconv.Conv1d(torch.randn(1, 1, 3), 8, padding=1, padding_mode="circular")
    with pytest.raises(PlanMemoryError, match=r'method="fourier".*100 are allowed'):
        route(A, method="fourier", memory_limit=100)
    assert isinstance(route(A, memory_limit=10_000), FourierPlan)


@pytest.mark.parametrize("circular", [False, True])
def test_auto_falls_back_to_lsmr_with_a_warning_and_the_same_answer(circular: bool) -> None:
    A = conv()
    if circular:
        weight = torch.tensor([[[4.0, 1.0, -1.0]]], dtype=A.dtype)
        A = lsconv.Conv1d(weight, 40, padding=1, padding_mode="circular")
    y = torch.randn(A.out_shape, dtype=A.dtype)
    expected = lsconv.lstsq(A, y).x
    with pytest.warns(ConvergenceWarning, match="falling back to LSMR"):
        x = lsconv.lstsq(A, y, memory_limit=1000).x
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [16, 40])
def test_factors_kept_fit_the_estimate_the_limit_is_held_against(padding: int, size: int) -> None:
    from lsconv.border.cost_model import plan_bytes

    A = conv(padding, size=size)
    plan = route(A, method="border")
    assert isinstance(plan, CapacitancePlan if padding == 1 else BorderPlan)
    assert getattr(plan, "inverse", plan).nbytes <= plan_bytes(A)


def test_the_table_lists_the_rules_in_the_order_in_which_they_are_asked() -> None:
    table = (route.__doc__ or "").split("=\n")[2]
    listed = [line.split()[0] for line in table.splitlines() if line.startswith("    ") and line[4].isalpha()]
    assert listed == [rule.__name__ for rule in RULES]  # type: ignore[attr-defined]
