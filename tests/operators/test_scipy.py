"""Operators through SciPy and back, against numpy's matrix products and SciPy's own solver."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from lsconv.errors import ArgumentError, ArgumentTypeError, DtypeError
from lsconv.operators.convolution import Conv2d
from lsconv.operators.elementary import Dense, Identity
from lsconv.operators.scipy import from_scipy, to_operator, to_scipy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_to_scipy_is_the_matrix(dtype: torch.dtype) -> None:
    A = Conv2d(torch.randn(2, 3, 3, 2, dtype=dtype), (5, 6), stride=(1, 2))
    S, matrix = to_scipy(A), A.to_dense().numpy()
    assert S.shape == matrix.shape
    assert S.dtype == matrix.dtype
    bound = {"atol": 1e3 * torch.finfo(dtype).eps, "rtol": 0}
    generator = np.random.default_rng(0)
    for shape in [(90,), (90, 1), (90, 4)]:
        x = generator.standard_normal(shape)
        np.testing.assert_allclose(S @ x, matrix @ x, **bound)
        np.testing.assert_allclose(S @ (1j * x), matrix @ (1j * x), **bound)
    y = generator.standard_normal((S.shape[0], 3))
    np.testing.assert_allclose(S.H @ y, matrix.conj().T @ y, **bound)
    np.testing.assert_allclose(S.rmatvec(y[:, 0]), matrix.conj().T @ y[:, 0], **bound)


def test_scipys_lsqr_solves_with_it() -> None:
    A = Conv2d(torch.randn(2, 1, 3, 3, dtype=torch.float64), (5, 6))
    y = torch.randn(A.out_shape, dtype=torch.float64)
    x = scipy.sparse.linalg.lsqr(A.to_scipy(), y.flatten().numpy(), atol=1e-13, btol=1e-13)[0]
    expected = torch.linalg.pinv(A.to_dense()) @ y.flatten()
    np.testing.assert_allclose(x, expected.numpy(), atol=1e-9)


def test_unusual_memory_is_read_right_and_never_handed_out() -> None:
    S = to_scipy(Identity((4,), torch.float64))
    x = np.arange(8.0)
    x.flags.writeable = False
    np.testing.assert_array_equal(S @ x[::2], x[::2])
    np.testing.assert_array_equal(S @ x[4:][::-1], x[4:][::-1])
    v = np.ones(4)
    result = S @ v
    result[:] = 0
    assert v.sum() == 4


def test_round_trip() -> None:
    A = Conv2d(torch.randn(2, 3, 3, 3, dtype=torch.complex128), (5, 6))
    B = from_scipy(to_scipy(A), A.in_shape, A.out_shape)
    torch.testing.assert_close(B.to_dense(), A.to_dense())
    assert B.dot_test() <= 1e-12
    x = torch.randn(2, 2, *A.in_shape, dtype=A.dtype)
    torch.testing.assert_close(B(x), A(x))
    assert B.to(torch.complex64)(x.to(torch.complex64)).dtype == torch.complex64


def test_gradients_flow_through_scipy() -> None:
    B = from_scipy(np.random.default_rng(0).standard_normal((3, 4)))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(B, (x,))
    assert torch.autograd.gradgradcheck(lambda x: B(x).square().sum(), (x,))


def test_everything_that_is_a_matrix_becomes_an_operator() -> None:
    dense = torch.randn(3, 4, dtype=torch.float64)
    sparse = scipy.sparse.csr_array(dense.numpy())
    identity = Identity((4,))
    assert to_operator(identity) is identity
    kinds = [dense, dense.to_sparse_coo(), sparse, scipy.sparse.linalg.aslinearoperator(sparse), from_scipy(sparse)]
    for kind in kinds:
        torch.testing.assert_close(to_operator(kind).to_dense(), dense)
    assert isinstance(to_operator(dense), Dense)
    assert from_scipy(np.eye(3, dtype=int)).dtype == torch.float64


def test_pylops_operators_work() -> None:
    pylops = pytest.importorskip("pylops")
    D = from_scipy(pylops.FirstDerivative(8, dtype="float64"))
    assert D.dot_test() <= 1e-12


def test_refusals() -> None:
    with pytest.raises(ArgumentError, match=r"A: expected an operator that is one matrix, got batch_shape \(2,\)"):
        Dense(torch.ones(2, 3, 4)).to_scipy()
    with pytest.raises(DtypeError, match="A: numpy has no bfloat16"):
        Identity((2,), torch.bfloat16).to_scipy()
    with pytest.raises(ArgumentTypeError, match=r"operator: expected a scipy.* got str"):
        from_scipy("matrix")
    with pytest.raises(ArgumentError, match=r"operator: shape \(3, 3\) does not map in_shape \(2,\)"):
        from_scipy(np.eye(3), in_shape=(2,))
    with pytest.raises(ArgumentTypeError, match=r"A: Conv2d does not know its input's size; use .*from_module"):
        to_operator(torch.nn.Conv2d(1, 1, 1))
    with pytest.raises(ArgumentTypeError, match=r"A: .* got ndarray; convert with torch.from_numpy\(A\)"):
        to_operator(np.eye(3))
    with pytest.raises(ArgumentTypeError, match=r"M: expected a LinearOperator, .* got int"):
        to_operator(3, "M")


def test_scipy_is_imported_only_when_needed() -> None:
    code = "import sys, lsconv.operators.scipy as s; sys.exit('scipy.sparse.linalg' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
