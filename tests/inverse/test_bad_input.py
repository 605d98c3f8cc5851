"""What does not fit is refused before anything is computed, in words that help; what is merely unusual is answered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConvergenceError,
    ConvergenceWarning,
    DeviceError,
    DtypeError,
    LsconvError,
    NonFiniteError,
    ShapeError,
)
from lsconv.krylov.loop.solution import Status

METHODS = ("auto", "border", "lsmr")
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def A() -> lsconv.Convolution:  # noqa: N802 - the field's name
    return lsconv.Conv2d(torch.randn(2, 3, 3, 3, dtype=torch.float64), (8, 7))


@pytest.fixture
def y(A: lsconv.Convolution) -> torch.Tensor:
    return torch.randn(4, *A.out_shape, dtype=A.dtype)


@every_method
def test_wrong_shape_names_both_shapes(A: Any, y: torch.Tensor, method: str) -> None:
    with pytest.raises(ShapeError, match=r"\(4, 2, 6, 4\).*\(2, 6, 5\)"):
        lsconv.lstsq(A, y[..., :-1], method=method)


@every_method
def test_messages_name_the_argument_as_the_caller_knows_it(A: Any, y: torch.Tensor, method: str) -> None:
    with pytest.raises(ShapeError, match=r"^y: "):
        lsconv.lstsq(A, y[..., :-1], method=method)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64])
def test_wrong_dtype_names_both_dtypes(A: Any, y: torch.Tensor, method: str, dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=rf"{dtype}.*torch.float64"):
        lsconv.lstsq(A, y.to(dtype), method=method)


@every_method
def test_wrong_device_names_both_devices(A: Any, y: torch.Tensor, method: str) -> None:
    with pytest.raises(DeviceError, match=r"meta.*cpu"):
        lsconv.lstsq(A, y.to("meta"), method=method)


@every_method
def test_a_list_is_not_a_tensor(A: Any, method: str) -> None:
    with pytest.raises(ArgumentTypeError, match="list"):
        lsconv.lstsq(A, [1.0, 2.0], method=method)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_data_are_refused_and_the_items_named(A: Any, y: torch.Tensor, method: str, bad: float) -> None:
    y[1, 0, 0, 0] = y[3, 1, 2, 2] = bad
    with pytest.raises(NonFiniteError, match="1, 3"):
        lsconv.lstsq(A, y, method=method)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_items_are_isolated_on_request(A: Any, y: torch.Tensor, method: str, bad: float) -> None:
    before = lsconv.lstsq(A, y, method=method)
    y[2, 0, 0, 0] = bad
    with pytest.warns(ConvergenceWarning, match="2"):
        after = lsconv.lstsq(A, y, method=method, check_finite=False)
    assert after.status[2] is Status.NON_FINITE
    assert after.x[2].isnan().all()
    assert after.residual_norm[2].isnan()
    for item in (0, 1, 3):
        assert torch.equal(before.x[item], after.x[item])


@every_method
@pytest.mark.parametrize("damp", [-1.0, float("nan"), float("inf"), torch.tensor([1.0, -1.0, 0.0, 0.0])])
def test_negative_or_non_finite_damp_is_refused(A: Any, y: torch.Tensor, method: str, damp: Any) -> None:
    with pytest.raises(ArgumentError, match="damp"):
        lsconv.lstsq(A, y, damp=damp, method=method)
    with pytest.raises(ArgumentError, match="damp"):
        lsconv.pinv(A, damp=damp, method=method)


@every_method
def test_the_name_of_a_rule_is_sent_to_the_functions_that_take_one() -> None:
    A = lsconv.Conv2d(torch.ones(1, 1, 3, 3), (8, 8))
    with pytest.raises(ArgumentTypeError, match="choose_damp"):
        lsconv.lstsq(A, torch.zeros(A.out_shape), damp="gcv")  # type: ignore[arg-type]


@pytest.mark.parametrize("damp", ["strong", None, torch.tensor(1.0 + 0j)])
def test_damp_of_another_kind_is_refused(A: Any, y: torch.Tensor, method: str, damp: Any) -> None:
    with pytest.raises((ArgumentTypeError, DtypeError), match="damp"):
        lsconv.lstsq(A, y, damp=damp, method=method)
    with pytest.raises((ArgumentTypeError, DtypeError), match="damp"):
        lsconv.pinv(A, damp=damp, method=method)


@every_method
def test_damp_that_does_not_broadcast_is_refused(A: Any, y: torch.Tensor, method: str) -> None:
    with pytest.raises(ShapeError, match="damp"):
        lsconv.lstsq(A, y, damp=torch.ones(3), method=method)


@every_method
@pytest.mark.parametrize(
    "arguments", [{"rtol": -1.0}, {"rtol": float("nan")}, {"atol": -1.0}, {"max_iter": -1}, {"max_iter": 1.5}]
)
def test_tolerances_and_limits_outside_their_domain_are_refused(
    A: Any, y: torch.Tensor, method: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=next(iter(arguments))):
        lsconv.lstsq(A, y, method=method, **arguments)


@every_method
def test_an_option_nobody_knows_is_named(A: Any, y: torch.Tensor, method: str) -> None:
    with pytest.raises((LsconvError, TypeError), match="colour"):
        lsconv.lstsq(A, y, method=method, colour="red")


def test_krylov_options_are_refused_by_the_border(A: Any, y: torch.Tensor) -> None:
    with pytest.raises(LsconvError, match=r"x0.*lsmr"):
        lsconv.lstsq(A, y, x0=torch.zeros(4, *A.in_shape, dtype=A.dtype))


def test_non_finite_weight_is_refused() -> None:
    weight = torch.randn(2, 3, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="weight"):
        lsconv.lstsq(lsconv.Conv2d(weight, (8, 8)), torch.randn(2, 6, 6))


def test_raise_on_failure_raises_what_would_be_a_warning() -> None:
    A = lsconv.Conv2d(torch.randn(4, 4, 3, 3), (32, 32), padding=1)  # square, nearly singular: float32 cannot
    y = torch.randn(A.out_shape)
    with pytest.warns(ConvergenceWarning):
        solution = lsconv.lstsq(A, y, method="lsmr", max_iter=2)
    assert not solution.converged
    with pytest.raises(ConvergenceError):
        lsconv.lstsq(A, y, method="lsmr", max_iter=2, raise_on_failure=True)


# ------------------------------------------------------------------ unusual, and answered


@every_method
def test_zero_data_are_answered_by_zero_at_once(A: Any, y: torch.Tensor, method: str) -> None:
    solution = lsconv.lstsq(A, torch.zeros_like(y), method=method)
    assert all(status is Status.ZERO for status in solution.status)
    assert not solution.x.any()
    assert not solution.iterations.any()
    assert solution.converged.all()


@every_method
def test_memory_layout_of_the_data_does_not_matter(A: Any, y: torch.Tensor, method: str) -> None:
    expected = lsconv.lstsq(A, y, method=method).x
    tolerance = 1e-9 * float(expected.abs().max())
    strided = torch.stack([y, y], -1)[..., 0]
    for other in (y.contiguous(memory_format=torch.channels_last), strided, y.mT.contiguous().mT, y.flip(-1).flip(-1)):
        torch.testing.assert_close(lsconv.lstsq(A, other, method=method).x, expected, rtol=0, atol=tolerance)


@every_method
def test_data_and_weight_are_left_as_they_were(A: Any, y: torch.Tensor, method: str) -> None:
    weight, data = A.weight.clone(), y.clone()
    lsconv.lstsq(A, y, damp=0.1, method=method)
    assert torch.equal(A.weight, weight)
    assert torch.equal(y, data)


@every_method
def test_data_and_weight_that_require_grad_are_answered(A: Any, y: torch.Tensor, method: str) -> None:
    expected = lsconv.lstsq(A, y, method=method).x
    B = A.with_parameters([A.weight.clone().requires_grad_()])
    solution = lsconv.lstsq(B, y.clone().requires_grad_(), method=method)
    torch.testing.assert_close(solution.x.detach(), expected)


@every_method
def test_an_expanded_right_hand_side_is_answered(A: Any, y: torch.Tensor, method: str) -> None:
    solution = lsconv.lstsq(A, y[0].expand(3, *A.out_shape), method=method)
    assert solution.x.shape == (3, *A.in_shape)
    assert torch.equal(solution.x[0], solution.x[2])
