"""Every method that ``lstsq`` can be asked for, against dense linear algebra, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lsconv
from lsconv.errors import ArgumentTypeError, MethodError
from lsconv.inverse.plans.krylov_choice import krylov_plan
from lsconv.inverse.route import METHODS
from lsconv.krylov.loop.solution import Status

KRYLOV = ("lsmr", "lsqr", "cgls", "craig", "cg", "minres", "gmres", "hybrid")
ACCURACY = {torch.float32: 2e-3, torch.float64: 1e-8, torch.complex128: 1e-8}


def system(hermitian: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A well-conditioned square matrix, positive definite where asked, and right-hand sides."""
    g = torch.Generator().manual_seed(3)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    root = torch.randn(9, 9, generator=g, dtype=wide)
    A = root @ root.mH / 9 + torch.eye(9) if hermitian else root / 9 + 2 * torch.eye(9)
    return A.to(dtype), torch.randn(3, 9, generator=g, dtype=wide).to(dtype)


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.dist(x.to(reference.dtype), reference) / reference.norm())


def test_all_krylov_methods_are_offered() -> None:
    assert set(METHODS) == {"auto", "matrix", "separable", "normal", "fourier", "border", "svd", *KRYLOV}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("method", [m for m in KRYLOV if m != "hybrid"])
def test_every_method_solves_a_positive_definite_system(method: str, dtype: torch.dtype) -> None:
    A, y = system(True, dtype)
    solution = lsconv.lstsq(A, y, method=method)
    double = torch.complex128 if dtype.is_complex else torch.float64
    assert solution.converged.all()
    assert distance(solution.x, torch.linalg.solve(A.to(double), y.to(double)[..., None])[..., 0]) < ACCURACY[dtype]


@pytest.mark.parametrize("method", ["lsmr", "lsqr", "cgls", "craig", "gmres"])
def test_methods_for_any_square_system_solve_one_that_is_not_symmetric(method: str) -> None:
    A, y = system(False)
    assert distance(lsconv.lstsq(A, y, method=method).x, torch.linalg.solve(A, y[..., None])[..., 0]) < 1e-8


def test_minres_solves_an_indefinite_convolution() -> None:
    A = lsconv.Conv1d(torch.tensor([[[1.0, 0.3, 1.0]]], dtype=torch.float64), in_size=7, padding=1)
    y = torch.arange(7.0, dtype=torch.float64)[None]
    dense = A.to_dense().reshape(7, 7)
    assert torch.linalg.eigvalsh(dense)[0] < 0 < torch.linalg.eigvalsh(dense)[-1]
    assert distance(lsconv.lstsq(A, y, method="minres").x[0], torch.linalg.solve(dense, y[0])) < 1e-8


@pytest.mark.parametrize("options", [{"rule": "gcv"}, {"rule": "discrepancy", "noise_std": 0.05}])
def test_hybrid_answers_the_damped_problem_of_the_damping_it_reports(options: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(20, 20, generator=g, dtype=torch.float64))[0]
    A = (q * torch.logspace(0, -5, 20, dtype=torch.float64)) @ q.mT
    y = A @ q[:, 0] + 0.05 * torch.randn(20, generator=g, dtype=torch.float64)
    solution = lsconv.lstsq(A, y, method="hybrid", **options)
    damp = float(solution.damp)
    dense = torch.linalg.solve(A.mT @ A + damp**2 * torch.eye(20), A.mT @ y)
    assert damp > 0
    assert distance(solution.x, dense) < 1e-4


@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_square_methods_refuse_what_they_cannot_serve_and_name_one_that_can(method: str) -> None:
    A, y = system(True)
    with pytest.raises(MethodError, match='damp > 0; use "lsmr" or "cgls"'):
        lsconv.lstsq(A, y, damp=0.1, method=method)
    with pytest.raises(MethodError, match=r'square A, got \(9,\) -> \(4,\); use "lsmr"'):
        lsconv.lstsq(A[:4], y[:, :4], method=method)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_symmetric_methods_refuse_an_operator_that_is_not(method: str) -> None:
    A, y = system(False)
    with pytest.raises(MethodError, match=r'A = A\^H, .* use "gmres" or "lsmr"'):
        lsconv.lstsq(A, y, method=method)


