"""Complex data under a real operator: the operator is linear over C, so x is the answer of both parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import lsconv

F64, C128 = torch.float64, torch.complex128
TIGHT = {"rtol": 1e-12}


def randn(*shape: int, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


KERNEL = randn(2, 1, 3, 3)
A = lsconv.Conv2d(KERNEL, in_size=(5, 6), padding=1)
Y = randn(3, 2, 5, 6, dtype=C128, seed=1)
FUNCTIONS = lsconv.FromFunctions(A.in_shape, A.out_shape, lambda x: A.apply(x), lambda y: A.adjoint(y), dtype=F64)
CIRCULANT = lsconv.CirculantPreconditioner(A, 0.3, side="solution")

SOLVES: dict[str, Callable[[Tensor], Tensor]] = {
    "lstsq": lambda y: lsconv.lstsq(A, y, damp=0.3, **TIGHT).x,
    "lstsq, undamped": lambda y: lsconv.lstsq(A, y).x,
    "lstsq, functions": lambda y: lsconv.lstsq(FUNCTIONS, y, damp=0.3, **TIGHT).x,
    "lstsq, mask": lambda y: lsconv.lstsq(lsconv.Mask(KERNEL.new_ones(A.out_shape) > 0) @ A, y, damp=0.3, **TIGHT).x,
    "pinv": lambda y: lsconv.pinv(A, damp=0.3)(y),
    "pinv.solve": lambda y: lsconv.pinv(A, damp=0.3).solve(y, **TIGHT).x,
    "tikhonov": lambda y: lsconv.tikhonov(A, y, 0.3, **TIGHT).x,
    "tikhonov, L and prior": lambda y: (
        lsconv.tikhonov(A, y, 0.3, L=lsconv.Gradient(A.in_shape), x_prior=(A.H(y) / 10), **TIGHT).x
    ),
    "lsqr, N": lambda y: lsconv.lsqr(A, y, damp=0.3, N=CIRCULANT, **TIGHT).x,
    "refine": lambda y: lsconv.refine(A, y, damp=0.3).x,
    **{
        name: lambda y, name=name: getattr(lsconv, name)(A, y, damp=0.3, **TIGHT).x
        for name in ("lsmr", "lsqr", "cgls", "craig")
    },
    **{
        name: lambda y, name=name: (
            getattr(lsconv, name)(0.1 * (A.H @ A) + lsconv.Identity(A.in_shape), y[:, :1], **TIGHT).x
        )
        for name in ("cg", "minres", "gmres")
    },
    "a matrix": lambda y: lsconv.lsmr(A.to_dense(), y.flatten(1), damp=0.3, **TIGHT).x,
    "SciPy": lambda y: lsconv.lsmr(A.to_scipy(), y.flatten(1), damp=0.3, **TIGHT).x,
    "deconvolve": lambda y: lsconv.deconvolve(y[0, 0], torch.full((3, 3), 1 / 9, dtype=F64), damp=0.3, **TIGHT).x,
    "deconvolve, channels": lambda y: (
        lsconv.deconvolve(y, torch.full((3, 3), 1 / 9, dtype=F64), damp=0.3, channels="first", **TIGHT).x
    ),
}


@pytest.mark.parametrize("name", SOLVES)
def test_the_answer_is_that_of_the_real_and_of_the_imaginary_part(name: str) -> None:
    solve = SOLVES[name]
    x = solve(Y)
    expected = torch.complex(solve(Y.real.contiguous()), solve(Y.imag.contiguous()))
    assert x.dtype == C128
    assert bool((x - expected).abs().max() < 1e-9 * expected.abs().max())


@pytest.mark.parametrize("backend", ["direct", "fft"])
def test_a_real_convolution_and_its_adjoint_take_complex_tensors(backend: str) -> None:
    kernels = randn(4, 3, 2, 3)  # one per batch item
    B = lsconv.Conv1d(kernels, in_size=7, padding=1, backend=backend)
    x, y = randn(2, 7, dtype=C128), randn(5, 4, 3, 7, dtype=C128)
    for found, of, v in ((B(x), B, x), (B.apply(x), B, x), (B.H(y), B.H, y), (B.adjoint(y), B.H, y)):
        expected = torch.complex(of(v.real.contiguous()), of(v.imag.contiguous()))
        assert bool((found - expected).abs().max() < 1e-13)


def test_a_complex_certificate_covers_both_parts() -> None:
    solution = lsconv.lstsq(A, Y, damp=0.3)
    both = lsconv.pinv(A, damp=0.3).solve(Y)
    for found in (solution, both):
        assert found.converged.shape == (3,)
        assert bool(found.converged.all())
        residual = torch.linalg.vector_norm((Y - A(found.x)).flatten(1), dim=1)
        assert torch.allclose(found.residual_norm, residual)


def test_an_item_with_one_nonfinite_part_is_nonfinite() -> None:
    y = Y.clone()
    y[1, 0, 2, 2] = complex(0, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lsconv.ConvergenceWarning)
        for solution in (
            lsconv.lstsq(A, y, damp=0.3, check_finite=False),
            lsconv.pinv(A, damp=0.3).solve(y, check_finite=False),
        ):
            assert solution.status[1] is lsconv.Status.NON_FINITE
            assert bool(solution.x[1].isnan().all())
            assert solution.converged.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["lstsq", "pinv", "tikhonov, L", "lsqr", "conv"])
def test_gradients_by_data_and_kernel(name: str) -> None:
    def of(y: Tensor, kernel: Tensor, damp: Tensor) -> Tensor:
        B = lsconv.Conv1d(kernel, in_size=5, padding=1)
        solves = {
            "lstsq": lambda: lsconv.lstsq(B, y, damp=damp, **TIGHT).x,
            "pinv": lambda: lsconv.pinv(B, damp=damp)(y),
            "tikhonov, L": lambda: lsconv.tikhonov(B, y, damp, L=lsconv.Gradient(B.in_shape, ndim=1), **TIGHT).x,
            "lsqr": lambda: lsconv.lsqr(B, y, damp=damp, **TIGHT).x,
            "conv": lambda: B.H(y) * damp,
        }
        return torch.view_as_real(solves[name]())

    inputs = randn(2, 5, dtype=C128), randn(2, 1, 3), torch.tensor(0.4, dtype=F64)
    assert torch.autograd.gradcheck(of, tuple(t.requires_grad_() for t in inputs), fast_mode=True)


def test_rules_choose_one_damp_for_both_parts() -> None:
    noisy = A(randn(1, 5, 6, dtype=C128)) + 0.1 * Y[0]
    over = A.to(dtype=C128)
    for choose in (lambda B: lsconv.choose_damp(B, noisy).damp, lambda B: lsconv.tikhonov(B, noisy, "gcv").damp):
        assert torch.allclose(choose(A), choose(over))


@pytest.mark.parametrize("penalty", [False, True])
def test_modules_keep_the_imaginary_part(penalty: bool) -> None:
    conv = torch.nn.Conv2d(1, 2, 3, padding=1)
    y, prior = randn(2, 2, 5, 6, dtype=torch.complex64), randn(1, 5, 6, dtype=torch.complex64)
    bias = conv.bias.detach().view(2, 1, 1)
    L = torch.nn.Conv2d(1, 2, 2, bias=False) if penalty else None
    layer = lsconv.nn.Tikhonov(conv, damp=0.3, in_size=(5, 6), L=L)
    B = lsconv.Conv2d.from_module(conv, (5, 6))
    operator = None if L is None else lsconv.Conv2d.from_module(L, (5, 6))
    for p in (None, prior):
        x = layer(y, p)
        expected = lsconv.tikhonov(B, y - bias, layer.damp, L=operator, x_prior=p).x
        assert x.dtype == torch.complex64
        assert torch.allclose(x, expected, atol=1e-4)
    assert torch.allclose(layer(y.real.contiguous(), prior).imag, layer(0 * y.real, prior).imag, atol=1e-4)
    valid = torch.nn.Conv2d(3, 1, 3)
    z = randn(3, 7, 7, dtype=torch.complex64)
    data = randn(1, 5, 5, dtype=torch.complex64)
    with torch.no_grad():
        x = lsconv.nn.RangeNull(valid)(data, z)
        found = lsconv.nn.PseudoInverse(valid)(data)
    V = lsconv.Conv2d.from_module(valid, (7, 7))
    shift = valid.bias.detach().view(1, 1, 1)
    assert torch.allclose(V(x), data - shift, atol=1e-4)
    assert torch.allclose(V(found), data - shift, atol=1e-4)


def test_complex_images_are_deconvolved_in_numpy_too() -> None:
    image, psf = Y[0, 0].numpy(), np.full((3, 3), 1 / 9)
    x = lsconv.deconvolve(image, psf, damp="gcv").x
    assert x.dtype == np.complex128
    assert np.abs(x.imag).max() > 0
    total = lsconv.deconvolve(image, psf, prior="tv", weight=0.1).x
    assert total.dtype == np.complex128


def test_no_message_advises_what_loses_data() -> None:
    single = A.to(torch.float32)
    with pytest.raises(lsconv.LsconvError, match=r"y: .*A\.to\(dtype=torch\.complex128\)"):
        lsconv.lstsq(single, Y)
    with pytest.raises(lsconv.LsconvError, match=r"y: .*A\.to\(dtype=torch\.float64\)"):
        lsconv.lstsq(single, Y.real)
    with pytest.raises(lsconv.LsconvError, match=r"y: .*y\.to\(dtype=torch\.float64\)"):
        lsconv.lstsq(A, Y.real.float())
    with pytest.raises(lsconv.LsconvError, match=r"x_prior: .*A\.to\(dtype=torch\.complex128\)"):
        lsconv.tikhonov(A, Y.real, 0.3, x_prior=Y[:, :1])
