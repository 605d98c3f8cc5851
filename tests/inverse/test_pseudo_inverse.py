"""pinv: the pseudo-inverse as an operator."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import lsconv

F64 = torch.float64

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

KINDS = {
    "valid 3->2": ((2, 3, 3, 3), 0, 1, 1, "zeros"),
    "same 2->3": ((3, 2, 3, 3), 1, 1, 1, "zeros"),
    "same 3->2": ((2, 3, 3, 3), 1, 1, 1, "zeros"),
    "full 2->2": ((2, 2, 3, 3), 2, 1, 1, "zeros"),
    "stride 2": ((2, 2, 3, 3), 1, 2, 1, "zeros"),
    "groups": ((4, 1, 3, 3), 0, 1, 2, "zeros"),
    "circular": ((2, 2, 3, 3), 1, 1, 1, "circular"),
    "circular, cropped": ((2, 2, 3, 3), 0, 1, 1, "circular"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def _operator(kind: str, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()) -> lsconv.Convolution:
    shape, padding, stride, groups, mode = KINDS[kind]
    weight = torch.randn(*batch, *shape, dtype=dtype)
    return lsconv.Conv2d(weight, (8, 6), stride=stride, padding=padding, groups=groups, padding_mode=mode)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_four_penrose_conditions(kind: str, dtype: torch.dtype) -> None:
    A = _operator(kind, dtype)
    plan = lsconv.pinv(A)
    M = A.to_dense()
    P = plan(torch.eye(M.shape[0], dtype=dtype).reshape(-1, *A.out_shape)).reshape(M.shape[0], -1).T
    for left, right in ((M @ P @ M, M), (P @ M @ P, P), ((M @ P).mH, M @ P), ((P @ M).mH, P @ M)):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-8 * float(right.abs().max()))
    torch.testing.assert_close(P, torch.linalg.pinv(M), rtol=0, atol=1e-8 * float(P.abs().max()))


@every_kind
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_adjoint_is_the_adjoint_of_the_dense_pseudo_inverse(kind: str, damp: float) -> None:
    A = _operator(kind, torch.complex128)
    M = A.to_dense()
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    factor = torch.where(s > 1e-10 * s[0], s / (s**2 + damp**2), 0).to(M.dtype)
    v = torch.randn(3, *A.in_shape, dtype=A.dtype)
    expected = (U * factor @ Vh @ v.reshape(3, -1, 1)).reshape(3, *A.out_shape)
    actual = lsconv.pinv(A, damp=damp).H(v)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


@every_kind
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_forward_and_adjoint_are_adjoint_to_each_other(kind: str, damp: float) -> None:
    assert lsconv.pinv(_operator(kind), damp=damp).dot_test() <= 1e-8


@every_kind
def test_equals_lstsq(kind: str) -> None:
    A = _operator(kind)
    y = torch.randn(3, *A.out_shape, dtype=A.dtype)
    plan = lsconv.pinv(A)
    expected = lsconv.lstsq(A, y).x
    torch.testing.assert_close(plan(y), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    assert torch.equal(plan.solve(y).x, expected)


@every_kind
def test_a_kept_plan_gives_identical_answers_again(kind: str) -> None:
    A = _operator(kind)
    plan = lsconv.pinv(A)
    y = torch.randn(2, *A.out_shape, dtype=A.dtype)
    first = plan.solve(y)
    plan.solve(torch.randn(5, *A.out_shape, dtype=A.dtype))
    again = plan.solve(y)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.residual_norm, again.residual_norm)


@pytest.mark.parametrize("batch", [(2,), (2, 1), (1,)])
@pytest.mark.parametrize("kind", ["valid 3->2", "same 2->3", "groups", "circular"])
def test_kernels_per_item_are_the_plans_of_the_single_kernels(kind: str, batch: tuple[int, ...]) -> None:
    A = _operator(kind, batch=batch)
    y = torch.randn(*batch, *A.out_shape, dtype=A.dtype)
    together = lsconv.pinv(A)(y)
    assert together.shape == (*batch, *A.in_shape)
    flat = A.weight.reshape(-1, *A.weight.shape[len(batch) :])
    for item, x, right in zip(flat, together.reshape(-1, *A.in_shape), y.reshape(-1, *A.out_shape), strict=True):
        single = lsconv.Conv2d(item, A.spatial_in, stride=A.stride, padding=A.padding, groups=A.groups,
                               padding_mode=A.padding_mode)  # fmt: skip
        torch.testing.assert_close(x, lsconv.pinv(single)(right), rtol=0, atol=1e-8 * float(x.abs().max()))


@pytest.mark.parametrize("kind", ["valid 3->2", "same 2->3", "groups", "circular"])
def test_damp_per_item_is_the_plan_of_each_damp(kind: str) -> None:
    A = _operator(kind)
    damp = torch.tensor([[0.0, 0.1, 2.0]], dtype=torch.float64)
    y = torch.randn(1, 3, *A.out_shape, dtype=A.dtype)
    together = lsconv.pinv(A, damp=damp)(y)
    for item in range(3):
        expected = lsconv.pinv(A, damp=float(damp[0, item]))(y[0, item])
        torch.testing.assert_close(together[0, item], expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


@every_kind
def test_answers_carry_no_gradient_graph_when_nothing_requires_grad(kind: str) -> None:
    A = _operator(kind)
    y = torch.randn(A.out_shape, dtype=A.dtype)
    plan = lsconv.pinv(A)
    for x in (plan(y), plan.solve(y).x, plan.H(torch.randn(A.in_shape, dtype=A.dtype))):
        assert not x.requires_grad
        assert x.grad_fn is None


def test_repr_tells_grid_border_memory_and_precision() -> None:
    text = repr(lsconv.pinv(lsconv.Conv2d(torch.randn(2, 3, 3, 3), (16, 20))))
    assert "grid=(16, 20)" in text
    assert "border=136 unknowns" in text  # 2 channels x (2 rows x 20 + 2 columns x 14)
    assert "MiB" in text
    assert "float32" in text


def test_a_zero_item_gives_a_zero_item() -> None:
    A = _operator("same 2->3")
    y = torch.randn(3, *A.out_shape, dtype=A.dtype)
    y[1] = 0
    x = lsconv.pinv(A)(y)
    assert not x[1].any()
    assert x[0].any()


@pytest.mark.parametrize("kind", ["valid 3->2", "same 2->3", "circular"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_an_item_that_is_not_finite_is_nan_with_a_warning_and_no_other_changes(
    kind: str, bad: float, damp: float
) -> None:
    A = _operator(kind)
    inverse = lsconv.pinv(A, damp=damp)
    for B in (inverse, inverse.H):
        y = torch.randn(3, *B.in_shape, dtype=A.dtype)
        expected = B(y)
        y[1, 0, 0, 0] = bad
        with pytest.warns(lsconv.ConvergenceWarning, match="1 of 3 item.s. of what it is applied to contain NaN"):
            x = B(y)
        assert x[1].isnan().all()
        torch.testing.assert_close(x[[0, 2]], expected[[0, 2]])


def test_composes_with_other_operators() -> None:
    A = _operator("valid 3->2")
    projection = A @ lsconv.pinv(A)
    y = torch.randn(A.out_shape, dtype=A.dtype)
    torch.testing.assert_close(projection(y), y)


def test_a_rank_deficient_border_is_no_silent_error() -> None:
    # A A^H is singular: border and factors see no solution, and the operator must not answer as if they did
    A = lsconv.Conv2d(torch.randn(2, 1, 3, 3, dtype=torch.float64), (6, 6), stride=2, padding=2)
    exact = torch.linalg.pinv(A.to_dense(), rtol=1e-12)
    Ap = lsconv.pinv(A)
    y, v = torch.randn(A.out_shape, dtype=torch.float64), torch.randn(A.in_shape, dtype=torch.float64)
    for answer in (Ap(y), Ap.solve(y).x):
        torch.testing.assert_close(answer.flatten(), exact @ y.flatten(), rtol=0, atol=1e-9)
    # the factors amplify rounding in the null space of A^H by sigma_max^2 / mu', here 1e10
    torch.testing.assert_close(Ap.H(v).flatten(), exact.mT @ v.flatten(), rtol=0, atol=1e-4)


DAMPED = {
    "separable": lambda: lsconv.Conv2d(torch.ones(1, 1, 5, 5, dtype=F64) / 25, (30, 24), padding=2),
    "patches": lambda: lsconv.Conv2d(torch.randn(3, 2, 2, 2, dtype=F64), (8, 12), stride=2),
    "dense": lambda: lsconv.Dense(torch.randn(9, 7, dtype=F64)),
    "folded": lambda: lsconv.Conv2d(torch.randn(1, 1, 1, 5, dtype=F64), (9, 40)),
    "border": lambda: lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=F64), (20, 24)),
    "circular": lambda: lsconv.Conv2d(torch.randn(2, 2, 3, 3, dtype=F64), (8, 9), padding=1, padding_mode="circular"),
    "few unknowns": lambda: lsconv.Conv1d(torch.randn(1, 1, 300, dtype=F64), 5, padding=299),
}


@pytest.mark.parametrize("name", DAMPED)
def test_another_damping_gives_the_answer_of_a_new_plan(name: str) -> None:
    torch.manual_seed(0)
    A = DAMPED[name]()
    first, y = lsconv.pinv(A, damp=0.5), torch.randn(2, *A.out_shape, dtype=F64)
    for damp in (0.2, 3.0, torch.tensor([0.1, 0.4], dtype=F64)):
        second = first.with_damp(damp)
        solution = second.solve(y)
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.x, lsconv.lstsq(A, y, damp=damp).x, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(second(y), solution.x, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(first(y), lsconv.lstsq(A, y, damp=0.5).x, rtol=1e-8, atol=1e-10)
    undamped = first.with_damp(0.0)
    torch.testing.assert_close(undamped(y), lsconv.lstsq(A, y).x, rtol=1e-6, atol=1e-8)


def test_factors_that_do_not_depend_on_the_damping_are_shared() -> None:
    A = DAMPED["separable"]()
    first = lsconv.pinv(A, damp=0.5)
    assert first.with_damp(0.1).plan._left is first.plan._left
    with pytest.raises(lsconv.ArgumentError, match="damp"):
        first.with_damp(-1.0)


def test_the_derivative_by_another_damping_is_that_of_a_new_plan() -> None:
    A = DAMPED["separable"]()
    y = torch.randn(A.out_shape, dtype=F64)
    first = lsconv.pinv(A, damp=0.5)
    damp = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (mine,) = torch.autograd.grad(first.with_damp(damp)(y).square().sum(), damp)
    (other,) = torch.autograd.grad(lsconv.lstsq(A, y, damp=damp).x.square().sum(), damp)
    torch.testing.assert_close(mine, other)


def test_a_damp_of_any_real_type_is_served_and_an_impossible_one_named() -> None:
    A = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=torch.float64), in_size=(8, 8))
    y = torch.randn(A.out_shape, dtype=torch.float64)
    expected = lsconv.lstsq(A, y, damp=0.5).x
    torch.testing.assert_close(lsconv.lstsq(A, y, damp=Fraction(1, 2)).x, expected)  # type: ignore[arg-type]
    torch.testing.assert_close(lsconv.pinv(A, damp=Fraction(1, 2))(y), expected)  # type: ignore[arg-type]
    torch.testing.assert_close(lsconv.lstsq(A, y, damp=1e150).x, torch.zeros_like(expected))
    for solve in (lambda damp: lsconv.lstsq(A, y, damp=damp), lambda damp: lsconv.pinv(A, damp=damp)):
        with pytest.raises(lsconv.ArgumentError, match="damp: expected finite"):
            solve(10**400)
    with pytest.raises(lsconv.ShapeError, match="damp: expected a number"):
        lsconv.pinv(A, damp=torch.zeros(0))
