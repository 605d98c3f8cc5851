"""Sums, products and stacks against the same algebra of dense matrices, and the contract every operator keeps."""

from __future__ import annotations

import pytest
import torch

from lsconv.errors import ArgumentTypeError, DeviceError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.algebra import block_diag, hstack, vstack
from lsconv.operators.base import LinearOperator
from lsconv.operators.checks import require_finite
from lsconv.operators.convolution import Conv1d
from lsconv.operators.elementary import Dense, FromFunctions, Identity

DTYPES = [torch.float64, torch.complex128]


def dense(m: int, n: int, dtype: torch.dtype, *batch: int) -> Dense:
    return Dense(torch.randn(*batch, m, n, dtype=dtype))


def check(A: LinearOperator, matrix: torch.Tensor) -> None:
    torch.testing.assert_close(A.to_dense(), matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(A.H.to_dense(), matrix.mH, rtol=0, atol=1e-12)
    assert A.dot_test() <= 1e-12
    assert A.H.H is A


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_algebra_is_that_of_matrices(batch: tuple[int, ...], dtype: torch.dtype) -> None:
    A, B, C = dense(3, 4, dtype, *batch), dense(3, 4, dtype), dense(4, 2, dtype, *batch)
    a, b, c = A.matrix, B.matrix, C.matrix
    alpha = 2.5 - 1j if dtype.is_complex else 2.5
    check(A + B - A * 2, a + b - 2 * a)
    check(alpha * A, alpha * a)
    check(A / alpha, a / alpha)
    check(-A, -a)
    check((A + B) @ C, (a + b) @ c)
    check(A.H @ B, a.mH @ b)
    check((A @ C).H @ A, (a @ c).mH @ a)
    check(vstack([A, B]), torch.cat([a, b.expand_as(a)], -2))
    check(hstack([A, B]), torch.cat([a, b.expand_as(a)], -1))
    zeros = torch.zeros(*batch, 3, 2, dtype=dtype), torch.zeros(*batch, 4, 4, dtype=dtype)
    blocks = torch.cat([torch.cat([a, zeros[0]], -1), torch.cat([zeros[1], c], -1)], -2)
    check(block_diag([A, C]), blocks)


def test_scalars_of_every_kind() -> None:
    A = dense(3, 4, torch.float64)
    x = torch.randn(4, dtype=torch.float64)
    for two in (2, 2.0, torch.tensor(2.0), torch.tensor(2)):
        torch.testing.assert_close((two * A)(x), 2 * A(x))
        torch.testing.assert_close((A * two)(x), 2 * A(x))
    numpy = pytest.importorskip("numpy")
    torch.testing.assert_close((numpy.float64(2) * A)(x), 2 * A(x))
    per_item = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close((per_item * A)(x), per_item[:, None] * A(x))
    torch.testing.assert_close(A @ x, A(x))


def test_stacks_join_feature_maps_along_channels_and_flatten_the_rest() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    same = vstack([Identity((2, 3)), 2 * Identity((2, 3))])
    assert torch.equal(same(x), torch.cat([x, 2 * x]))
    assert [torch.equal(part, x * f) for part, f in zip(same.split(same(x)), (1, 2), strict=True)] == [True, True]
    mixed = vstack([Identity((2, 3)), Conv1d(torch.ones(1, 2, 2), 3)])
    assert mixed.out_shape == (8,)
    assert mixed.split(mixed(x))[1].shape == (1, 2)
    assert mixed.dot_test() < 1e-5
    side = hstack([Identity((2, 3)), Identity((2, 3))])
    assert torch.equal(side(torch.cat([x, x])), 2 * x)
    assert torch.equal(side.split(torch.cat([x, -x]))[1], -x)


def test_sums_and_products_are_flat() -> None:
    identity = Identity((2,))
    assert len((identity + identity + identity).operators) == 3  # type: ignore[attr-defined]
    assert len((identity @ identity @ identity).operators) == 3


def test_compositions_that_do_not_fit_are_refused() -> None:
    A = dense(3, 4, torch.float64)
    with pytest.raises(ShapeError, match=r"sum: .*\(4,\) -> \(3,\) and \(3,\) -> \(4,\)"):
        A + A.H
    with pytest.raises(ShapeError, match=r"product: the left operator takes \(4,\) but the right one gives \(3,\)"):
        A @ A
    with pytest.raises(ShapeError, match=r"vstack: operators must share in_shape"):
        vstack([A, A.H])
    with pytest.raises(ShapeError, match=r"hstack: operators must share out_shape"):
        hstack([A, A.H])
    with pytest.raises(ShapeError, match="block_diag: expected at least one operator"):
        block_diag([])
    with pytest.raises(ArgumentTypeError, match="vstack: item 1 is Tensor, expected a LinearOperator"):
        vstack([A, torch.ones(3, 4)])  # type: ignore[list-item]
    with pytest.raises(DtypeError, match=r"sum: operators have different dtypes, torch.float64 and torch.float32"):
        A + A.to(torch.float32)
    with pytest.raises(DeviceError, match="sum: operators live on different devices, cpu and meta"):
        A + FromFunctions((4,), (3,), A.apply, A.adjoint, dtype=A.dtype, device="meta")
    with pytest.raises(ShapeError, match=r"product: batch dimensions .* do not broadcast"):
        dense(3, 4, torch.float64, 2) @ dense(4, 3, torch.float64, 5)
    with pytest.raises(ShapeError, match=r"alpha: batch dimensions .* do not broadcast"):
        torch.ones(2) * dense(3, 4, torch.float64, 5)
    with pytest.raises(DtypeError, match="alpha: a complex scalar times a real operator"):
        1j * A
    with pytest.raises(TypeError):
        A + 1
    with pytest.raises(TypeError):
        A * "2"


def test_parameters_are_found_exchanged_and_converted_through_compositions() -> None:
    A, B = dense(3, 4, torch.float64), dense(3, 4, torch.float64)
    C = vstack([2 * A, B.H.H @ Identity((4,), torch.float64)])
    assert [tuple(p.shape) for p in C.parameters()] == [(3, 4), (), (3, 4)]
    doubled = C.with_parameters([2 * p for p in C.parameters()])
    torch.testing.assert_close(doubled.to_dense(), torch.cat([8 * A.matrix, 2 * B.matrix]))
    torch.testing.assert_close(C.to_dense(), torch.cat([2 * A.matrix, B.matrix]))
    single = C.to(torch.float32)
    assert single.dtype == single.to_dense().dtype == torch.float32
    with pytest.raises(ArgumentTypeError, match="parameters: expected 3 tensors, got 1"):
        C.with_parameters([A.matrix])
    with pytest.raises(ShapeError, match=r"parameters\[1\]: expected torch.float64 \(\) on cpu, got .*\(2,\)"):
        C.with_parameters([A.matrix, torch.ones(2, dtype=torch.float64), B.matrix])
    with pytest.raises(DtypeError, match=r"dtype: a complex operator .* cannot be converted to torch.float32"):
        dense(2, 2, torch.complex64).to(torch.float32)


def test_dot_test_finds_a_wrong_adjoint() -> None:
    wrong = FromFunctions((4,), (4,), lambda x: x.cumsum(-1), lambda y: y.cumsum(-1))
    assert wrong.dot_test(generator=torch.Generator().manual_seed(1)) > 1e-2


def test_non_finite_items_are_named() -> None:
    A = Identity((2, 2))
    x = torch.zeros(3, 4, 2, 2)
    x[1, 2, 0, 0], x[2, 0, 1, 1] = torch.nan, torch.inf
    with pytest.raises(NonFiniteError, match=r"y: contains NaN or infinity in batch item\(s\) \(1, 2\), \(2, 0\)$"):
        A.check_output(x, "y", finite=True)
    assert A.check_input(x) == (3, 4)
    with pytest.raises(NonFiniteError, match=r"batch item\(s\) 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"):
        require_finite(torch.full((10,), torch.nan), "v", 0)


def test_shapes_must_be_positive_and_dtypes_continuous() -> None:
    with pytest.raises(ShapeError, match=r"in_shape: every size must be positive, got \(0,\)"):
        Identity((0,))
    with pytest.raises(DtypeError, match=r"dtype: expected a floating-point or complex dtype, got torch.int64"):
        Identity((2,), torch.int64)