def test_cg_says_that_an_indefinite_system_is_one() -> None:
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    with pytest.warns(lsconv.ConvergenceWarning, match="definite"):
        solution = lsconv.lstsq(A, torch.ones(3, dtype=torch.float64), method="cg")
    assert solution.status is Status.NEGATIVE_CURVATURE


def test_hybrid_refuses_a_damping_and_preconditioners() -> None:
    A, y = system(True)
    with pytest.raises(MethodError, match=r'chooses the damping itself, .* use "lsqr"'):
        lsconv.lstsq(A, y, damp=0.1, method="hybrid")
    with pytest.raises(MethodError, match="takes none"):
        lsconv.lstsq(A, y, method="hybrid", preconditioner=lsconv.Identity((9,), dtype=torch.float64))
    with pytest.raises(MethodError, match='use lstsq, or "lsqr"'):
        lsconv.pinv(A, method="hybrid")


@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_square_methods_take_an_operator_as_their_preconditioner(method: str) -> None:
    d = torch.logspace(0, 3, 30, dtype=torch.float64)
    A, y = torch.diag(d) + 1e-2, torch.ones(30, dtype=torch.float64)
    jacobi = lsconv.Diagonal(1 / d)
    plain = lsconv.lstsq(A, y, method=method)
    helped = lsconv.lstsq(A, y, method=method, preconditioner=jacobi)
    assert helped.iterations < plain.iterations / 2
    assert distance(helped.x, torch.linalg.solve(A, y)) < 1e-6
    with pytest.raises(MethodError, match=f'serves "lsmr".*"{method}" has no use'):
        lsconv.lstsq(A, y, method=method, preconditioner="circulant")
    with pytest.raises(ArgumentTypeError, match="preconditioner: expected"):
        lsconv.lstsq(A, y, method=method, preconditioner="jacobi")


@pytest.mark.parametrize("method, option", [("cgls", "conlim"), ("cg", "restart"), ("hybrid", "x0"), ("lsmr", "rule")])
def test_an_option_that_the_method_lacks_is_named(method: str, option: str) -> None:
    A, y = system(True)
    with pytest.raises(MethodError, match=f'{option}: method "{method}" has no such option'):
        lsconv.lstsq(A, y, method=method, **{option: 1})


@pytest.mark.parametrize("method", ["cg", "minres", "gmres", "craig"])
def test_pinv_by_any_linear_method_has_its_adjoint(method: str) -> None:
    A, y = system(method in ("cg", "minres"))
    Ap = lsconv.pinv(A, method=method)
    inverse = torch.linalg.inv(A)
    assert distance(Ap(y), y @ inverse.mT) < 1e-8
    assert distance(Ap.H(y), y @ inverse.conj()) < 1e-8


def test_blurs_are_preconditioned_by_the_circulant_and_layers_are_not() -> None:
    blur = lsconv.Conv2d(torch.ones(2, 1, 3, 3), (12, 12), groups=2)
    layer = lsconv.Conv2d(torch.ones(2, 2, 3, 3), (12, 12))
    weights = lsconv.Diagonal(torch.ones(blur.out_shape))
    for A in (blur, 2 * blur.H, weights @ blur, lsconv.vstack([blur, blur])):
        assert krylov_plan(A, 2.0, "lsmr").N is not None or krylov_plan(A, 2.0, "lsmr").M is not None
    for A in (layer, 2 * layer.H, weights @ layer, lsconv.vstack([layer, layer])):
        assert krylov_plan(A, 2.0, "lsmr").N is None
        assert krylov_plan(A, 2.0, "lsmr").M is None
