"""Identity, diagonal, mask, crop, matrices and pairs of functions against their dense matrices."""

from __future__ import annotations

import pytest
import torch

from lsconv.errors import ArgumentTypeError, DtypeError, NonFiniteError, ShapeError
from lsconv.operators.base import LinearOperator
from lsconv.operators.elementary import Crop, Dense, Diagonal, FromFunctions, Identity, Mask
from lsconv.operators.scipy import from_scipy

DTYPES = [torch.float64, torch.complex128]


def operators(dtype: torch.dtype) -> list[LinearOperator]:
    matrix = torch.randn(5, 6, dtype=dtype)
    return [
        Identity((2, 3), dtype=dtype),
        Diagonal(torch.randn(2, 3, dtype=dtype)),
        Diagonal(torch.randn(4, 2, 3, dtype=dtype), batch_ndim=1),
        Mask(torch.rand(2, 3) > 0.5, dtype=dtype),
        Mask(torch.rand(4, 2, 3) > 0.5, 1, dtype=dtype),
        Crop((3, 5, 6), (1, 0), (2, 6), dtype=dtype),
        Crop((5, 6), 1, 2, dtype=dtype),
        Dense(matrix, (2, 3)),
        Dense(torch.randn(4, 5, 6, dtype=dtype), (3, 2), (5, 1)),
        Dense(torch.randn(4, 1, 5, 6, dtype=dtype)),
        Dense(torch.where(torch.rand(5, 6) > 0.5, matrix, 0).to_sparse_coo(), (2, 3)),
        FromFunctions((3,), (6,), lambda x: torch.cat([x, x], -1), lambda y: y[..., :3] + y[..., 3:], dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(12))
def test_apply_and_adjoint_are_one_matrix(index: int, dtype: torch.dtype) -> None:
    A = operators(dtype)[index]
    matrix = A.to_dense()
    assert matrix.shape == (*A.batch_shape, A.out_numel, A.in_numel)
    torch.testing.assert_close(A.H.to_dense(), matrix.mH, rtol=0, atol=1e-13)
    for batch in [(), (3,), (3, 2)]:
        x = torch.randn(*batch, *A.batch_shape, *A.in_shape, dtype=dtype)
        expected = (matrix @ x.reshape(*batch, *A.batch_shape, A.in_numel, 1)).reshape(
            *batch, *A.batch_shape, *A.out_shape
        )
        torch.testing.assert_close(A(x), expected, rtol=0, atol=1e-13)
    one = torch.randn(A.in_shape, dtype=dtype)
    assert A(one).shape == (*A.batch_shape, *A.out_shape)
    assert A.dot_test() <= 1e-12


def test_default_dtype_is_torchs() -> None:
    assert Identity((2,)).dtype == Crop((2,), 0, 1).dtype == Mask(torch.tensor([True])).dtype == torch.float32


def test_mask_is_a_projection_that_ignores_what_it_hides() -> None:
    M = Mask(torch.tensor([True, False]))
    x = torch.tensor([1.0, torch.nan])
    assert torch.equal(M(x), torch.tensor([1.0, 0.0]))
    assert torch.equal(M(M(x)), M(x))
    v = torch.tensor([1.0, 2.0], requires_grad=True)
    M(v).sum().backward()
    assert torch.equal(v.grad, torch.tensor([1.0, 0.0]))


def test_sparse_matrices_act_as_their_dense_form_and_are_differentiable() -> None:
    dense = torch.where(torch.rand(5, 6) > 0.5, torch.randn(5, 6), 0).double()
    for sparse in (dense.to_sparse_coo(), Dense(dense.to_sparse_coo()).matrix):
        A = Dense(sparse)
        assert torch.equal(A.to_dense(), dense)
        x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(A, (x,))
        assert torch.autograd.gradcheck(A.H, (torch.randn(5, dtype=torch.float64, requires_grad=True),))
        torch.testing.assert_close(A.to(torch.float32).H.to_dense(), dense.float().mT)


def test_parameters_of_functions_can_be_exchanged_converted_and_differentiated() -> None:
    scale = torch.tensor(3.0, dtype=torch.float64)
    A = FromFunctions((2,), (2,), lambda x, s: s * x, lambda y, s: s * y, parameters=(scale,), dtype=torch.float64)
    x = torch.ones(2, dtype=torch.float64)
    assert torch.equal(A.with_parameters([2 * scale])(x), 6 * x)
    assert A.to(torch.float32)(x.float()).dtype == torch.float32
    s = scale.clone().requires_grad_()
    A.with_parameters([s])(x).sum().backward()
    assert s.grad == 2


def test_refusals() -> None:
    with pytest.raises(NonFiniteError, match="diagonal: contains NaN"):
        Diagonal(torch.tensor([torch.nan]))
    with pytest.raises(ShapeError, match="batch_ndim: 3 does not fit the 1 dimensions of diagonal"):
        Diagonal(torch.ones(2), batch_ndim=3)
    with pytest.raises(DtypeError, match=r"expected a floating-point or complex dtype, got torch.int64"):
        Diagonal(torch.tensor([1]))
    with pytest.raises(DtypeError, match=r"mask: expected dtype torch.bool, got torch.float32"):
        Mask(torch.ones(2))
    with pytest.raises(ArgumentTypeError, match=r"mask: expected a torch.Tensor, got list"):
        Mask([True])  # type: ignore[arg-type]
    for start, size in [((3,), (3,)), ((-1,), (2,)), ((0,), (0,)), ((0, 0), (1, 1)), ((0,), (1, 1))]:
        with pytest.raises(ShapeError, match=r"crop: the window .* does not lie inside shape \(5,\)"):
            Crop((5,), start, size)
    with pytest.raises(ShapeError, match=r"matrix: expected shape \(\*batch, m, n\), got \(3,\)"):
        Dense(torch.ones(3))
    with pytest.raises(ShapeError, match=r"matrix: shape \(2, 3\) does not map in_shape \(4,\)"):
        Dense(torch.ones(2, 3), in_shape=(4,))
    with pytest.raises(NonFiniteError, match="matrix"):
        Dense(torch.full((2, 2), torch.inf))
    with pytest.raises(ArgumentTypeError, match=r"matrix: expected a torch.Tensor .*, got list"):
        Dense([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="adjoint: expected a function of a tensor, got NoneType"):
        FromFunctions((1,), (1,), lambda x: x, None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"parameters\[0\]: expected a torch.Tensor, got float"):
        FromFunctions((1,), (1,), lambda x, s: x, lambda y, s: y, parameters=(1.0,))  # type: ignore[arg-type]


def test_a_matrix_is_replaced_by_one_per_item_only_where_that_is_asked_for() -> None:
    A = Dense(torch.randn(4, 6, dtype=torch.float64), (2, 3), (4,))
    matrices = torch.randn(5, 4, 6, dtype=torch.float64)
    B = A.with_parameters([matrices], per_item=True)
    assert (B.batch_shape, B.in_shape, B.out_shape) == ((5,), (2, 3), (4,))
    torch.testing.assert_close(B.to_dense(), matrices)
    for given, per_item in ((matrices, False), (matrices.mT, True)):
        with pytest.raises(ShapeError, match=r"parameters\[0\]"):
            A.with_parameters([given], per_item=per_item)


def test_a_subclass_says_for_itself_whether_it_is_capturable() -> None:
    class Counting(Diagonal):
        """Counts its calls, which a recorded graph would not."""

    diagonal = torch.linspace(1, 3, 12)
    assert Diagonal(diagonal).capturable
    assert not Counting(diagonal).capturable
    assert not Dense(torch.eye(3).to_sparse()).capturable
    assert not from_scipy(torch.eye(3).numpy()).capturable
    functions = FromFunctions((12,), (12,), torch.neg, torch.neg)
    assert not (Diagonal(diagonal) @ functions).capturable
    functions.capturable = True
    assert (Diagonal(diagonal) @ functions).capturable
