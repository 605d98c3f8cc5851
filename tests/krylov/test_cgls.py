"""The residual norms that CGLS reports, most of which it does not measure, are those of its iterates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lsconv
from lsconv.operators.elementary import Dense

pytestmark = pytest.mark.filterwarnings("ignore::lsconv.errors.ConvergenceWarning")

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def spectrum(m: int, n: int, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An m x n matrix of these singular values."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    u, v = (torch.linalg.qr(torch.randn(k, n, dtype=wide, generator=generator)).Q for k in (m, n))
    return (u * values.to(wide) @ v.mH).to(dtype)


def data(m: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, dtype=dtype, generator=torch.Generator().manual_seed(4))


def furthest(A: torch.Tensor, b: torch.Tensor, iterations: int, damp: float = 0.0, **options: Any) -> float:
    """The largest error of a reported norm, in units of rounding of ``||b||``, over the iterations of a solve."""
    wide = torch.complex128 if A.is_complex() else torch.float64
    errors = []

    def look(state: Any) -> None:
        x = state.x.to(wide)
        r = torch.linalg.vector_norm(b.to(wide) - A.to(wide) @ x)
        exact = math.hypot(float(r), damp * float(torch.linalg.vector_norm(x)))
        errors.append(abs(float(state.residual_norm) - exact))

    lsconv.cgls(Dense(A), b, rtol=0, max_iter=iterations, damp=damp, callback=look, **options)
    assert len(errors) > 10
    return max(errors) / (torch.finfo(A.dtype).eps * float(torch.linalg.vector_norm(b)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damp", [0.0, 0.03])
def test_norms_of_an_inconsistent_system_are_those_of_the_iterates(dtype: torch.dtype, damp: float) -> None:
    """A residual that hardly falls: every norm is a difference of the ones before it.

    Of 24 draws of the data, in real and in complex numbers, the furthest norm is 4 to 13 units of rounding off.
    """
    A = spectrum(60, 40, torch.logspace(0, -3, 40, dtype=torch.float64), dtype)
    assert furthest(A, data(60, dtype), 80, damp) < 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_a_residual_that_vanishes_keep_their_digits(dtype: torch.dtype) -> None:
    """It loses a digit at every other iteration. Without measuring, half of the digits would be lost."""
    A = spectrum(40, 40, torch.linspace(1, 3, 40, dtype=torch.float64), dtype)
    assert furthest(A, data(40, dtype), 25) < 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_from_a_start_and_with_a_preconditioner_of_the_solution(dtype: torch.dtype) -> None:
    """With N the steps are others, and orthogonal to the residual all the same."""
    A = spectrum(60, 40, torch.logspace(0, -2, 40, dtype=torch.float64), dtype)
    N = Dense(torch.diag(torch.linspace(1, 5, 40, dtype=dtype)))
    x0 = 0.1 * data(40, dtype)
    assert furthest(A, data(60, dtype), 60, N=N, x0=x0) < 8
    assert furthest(A, data(60, dtype), 60, 0.05, N=N, x0=x0) < 8


def test_norms_with_a_preconditioner_of_the_residual_are_measured() -> None:
    """There the residual falls in the norm of M, from which its own does not follow."""
    A = spectrum(60, 40, torch.logspace(0, -2, 40, dtype=torch.float64), torch.float64)
    M = Dense(torch.diag(torch.linspace(1, 5, 60, dtype=torch.float64)))
    assert furthest(A, data(60, torch.float64), 60, M=M) < 8


class Norms(TorchDispatchMode):
    """Counts the norms of long vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.linalg_vector_norm.default and args[0].numel() >= 4000
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("damp, each", [(0.0, 2), (0.05, 3)])
def test_norms_are_measured_at_one_of_eight_iterations(damp: float, each: int) -> None:
    """A p and A^H r (and p, where there is damping) at every iteration; r (and x) at every eighth."""
    diagonal = torch.logspace(0, -2, 4096)
    A = lsconv.FromFunctions((4096,), (4096,), lambda x: diagonal * x, lambda y: diagonal * y)
    counts = []
    for iterations in (8, 32):
        with Norms() as norms:
            lsconv.cgls(A, torch.linspace(1, 2, 4096), rtol=0, max_iter=iterations, damp=damp)
        counts.append(norms.count)
    assert counts[1] - counts[0] == 24 * each + 3 * (1 if damp == 0 else 2)
