"""An operator made without a dtype takes that of what it meets; messages name the argument and a lossless remedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import lsconv
from lsconv.errors import ArgumentTypeError, DeviceError, DtypeError

F64 = torch.float64
A = lsconv.Conv2d(torch.randn(1, 1, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), in_size=(8, 8))
X = torch.randn(1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
KEEP = A(X) > 0

HELPERS = {
    "identity": lambda **dtype: lsconv.Identity((1, 8, 8), **dtype),
    "mask": lambda **dtype: lsconv.Mask(X > 0, **dtype),
    "crop": lambda **dtype: lsconv.Crop((1, 8, 8), (1, 1), (6, 6), **dtype),
    "pad": lambda **dtype: lsconv.Pad((1, 8, 8), (1, 1), "reflect", **dtype),
    "gradient": lambda **dtype: lsconv.Gradient((1, 8, 8), **dtype),
    "laplacian": lambda **dtype: lsconv.Laplacian((1, 8, 8), **dtype),
    "scaled": lambda **dtype: 0.1 * lsconv.Gradient((1, 8, 8), **dtype) / 3,
    "adjoint": lambda **dtype: lsconv.Crop((1, 10, 10), (1, 1), (8, 8), **dtype).H,
    "stacked": lambda **dtype: lsconv.vstack(
        [lsconv.Identity((1, 8, 8), **dtype), 0.1 * lsconv.Laplacian((1, 8, 8), **dtype)]
    ),
}


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
def test_an_operator_without_dtype_takes_that_of_a_tensor(name: str, dtype: torch.dtype) -> None:
    x = X.to(dtype) * (1 - 0.5j if dtype.is_complex else 1)
    given, free = HELPERS[name](dtype=dtype), HELPERS[name]()
    assert torch.equal(free(x), given(x))
    assert torch.equal(free.H(given(x)), given.H(given(x)))
    assert free.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("name", HELPERS)
def test_an_operator_without_dtype_takes_that_of_other_operators(name: str) -> None:
    free, given = HELPERS[name](), HELPERS[name](dtype=F64)
    other = lsconv.Dense(torch.eye(64, dtype=F64), (1, 8, 8), (1, 8, 8))
    scaled = lsconv.Dense(2 * torch.eye(given.out_numel, dtype=F64), given.out_shape, given.out_shape)
    for free_side, given_side in (
        (free @ other, given @ other),
        (scaled @ free, scaled @ given),
        (scaled @ free + free @ other, scaled @ given + given @ other),
        (lsconv.vstack([other, free]), lsconv.vstack([other, given])),
        (lsconv.hstack([free.H, other]), lsconv.hstack([given.H, other])),
        (lsconv.block_diag([free, other]), lsconv.block_diag([given, other])),
    ):
        assert free_side.dtype == F64
        assert torch.equal(free_side.to_dense(), given_side.to_dense())


def test_a_real_operator_beside_a_complex_one_is_complex() -> None:
    both = lsconv.Mask(KEEP, dtype=F64) @ A.to(dtype=torch.complex128)
    assert torch.equal(both(X + 0j), torch.where(KEEP, A(X) + 0j, 0))


def test_solvers_give_their_dtype_to_helpers() -> None:
    y = A(X)
    free, given = lsconv.Gradient(A.in_shape), lsconv.Gradient(A.in_shape, dtype=F64)
    for damp in (0.1, "gcv"):
        assert torch.equal(lsconv.tikhonov(A, y, damp, L=free).x, lsconv.tikhonov(A, y, damp, L=given).x)
    assert torch.equal(lsconv.choose_damp(A, y, L=free).damp, lsconv.choose_damp(A, y, L=given).damp)
    assert torch.allclose(lsconv.lstsq(lsconv.Identity((1, 8, 8)), X).x, X, rtol=1e-12)
    assert lsconv.lsmr(A, y, damp=1.0, N=lsconv.Identity(A.in_shape)).x.dtype == F64
    variation = [lsconv.total_variation(A, y, 0.1, L=L, max_iter=5000).x for L in (free, given)]
    assert torch.equal(*variation)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: A(X.float()), r"x: dtype torch.float32 .* x.to\(dtype=torch.float64\)"),
        (lambda: A.to(torch.float32)(X), r"x: dtype torch.float64 .* A.to\(dtype=torch.float64\)"),
        (lambda: lsconv.Mask(KEEP, dtype=torch.float32) @ A, r"product: .*Mask.* with \.to\(dtype=torch.float64\)"),
        (
            lambda: lsconv.tikhonov(A, A(X), 0.1, L=lsconv.Gradient(A.in_shape, dtype=torch.float32)),
            r"L: dtype torch.float32 .* L.to\(dtype=torch.float64\)",
        ),
        (
            lambda: lsconv.lsmr(A, A(X), damp=0.1, N=lsconv.Identity(A.in_shape, dtype=torch.float32)),
            r"N: dtype torch.float32 .* N.to\(dtype=torch.float64\)",
        ),
    ],
)
def test_messages_name_the_argument_and_the_remedy(call: Callable[[], object], text: str) -> None:
    with pytest.raises(DtypeError, match=text):
        call()


def test_numpy_arrays_are_refused_with_the_remedy() -> None:
    array = X.numpy()
    with pytest.raises(ArgumentTypeError, match=r"Mask\(~mask\) @ A"):
        A @ np.ma.masked_array(array)
    for call in (lambda: A @ array, lambda: A(array)):
        with pytest.raises(ArgumentTypeError, match=r"x: expected a torch.Tensor .* torch.from_numpy\(x\)"):
            call()
    for call in (lambda: array @ A, lambda: X @ A):
        with pytest.raises(ArgumentTypeError, match=r"A\.H @ x\.conj"):
            call()
    with pytest.raises(TypeError):
        A @ "x"


def test_the_meta_device_serves_shapes_and_refuses_solves() -> None:
    B, y = A.to("meta"), torch.empty(2, 1, 6, 6, dtype=F64, device="meta")
    assert B(torch.empty(2, 1, 8, 8, dtype=F64, device="meta")).shape == y.shape
    assert lsconv.Conv1d(torch.empty(1, 1, 3, device="meta"), in_size=5).out_shape == (1, 3)
    for call in (
        lambda: lsconv.lstsq(B, y),
        lambda: lsconv.pinv(B),
        lambda: lsconv.tikhonov(B, y, 0.1),
        lambda: lsconv.lsmr(B, y),
        lambda: lsconv.total_variation(B, y, 0.1),
        lambda: lsconv.choose_damp(B, y),
    ):
        with pytest.raises(DeviceError, match=r"A: .*meta device, which holds no values"):
            call()
    with pytest.raises(DeviceError, match="y: device meta differs"):
        lsconv.lstsq(A, y)
